"""How much memory BERT-base needs in a process of its own: `peak_memory.py HOW THREADS`.

HOW is `eager`, `torch.compile`, `freezing` or `accel`. Prints JSON, in MB: `process`, the most that the
process ever held; `calls`, the most during settled calls; `resting`, what it holds between them.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

SETTLING, CALLS = 15, 5


def resident_mb() -> dict[str, float]:
    """What the process holds now (`VmRSS`), and the most since it was last reset (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


def main() -> None:
    how, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    tokens = torch.randint(0, 30000, (1, 128))
    call = model
    if how == "accel":
        import accel

        call = accel.optimize(model)
    elif how != "eager":
        import torch._inductor.config as inductor

        inductor.freezing = how == "freezing"
        call = torch.compile(model)
    with torch.no_grad():
        for _ in range(SETTLING):
            call(tokens)
            if how == "accel":
                accel.wait(120)
        resting = resident_mb()["VmRSS"]
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        for _ in range(CALLS):
            call(tokens)
        calls = resident_mb()["VmHWM"]
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"process": process, "calls": calls, "resting": resting}))


if __name__ == "__main__":
    main()
