"""Counters: what happened, as plain numbers.

In: `add` from the driver. Out: `snapshot()`. Invariant: every name of NAMES is there.
"""

from __future__ import annotations

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
