"""A tiny function from a cold start: `tiny_from_cold.py HOW THREADS`, HOW as in bert_from_cold.py.

Prints JSON: `first_call_s`, and `served_after_s`, from the first call to the end of the first one that
compiled code served.
"""

from __future__ import annotations

import json
import sys
import time

import torch

if sys.argv[1] == "accel":
    import accel

LIMIT_S = 60


def three_pointwise(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.relu(x * y + 1.0)


def main() -> None:
    how, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    call = three_pointwise
    if how == "accel":
        call = accel.optimize(three_pointwise)
    elif how == "torch.compile":
        call = torch.compile(three_pointwise)
    with torch.no_grad():
        start = time.perf_counter()
        call(x, y)
        first_s = time.perf_counter() - start
        while how == "accel" and accel.counters()["calls_compiled"] == 0:
            if time.perf_counter() - start > LIMIT_S:
                raise SystemExit("never served compiled")
            time.sleep(0.001)  # as a program that does something else between the calls
            call(x, y)
    served_s = time.perf_counter() - start
    print(json.dumps({"first_call_s": first_s, "served_after_s": served_s}))


if __name__ == "__main__":
    main()
