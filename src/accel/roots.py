"""Roots: the functions and modules that may be recorded, and the state each is in.

In: entries of the native dispatch. Out: per root its state, its variants, why it was given up.
Invariant: a state is a row of STATES; a root leaves `blacklisted` and `losing` only by `reset`.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from accel import log
from accel.capture.recorder import Recording
from accel.capture.twins import CodeKey, code_key
from accel.capture.variation import GRADIENTS, Variation
from accel.errors import reason_text
from accel.misses import Miss
from accel.rewriter import prologue
from accel.trial import Trial

# What a root may be doing, and what its calls do meanwhile.
STATES = {
    "cold": "called too rarely so far; calls run eagerly",
    "recording": "one call is being recorded; it is the eager run",
    "compiling": "a recording is with the compiler; calls run eagerly",
    "compiled": "calls whose guards hold run compiled code",
    "full": "as compiled, but no further variants are made",
    "split": "runs compiled between its graph breaks",
    "losing": "compiled code was not faster; calls run eagerly",
    "blacklisted": "cannot be recorded; calls run eagerly, callees get their turn",
    "plain": "runs no torch operations; its prologue is taken out",
    "disabled": "turned off by the user",
}


# Those in which no call is recorded.
IDLE = 100  # variants that serve fewer than one in so many calls only cost time
SETTLED = frozenset({"blacklisted", "plain", "losing", "disabled", "full"})


@dataclass
class Limits:
    """Each limit of the state machine, one row."""

    max_deferrals: int = 1  # times an inner root waits for one that may never be called again
    first_call_s: float = 10.0  # how long inner roots wait for the first call of a module
    max_transient_voids: int = 6  # recordings lost to signals, GC callbacks and the like
    max_eager_times: int = 8  # calls measured while a root compiles
    max_plain_runs: int = 2  # recordings without torch operations before a root is let alone
    plain_pause_calls: int = 16  # calls between them
    max_backoff_calls: int = 4096  # most calls between two tries
    max_fixed_variants: int = 6  # that hold for one number each, before it is left to Python
    max_backward_patterns: int = 4  # sets of outputs at which gradients arrive, besides all


@dataclass
class Installed:
    """One compiled variant of a root."""

    native: Any
    recording: Recording
    program: Any  # its guards
    key: str
    operations: int
    trial: Trial = field(default_factory=Trial)
    doubted: tuple[int, int] = (0, 0)  # calls and failed speculations when somebody looked


@dataclass
class Tally:
    """What dropped variants have done."""

    hits: int = 0  # calls that they have served
    operations: int = 0  # torch operations in these
    failures: int = 0  # replays that a speculation ended
    errors: int = 0
    backwards: int = 0

    def add(self, installed: Installed) -> None:
        native = installed.native
        self.hits += int(native.hits)
        self.operations += int(native.hits) * installed.operations
        self.failures += failures(installed)
        self.errors += int(native.errors)
        self.backwards += sum(gradient.runs for gradient in native.gradients or ())


def failures(installed: Installed) -> int:
    """Replays of a variant that a speculation ended (and not the sizes of a family)."""
    native = installed.native
    return int(native.misspeculations) - int(getattr(native.executor, "refusals", 0))


@dataclass(repr=False)
class Root:
    """One function code or one module instance."""

    name: str
    kind: str  # "function" | "module" | "node"
    location: str
    entry: Any
    code: types.CodeType | None = None
    module: weakref.ref[Any] | None = None
    backend: Any = None
    forced: bool = False  # asked for by optimize(): recorded at the first call
    fullgraph: bool = False
    assumes_all: bool = False  # it cannot be split where a tensor decides
    dynamic: bool | None = None  # of optimize(); None: as the setting says
    variation: Variation | None = None
    state: str = "cold"
    reason: str = ""
    reason_location: str = ""
    deferrals: int = 0
    first_seen_s: float = 0.0  # when an inner root first waited for it; 0: never
    transient_voids: int = 0
    plain_runs: int = 0
    backoff: int = 1
    recordings: int = 0
    variants: list[Installed] = field(default_factory=list)
    retired: Tally = field(default_factory=Tally)
    pending: int = 0
    backward_patterns: int = 0
    # Held while one of its calls is recorded, in whatever thread, and what it gave is submitted.
    turn: threading.Lock = field(default_factory=threading.Lock)
    eager_ns: list[int] = field(default_factory=list)  # calls measured while it compiles
    looked_at: tuple[int, int] = (0, 0)  # calls and hits when `serves_nothing` looked
    ops_per_call: int = 0
    history: list[str] = field(default_factory=list)
    owner: weakref.ref[Root] | None = None  # of a node: the split root
    miss: Miss | None = None  # why it was recorded again the last time
    split: Any = None  # accel.splitting.Split of a function that runs between its graph breaks

    def __repr__(self) -> str:
        return f"<Root {self.name} at {self.location}: {self.state}>"

    def fix_sizes(self, why: str) -> bool:
        """Its recordings have fixed sizes, or numbers, from now on, for `why`; False when they
        had anyway."""
        if self.variation is None:
            return False
        if why == GRADIENTS and not self.variation.no_gradients:
            self.variation.no_gradients = True
        elif self.variation.has_size_numbers and not self.variation.no_size_numbers:
            self.variation.no_size_numbers = reason_text("dynamic", why)
        elif self.variation.has_lifted and not self.variation.no_numbers:
            self.variation.no_numbers = reason_text("dynamic", why)
        else:
            self.variation.refused = reason_text("dynamic", why)
        return True

    @property
    def module_name(self) -> str:
        """Where the class of its nn.Module is defined; empty where it has none."""
        module = self.module() if self.module is not None else None
        return type(module).__module__ if module is not None else ""

    @property
    def is_dead(self) -> bool:
        """True when its module is gone."""
        return self.module is not None and self.module() is None

    def publish(self) -> None:
        """Native dispatch tries these variants from now on."""
        self.entry.variants = tuple(v.native for v in self.variants)

    def retire(self, gone: Iterable[Installed]) -> None:
        """These variants serve no more calls; what they have served still counts."""
        ids = {id(v) for v in gone}
        for installed in self.variants:
            if id(installed) in ids:
                self.retired.add(installed)
        self.variants = [v for v in self.variants if id(v) not in ids]
        self.publish()

    def turn_off(self) -> None:
        """By the user's wish."""
        self.state, self.entry.state = "disabled", "off"

    def give_up(self, kind: str, detail: str, location: str) -> None:
        """It is recorded no more, for a reason that `errors.REASONS` has a row for."""
        self.state = "full" if self.variants else "blacklisted"
        self.reason = reason_text(kind, detail)
        self.reason_location = location
        self.entry.state = "armed" if self.variants else "off"
        self.entry.threshold = Limits.max_backoff_calls
        log.artifact("driver", "%s blacklisted: %s at %s", self.name, self.reason, location)

    @property
    def is_recording(self) -> bool:
        return self.turn.locked()

    @property
    def judged(self) -> bool:
        return self.state in SETTLED or self.state == "compiled"

    def begin_again(self) -> None:
        """As before its first call, but for what it has counted."""
        self.retire(self.variants)
        self.miss = None
        self.state, self.reason, self.reason_location = "cold", "", ""
        self.deferrals = self.transient_voids = self.plain_runs = 0
        self.variation = None
        self.eager_ns.clear()
        self.backoff = 1
        self.assumes_all = False
        self.entry.disarm = False
        self.entry.state = "count"

    @property
    def hits(self) -> int:
        """How many of its calls compiled code served."""
        return self.retired.hits + sum(int(v.native.hits) for v in self.variants)

    @property
    def serves_few(self) -> bool:
        """Whether its variants, if any, serve less than half of its calls."""
        return not self.variants or 2 * self.hits < int(self.entry.calls)

    def serves_nothing(self) -> bool:
        """Whether its variants have served next to none of the many calls since the last look."""
        calls, hits = self.looked_at
        self.looked_at = int(self.entry.calls), self.hits
        calls, hits = self.looked_at[0] - calls, self.looked_at[1] - hits
        return calls >= Limits.max_backoff_calls and IDLE * hits < calls


