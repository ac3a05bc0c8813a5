"""Explanations: what accel made of one call, for people.

In: a function or module, and the arguments of one call. Out: an `Explanation` with graph,
guards and breaks. Invariant: the call is made exactly once, as a recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accel.roots import Root


@dataclass
class RootReport:
    """One root, as the driver knows it now."""

    name: str
    location: str
    state: str
    reason: str
    reason_location: str
    graphs: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)
    calls: int = 0
    hits: int = 0

    @staticmethod
    def of(root: Root) -> RootReport:
        report = RootReport(root.name, root.location, root.state, root.reason, root.reason_location)
        report.calls = root.entry.calls
        for installed in root.variants:
            graph = installed.recording.graph
            if graph is not None:
                report.graphs.append(graph_text(graph))
            report.hits += installed.native.hits
            if not report.guards and installed.recording.guards is not None:
                report.guards = [str(g) for g in installed.recording.guards.all()]
        return report


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
        return sum(r.state == "blacklisted" for r in self.roots)

    def __str__(self) -> str:
        head = (
            f"{self.graph_count} graph(s), {self.op_count} operations, "
            f"{self.graph_break_count} graph break(s)"
        )
        return f"{head}\n{report_text(self.roots)}"


def report_text(roots: list[RootReport]) -> str:
    """Graphs, guards and reasons of some roots, as text."""
    lines: list[str] = []
    for root in roots:
        lines.append(f"\n{root.name} ({root.location}): {root.state}")
        if root.reason:
            where = f" at {root.reason_location}" if root.reason_location else ""
            lines.append(f"  reason: {root.reason}{where}")
        for graph in root.graphs:
            lines += ["  graph:", *(f"    {line}" for line in graph.splitlines())]
        if root.guards:
            lines.append(f"  {len(root.guards)} guards; a call is eager when one fails:")
            lines += [f"    {guard}" for guard in root.guards]
    return "\n".join(lines)


def graph_text(graph: Any) -> str:
    """A segment graph as readable lines: `v3 = torch.nn.functional.gelu(v2)`."""
    lines = [f"{name}: {meta.dtype}{list(meta.sizes)}" for name, meta in graph.inputs]
    for o in graph.operations:
        args = [_text(a) for a in o.args] + [f"{k}={_text(v)}" for k, v in o.kwargs.items()]
        call = (
            f"{args[0]}.{o.target}({', '.join(args[1:])})"
            if o.kind == "call_method"
            else f"{o.target}({', '.join(args)})"
        )
        lines.append(f"{o.name} = {call}  # {o.location}")
    for name, expected in graph.speculations:
        lines.append(f"assume bool({name}) is {expected}")
    lines.append(f"return {', '.join(graph.outputs)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    name = getattr(value, "name", None)
    if name is not None:
        return str(name)
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_text(v) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)"
    return repr(value)


def explain(target: Any, driver: Any) -> Callable[..., Explanation]:
    """Arms `target`, and gives a function that makes one recorded call and explains it."""
    from accel.api import optimize

    def call(*args: Any, **kwargs: Any) -> Explanation:
        if driver is None:
            return Explanation(target(*args, **kwargs), [])
        before = {id(r): r.recordings for r in driver.roots.values()}
        optimize(target)
        result = target(*args, **kwargs)
        driver.wait(None)
        roots = [r for r in driver.roots.values() if r.recordings != before.get(id(r), 0)]
        reports = [RootReport.of(r) for r in roots]
        return Explanation(result, reports, sum(r.ops_per_call for r in roots))

    return call
