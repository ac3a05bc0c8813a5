"""Explanations: what accel made of a program or of one call, for people.

In: roots, or a function and the arguments of one call. Out: an `Explanation` with graphs, guards
and breaks; the `Summary` at a program's exit. Invariant: an explained call is made exactly once.
"""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.casts import DEVICES, Autocast, by_operation
from accel.errors import hint_for, reason_text
from accel.guards import Guard
from accel.report import RootLine, Summary, short_place
from accel.roots import STATES, Root
from accel.sources import Source, source_text


@dataclass
class RootReport:
    """One root, as the driver knows it now; `guards` are those of the newest variant."""

    name: str
    location: str
    state: str
    reason: str
    reason_location: str
    graphs: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    machinery_guards: int = 0
    history: list[str] = field(default_factory=list)
    calls: int = 0
    hits: int = 0
    split_calls: int = 0  # that were split at breaks
    segments_served: int = 0  # in these
    breaks: list[str] = field(default_factory=list)

    @staticmethod
    def of(root: Root) -> RootReport:
        report = RootReport(root.name, root.location, root.state, root.reason, root.reason_location)
        report.calls = root.entry.calls
        report.history = list(root.history)
        report.hits = root.hits
        if root.split is not None:
            report.breaks = list(root.split.reasons.values())
            report.segments_served, _, _, report.split_calls, _ = root.split.totals(root)
        for installed in [v for part in _parts(root) for v in part.variants]:
            graph = installed.recording.graph
            if graph is not None:
                report.graphs.append(graph_text(graph, installed.recording.inputs))
            if not report.guards and installed.recording.guards is not None:
                guards = installed.recording.guards.all()
                shown = [g for g in guards if not is_machinery(g)]
                report.guards = [guard_text(g) for g in shown]
                report.machinery_guards = len(guards) - len(shown)
        return report

    def __str__(self) -> str:
        place = short_place(self.location)
        lines = [f"{self.name} ({place}): {self.state}: {STATES.get(self.state, '')}"]
        if self.state == "split":
            lines.append(
                f"  {self.split_calls:,} of {self.calls:,} calls were split at graph breaks; "
                f"compiled segments ran {self.segments_served:,} times in them"
            )
        else:
            lines.append(f"  {self.hits:,} of {self.calls:,} calls ran compiled")
        if self.reason:
            lines.append(_break_line(self.reason, self.reason_location))
        for text in self.breaks[1:]:
            located = _LOCATED.fullmatch(text)
            lines.append(_break_line(*located.groups()) if located else _break_line(text, ""))
        if self.state == "split" and not self.graphs:
            lines.append("  what lies between is recorded in the next calls: explain one of those")
        earlier = Counter(text for text in self.history if not text.startswith(self.reason or "\0"))
        for text, times in earlier.items():
            lines.append(f"  earlier: {text}" + (f", {times} times" if times > 1 else ""))
        for text, number in _numbered(self.graphs):
            lines += [f"  graph{number}:", *(f"    {line}" for line in text.splitlines())]
        if self.guards:
            lines.append("  guards; a call for which one does not hold runs as Python:")
            lines += [f"    {guard}" for guard in self.guards]
        if self.machinery_guards:
            lines.append(f"    and {self.machinery_guards} on hooks and torch.nn's own functions")
        return "\n".join(lines)


def _numbered(graphs: list[str]) -> list[tuple[str, str]]:
    """Each different graph once, with what its heading says besides."""
    counts = Counter(graphs)
    many = len(counts) > 1
    return [
        (text, (f" {i}" if many else "") + (f" ({n} variants)" if n > 1 else ""))
        for i, (text, n) in enumerate(counts.items(), 1)
    ]


