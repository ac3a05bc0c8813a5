"""Roots: the functions and modules that may be recorded, and the state each is in.

In: entries of the native dispatch. Out: per root its state, its variants, why it was given up.
Invariant: a state is a row of STATES; a root leaves `blacklisted` and `losing` only by `reset`.
"""

from __future__ import annotations

import threading
import types
import weakref
from dataclasses import dataclass, field
from typing import Any

from accel.capture.recorder import Recording
from accel.capture.variation import Variation
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


@dataclass
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
    retired_hits: int = 0  # calls that dropped variants have served
    pending: int = 0
    backward_patterns: int = 0
    # Held while one of its calls is recorded, in whatever thread, and what it gave is submitted.
    turn: threading.Lock = field(default_factory=threading.Lock)
    eager_ns: list[int] = field(default_factory=list)  # calls measured while it compiles
    ops_per_call: int = 0
    history: list[str] = field(default_factory=list)
    split: Any = None  # accel.splitting.Split of a function that runs between its graph breaks

    @property
    def is_recording(self) -> bool:
        return self.turn.locked()

    @property
    def judged(self) -> bool:
        return self.state in SETTLED or self.state == "compiled"

    @property
    def hits(self) -> int:
        """How many of its calls compiled code served."""
        return self.retired_hits + sum(int(v.native.hits) for v in self.variants)
