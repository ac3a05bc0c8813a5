"""Compiled graphs from a dump, run again and timed step by step: `accel bench kernel FOLDER`.

In: what `--dump-dir` wrote for a graph: its plan and its kernels' text. Out: nanoseconds of each step, in
its place and alone. The kernels are compiled from the dumped text, so a text that was edited is what is timed.
Invariant: inputs are made up from their layouts; no program is run.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accel.errors import AccelError, CompileError

PLAN, TEXT = "plan.json", "kernels.cpp"
ALONE = 5  # runs of a step that follow each other; the first of them is not counted


class ReplayError(AccelError):
    """The folder holds nothing that can be run again."""


@dataclass
class StepTime:
    """Median times of the steps that do the same: one kernel, or one operation on one layout."""

    name: str
    layout: str
    count: int
    bytes: int  # read or written, at least, by one of them
    in_place_ns: float
    # None for an operation, which may allocate, and for what works on its result.
    alone_ns: float | None


@dataclass
class Replay:
    """`whole_ns` is the run, `steps` what it consists of, the longest first."""

    folder: str
    threads: int
    rounds: int
    whole_ns: float
    steps: list[StepTime] = field(default_factory=list)


def folders(root: Path) -> list[Path]:
    """The dumped graphs below a folder. Errors: ReplayError."""
    found = sorted(p.parent for p in root.rglob(PLAN)) if root.is_dir() else []
    if not found:
        raise ReplayError(
            f"{root} holds no dumped graph; `accel run --dump-dir {root} PROGRAM` makes some"
        )
    return found


def replay(folder: Path, rounds: int, only: str = "") -> Replay:
    """Times a dumped graph on torch's threads; with `only`, the steps of that kernel or operation.

    Errors: ReplayError.
    """
    try:
        return _replay(folder, rounds, only)
    except ReplayError:
        raise
    except CompileError as error:
        raise ReplayError(f"{folder / TEXT} cannot be compiled: {error}") from error
    except OSError as error:
        raise ReplayError(f"{folder}: {error}") from error
    except UnicodeDecodeError as error:
        raise ReplayError(f"{folder / TEXT} is not text: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # A plan that somebody changed, or that does not fit its text.
        raise ReplayError(f"{folder / PLAN} is not a plan for {TEXT}: {error!r}") from error


def _replay(folder: Path, rounds: int, only: str) -> Replay:
    from accel import runtime
    from accel.codegen import build
    from accel.codegen.options import CodegenOptions

    if not runtime.available:
        raise ReplayError(f"nothing can be run: {runtime.reason}")
    try:
        plan = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise ReplayError(f"{folder / PLAN} is not a plan: {error}") from error
    if plan.get("device"):
        raise ReplayError(f"{folder}: a plan for {plan['device']}; only the processor's are timed")
    if "sizes" in plan:
        raise ReplayError(f"{folder}: a graph for several sizes; only those for one are timed")
    steps = [*plan["steps"], *plan["commit"]]
    names = [_name(s) for s in steps]
    if only and only not in names:
        raise ReplayError(
            f"{folder}: no step is called {only!r}; there are {', '.join(dict.fromkeys(names))}"
        )
    again = [i for i, s in enumerate(steps) if s["op"] == "kernel" and only in ("", names[i])]
    with tempfile.TemporaryDirectory() as scratch:
        library = None
        if any(s["op"] == "kernel" for s in steps):
            name = build.build([(folder / TEXT).read_text()], Path(scratch), CodegenOptions())
            library = os.path.join(scratch, name)
        executor = runtime.native.Executor(plan, library)
        inputs = [_made_up(row) for row in plan["inputs"]]
        try:
            executor.run(inputs)
        except runtime.native.ExecutorError as error:
            raise ReplayError(f"{folder}: made-up inputs do not suit it: {error}") from error
        in_place = [executor.profile(inputs) for _ in range(rounds)]
        alone = _alone(runtime.native.Executor, plan, library, inputs, again, rounds)
    return _summary(folder, plan, steps, in_place, alone, only)


def _alone(
    executor: Any, plan: dict[str, Any], library: Any, inputs: Any, again: list[int], rounds: int
) -> dict[int, float]:
    """Nanoseconds of kernels that run several times in a row, behind all the others."""
    steps = plan["steps"]
    fit = [i for i in again if i < len(steps) and not _is_dynamic(plan, steps[i])]
    repeated = [steps[i] for i in fit for _ in range(ALONE)]
    longer = executor({**plan, "steps": [*steps, *repeated], "commit": []}, library)
    runs = [longer.profile(inputs)[len(steps) :] for _ in range(max(rounds // 4, 3))]
    found = {}
    for at, i in enumerate(fit):
        times = [t for run in runs for t in run[at * ALONE + 1 : (at + 1) * ALONE]]
        found[i] = statistics.median(times)
    return found


def _is_dynamic(plan: dict[str, Any], step: dict[str, Any]) -> bool:
    """Whether an operation made, and a later step freed, what the kernel works on."""

    def made(buffer: int) -> bool:
        row = plan["buffers"][buffer]
        return row["kind"] == "dynamic" or (row["kind"] == "view" and made(row["base"]))

    return any(map(made, step["buffers"]))


def _summary(
    folder: Path, plan: dict[str, Any], steps: list[Any], in_place: list[Any], alone: Any, only: str
) -> Replay:
    groups: dict[tuple[str, str], list[int]] = {}
    for i, step in enumerate(steps):
        if step["op"] != "free" and only in ("", _name(step)):
            groups.setdefault((_name(step), _layout(plan, step)), []).append(i)
    result = Replay(
        str(folder), torch.get_num_threads(), len(in_place), statistics.median(map(sum, in_place))
    )
    for (name, layout), members in groups.items():
        medians = [statistics.median(r[i] for r in in_place) for i in members]
        repeated = [alone[i] for i in members if i in alone]
        result.steps.append(
            StepTime(
                name, layout, len(members), _bytes(plan, steps[members[0]]), sum(medians),
                sum(repeated) if len(repeated) == len(members) else None,
            )
        )  # fmt: skip
    result.steps.sort(key=lambda s: -s.in_place_ns)
    return result


def _name(step: dict[str, Any]) -> str:
    return str(step.get("symbol") or step.get("target") or step["op"])


def _tensors(plan: dict[str, Any], step: dict[str, Any]) -> list[dict[str, Any]]:
    """The layouts of the tensors that a step works on, each once."""
    if step["op"] == "kernel":
        ids = step["buffers"]
    else:
        arguments = [*step.get("args", ()), *step.get("kwargs", {}).values()]
        ids = [a["b"] for a in arguments if "b" in a] + [
            r for r in step.get("results", ()) if r is not None
        ]
    rows = (plan["buffers"][i] for i in dict.fromkeys(ids))
    rows_of_inputs = (plan["inputs"][r["index"]] if r["kind"] == "input" else r for r in rows)
    return [r for r in rows_of_inputs if "sizes" in r]


def _layout(plan: dict[str, Any], step: dict[str, Any]) -> str:
    sizes = [r["sizes"] for r in _tensors(plan, step)]
    return " ".join("x".join(map(str, s)) or "1" for s in sizes)


def _bytes(plan: dict[str, Any], step: dict[str, Any]) -> int:
    return sum(_numel(r) * getattr(torch, r["dtype"]).itemsize for r in _tensors(plan, step))


def _numel(row: dict[str, Any]) -> int:
    """Numbers in memory: an expanded dimension is one."""
    count = 1
    for size, stride in zip(row["sizes"], row["strides"], strict=True):
        count *= size if stride or not size else 1
    return count


def _made_up(row: dict[str, Any]) -> torch.Tensor:
    """A tensor of this layout: small random numbers, zeros where they may be positions."""
    dtype, sizes, strides = getattr(torch, row["dtype"]), row["sizes"], row["strides"]
    span = (
        1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) if 0 not in sizes else 0
    )
    memory = torch.full((span,), dtype == torch.bool, dtype=dtype)
    if dtype.is_floating_point:
        memory = (torch.rand(span) * 0.1 + 0.01).to(dtype)
    return memory.as_strided(sizes, strides)


# ------------------------------------------------------------------------------- in words


def table(result: Replay, most: int) -> str:
    """What a person reads."""
    head = f"{result.folder}: {_us(result.whole_ns)} us, {result.threads} thread(s), medians of {result.rounds}"
    rows = [("step", "times", "us", "%", "alone us", "GB/s", "tensors")]
    for s in result.steps[:most]:
        share = f"{100 * s.in_place_ns / max(result.whole_ns, 1):.1f}"
        alone = "" if s.alone_ns is None else _us(s.alone_ns)
        speed = f"{s.bytes * s.count / max(s.in_place_ns, 1):.1f}"
        rows.append((s.name, str(s.count), _us(s.in_place_ns), share, alone, speed, s.layout[:60]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, len(widths) - 1}
    lines = [
        "  ".join(f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]  # fmt: skip
    if len(result.steps) > most:
        lines.append(
            f"... and {len(result.steps) - most} more; --rows {len(result.steps)} shows all"
        )
    return "\n".join([head, *(line.rstrip() for line in lines)])


def _us(ns: float) -> str:
    return f"{ns / 1e3:.1f}"
