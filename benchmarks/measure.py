"""Timing competitors fairly: interleaved, in one process, with intervals.

In: named competitors, and what times a block of calls (the wall clock, or a GPU's events). Out:
seconds per call and round for each. Invariant: every round times
every competitor once, in an order that changes from round to round, with the garbage collector
off, and outside a competitor's turn nothing of it stays switched on.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

BLOCK_S = 0.004  # one timed block lasts at least this long
RESAMPLES = 2000


@dataclass
class Competitor:
    """`call` is timed; `turn()` is a context manager that is entered around each of its blocks.

    `answers` is False for what computes something else and is only timed beside the others.
    """

    name: str
    call: Callable[[], Any]
    turn: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    answers: bool = True
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Interval:
    """A median and its 95% bootstrap interval."""

    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


def interval_text(value: dict[str, float] | None, digits: int) -> str:
    """An interval's JSON as tables show it; nothing where nothing was measured."""
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}-{value['high']:.{digits}f})"


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Median of `values` with a 95% percentile bootstrap interval."""
    generator = random.Random(seed)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]
    return Interval(statistics.median(values), low, high)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Ratio of two competitors' seconds, paired by round."""
    return bootstrap([n / d for n, d in zip(numerator, denominator, strict=True)])


Timer = Callable[[Callable[[], Any], int], float]  # (call, how often) -> seconds of all of them


def wall_clock(call: Callable[[], Any], count: int) -> float:
    """Seconds from before the first of `count` calls to behind the last."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def calls_per_block(competitor: Competitor, timer: Timer = wall_clock) -> int:
    """How many calls fill a block."""
    with competitor.turn():
        count = 1
        while True:
            elapsed = timer(competitor.call, count)
            if elapsed >= BLOCK_S:
                return count
            count = max(2 * count, int(count * BLOCK_S / max(elapsed, 1e-9)))


def race(
    competitors: Sequence[Competitor], rounds: int, seed: int = 0, timer: Timer = wall_clock
) -> None:
    """Fill in the `seconds` of each competitor: one entry (seconds per call) a round."""
    generator = random.Random(seed)
    counts = {c.name: calls_per_block(c, timer) for c in competitors}
    order = list(competitors)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            generator.shuffle(order)
            for competitor in order:
                _time_block(competitor, counts[competitor.name], timer)
    finally:
        gc.enable()


def _time_block(competitor: Competitor, count: int, timer: Timer) -> None:
    with competitor.turn():
        timer(competitor.call, max(1, count // 20))  # caches and inline caches of this competitor
        competitor.seconds.append(timer(competitor.call, count) / count)
