"""Counters: what happened, as plain numbers.

In: `add` from the driver, the roots. Out: `snapshot()`, `totals()`. Invariant: every name of NAMES is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    "ops_compiled",
    "ops_eager",
    "seconds_recording",
    "seconds_compiling",
)


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


def totals(roots: Iterable[Root], base_calls: Mapping[int, int]) -> dict[str, float]:
    """What the roots and native code have counted; `base_calls` are the calls, by entry, that
    came before the newest reset."""
    compiled = eager = ops_compiled = ops_eager = failed = deopts = backwards = 0
    served = split = 0
    for root in roots:
        hits = root.hits
        compiled += hits
        backwards += sum(v.native.gradient.runs for v in root.variants if v.native.gradient)
        ops_compiled += sum(v.native.hits * v.operations for v in root.variants)
        ops_compiled += root.retired_hits * root.ops_per_call
        if root.split is not None:
            split_hits, split_ops, split_missed, split_calls, failures = root.split.totals(root)
            served += split_hits
            ops_compiled += split_ops
            ops_eager += split_missed
            split += split_calls
            deopts += failures
        if root.state == "plain" or (not root.recordings and root.state == "cold"):
            continue  # without torch operations, part of another root's calls, or called once
        calls = root.entry.calls - base_calls.get(root.entry.index, 0)
        misses = max(calls - hits - (split_calls if root.split is not None else 0), 0)
        eager += misses
        ops_eager += misses * root.ops_per_call
        refused = sum(getattr(v.native.executor, "refusals", 0) for v in root.variants)
        missed = sum(v.native.misspeculations for v in root.variants) - refused
        missed += root.retired_failures
        failed += missed
        deopts += missed + sum(v.native.errors for v in root.variants)
    return dict(
        backwards_compiled=backwards,
        calls_compiled=compiled,
        calls_eager=eager,
        calls_split=split,
        segments_served=served,
        ops_compiled=ops_compiled,
        ops_eager=ops_eager,
        speculations_failed=failed,
        deopts=deopts,
    )