class Owners:
    """Which of the functions that share a code has which root.

    Functions made by one `def` share its code and, as the user's program knows nothing of it, its
    root and the limit of its variants. One that was asked for by itself gets a root of its own,
    known by the number in its prologue; when it is collected, the next one takes the root over.
    """

    most = 256  # for one code; the rest share the first

    def __init__(self, make: Callable[[types.CodeType], Root]) -> None:
        self._make = make
        self._rows: dict[CodeKey, list[tuple[weakref.ref[types.FunctionType], Root]]] = {}

    def claim(self, f: types.FunctionType, shared: Root) -> Root:
        """The root of `f`, whose code has the root `shared`; gives `f` the prologue for it."""
        assert shared.code is not None
        rows = self._rows.setdefault(code_key(shared.code), [])
        number, root = self._free(f, rows)
        if root is None:
            if len(rows) == self.most:
                return shared
            root = self._make(shared.code) if rows else shared
        if number == len(rows) or rows[number][0]() is not f:
            rows[number : number + 1] = [(weakref.ref(f), root)]
            code = prologue.under_prologue(f.__code__)
            f.__code__ = prologue.insert_prologue(code, root.entry.index)
        return root

    def _free(self, f: types.FunctionType, rows: list[Any]) -> tuple[int, Root | None]:
        """The row of `f`, or one whose function has been collected; else a new one."""
        owners = [owner() for owner, _ in rows]
        if f in owners:
            return owners.index(f), rows[owners.index(f)][1]
        for number, (owner, (_, root)) in enumerate(zip(owners, rows, strict=True)):
            if owner is None and not root.pending and not root.is_recording:
                if root.state in SETTLED:
                    root.begin_again()
                return number, root
        return len(rows), None