def summary(driver: Any) -> Summary:
    """What happened to the roots that were ever recorded, the busiest first."""
    lines = []
    for root in driver.roots:
        if not root.recordings or root.state == "plain":
            continue
        if root.state == "cold" and root.reason == reason_text("no_operations"):
            continue  # not worth a word
        hits = root.hits
        split_calls = root.split.totals(root)[3] if root.split is not None else 0
        line = RootLine(
            root.name,
            root.location,
            root.state,
            root.reason,
            root.reason_location,
            len(root.variants),
            hits,
            max(root.entry.calls - hits - split_calls, 0),
            hint=hint_for(root.reason),
            is_break=root.state in ("blacklisted", "split"),
        )
        lines.append(line)
    lines.sort(key=lambda r: -(r.calls_compiled + r.calls_eager))
    return Summary(driver.read_counters(), lines)


# ------------------------------------------------------------------------------- guards

# What holds while a guard of this kind holds: a row for each row of accel.guards.CHECKS.
HOLDS: dict[str, str] = {
    "IS": "is {0}",
    "TYPE_IS": "is a {0}",
    "EQUALS": "== {0}",
    "DICT_ABSENT": "has no {0}",
    "DICT_KEYS": "has the same keys",
    "LEN": "has length {0}",
    "SET_EQUALS": "holds the same members",
    "SAME": "is {0}",
    "NOT_SAME": "is not {0}",
    "TYPE_ATTRS": "has the same class attributes",
    "UNBOUND": "is not bound",
    "TENSOR": "has the same size, stride, dtype, device and kind",
    "TENSOR_KIND": "has the same dtype, device, number of dimensions and kind",
    "NO_OVERLAP": "shares no memory with {0}",
    "CALL": "is the same",
}

_MACHINERY = re.compile(
    r"_hooks|_call_impl|torch\.nn\.modules\.|<globals of torch|<globals of builtins|'forward'"
)


def is_machinery(guard: Guard) -> bool:
    """True for guards that torch.nn.Module's own code brings, the same for every module."""
    return bool(_MACHINERY.search(f"{guard.source} {guard.operands!r:.200}")) or (
        guard.check == "DICT_ABSENT" and str(guard.source).endswith(".__dict__")
    )


def guard_text(guard: Guard) -> str:
    """What must hold, in the user's words."""
    names = [_name(operand) for operand in guard.operands]
    try:
        text = HOLDS[guard.check].format(*names)
    except (IndexError, KeyError):
        text = guard.check.lower()
    place = f"  # {short_place(guard.location)}" if guard.location else ""
    return f"{source_text(guard.source)} {text}{place}"


_NAME_WIDTH = 60


_SHOWN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


def _name(operand: Any) -> str:
    """An operand in few words."""
    if isinstance(operand, Source):
        return source_text(operand)
    if isinstance(operand, types.ModuleType):
        return f"module {operand.__name__}"
    if isinstance(operand, types.CodeType):
        return f"the code at {short_place(f'{operand.co_filename}:{operand.co_firstlineno}')}"
    if type(operand) is dict and "__name__" in operand:
        return f"the namespace of {operand['__name__']}"
    if isinstance(operand, (type, types.FunctionType, types.BuiltinFunctionType)):
        return operand.__qualname__
    if type(operand) not in _SHOWN:  # no code of the user's may run here
        return f"the same {type(operand).__qualname__}"
    text = repr(operand)
    return text if len(text) <= _NAME_WIDTH else f"{text[: _NAME_WIDTH - 3]}..."


# ------------------------------------------------------------------------------- graphs


def report_text(roots: list[RootReport]) -> str:
    """Graphs, guards and reasons of some roots, as text."""
    return "\n\n".join(map(str, roots))


