"""Blueprints: what the compiler gives for a graph for several sizes, made into plans for one.

In: a plan whose numbers may be expressions over symbols, and the symbols' values. Out: an
ordinary plan, with its arena laid out. Invariant: plain data in, plain data out; nothing is
compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accel import expressions
from accel.codegen.memory import Life, place


def instantiate(blueprint: dict[str, Any], values: Sequence[int]) -> dict[str, Any]:
    """The plan for the symbols' `values`. Errors: as `expressions.evaluate`."""
    plan: dict[str, Any] = _Substitution(values).of(
        {k: v for k, v in blueprint.items() if k != "sizes"}
    )
    lives = [
        Life(position, row["bytes"], *row["life"])
        for position, row in enumerate(plan["buffers"])
        if row["kind"] == "arena"
    ]
    offsets, plan["arena_bytes"] = place(lives)
    for position, offset in offsets.items():
        plan["buffers"][position]["offset"] = offset
    return plan


class _Substitution:
    def __init__(self, values: Sequence[int]) -> None:
        self.values = values

    def of(self, data: Any) -> Any:
        """`data` anew, with numbers in place of {"e": expression}."""
        kind = type(data)
        if kind is dict:
            if "e" in data and len(data) == 1:
                return expressions.evaluate(data["e"], self.values)
            return {k: self.of(v) for k, v in data.items()}
        if kind is list:
            return [self.of(v) for v in data]
        return data
