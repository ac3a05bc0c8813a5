"""Threads, odd exceptions and tracers around calls that are recorded or served."""

from __future__ import annotations

import contextlib
import cProfile
import io
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from disturbing import WAIT_S, inside, new_function, root_of, served

import accel
from accel import runtime, trial
from accel.capture.operations import OperationEvents
from accel.installing import Installer


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trial, "FIRST_REVIEW", 10**9)  # what is compiled stays, slow or not
    yield
    assert accel.wait(WAIT_S)
    accel.reset()


# -------------------------------------------------------------------- threads


def beside(work: Callable[[], Any]) -> Callable[[], None]:
    """Runs something in another thread, to its end; what it raises is raised here."""

    def run() -> None:
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the other thread hangs"
        if errors:
            raise errors[0]

    return run


def raises(call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError):
        call()


ACTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "calls the root": lambda f, m: torch.testing.assert_close(f(torch.ones(2, 8)), m.eager(torch.ones(2, 8))),
    "sets an attribute": lambda f, m: setattr(m, "gain", 3.0),
    "sets a parameter": lambda f, m: setattr(m, "weight", torch.nn.Parameter(torch.full((8,), 3.0), False)),
    "writes a parameter": lambda f, m: m.weight.fill_(5.0),
    "resets": lambda f, m: accel.reset(),
    "optimizes": lambda f, m: accel.optimize(f),
    "disables": lambda f, m: (accel.disable(f), accel.optimize(f)),
    "raises": lambda f, m: raises(lambda: f(torch.ones(3, 3))),
    "starts another root": lambda f, m: served(lambda: accel.optimize(new_function(1.75))(torch.ones(8))),
}  # fmt: skip


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((8,), 2.0), requires_grad=False)
        self.gain = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * self.weight)
        return (y + self.gain).softmax(-1) * self.weight * self.gain

    eager = forward


@pytest.mark.parametrize(
    ("step", "at"), [("record", 1), ("record", 3), ("compile", 1), ("install", 1)]
)
@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_another_thread_in_a_step_of_ours(action: str, step: str, at: int) -> None:
    owner, name = {
        "record": (OperationEvents, "after_operation"),
        "compile": (Installer, "compile"),
        "install": (Installer, "_install"),
    }[step]
    model = Scaled()
    forward = model.eager

    def f(x: torch.Tensor) -> torch.Tensor:
        return model(x) + 1.0

    def eager(x: torch.Tensor) -> torch.Tensor:
        return forward(x) + 1.0

    accel.optimize(f)
    x = torch.randn(4, 8)
    object.__setattr__(model, "eager", eager)
    with inside(owner, name, beside(lambda: ACTIONS[action](f, model)), at) as hit:
        f(x)
        assert accel.wait(WAIT_S)
        f(x)
    assert hit.happened and hit.recording == (step != "install")
    assert served(lambda: torch.testing.assert_close(f(x), eager(x))) >= 3
    assert not root_of(f).is_recording


# ----------------------------------------------------------------- exceptions


def run_out(depth: int) -> int:
    return 1 + run_out(depth + 1)


def close_midway(x: torch.Tensor) -> torch.Tensor:
    log = []

    def parts() -> Iterator[torch.Tensor]:
        try:
            for k in range(5):
                yield x * float(k)
        finally:
            log.append("closed")

    generator = parts()
    y = next(generator) + next(generator)
    generator.close()
    return y + float(len(log))


