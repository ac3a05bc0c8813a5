"""Counters: what happened, as plain numbers.

In: `add` from the driver, the roots. Out: `snapshot()`, `Totals.read()`. Invariant: every name of NAMES is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accel.roots import Root

NAMES = (
    "recordings",
    "recordings_voided",
    "segments",
    "segments_served",
    "graph_breaks",
    "variants",
    "variants_losing",
    "recompiles",
    "deopts",
    "speculations_failed",
    "calls_compiled",
    "calls_eager",
    "calls_split",
    "backwards_compiled",
    "backwards_recomputed",
    "optimizer_steps",
    "cuda_graphs_launched",
    "ops_compiled",
    "ops_eager",
    "seconds_recording",
    "seconds_compiling",
)
# Those that are sums over roots.
COUNTED = (
    "backwards_compiled", "calls_compiled", "calls_eager", "calls_split", "segments_served",
    "ops_compiled", "ops_eager", "speculations_failed", "deopts",
)  # fmt: skip


class Counters:
    """Numbers by name; the GIL makes `add` safe enough."""

    def __init__(self) -> None:
        self._values: dict[str, float] = dict.fromkeys(NAMES, 0)

    def add(self, name: str, amount: float = 1) -> None:
        self._values[name] += amount

    def snapshot(self) -> dict[str, float]:
        return dict(self._values)

    def reset(self) -> None:
        self._values = dict.fromkeys(NAMES, 0)


class Totals:
    """What roots and native code have counted since the newest reset, in rows of COUNTED."""

    def __init__(self) -> None:
        self._calls_before: dict[int, int] = {}  # by entry: calls before the reset
        self._buried: Counter[str] = Counter()  # of roots that are gone

    def begin_again(self, roots: Iterable[Root]) -> None:
        self._buried.clear()
        self._calls_before = {root.entry.index: root.entry.calls for root in roots}

    def bury(self, root: Root) -> None:
        """The root is about to be forgotten; what it has counted is not."""
        self._buried.update(self._of(root))
        self._calls_before.pop(root.entry.index, None)

    def read(self, roots: Iterable[Root]) -> dict[str, float]:
        totals = Counter(dict.fromkeys(COUNTED, 0))
        totals.update(self._buried)
        for root in roots:
            totals.update(self._of(root))
        return dict(totals)

    def _of(self, root: Root) -> dict[str, int]:
        hits = root.hits
        nodes = root.split.nodes if root.split is not None else ()
        variants = [*root.variants, *(v for node in nodes for v in node.variants)]
        runs = (g.runs for v in variants for g in v.native.gradients or ())
        totals = {
            "calls_compiled": hits,
            "backwards_compiled": sum(runs) + sum(r.retired.backwards for r in (root, *nodes)),
            "ops_compiled": sum(v.native.hits * v.operations for v in root.variants)
            + root.retired.operations,
        }
        split_calls = 0
        if root.split is not None:
            served, ops, missed, split_calls, failures = root.split.totals(root)
            totals["ops_compiled"] += ops
            totals.update(
                segments_served=served, calls_split=split_calls, ops_eager=missed, deopts=failures
            )
        if root.state == "plain" or (not root.recordings and root.state == "cold"):
            return totals  # without torch operations, part of another root's calls, or called once
        calls = root.entry.calls - self._calls_before.get(root.entry.index, 0)
        eager = max(calls - hits - split_calls, 0)
        refused = sum(getattr(v.native.executor, "refusals", 0) for v in root.variants)
        failed = sum(v.native.misspeculations for v in root.variants) - refused
        failed += root.retired.failures
        raised = sum(v.native.errors for v in root.variants) + root.retired.errors
        totals["calls_eager"] = eager
        totals["ops_eager"] = totals.get("ops_eager", 0) + eager * root.ops_per_call
        totals["speculations_failed"] = failed
        totals["deopts"] = totals.get("deopts", 0) + failed + raised
        return totals
