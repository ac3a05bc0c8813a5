"""Runs a differential program while chosen guards, speculations and executors fail by order.

In: a `Program` of `tests/differential`, and orders. Out: nothing, or an AssertionError with what
differed from eager. Invariant: an order that fails nothing is an error of the test.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
import sys
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accel import runtime

DIFFERENTIAL = Path(__file__).resolve().parents[1] / "differential"
sys.path.insert(0, str(DIFFERENTIAL))

from harness import ANY, Accel, Program, Session, check  # noqa: E402

KINDS = ("guard", "speculation", "executor")
# Calls meet the same places over and over: a loop of 1,000 rounds is not run 3,000 times.
FIRST, LATER = 20, 10
# Programs in which a failing backward shows, and how. Those that fail after the program (or the
# call itself) has written what the forward read: nothing can compute them, and the error says so
# (accel.compile.gradients). And one that asks two backwards for the same bits, of which one is
# eager's. And what is written through `.data` in between, which no version tells: a forward that runs
# again begins with what its inputs held before it.
_MODIFIED = "'accel: this backward needs "
DOCUMENTED = {
    "a gradient at one output, of a state that the call has written": _MODIFIED,
    "a gradient at one output, of an input written since": _MODIFIED,
    "weight written before backward": _MODIFIED,
    "static input overwritten before backward": _MODIFIED,
    "a buffer follows the weights": _MODIFIED,
    "what only an unused result's backward reads is written": _MODIFIED,
    "results and inputs are written that this backward does not read": _MODIFIED,
    "what a written part of a tensor came from is written before the backward": _MODIFIED,
    "inputs that the call writes are written unseen before the backward": "values differ",
    "gradcheck in float64": "Backward is not reentrant",
}


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
        # What accel says of variants that fail is not what the program does.
        with unittest.mock.patch("accel.log.notice_once"):
            truth = check(dataclasses.replace(program, expect=ANY), Failing(orders), truth)
    finally:
        counts = runtime.native.stop_failures()
    return truth, counts


def places(count: int) -> list[int]:
    """All places of a kind; of a long loop's, the first ones and a sample of the others."""
    first = range(min(count, FIRST))
    later = range(FIRST, count)
    return [*first, *sorted(random.Random(count).sample(later, min(len(later), LATER)))]


def check_each(program: Program) -> Iterator[Order]:
    """Fails each place of each kind in turn; gives the orders it tried."""
    truth, counts = check_failing(program, tuple(Order(kind) for kind in KINDS))
    for kind in KINDS:
        for number in places(counts[kind][0]):
            order = Order(kind, at=number)
            if stays(program, (order,), truth):
                yield order


def stays(program: Program, orders: tuple[Order, ...], truth: Session) -> bool:
    """Whether the answer stays when these fail; False where it is documented that it cannot.

    Errors: AssertionError where it does not.
    """
    try:
        check_failing(program, orders, truth)
    except AssertionError as error:
        if DOCUMENTED.get(program.name, "\0") in str(error):
            return False
        raise AssertionError(f"{orders}: {error}") from error
    return True
