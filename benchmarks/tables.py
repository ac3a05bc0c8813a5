"""Turns the JSON of measured rows into `RESULTS.md`.

In: a folder of results. Out: one Markdown page. Invariant: a verdict is computed from the numbers
beside it, never typed; accel rows that were not served compiled say so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_kernels import records_of, table
from calls import CALL_ROWS, CallRow
from gpu_rows import gpu_table
from measure import interval_text
from plots import write_plots
from programs import PROGRAM_ROWS

_UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))
COMMAND = "python benchmarks/bench.py"
GPUS = Path(__file__).parent / "gpus.md"  # what to say above their table
MISSED = Path(__file__).parent / "missed.md"  # written by hand: where time goes, what was tried


def write_results(folder: Path, page: Path) -> None:
    """Write the page for everything in `folder`."""
    records = {
        (record["row"], record["threads"]): record
        for record in (
            json.loads(path.read_text())
            for path in sorted(folder.glob("*.json"))
            if not path.name.startswith(("kernel-", "gpu-"))
        )
        if "row" in record
    }
    kernels = records_of(folder)
    known = [r["machine"] for r in (*records.values(), *kernels) if "machine" in r]
    lines = ["# Results", "", f"Command: `{COMMAND}` (one row: `--only tiny`).", ""]
    lines += sorted(set(map(_machine_line, known)))
    lines += [
        "",
        "Medians with 95% bootstrap intervals; competitors interleaved in one process;",
        "`x` columns are paired by round, above 1 means accel is faster.",
        "",
        "## Calls",
        "",
        "| what | threads | eager us | torch.compile us | accel us | x eager | x torch.compile "
        "| target | met |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in CALL_ROWS:
        lines += [
            _call_line(row, record, records)
            for (name, _), record in sorted(records.items())
            if name == row.name
        ]
    lines += [
        "",
        "## Programs",
        "",
        "| what | threads | measured | target |",
        "| --- | --- | --- | --- |",
    ]
    for program in PROGRAM_ROWS:
        for (name, threads), record in sorted(records.items()):
            if name == program.name:
                lines.append(
                    f"| {program.title} | {threads} | {_program_cell(record)} | {program.target} |"
                )
    if kernels:
        lines += ["", "## Kernels and models, beside every competitor", ""]
        plots = write_plots([r for r in kernels if "us" in r], folder)
        lines += [f"![{p.stem}]({p.relative_to(page.parent)})" for p in plots]
        lines += ["", table(folder)]
    lines += ["", MISSED.read_text().rstrip()]
    lines += ["", GPUS.read_text().rstrip(), "", gpu_table(folder)]
    page.write_text("\n".join(lines).rstrip() + "\n")


def _machine_line(machine: dict[str, Any]) -> str:
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores ({machine['capability']}); "
        f"Python {machine['python']}, torch {machine['torch']}; {machine['date']}."
    )


def _call_line(row: CallRow, record: dict[str, Any], records: dict[Any, Any]) -> str:
    start = f"| {row.title} | {record['threads']}"
    if "not_measured" in record:
        reason = record["not_measured"].replace("|", "/")
        return f"{start} | not measured: {reason} | | | | | {row.target} | |"
    times = [interval_text(record["us"].get(n), 2) for n in ("eager", "torch.compile", "accel")]
    speedup = record.get("speedup", {})
    ratios = [interval_text(speedup.get(n), 2) for n in ("eager", "torch.compile")]
    facts = record["facts"].get("accel", {})
    if facts and not facts["served_compiled"]:
        times[2] += " (**eager**: " + "; ".join(facts["reasons"])[:80] + ")"
    if facts and not facts.get("agrees", True):
        times[2] += " (**wrong result**)"
    verdict = _verdict(row, record, records)
    return " | ".join([start, *times, *ratios, row.target, verdict]) + " |"


def _verdict(row: CallRow, record: dict[str, Any], records: dict[Any, Any]) -> str:
    speedup, facts = record.get("speedup", {}), record["facts"].get("accel", {})
    checks: list[bool] = []
    if "accel" not in record["us"]:
        return ""
    us = record["us"]["accel"]["median"]
    baseline_us = 0.0
    if row.baseline is not None:
        baseline = records.get((row.baseline, record["threads"]), {}).get("us", {})
        if "accel" not in baseline:
            return f"needs {row.baseline}"
        baseline_us = baseline["accel"]["median"]
    if row.target_us is not None:
        checks.append(us - baseline_us <= row.target_us)
    if row.of_baseline is not None and "baseline" in speedup:
        # Raced beside it: its seconds over this row's.
        checks.append(speedup["baseline"]["median"] >= row.of_baseline)
    for name, least in (("eager", row.over_eager), ("torch.compile", row.over_compile)):
        if least is not None and name in speedup:
            # "Not slower" is judged by the interval, a factor by the median.
            value = speedup[name]["high" if least == 1.0 else "median"]
            checks.append(value >= least)
    if not checks:
        return ""
    return "yes" if all(checks) and facts.get("served_compiled") else "**no**"


def _program_cell(record: dict[str, Any]) -> str:
    if "not_measured" in record:
        return "not measured: " + record["not_measured"].replace("|", "/").replace("\n", " ")
    cells = [f"{name}: {_seconds(value)}" for name, value in record.get("s", {}).items()]
    cells += [
        f"{name}: {interval_text(value, 0)} MB" for name, value in record.get("mb", {}).items()
    ]
    cells += [
        f"**{name}: added {interval_text(value, 2)} s**"
        for name, value in record.get("added_s", {}).items()
    ]
    cells += [
        f"**{name}: {interval_text(value, 3)}x**" for name, value in record.get("ratio", {}).items()
    ]
    return "<br>".join(cells)


def _seconds(value: dict[str, float]) -> str:
    """An interval in the unit that suits it."""
    scale, unit = next(u for u in _UNITS if value["median"] * u[0] >= 0.1 or u is _UNITS[-1])
    return f"{interval_text({k: v * scale for k, v in value.items()}, 2)} {unit}"
