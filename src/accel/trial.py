"""The trial of a variant: is compiled code faster than eager on the program's own calls?

In: measured times of calls that the variant served, and of calls of the same kind that ran
eagerly. Out: a `Ruling`: keep it, drop it, or measure more. Invariant: eager runs made only
to be measured take at most BUDGET of the time that the root's calls take.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

BUDGET = 0.01  # of the time spent in the root's calls
MARGIN = 1.05  # compiled code must be this much slower than eager to lose
MIN_COMPILED = 8  # measured calls of each kind before anything is said
MIN_EAGER = 3
STRIKES = 2  # reviews in a row, each with fresh times, that find it losing
FIRST_REVIEW = 16  # hits
WARM_UP = 2  # first hits, which allocate
PROBE_EVERY = 32  # hits, once the first review is over
_MAX_EAGER = 7  # latest eager times that count
_ASKING_NS = 30_000  # what arranging an eager run costs
# Shorter calls are measured in a row: between compiled ones, Python's and torch's code for the
# eager call is cold, and the first of them takes up to half a millisecond longer.
SHORT_NS = 2_000_000
BURST = 8
_LONGEST = 1 << 20  # hits between two reviews


@dataclass(frozen=True)
class Ruling:
    """What to do now, and at which hit to look again."""

    losing: bool = False
    eager_runs: int = 0
    probe_every: int = PROBE_EVERY
    review_in: int = 0  # hits


@dataclass
class Trial:
    """What is known of one variant. Times are nanoseconds of whole calls."""

    eager_ns: list[int] = field(default_factory=list)  # of warm calls
    burst: list[int] = field(default_factory=list)  # eager runs since the last review, in a row
    strikes: int = 0
    reviews: int = 0

    def review(self, compiled_ns: list[int]) -> Ruling:
        """`compiled_ns` are the times measured since the last strike."""
        self.reviews += 1
        if self.burst:
            self.eager_ns.append(int(statistics.median(self.burst[len(self.burst) // 2 :])))
            self.burst.clear()
        del self.eager_ns[:-_MAX_EAGER]
        if self.reviews == 1:
            compiled_ns = compiled_ns[WARM_UP:]
        if len(compiled_ns) < MIN_COMPILED:
            return Ruling(probe_every=1, review_in=FIRST_REVIEW)
        compiled = statistics.median(compiled_ns)
        runs = BURST if compiled < SHORT_NS else 1
        earned = runs if self.reviews > 1 else 0  # nothing has been saved up at the first one
        if len(self.eager_ns) < MIN_EAGER:
            guess = statistics.median(self.eager_ns) if self.eager_ns else 2 * compiled
            return Ruling(eager_runs=earned, review_in=self._affordable(runs * guess, compiled))
        eager = statistics.median(self.eager_ns)
        if compiled > MARGIN * eager and min(compiled_ns) > min(self.eager_ns):
            self.strikes += 1
            if self.strikes >= STRIKES:
                return Ruling(losing=True)
            return Ruling(eager_runs=runs, probe_every=1, review_in=FIRST_REVIEW)
        self.strikes = 0
        # The clearer the gain, the rarer the look.
        patience = 4 if compiled > 0.9 * eager else 64
        pause = self._affordable(runs * eager, compiled) * patience * min(self.reviews, 16)
        return Ruling(eager_runs=earned, review_in=min(pause, _LONGEST))

    @staticmethod
    def _affordable(eager: float, compiled: float) -> int:
        """Hits after which eager runs that take so long are within the budget."""
        return max(FIRST_REVIEW, int((eager + _ASKING_NS) / (BUDGET * compiled)))

    def text(self, compiled_ns: list[int]) -> str:
        compiled, eager = statistics.median(compiled_ns), statistics.median(self.eager_ns)
        return f"{compiled / 1000:.1f} us compiled, {eager / 1000:.1f} us eager"
