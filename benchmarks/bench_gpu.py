"""The numbers of a GPU, with one command: `python benchmarks/bench_gpu.py`.

In: which rows (`--only gelu-16M-bf16 tiny`; all without). Out: `results/gpu-<row>.json` for each, and the
tables of RESULTS.md. Invariant: only a GPU gives numbers. `--check` makes every row on whichever device there
is, small, and says whether competitors agree; it writes nothing.

Each row has a process of its own. Competitors are interleaved; times are a GPU's, between two events around a
block of calls, or the processor's (`tiny`: until a call has been enqueued; `first`: of a process
until its first result is there).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_rows import COLUMNS, COMPETITORS, GPU_ROWS, GpuRow
from measure import Competitor, Timer, bootstrap, race, ratio, wall_clock
from run_call import SEED, SETTLING_CALLS, WARM_CALLS, accel_present

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TIMEOUT_S = 1800  # max-autotune of a large model
ENQUEUED = 50  # calls between two waits, where enqueueing is timed
# Of the root of the mean square of eager's result: half types round at every kernel's end.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
SETTLING_STEPS = 17


class NotMeasured(Exception):
    """A row that cannot be measured, and why."""


# ---------------------------------------------------------------- clocks


def by_events(call: Callable[[], Any], count: int) -> float:
    """Seconds that the GPU was busy with `count` calls, or waited for the processor between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def by_enqueueing(call: Callable[[], Any], count: int) -> float:
    """Seconds of the processor until `count` calls were enqueued; the queue is never full."""
    total, left = 0.0, count
    while left > 0:
        torch.cuda.synchronize()
        total += wall_clock(call, min(left, ENQUEUED))
        left -= ENQUEUED
    torch.cuda.synchronize()
    return total


CLOCKS: dict[str, Timer] = {"events": by_events, "enqueue": by_enqueueing}


# ---------------------------------------------------------------- competitors


@contextlib.contextmanager
def made_on(device: str) -> Iterator[None]:
    """Modules and tensors are made there, of the same random numbers each time."""
    torch.manual_seed(SEED)
    with torch.device(device):
        yield


