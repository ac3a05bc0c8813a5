"""Training steps of BERT-base under one way of running them; prints JSON.

`ready_s`: from the first step on, until a step whose forward and backward were compiled has ended;
`peak_mb`: the process's peak resident memory after 4 more steps.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

LIMIT_S = 240


def main() -> None:
    way = sys.argv[1]
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).train()
    tokens, labels = torch.randint(0, 30000, (4, 64)), torch.randint(0, 2, (4,))
    optimizer = torch.optim.AdamW(model.parameters())
    called: Any = model

    def step() -> None:
        called(tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def is_ready() -> bool:
        return True

    start = time.perf_counter()
    if way == "torch.compile":
        called = torch.compile(model)
    elif way == "accel":
        import accel

        called = accel.optimize(model)

        def is_ready() -> bool:
            return bool(accel.counters()["backwards_compiled"])

    step()
    while not is_ready() and time.perf_counter() - start < LIMIT_S:
        step()
    ready_s = time.perf_counter() - start if is_ready() else None
    for _ in range(4):
        step()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    json.dump({"ready_s": ready_s, "peak_mb": peak_mb}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