class Odd(torch.Tensor):
    @classmethod
    def __torch_function__(cls, f: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LookupError("in a __torch_function__")


def recursion(x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(x)
    run_out(0)
    return y


def caught_recursion(x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(x)
    try:
        run_out(0)
    except RecursionError:
        y = y + 1.0
    return y


def out_of_memory(x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(x)
    if y.dim() == 1:
        raise MemoryError("the user's own")
    return y


def exits(x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(x)
    if y.dim() == 1:
        sys.exit(int(y.numel()))
    return y


def warns(x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(x)
    warnings.warn("beware", stacklevel=1)
    return y + 1.0


def odd_tensor(x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(x)
    return y + torch.ones(4).as_subclass(Odd)


def closes_by_error(x: torch.Tensor) -> torch.Tensor:
    def parts() -> Iterator[torch.Tensor]:
        try:
            yield x * 2.0
        except ValueError:
            yield x * 3.0

    generator = parts()
    first = next(generator)
    return first + generator.throw(ValueError("thrown in"))


BODIES = [recursion, caught_recursion, out_of_memory, exits, warns, odd_tensor, close_midway, closes_by_error]  # fmt: skip


def outcome(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return function(x).tolist()
        except BaseException as error:
            lines, trace = [], error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code.co_filename == __file__:
                    lines.append((trace.tb_frame.f_code.co_name, trace.tb_lineno))
                trace = trace.tb_next
            deep = len(lines) > 50
            return type(error), str(error), error.args, lines[1:3] if deep else lines[1:]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_exceptions_of_all_kinds(body: Callable[[torch.Tensor], Any]) -> None:
    f = types.FunctionType(body.__code__, body.__globals__, body.__name__)
    accel.optimize(f)
    shapes = [(4,)] * 5 + [(2, 4)] * 4 + [(4,)] * 2
    recordings = accel.counters()["recordings"]
    for shape in shapes:
        x = torch.arange(float(torch.Size(shape).numel())).reshape(shape) - 3.0
        assert outcome(f, x) == outcome(body, x)
        assert accel.wait(WAIT_S)
    assert accel.counters()["recordings"] > recordings
    assert not root_of(f).is_recording and not runtime.native.is_recording()


@pytest.mark.parametrize("limit", range(60, 200, 7))
def test_the_stack_ends_somewhere_in_a_recording(limit: int) -> None:
    """Wherever the recursion limit strikes, the next call with room for it is right."""

    def inner(x: torch.Tensor, n: int) -> torch.Tensor:
        return torch.relu(x + 1.0) if n == 0 else inner(x, n - 1) * 2.0

    def f(x: torch.Tensor) -> torch.Tensor:
        return inner(x, 20)

    x, before = torch.ones(3), sys.getrecursionlimit()
    right = f(x)
    accel.optimize(f)
    depth = len(list(frames()))
    raised = False
    sys.setrecursionlimit(depth + limit)
    try:
        torch.equal(f(x), right)
    except RecursionError:
        raised = True
    finally:
        sys.setrecursionlimit(before)
    assert not root_of(f).is_recording
    assert served(lambda: torch.testing.assert_close(f(x), right)) >= 3 or raised


def frames() -> Iterator[Any]:
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


# -------------------------------------------------------------------- tracers


class Log:
    """Events of this file's frames, as coverage and profilers see them."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != __file__:
            return None
        self.events.append((event, frame.f_code.co_name, frame.f_lineno))
        return self.trace

    def profile(self, frame: Any, event: str, arg: Any) -> None:
        if frame.f_code.co_filename == __file__ and event in ("call", "return"):
            self.events.append((event, frame.f_code.co_name, frame.f_lineno))


def traced_helper(x: torch.Tensor) -> torch.Tensor:
    y = x * 2.0
    return y + 1.0


def traced_root(x: torch.Tensor) -> torch.Tensor:
    y = traced_helper(x)
    total = [traced_helper(y) for _ in range(2)]
    if y.dim() == 2:
        y = y + total[0]
    return torch.relu(y) + total[1]


@contextlib.contextmanager
def tracing(way: str, log: Log) -> Iterator[None]:
    before = sys.gettrace(), sys.getprofile()
    if way == "settrace":
        sys.settrace(log.trace)
    elif way == "setprofile":
        sys.setprofile(log.profile)
    profiler = cProfile.Profile()
    if way == "cProfile":
        profiler.enable()
    try:
        yield
    finally:
        if way == "cProfile":
            profiler.disable()
        sys.settrace(before[0])
        sys.setprofile(before[1])


@pytest.mark.parametrize("way", ["settrace", "setprofile", "cProfile"])
@pytest.mark.parametrize("moment", ["recording", "replay", "throughout"])
def test_tracers(way: str, moment: str) -> None:
    """Answers stay; the recorded call, which is the eager run, shows its tracer the same lines."""
    f = types.FunctionType(traced_root.__code__, globals(), "traced_root")
    x = torch.randn(2, 4)
    right, wanted = traced_root(x), Log()
    with tracing(way, wanted):
        traced_root(x)
    accel.optimize(f)
    log = Log()
    recordings = accel.counters()["recordings"]
    if moment == "recording":
        with tracing(way, log):
            result = f(x)
        assert accel.counters()["recordings"] == recordings + 1
        torch.testing.assert_close(result, right)
        whole = lines_of(log)
        # The twin's call, and then that of the function whose prologue has answered.
        assert whole[: len(lines_of(wanted))] == lines_of(wanted)
        rest = [event for event in whole[len(lines_of(wanted)) :] if event[0] != "line"]
        line = f.__code__.co_firstlineno
        pair = [("call", "traced_root", line), ("return", "traced_root", line)]
        assert rest == ([] if way == "cProfile" else pair)
        assert served(lambda: torch.testing.assert_close(f(x), right)) >= 4
        return
    if moment == "replay":
        assert served(lambda: f(x)) >= 4
    for _ in range(6):
        with tracing(way, log):
            result = f(x)
        torch.testing.assert_close(result, right)
        accel.wait(WAIT_S)
    assert served(lambda: torch.testing.assert_close(f(x), right)) >= 4


def test_a_profiler_sees_each_served_call_once() -> None:
    """A call and its return; a return alone would be taken for its caller's."""
    f = accel.optimize(new_function(4.375))
    x = torch.ones(2, 4)

    def caller() -> None:
        for _ in range(3):
            f(x)

    assert served(lambda: f(x)) >= 4
    before, events = accel.counters()["calls_compiled"], []
    sys.setprofile(
        lambda frame, event, _: events.append((event, frame.f_code.co_name, frame.f_lineno))
    )
    try:
        caller()
    finally:
        sys.setprofile(None)
    assert accel.counters()["calls_compiled"] == before + 3
    line = f.__code__.co_firstlineno
    seen = [event for event in events if event[1] == "f" and event[0] in ("call", "return")]
    assert seen == [("call", "f", line), ("return", "f", line)] * 3
    profiler = cProfile.Profile()
    profiler.runcall(caller)
    stats = {
        entry.code.co_name: entry for entry in profiler.getstats() if hasattr(entry.code, "co_name")
    }
    assert stats["f"].callcount == 3 and stats["caller"].callcount == 1


def lines_of(log: Log) -> list[tuple[str, str, int]]:
    return [event for event in log.events if event[1] != "tracing"]


def test_a_tracer_in_every_new_thread() -> None:
    f = types.FunctionType(traced_root.__code__, globals(), "traced_root")
    accel.optimize(f)
    x, log = torch.randn(2, 4), Log()
    right = traced_root(x)
    threading.settrace(log.trace)
    try:
        for _ in range(5):
            beside(lambda: torch.testing.assert_close(f(x), right))()
            accel.wait(WAIT_S)
    finally:
        threading.settrace(None)  # type: ignore[arg-type]
    assert any(name == "traced_helper" for _, name, _ in log.events)
    assert served(lambda: torch.testing.assert_close(f(x), right)) >= 4


def test_a_tracer_that_raises_while_recording() -> None:
    """Its exception is the program's, as in eager."""

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is traced_helper.__code__ or frame.f_code.co_name == "traced_helper":
            raise LookupError("from the tracer")
        return trace

    f = types.FunctionType(traced_root.__code__, globals(), "traced_root")
    accel.optimize(f)
    x = torch.randn(2, 4)
    right, before = traced_root(x), sys.gettrace()
    try:
        sys.settrace(trace)
        with pytest.raises(LookupError, match="from the tracer"):
            f(x)
    finally:
        sys.settrace(before)
    assert served(lambda: torch.testing.assert_close(f(x), right)) >= 3


def test_a_tracer_is_set_by_the_recorded_function() -> None:
    log = Log()

    def f(x: torch.Tensor) -> torch.Tensor:
        before = sys.gettrace()
        sys.settrace(log.trace)
        y = traced_helper(x)
        sys.settrace(before)
        return torch.relu(y)

    x = torch.randn(2, 4)
    accel.optimize(f)
    for _ in range(6):
        log.events.clear()
        torch.testing.assert_close(f(x), torch.relu(x * 2.0 + 1.0))
        calls = [name for event, name, _ in log.events if event == "call"]
        assert calls in (["traced_helper"], ["traced_helper"] * 2)  # twice where it is recorded
        accel.wait(WAIT_S)


def test_stdout_of_a_profiled_program_is_its_own() -> None:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        profiler = cProfile.Profile()
        f = accel.optimize(new_function(3.375))
        for _ in range(5):
            profiler.runcall(f, torch.ones(4))
            accel.wait(WAIT_S)
    assert errors.getvalue() == ""
