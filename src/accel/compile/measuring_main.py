"""The measuring process's program: plans from a pipe, how long they take to another.

In: as its argument, where accel and torch are; then a line for each job, {"gpu": name, "runs": [{"plan",
"library"}, ...]}: plans that do the same. Out: a line for each, {"seconds": [...]} or {"error"}.
Invariant: nothing of the user's is imported, the GPU is used here only; when the pipe closes, or nothing
has come for a while, this process ends.

Run as a file, before `accel` can be imported: only the standard library up here.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_IDLE_S = 30.0  # a context on a GPU takes memory
_ROUNDS, _WARM = 15, 3
_FLUSHED_BYTES = 256 << 20  # more than any second-level cache: weights come from memory
_SPARE_BYTES = 1 << 30  # that the program may want while this runs


def main() -> None:
    greeting = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path += [entry for entry in greeting["path"] if entry not in sys.path]
    load = runpy.run_path(str(Path(__file__).with_name("worker_main.py")))["load_packages"]
    load({"accel": greeting["packages"]["accel"]})
    from accel.compile import prefork

    prefork.disarm()
    load({"torch": greeting["packages"]["torch"]})
    while select.select([sys.stdin], [], [], _IDLE_S)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        try:
            answer: dict[str, Any] = {"seconds": measure(json.loads(line))}
        except Exception as error:  # whatever it is: nothing was measured
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


def measure(job: dict[str, Any]) -> list[float]:
    """Medians of interleaved runs. Errors: any, where a plan does not run here."""
    import torch

    from accel import runtime

    plan = job["runs"][0]["plan"]
    device = torch.device(plan.get("device", "cpu"))
    if device.type == "cuda":
        _check_gpu(device, job["gpu"], plan)
    inputs = [_made_up(row, device) for row in plan["inputs"]]
    executors = [runtime.native.Executor(run["plan"], run["library"]) for run in job["runs"]]
    # While this is written, runs are queued up behind it: what is timed is the GPU's work.
    flushed = torch.empty(
        _FLUSHED_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device
    )
    times: list[list[float]] = [[] for _ in executors]
    with torch.no_grad():
        for number in range(_WARM + _ROUNDS):
            for executor, found in zip(executors, times, strict=True):
                flushed.zero_()
                seconds = _seconds(device, executor, inputs)
                if number >= _WARM:
                    found.append(seconds)
    return [statistics.median(found) for found in times]


def _check_gpu(device: Any, name: str, plan: dict[str, Any]) -> None:
    import torch

    if torch.cuda.get_device_name(device) != name:
        raise RuntimeError(f"{device} is a {torch.cuda.get_device_name(device)} here")
    free, _ = torch.cuda.mem_get_info(device)
    wanted = sum(_bytes_of(b) for b in plan["buffers"]) + plan["arena_bytes"]
    if free < 2 * wanted + _FLUSHED_BYTES + _SPARE_BYTES:
        raise RuntimeError(f"{device} has too little memory left")


def _bytes_of(row: dict[str, Any]) -> int:
    import torch

    if row["kind"] not in ("input", "output") or "sizes" not in row:
        return 0
    count = 1
    for n in row["sizes"]:
        count *= n
    return count * int(getattr(torch, row["dtype"]).itemsize)


def _made_up(row: dict[str, Any], device: Any) -> Any:
    """Numbers like a model's; zeros as indices."""
    import torch

    dtype = getattr(torch, row["dtype"])
    made = torch.empty_strided(row["sizes"], row["strides"], dtype=dtype, device=device)
    return made.normal_(std=0.25) if dtype.is_floating_point else made.zero_()


def _seconds(device: Any, executor: Any, inputs: list[Any]) -> float:
    import torch

    if device.type != "cuda":
        return _timed(lambda: executor.run(inputs))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    executor.run(inputs)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
