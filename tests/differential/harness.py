"""Runs a program plainly and under an engine, and compares everything observable.

In: a `Program`, which drives a `Session`. Out: nothing, or an AssertionError that lists every
difference. Invariant: eager is the truth, and the program cannot tell which run it is in.

A program is a function of a session:

    @program("list append", expect=COMPILED)
    def _(s: Session) -> None:
        seen = s.watch([])            # state to compare after every call
        def step(x):
            seen.append(x * 2)
            return x + 1
        step = s.root(step)           # plain, or optimized
        s.warm(step, torch.ones(3))   # several calls; the last must be served compiled
        s.call(step, torch.ones(4))   # no claim about how it is served
        s.miss(step, ...)             # must not be served by what was compiled before
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import inspect
import io
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy
import torch
from snapshots import DEFAULT, Describer, Tolerance, differences

# Files here whose frames are not the user's.
NOT_PROGRAMS = ("harness.py", "fakes.py")
HERE = os.path.dirname(os.path.abspath(__file__))
COMPILED, EAGER, ANY = "compiled", "eager", "any"
WAIT_S = 120.0
SLOW_COLLECTION_S = 0.03


class Engine(Protocol):
    """What is put to the test: accel, or a fake in the harness' own tests."""

    keeps_code: bool  # what one call has compiled may serve the next

    def optimize(self, function: Any, **options: Any) -> Any: ...
    def wait(self) -> None: ...
    def counters(self) -> dict[str, Any]: ...
    def reasons(self) -> list[str]: ...
    def reset(self) -> None: ...
    def absent(self) -> contextlib.AbstractContextManager[Any]: ...


