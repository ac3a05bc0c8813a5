"""A model's first result on a GPU from a cold start: `first_result_on_gpu.py HOW`, HOW eager or accel.

Prints the seconds from the call to its result. The GPU has been used before: that start is torch's.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import BertConfig, BertModel

if sys.argv[1] == "accel":
    import accel


def main() -> None:
    with torch.device("cuda"), torch.no_grad():
        model = BertModel(BertConfig()).eval().half()
        tokens = torch.randint(0, 30000, (1, 128))
        torch.randn(64, 64).half() @ torch.randn(64, 64).half()
    call = accel.optimize(model) if sys.argv[1] == "accel" else model
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.no_grad():
        call(tokens)
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
