"""All the numbers, with one command: `python benchmarks/bench.py`.

In: which rows (`--only tiny mlp50 gelu-16M`), how many threads. Out: `results/<row>-<threads>.json` for
each row measured, the tables of everything measured so far in `RESULTS.md`, and its plots. Invariant: a row
that could not be measured says so in the table, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_kernels import COMPETITORS, ROWS, record_path
from calls import CALL_ROWS, CallRow
from programs import PROGRAM_ROWS, NotMeasured, ProgramRow
from tables import write_results

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROW_TIMEOUT_S = 900
KERNEL_TIMEOUT_S = 2400  # several compilations by torch.compile


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def _alone(script: str, words: list[str], threads: int, timeout_s: int) -> str:
    """What a script of this folder prints, run for one row. Errors: NotMeasured."""
    command = [sys.executable, str(HERE / script), *words, "--threads", str(threads)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as expired:
        raise NotMeasured(f"not done after {timeout_s} s") from expired
    if done.returncode:
        raise NotMeasured(done.stderr.strip().splitlines()[-1] if done.stderr else "it crashed")
    return done.stdout


def measure_call(row: CallRow, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of calls.py, in a process of its own."""
    words = [row.name]
    if arguments.rounds:
        words += ["--rounds", str(arguments.rounds)]
    if arguments.competitors:
        words += ["--competitors", *arguments.competitors]
    return json.loads(_alone("run_call.py", words, threads, ROW_TIMEOUT_S).splitlines()[-1])


def measure_kernel(name: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of bench_kernels.py, in a process of its own."""
    words = ["--here", "--only", name, "--folder", str(RESULTS), "--rounds", str(arguments.rounds)]
    words += ["--competitors", *(arguments.competitors or COMPETITORS)]
    _alone("bench_kernels.py", words, threads, KERNEL_TIMEOUT_S)
    return json.loads(record_path(RESULTS, name, threads).read_text())


def measure_program(row: ProgramRow, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of programs.py."""
    return row.measure(arguments.rounds or row.repeats, threads)


def _kernel_name(name: str, others: dict[str, Any]) -> str:
    """Models are rows of both kinds: there beside eager, here beside all competitors."""
    return f"kernel-{name}" if name in others else name


def main() -> None:
    rows: dict[str, CallRow | ProgramRow] = {r.name: r for r in (*CALL_ROWS, *PROGRAM_ROWS)}
    kernels = {_kernel_name(name, rows): row for name, row in ROWS.items()}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*rows, *kernels], default=[*rows, *kernels], metavar="ROW")  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=0, help="0: as many as the row says")
    parser.add_argument("--competitors", nargs="+", help="of eager, torch.compile, accel")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.only:
        row = rows.get(name)
        for threads in arguments.threads:
            print(f"{name}, {threads} thread(s) ...", file=sys.stderr, flush=True)
            record: dict[str, Any] = {"row": name, "threads": threads, "machine": machine()}
            try:
                if row is None:
                    record |= measure_kernel(kernels[name].name, threads, arguments)
                elif isinstance(row, CallRow):
                    record |= measure_call(row, threads, arguments)
                else:
                    record |= measure_program(row, threads, arguments)
            except NotMeasured as reason:
                record["not_measured"] = str(reason)
                print(f"  not measured: {reason}", file=sys.stderr)
            path = RESULTS / f"{name}-{threads}.json"
            if row is None:
                record["row"] = kernels[name].name
                path = record_path(RESULTS, kernels[name].name, threads)
            path.write_text(json.dumps(record, indent=1) + "\n")
    write_results(RESULTS, HERE / "RESULTS.md")
    print((HERE / "RESULTS.md").read_text())


if __name__ == "__main__":
    main()