class Eager:
    """The truth: nothing is optimized."""

    keeps_code = False

    def optimize(self, function: Any, **options: Any) -> Any:
        return function

    def wait(self) -> None:
        pass

    def counters(self) -> dict[str, Any]:
        return {}

    def reasons(self) -> list[str]:
        return []

    def reset(self) -> None:
        pass

    def absent(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class Accel:
    """accel, waiting for its compiler after each call."""

    keeps_code = True

    def optimize(self, function: Any, **options: Any) -> Any:
        import accel

        return accel.optimize(function, **options)

    def wait(self) -> None:
        import accel

        assert accel.wait(WAIT_S), f"compilation was not idle after {WAIT_S} s"

    def counters(self) -> dict[str, Any]:
        import accel

        return dict(accel.counters())

    def reasons(self) -> list[str]:
        from accel import driver

        return [root.reason for root in driver.current.roots if root.reason]

    def reset(self) -> None:
        import accel

        accel.reset()

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """Without the universal root in nn.Module: the truth must not be served by accel."""
        from accel import driver

        if driver.current is None:
            yield
            return
        driver.current.unpatch()
        try:
            yield
        finally:
            driver.current._patch_module_call()


class AccelRecording(Accel):
    """accel, forgetting everything after each call: every call of a root is recorded."""

    keeps_code = False

    def wait(self) -> None:
        super().wait()
        self.reset()


@dataclasses.dataclass(frozen=True)
class Program:
    """A named program and what must have happened by its end.

    `expect` COMPILED: calls marked `warm` and `hit` are served compiled, and some call is; EAGER: no call is, and
    one of the engine's reasons contains `reason`; ANY: either is right.
    """

    name: str
    body: Callable[[Session], None]
    expect: str = COMPILED
    reason: str = ""
    tolerance: Tolerance = DEFAULT
    runs: int = 0  # how often compiled code must have run at least, as calls and as segments

    @property
    def location(self) -> str:
        code = inspect.unwrap(self.body).__code__
        return f"{os.path.relpath(code.co_filename)}:{code.co_firstlineno}"


class Session:
    """One run of a program, plain or optimized; collects what each call did."""

    def __init__(self, engine: Engine, expect: str, is_truth: bool) -> None:
        self._engine = engine
        self._is_truth = is_truth
        self._expect = expect
        self._watched: list[Any] = []
        self._results: list[Any] = []
        self._cleanups = contextlib.ExitStack()
        self.calls: list[dict[str, Any]] = []
        self.complaints: list[str] = []

    def root(self, function: Any, **options: Any) -> Any:
        """`function` (or module), optimized when this is the optimized run."""
        plain = getattr(function, "__func__", function)
        if hasattr(plain, "__code__"):
            self._cleanups.callback(setattr, plain, "__code__", plain.__code__)
        return self._engine.optimize(function, **options)

    def watch(self, value: Any) -> Any:
        """Compare `value` after every call from now on; returns it."""
        self._watched.append(value)
        return value

    def patch(self, owner: Any, name: str, value: Any) -> None:
        """setattr (or setitem on a dict), undone at the end of the run."""
        missing = object()
        if isinstance(owner, dict) or owner is os.environ:
            before = owner.get(name, missing)
            assign, remove = owner.__setitem__, owner.__delitem__
        else:
            own = isinstance(owner, type)  # an inherited attribute is not the class' own
            before = vars(owner).get(name, missing) if own else getattr(owner, name, missing)
            assign, remove = partial(setattr, owner), partial(delattr, owner)
        assign(name, value)
        undo = partial(remove, name) if before is missing else partial(assign, name, before)
        self._cleanups.callback(undo)

    def finally_(self, undo: Callable[[], Any]) -> None:
        """Run `undo` at the end of the run."""
        self._cleanups.callback(undo)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call and record the outcome; returns the result, or None after an exception."""
        return self._call(function, args, kwargs)

    def hit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`call` that must be served compiled (if the program expects so)."""
        before = self._served()
        result = self._call(function, args, kwargs)
        if not self._is_truth and self._expect == COMPILED and self._served() <= before:
            reasons = "; ".join(self._engine.reasons()) or "no reason given"
            self.complaints.append(
                f"call {len(self.calls)} was not served compiled: {reasons}; "
                f"counters {self._engine.counters()}"
            )
        return result

    def miss(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`call` for which nothing compiled so far is valid."""
        before = self._served()
        result = self._call(function, args, kwargs)
        if not self._is_truth and self._engine.keeps_code and self._served() > before:
            self.complaints.append(f"call {len(self.calls)} was served by stale compiled code")
        return result

    def split(
        self,
        function: Callable[..., Any],
        *args: Any,
        segments: int = 2,
        calls: int = 5,
        tries: int = 3,
    ) -> Any:
        """Some calls, then some more; in one of those at least so many compiled segments must run."""
        for _ in range(calls):
            self._call(function, args, {})
        served = 0
        for _ in range(tries):  # one or two of them may be recorded, for the sake of a rarer path
            before = int(self._engine.counters().get("segments_served", 0))
            result = self._call(function, args, {})
            after = int(self._engine.counters().get("segments_served", 0))
            served = max(served, after - before)
        if not self._is_truth and self._engine.keeps_code and served < segments:
            reasons = "; ".join(self._engine.reasons()) or "no reason given"
            self.complaints.append(
                f"call {len(self.calls)} ran {served} compiled segments, not {segments}: "
                f"{reasons}; counters {self._engine.counters()}"
            )
        return result

    def warm(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Two calls, then one that must be served compiled."""
        self._call(function, args, kwargs)
        self._call(function, args, kwargs)
        return self.hit(function, *args, **kwargs)

    def _served(self) -> int:
        return int(self._engine.counters().get("calls_compiled", 0))

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outcome: dict[str, Any] = {}
        stdout, stderr = io.StringIO(), io.StringIO()
        versions = [(t, t._version) for t in _tensors((args, kwargs)) if not t.is_inference()]
        result = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                try:
                    result = function(*args, **kwargs)
                except Exception as error:
                    outcome["exception"] = describe_exception(error)
        self._engine.wait()
        outcome["printed"] = [stdout.getvalue(), stderr.getvalue()]
        outcome["warnings"] = [
            [w.category.__name__, str(w.message), os.path.basename(w.filename)]
            for w in caught
            if "torch.jit" not in str(w.message)  # issued when torch imports something lazily
        ]
        outcome["rng"] = rng_state()
        outcome["references"] = {
            "arguments": [_references(a) for a in (*args, *kwargs.values())],
            "result": _references(result),
        }
        outcome["written"] = [t._version - version for t, version in versions]
        del versions
        outcome["grad_mode"] = [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
        describer = Describer()
        outcome["arguments"] = [describer.describe(a) for a in (*args, *kwargs.values())]
        outcome["state"] = [describer.describe(value) for value in self._watched]
        outcome["result"] = describer.describe(result)
        self.calls.append(outcome)
        self._results.append(result)
        return result

    def finish(self) -> None:
        """Describe all results once more: later calls must not have touched earlier results."""
        self._cleanups.close()
        describer = Describer()
        self.calls.append(
            {"all results, at the end": [describer.describe(r) for r in self._results]}
        )


def run(program: Program, engine: Engine, is_truth: bool) -> Session:
    """Run `program` once from a fixed random state."""
    torch.manual_seed(1234)
    random.seed(1234)
    numpy.random.seed(1234)
    session = Session(engine, program.expect, is_truth)
    try:
        program.body(session)
        start = time.perf_counter()
        gc.collect()
        if time.perf_counter() - start > SLOW_COLLECTION_S:
            gc.freeze()  # a program has imported something large
    finally:
        session.finish()
    return session


def check(program: Program, engine: Engine | None = None, truth: Session | None = None) -> Session:
    """Run `program` plainly and under `engine`; raise AssertionError on any difference. The plain
    run is what it answers, and what later checks of the program may be given."""
    engine = Accel() if engine is None else engine
    if truth is None:
        with engine.absent():
            truth = run(program, Eager(), True)
    engine.reset()
    before = engine.counters()
    trial = run(program, engine, False)
    after = engine.counters()
    served = after.get("calls_compiled", 0) - before.get("calls_compiled", 0)
    reasons = engine.reasons()
    engine.reset()

    found = []
    if len(truth.calls) != len(trial.calls):
        found.append(f"{len(truth.calls)} calls plainly, {len(trial.calls)} optimized")
    for index, (expected, got) in enumerate(zip(truth.calls, trial.calls, strict=False)):
        found += differences(expected, got, program.tolerance, f"call {index + 1}")
    found += trial.complaints
    if program.expect == EAGER:
        if served:
            found.append(f"{served} calls were served compiled, none should be")
        if not any(program.reason in reason for reason in reasons):
            found.append(f"no reason contains {program.reason!r}: {reasons}")
    if engine.keeps_code:
        runs = served + after.get("segments_served", 0) - before.get("segments_served", 0)
        least = max(program.runs, 1 if program.expect == COMPILED else 0)
        if runs < least:
            found.append(f"compiled code ran {runs} times, not {least}: {reasons}")
    if found:
        lines = "\n  ".join(found[:20])
        more = f"\n  ... and {len(found) - 20} more" if len(found) > 20 else ""
        raise AssertionError(f"{program.name} ({program.location}):\n  {lines}{more}")
    return truth


def program(
    table: list[Program],
    name: str,
    *,
    expect: str = COMPILED,
    reason: str = "",
    tolerance: Tolerance = DEFAULT,
    runs: int = 0,
) -> Callable[[Callable[[Session], None]], Callable[[Session], None]]:
    """Decorator that adds a row to a table of programs."""

    def add(body: Callable[[Session], None]) -> Callable[[Session], None]:
        table.append(Program(name, body, expect, reason, tolerance, runs))
        return body

    return add


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Type, message and the lines of the program (not of torch or accel) it passed through."""
    lines = [
        [os.path.basename(frame.filename), frame.lineno, frame.name]
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.dirname(frame.filename) == HERE
        and os.path.basename(frame.filename) not in NOT_PROGRAMS
    ]
    linked = {
        name: None if value is None else describe_exception(value)
        for name, value in (("cause", error.__cause__), ("context", error.__context__))
    }
    return {"type": type(error).__qualname__, "message": str(error), "lines": lines, **linked}


def rng_state() -> dict[str, str]:
    """Digests of the three global random generators."""
    name, keys, *rest = numpy.random.get_state()
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": repr(random.getstate()).encode(),
        "numpy": keys.tobytes() + repr((name, *rest)).encode(),
    }
    return {name: hashlib.sha256(state).hexdigest()[:16] for name, state in states.items()}


def _tensors(value: Any, depth: int = 3) -> Iterator[torch.Tensor]:
    """The tensors near the surface of plain containers (which may contain themselves)."""
    if type(value) is torch.Tensor:
        yield value
    elif depth and type(value) in (tuple, list):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and type(value) is dict:
        yield from _tensors(list(value.values()), depth)


def _references(value: Any) -> list[int] | None:
    """How many references each tensor in `value` has; None for values that are shared anyway."""
    if type(value) is torch.Tensor:
        return [sys.getrefcount(value), value._use_count()]
    if type(value) in (list, dict):
        return [sys.getrefcount(value), sum(sys.getrefcount(t) for t in _tensors(value))]
    return None


# Programs collect garbage often: the libraries' own objects need not be looked at each time.
gc.freeze()
