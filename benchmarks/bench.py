"""All the numbers, with one command: `python benchmarks/bench.py`.

In: which rows (`--only tiny mlp50`), how many threads. Out: `results/<row>-<threads>.json` for each
row measured, and the table of everything measured so far in `RESULTS.md`. Invariant: a row that
could not be measured says so in the table, with the reason.
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

from calls import CALL_ROWS, CallRow
from programs import PROGRAM_ROWS, NotMeasured, ProgramRow
from tables import write_results

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROW_TIMEOUT_S = 900


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


def measure_call(row: CallRow, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of calls.py, in a process of its own."""
    command = [sys.executable, str(HERE / "run_call.py"), row.name, "--threads", str(threads)]
    if arguments.rounds:
        command += ["--rounds", str(arguments.rounds)]
    if arguments.competitors:
        command += ["--competitors", *arguments.competitors]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=ROW_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        raise NotMeasured(f"not done after {ROW_TIMEOUT_S} s") from expired
    if done.returncode:
        raise NotMeasured(done.stderr.strip().splitlines()[-1] if done.stderr else "it crashed")
    return json.loads(done.stdout.splitlines()[-1])


def measure_program(row: ProgramRow, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of programs.py."""
    return row.measure(arguments.rounds or row.repeats, threads)


def main() -> None:
    rows: dict[str, CallRow | ProgramRow] = {r.name: r for r in (*CALL_ROWS, *PROGRAM_ROWS)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(rows), default=list(rows))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=0, help="0: as many as the row says")
    parser.add_argument("--competitors", nargs="+", help="of eager, torch.compile, accel")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.only:
        row = rows[name]
        for threads in arguments.threads:
            print(f"{name}, {threads} thread(s) ...", file=sys.stderr, flush=True)
            record: dict[str, Any] = {"row": name, "threads": threads, "machine": machine()}
            try:
                if isinstance(row, CallRow):
                    record |= measure_call(row, threads, arguments)
                else:
                    record |= measure_program(row, threads, arguments)
            except NotMeasured as reason:
                record["not_measured"] = str(reason)
                print(f"  not measured: {reason}", file=sys.stderr)
            path = RESULTS / f"{name}-{threads}.json"
            path.write_text(json.dumps(record, indent=1) + "\n")
    write_results(RESULTS, HERE / "RESULTS.md")
    print((HERE / "RESULTS.md").read_text())


if __name__ == "__main__":
    main()
