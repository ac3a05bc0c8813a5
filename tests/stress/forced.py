"""Runs a differential program while chosen guards, speculations and executors fail by order.

In: a `Program` of `tests/differential`, and orders. Out: nothing, or an AssertionError with what
differed from eager. Invariant: an order that fails nothing is an error of the test.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accel import runtime

DIFFERENTIAL = Path(__file__).resolve().parents[1] / "differential"
sys.path.insert(0, str(DIFFERENTIAL))

from harness import ANY, Accel, Program, Session, check  # noqa: E402

KINDS = ("guard", "speculation", "executor")


@dataclasses.dataclass(frozen=True)
class Order:
    """Of this kind of places the one number `at` fails, and of the others this share."""

    kind: str
    at: int = -1
    share: float = 0.0
    seed: int = 0


class Failing(Accel):
    """accel, whose code fails as ordered from the moment it is reset."""

    keeps_code = False  # no claims about what is served

    def __init__(self, orders: tuple[Order, ...]) -> None:
        self.orders = list(orders)

    def reset(self) -> None:
        super().reset()
        while self.orders:  # the reset after the run gives no orders
            runtime.native.force_failures(**dataclasses.asdict(self.orders.pop()))


def programs() -> dict[str, Program]:
    """Every differential program, by table and name."""
    found = {}
    for path in sorted(DIFFERENTIAL.glob("programs_*.py")):
        table = path.stem.removeprefix("programs_")
        for program in importlib.import_module(path.stem).PROGRAMS:
            found[f"{table}: {program.name}"] = program
    return found


def check_failing(
    program: Program, orders: tuple[Order, ...], truth: Session | None = None
) -> tuple[Session, dict[str, Any]]:
    """The plain run, and {kind: (places met, failures forced)} of the run with these orders."""
    try:
        truth = check(dataclasses.replace(program, expect=ANY), Failing(orders), truth)
    finally:
        counts = runtime.native.stop_failures()
    return truth, counts


def check_each(program: Program, share: float = 1.0, seed: int = 0) -> Iterator[Order]:
    """Fails each place of each kind in turn (a share of them); gives the orders it tried."""
    import random

    rng = random.Random(seed)
    truth, counts = check_failing(program, tuple(Order(kind) for kind in KINDS))
    for kind in KINDS:
        for number in range(counts[kind][0]):
            if rng.random() >= share:
                continue
            order = Order(kind, at=number)
            try:
                check_failing(program, (order,), truth)
            except AssertionError as error:
                raise AssertionError(f"{order}: {error}") from error
            yield order