def callable_of(row: GpuRow, device: str, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    """What is timed, with `wrap` around the function or module that a user would wrap."""
    with made_on(device):
        made = row.make()
    if row.trains:
        model, step = made
        return functools.partial(step, wrap(model))
    call: Callable[[], Any] = made.bind(wrap(made.target))
    return call


def compiled(mode: str | None) -> Callable[[Any], Any]:
    return functools.partial(torch.compile, mode=mode)


def copied(row: GpuRow, device: str) -> Competitor:
    """Moves as many bytes as the row's kernel reads and writes at least, half of them each way."""
    with made_on(device):
        made = row.make()
    out = made.bind(made.target)()
    tensors = [*made.args, *(out if isinstance(out, tuple) else (out,))]
    size = sum(t.numel() * t.element_size() for t in tensors)
    source, target = (torch.zeros(size // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return Competitor("copy", functools.partial(target.copy_, source), answers=False)


def settled(
    row: GpuRow, call: Callable[[], Any], between: Callable[[], Any] = lambda: None
) -> list[Any]:
    """What the calls answered until nothing is compiled any more: of training each loss, else the last."""
    results: list[Any] = []
    for _ in range(SETTLING_STEPS if row.trains else SETTLING_CALLS):
        if not row.trains:
            results.clear()
        results.append(call())
        between()
    return results


def with_accel(row: GpuRow, device: str) -> tuple[Competitor, list[Any], dict[str, Any]]:
    import accel
    from accel import driver

    call = callable_of(row, device, accel.optimize)
    with accel_present():
        results = settled(row, call, lambda: accel.wait(600))
        served = 0
        for _ in range(WARM_CALLS):
            before = accel.counters()
            call()
            after = accel.counters()
            names = ("calls_compiled", "segments_served")
            served += any(after[name] > before[name] for name in names)
    facts: dict[str, Any] = {"served_compiled": served == WARM_CALLS}
    if not facts["served_compiled"]:
        facts["reasons"] = [r.reason for r in driver.current.roots if r.reason]
    return Competitor("accel", call, accel_present), results, facts


def competitors_of(
    row: GpuRow, device: str, names: tuple[str, ...]
) -> tuple[list[Competitor], dict[str, Any]]:
    """Settled competitors, and whether they agree with the first; accel last: it must not exist while
    others compile."""
    found: list[Competitor] = []
    facts: dict[str, Any] = {}
    results: dict[str, list[Any]] = {}
    plain = {"eager": lambda target: target, "torch.compile": compiled(None)}
    for name, wrap in (plain | {"max-autotune": compiled("max-autotune")}).items():
        if name in names:
            torch._dynamo.reset()
            call = callable_of(row, device, wrap)
            results[name], facts[name] = settled(row, call), {}
            found.append(Competitor(name, call))
    if "copy" in names and row.group == "kernels":
        found.append(copied(row, device))
    if "accel" in names:
        competitor, results["accel"], facts["accel"] = with_accel(row, device)
        found.append(competitor)
    expected = next(iter(results.values()))
    for name, got in results.items():
        facts[name]["agrees"] = close(expected, got, TOLERANCE[row.dtype])
    return found, facts


# ---------------------------------------------------------------- results


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_of(v)]
    return []


def close(expected: Any, got: Any, tolerance: float) -> bool:
    """Whether each tensor's error is small beside the tensor (both roots of mean squares)."""
    pairs = list(zip(tensors_of(expected), tensors_of(got), strict=True))
    return all(
        (e.double() - g.double()).square().mean().sqrt()
        <= tolerance * e.double().square().mean().sqrt() + 1e-6
        for e, g in pairs
    )


def measure(row: GpuRow, device: str, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Race the competitors on one row; without rounds, only compare them."""
    gradients = contextlib.nullcontext() if row.trains else torch.no_grad()
    with gradients:
        found, facts = competitors_of(row, device, names)
        if not rounds:
            return {"facts": facts}
        race(found, rounds, timer=CLOCKS[row.clock])
    return _record({c.name: c.seconds for c in found}, facts, rounds)


def first_result(names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Processes that make BERT and call it once; their own seconds from the call to its result."""
    seconds: dict[str, list[float]] = {n: [] for n in ("eager", "accel") if n in names}
    script = str(HERE / "scripts" / "first_result_on_gpu.py")
    for _ in range(rounds):
        for name, values in seconds.items():
            command = [sys.executable, script, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotMeasured(done.stderr.strip().splitlines()[-1])
            values.append(float(done.stdout.splitlines()[-1]))
    return _record(seconds, {}, rounds)


def _record(seconds: dict[str, list[float]], facts: dict[str, Any], rounds: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "us": {n: bootstrap([s * 1e6 for s in v]).to_json() for n, v in seconds.items()},
        "facts": facts,
        "rounds": rounds,
    }
    if "accel" in seconds:
        others = {n: v for n, v in seconds.items() if n != "accel"}
        record["speedup"] = {n: ratio(v, seconds["accel"]).to_json() for n, v in others.items()}
    return record


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import triton

    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "memory_gib": round(facts.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


# ---------------------------------------------------------------- running


def smaller(row: GpuRow) -> GpuRow:
    """The row with few rows, for a look at whether it runs."""
    if row.group != "kernels":
        return row
    assert isinstance(row.make, functools.partial)
    made = functools.partial(row.make.func, 8, *row.make.args[1:])
    return GpuRow(row.name, row.group, made, row.rounds, row.dtype)


def check(names: list[str], device: str) -> bool:
    """Whether eager and accel agree on each row, and accel serves it; printed."""
    good = True
    for name in names:
        if GPU_ROWS[name].clock == "processes":
            continue
        row = smaller(GPU_ROWS[name])
        facts = measure(row, device, ("eager", "accel"), 0)["facts"]["accel"]
        print(f"{name} ({COLUMNS} columns): {json.dumps(facts)}", flush=True)
        good = good and facts["agrees"] and facts["served_compiled"]
    return good


def measure_here(name: str, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """One row, in this process."""
    row = GPU_ROWS[name]
    rounds = rounds or row.rounds
    if row.clock == "processes":
        return first_result(names, rounds)
    return measure(row, "cuda", names, rounds)


def _alone(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, in a process of its own. Errors: NotMeasured."""
    command = [sys.executable, __file__, "--here", "--only", name]
    command += ["--rounds", str(arguments.rounds), "--competitors", *arguments.competitors]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as expired:
        raise NotMeasured(f"not done after {TIMEOUT_S} s") from expired
    if done.returncode:
        raise NotMeasured((done.stderr.strip() or "it crashed").splitlines()[-1])
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(GPU_ROWS), default=list(GPU_ROWS), metavar="ROW")  # fmt: skip
    parser.add_argument("--competitors", nargs="+", choices=COMPETITORS, default=list(COMPETITORS))
    parser.add_argument("--rounds", type=int, default=0, help="0: as many as the row says")
    parser.add_argument("--check", action="store_true", help="measure nothing, on any device")
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON")
    arguments = parser.parse_args()
    there = torch.cuda.is_available()
    if arguments.check:
        return 0 if check(arguments.only, "cuda" if there else "cpu") else 1
    if not there:
        print("bench_gpu: no NVIDIA GPU that torch can use (torch.cuda.is_available() is False); nothing was "
              "measured. `--check` runs every row small on the processor.", file=sys.stderr)  # fmt: skip
        return 2
    if arguments.here:
        (name,) = arguments.only
        print(json.dumps(measure_here(name, tuple(arguments.competitors), arguments.rounds)))
        return 0
    for name in arguments.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        row = GPU_ROWS[name]
        record: dict[str, Any] = {"row": name, "group": row.group, "machine": machine()}
        try:
            record |= _alone(name, arguments)
        except NotMeasured as reason:
            record["not_measured"] = str(reason)
            print(f"  not measured: {reason}", file=sys.stderr)
        (RESULTS / f"gpu-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    from tables import write_results  # draws plots, with a library that tests do without

    write_results(RESULTS, HERE / "RESULTS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