def graph_text(graph: Any, sources: Sequence[Source] = ()) -> str:
    """A segment graph as readable lines: `v3 = torch.nn.functional.gelu(v2)`; beside each input
    where its tensor comes from."""
    names = [source_text(source) for source in sources]
    names += [""] * (len(graph.inputs) - len(names))
    rows = [
        (f"{name}: {meta.dtype}{list(meta.sizes)}", origin)
        for (name, meta), origin in zip(graph.inputs, names, strict=True)
    ]
    casts = by_operation(graph.casts)
    for o in graph.operations:
        rows += [(_cast_text(cast), "") for cast in casts.get(o.name, ())]
        args = [_text(a) for a in o.args] + [f"{k}={_text(v)}" for k, v in o.kwargs.items()]
        call = (
            f"{args[0]}.{o.target}({', '.join(args[1:])})"
            if o.kind == "call_method"
            else f"{o.target}({', '.join(args)})"
        )
        rows.append((f"{o.name} = {call}", short_place(o.location)))
    for name, expected in graph.speculations:
        rows.append((f"assume bool({name}) is {expected}", ""))
    rows.append((f"return {', '.join(graph.outputs)}", ""))
    width = min(max(len(text) for text, _ in rows), 72)
    return "\n".join(f"{text:<{width}}  # {place}" if place else text for text, place in rows)


def _cast_text(cast: Autocast | None) -> str:
    if cast is None:
        return "end of autocast"
    on = [
        f"{dtype} on {device}"
        for device, dtype, enabled in zip(DEVICES, cast.dtypes, cast.enabled, strict=True)
        if enabled
    ]
    return f"autocast to {', '.join(on)}" if on else "autocast off"


def _text(value: Any) -> str:
    name = getattr(value, "name", None)
    if name is not None:
        return str(name)
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_text(v) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)"
    return repr(value)


# ------------------------------------------------------------------------- one call


@dataclass
class Explanation:
    """The result of `accel.explain(f)(*args)`; print it.

    `result` is what the call returned; `graph_break_count`, `graph_count` and `op_count`
    carry over from torch._dynamo.explain.
    """

    result: Any
    roots: list[RootReport]
    op_count: int = 0

    @property
    def graph_count(self) -> int:
        return sum(len(r.graphs) for r in self.roots)

    @property
    def graph_break_count(self) -> int:
        return sum(
            len(r.breaks) if r.breaks else r.state in ("blacklisted", "split") for r in self.roots
        )

    def __str__(self) -> str:
        head = (
            f"{self.graph_count} graph(s), {self.op_count} operations, "
            f"{self.graph_break_count} graph break(s)"
        )
        return f"{head}\n\n{report_text(self.roots)}"


# How a split root notes an exit: why, and where.
_LOCATED = re.compile(r"(.*) \((.+:\d+)\)", re.DOTALL)


def _break_line(reason: str, location: str) -> str:
    """Where a graph breaks, why, and what the user can do about it."""
    where = f" at {short_place(location)}" if location else ""
    hint = hint_for(reason)
    return f"  graph break{where}: {reason}" + (f"; {hint}" if hint else "")


def _parts(root: Root) -> list[Root]:
    """The root, and what it was split into."""
    return [root, *(root.split.nodes if root.split is not None else ())]


def _doings(root: Root) -> tuple[int, ...]:
    """Numbers that differ once the root was called, whoever served the call."""
    return tuple(n for p in _parts(root) for n in (p.recordings, p.entry.calls, p.hits))


def explain(target: Any, driver: Any, optimize: Callable[[Any], Any]) -> Callable[..., Explanation]:
    """Arms `target`, and gives a function that makes one recorded call and explains it."""

    def call(*args: Any, **kwargs: Any) -> Explanation:
        if driver is None:
            return Explanation(target(*args, **kwargs), [])
        before = {id(r): _doings(r) for r in driver.roots}
        optimize(target)
        result = target(*args, **kwargs)
        driver.wait(None)
        roots = [r for r in driver.roots if r.recordings and _doings(r) != before.get(id(r))]
        operations = sum(part.ops_per_call for r in roots for part in _parts(r))
        return Explanation(result, [RootReport.of(r) for r in roots], operations)

    return call
