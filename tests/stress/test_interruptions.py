"""Signals, wherever they come: the program's handler runs, its exception arrives, answers stay.

`disturbing.inside` sends the signal from within an exact step of accel's own work, so that every
test shows which state was hit; timers try the rest.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disturbing import WAIT_S, handling, inside, raising, root_of, served

import accel
from accel import driver, trial
from accel.capture.recorder import Recorder
from accel.capture.segments import SegmentRecorder, SegmentRun
from accel.compile.family import Family
from accel.compile.service import CompileService
from accel.compile.worker import Worker
from accel.driver import Driver
from accel.installing import Installer


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trial, "FIRST_REVIEW", 10**9)  # what is compiled stays, slow or not
    yield
    assert accel.wait(WAIT_S)
    accel.reset()


class Overdue(Exception):
    """What a program's own handler raises; an Exception, as most are."""


ERRORS = [KeyboardInterrupt, SystemExit, Overdue]


def send() -> None:
    signal.raise_signal(signal.SIGALRM)


_numbers = iter(range(1, 10**6))


def fresh_function() -> tuple[Callable[[torch.Tensor], torch.Tensor], Any]:
    """A function whose graph nobody has compiled yet, and the plain one."""
    number = float(next(_numbers)) + 0.125

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * number + 1.0).softmax(-1)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * number + 1.0).softmax(-1)

    return accel.optimize(f), plain


# Steps of accel's own work on a root's way, in order.
STEPS = [
    (Driver, "_decide_function"),
    (Driver, "_wants_recording"),
    (Driver, "_record"),
    (Recorder, "__init__"),
    (Recorder, "binary"),
    (Recorder, "call"),
    (Recorder, "glob"),
    (Recorder, "after_operation"),
    (Recorder, "finish"),
    (Recorder, "conclude"),
    (Driver, "_recorded"),
    (Installer, "compile"),
    (Installer, "_submit"),
    (CompileService, "submit"),
    (CompileService, "_begin"),
    (Worker, "submit"),
    (Worker, "_pump"),
    (Worker, "_accept"),
    (CompileService, "poll"),
    (CompileService, "_finished"),
    (CompileService, "_answer"),
    (Installer, "_install"),
]


def owner_of(kind: Any, name: str) -> Any:
    return next(c for c in kind.__mro__ if name in vars(c))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[0].__name__}.{step[1]}")
def test_a_handler_raises_in_a_step_of_ours(step: Any, error: type[BaseException]) -> None:
    f, plain = fresh_function()
    x, arrived = torch.randn(4, 8), []
    with (
        handling(signal.SIGALRM, raising(error("stop"))),
        inside(owner_of(*step), step[1], send) as hit,
    ):
        deadline = time.monotonic() + WAIT_S
        while not hit.happened or not arrived:
            assert time.monotonic() < deadline, f"hit: {hit.happened}, raised: {arrived}"
            try:
                assert torch.allclose(f(x), plain(x))
                if not hit.happened:
                    accel.wait(0.05)
            except error as raised:
                arrived.append(raised)
    assert [str(e) for e in arrived] == ["stop"]
    assert not root_of(f).is_recording
    assert served(lambda: torch.testing.assert_close(f(x), plain(x))) >= 2
    assert not root_of(f).pending


def test_ctrl_c_at_every_event_of_a_recording() -> None:
    """State is eager's up to some instruction, and no recording goes on behind it."""
    x, hits = torch.randn(4, 8), 0
    for at in range(1, 60):
        state = SimpleNamespace(begun=0, ended=0)

        def f(x: torch.Tensor, state: Any = state) -> torch.Tensor:
            state.begun = state.begun + 1
            y = torch.relu(x * 2.5 + 1.0)
            state.ended = state.ended + 1
            return y.softmax(-1)

        accel.optimize(f)
        events = ("binary", "call", "attr", "setattr", "glob")
        count = [0]

        def event(at: int = at, count: list[int] = count) -> None:
            count[0] += 1
            if count[0] == at:
                signal.raise_signal(signal.SIGINT)

        plains = {name: owner_of(Recorder, name) for name in events}
        saved = {name: vars(owner)[name] for name, owner in plains.items()}
        for name, owner in plains.items():

            def told(self: Any, *args: Any, _plain: Any = saved[name]) -> Any:
                event()
                return _plain(self, *args)

            setattr(owner, name, told)
        voided = accel.counters()["recordings_voided"]
        try:
            f(x)
        except KeyboardInterrupt:
            hits += 1
            assert (state.begun, state.ended) in ((0, 0), (1, 0), (1, 1))
            assert accel.counters()["recordings_voided"] == voided + 1
        else:
            assert count[0] < at
        finally:
            for name, owner in plains.items():
                setattr(owner, name, saved[name])
        if count[0] < at:
            break
    assert hits >= 8
    before = state.ended
    assert served(lambda: f(x)) >= 3  # the counters change: it is recorded twice
    assert state.ended == before + 6


@pytest.mark.parametrize("name", ["binary", "call", "after_operation", "glob"])
def test_an_interrupt_that_the_function_catches_is_no_path_of_the_trace(name: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        try:
            y = torch.relu(x * 3.5 + 1.0)
            z = y.softmax(-1)
        except KeyboardInterrupt:
            z = x * 1000.0
        return z + 1.0

    x = torch.randn(4, 8)
    right = f(x)
    accel.optimize(f)
    with inside(owner_of(Recorder, name), name, lambda: signal.raise_signal(signal.SIGINT)) as hit:
        assert torch.equal(f(x), x * 1000.0 + 1.0)
    assert hit.recording
    assert served(lambda: torch.testing.assert_close(f(x), right)) >= 4


@pytest.mark.parametrize("at", range(1, 4))
@pytest.mark.parametrize("name", ["binary", "call", "attr", "setattr", "after_operation"])
def test_a_handler_that_changes_what_the_trace_wrote(name: str, at: int) -> None:
    state = SimpleNamespace(flag=0, scale=torch.ones(8))

    def f(x: torch.Tensor) -> torch.Tensor:
        state.flag = 0
        y = torch.relu(x * state.scale + 1.0)
        y = y + 1.0
        if state.flag:
            y = y * 100.0
        return y.softmax(-1)

    x = torch.randn(4, 8)
    right = f(x)
    accel.optimize(f)

    def handler(*_: Any) -> None:
        state.flag, state.scale = 1, state.scale + 1.0

    owner = owner_of(Recorder, name)
    with handling(signal.SIGALRM, handler), inside(owner, name, send, at) as hit:
        f(x)
    assert hit.calls < at or (hit.recording and state.scale.max() == 2.0)
    state.scale = torch.ones(8)
    assert served(lambda: torch.testing.assert_close(f(x), right)) >= 4


def test_timers_while_recording() -> None:
    """A handler that changes what the trace reads, at any time of many recordings."""
    state, ticks = SimpleNamespace(mode=0), [0]

    def f(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        first = state.mode
        for _ in range(6):
            x = torch.relu(x * 1.5 + float(state.mode))
        return x + first, first

    def tick(*_: Any) -> None:
        ticks[0] += 1
        state.mode = ticks[0] % 2

    like = type(f)(f.__code__, f.__globals__, "like", None, f.__closure__)
    accel.optimize(f)
    x = torch.randn(4, 8)
    with handling(signal.SIGALRM, tick):
        for k in range(60):
            accel.reset()
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + k * 2e-5, 1e-3)
            f(x)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for mode in (0, 1):
                state.mode = mode
                torch.testing.assert_close(f(x), like(x))
    assert ticks[0] > 20
    assert served(lambda: torch.testing.assert_close(f(x), like(x))) >= 4


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Overdue])
def test_handlers_that_raise_in_replays(dynamic: bool, error: type[BaseException]) -> None:
    """Each exception arrives once; a call that returns is right."""
    kept: dict[str, torch.Tensor] = {}

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * 2.5 + 1.0)
        kept["last"] = y
        return y.softmax(-1)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 2.5 + 1.0).softmax(-1)

    accel.optimize(dynamic=dynamic)(f)
    x = torch.randn(4, 8)
    wanted, handled, caught = plain(x), [0], 0
    assert served(lambda: f(x)) >= 3  # the key is new at first: it is recorded twice

    def handler(*_: Any) -> None:
        handled[0] += 1
        raise error

    before = accel.counters()["calls_compiled"]
    with handling(signal.SIGALRM, handler):
        calls, end = 0, time.monotonic() + 0.6
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + calls % 17 * 1e-5)
                for _ in range(20):
                    result = f(x)
                    if not torch.allclose(result, wanted):
                        pytest.fail("a wrong answer")
                time.sleep(0.01)
            except error:
                caught += 1
            calls += 1
    assert caught == handled[0] >= 20
    assert accel.counters()["calls_compiled"] - before > 100
    assert accel.counters()["deopts"] == 0
    assert served(lambda: torch.testing.assert_close(f(x), wanted)) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, Overdue])
def test_a_handler_raises_in_code_for_open_sizes(error: type[BaseException]) -> None:
    """What serves such calls is partly Python code of ours."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 4.5 + 1.0).softmax(-1)

    accel.optimize(dynamic=True)(f)
    x = torch.randn(5, 8)
    wanted = torch.relu(x * 4.5 + 1.0).softmax(-1)
    assert served(lambda: f(x)) >= 4
    with (
        handling(signal.SIGALRM, raising(error("stop"))),
        inside(Family, "__call__", send) as hit,
        pytest.raises(error, match="stop"),
    ):
        f(x)
    assert hit.happened
    assert served(lambda: torch.testing.assert_close(f(x), wanted)) == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, Overdue])
def test_a_backend_of_the_users_is_interrupted(error: type[BaseException]) -> None:
    runs = [0]

    def mine(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs[0] += 1
            if runs[0] == 3:
                send()
            return gm(*args)

        return run

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 5.5)

    accel.optimize(mine)(f)
    x = torch.ones(4)
    with handling(signal.SIGALRM, raising(error("stop"))):
        outcomes = []
        for _ in range(8):
            try:
                outcomes.append(float(f(x)[0]))
            except error as stop:
                outcomes.append(str(stop))
            accel.wait(WAIT_S)
    assert runs[0] >= 5
    assert outcomes.count("stop") == 1 and outcomes.count(5.5) == 7


def test_ctrl_c_ends_a_wait() -> None:
    f, plain = fresh_function()
    x = torch.randn(4, 8)
    f(x)
    current = driver.current
    assert current is not None and current.service.pending == 1
    started = time.monotonic()
    with (
        inside(CompileService, "poll", lambda: signal.raise_signal(signal.SIGINT), at=2),
        pytest.raises(KeyboardInterrupt),
    ):
        accel.wait(WAIT_S)
    assert time.monotonic() - started < 20
    assert served(lambda: torch.testing.assert_close(f(x), plain(x))) >= 4


def test_ctrl_c_while_a_call_waits_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    f, plain = fresh_function()
    current = driver.current
    assert current is not None
    config = dataclasses.replace(current.config, sync=True)
    monkeypatch.setattr(current.installer, "config", config)
    x = torch.randn(4, 8)
    with (
        inside(CompileService, "idle", lambda: signal.raise_signal(signal.SIGINT)) as hit,
        pytest.raises(KeyboardInterrupt),
    ):
        f(x)
    assert hit.recording and root_of(f).pending == 1
    assert served(lambda: torch.testing.assert_close(f(x), plain(x))) >= 4


def looping(log: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    def f(x: torch.Tensor) -> torch.Tensor:
        for k in range(4):
            x = torch.relu(x * 1.25 + k).softmax(-1)
            log.append(x.sum().item())
        return x * 2.0

    return f


SEGMENT_STEPS = [
    (SegmentRun, "at_node"),
    (SegmentRun, "at_landing"),
    (SegmentRun, "finish"),
    (SegmentRecorder, "close"),
    (SegmentRecorder, "binary"),
]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Overdue])
@pytest.mark.parametrize("step", SEGMENT_STEPS, ids=lambda step: f"{step[0].__name__}.{step[1]}")
def test_a_handler_raises_while_stretches_are_recorded(
    step: Any, error: type[BaseException]
) -> None:
    log: list[float] = []
    wanted_log: list[float] = []
    f, plain = accel.optimize(looping(log)), looping(wanted_log)
    x = torch.randn(4, 8)
    wanted = plain(x)
    f(x)  # finds an exit; the next call is recorded stretch by stretch
    outcomes = []
    with (
        handling(signal.SIGALRM, raising(error("stop"))),
        inside(owner_of(*step), step[1], send) as hit,
    ):
        for _ in range(12):
            log.clear()
            try:
                torch.testing.assert_close(f(x), wanted)
                assert log == pytest.approx(wanted_log)
            except error:
                outcomes.append(len(log))
                assert log == pytest.approx(wanted_log[: len(log)])
            accel.wait(WAIT_S)
    assert hit.happened and hit.recording and len(outcomes) == 1
    assert served(lambda: torch.testing.assert_close(f(x), wanted)) >= 12


def test_timers_in_a_split_loop() -> None:
    log: list[float] = []
    wanted_log: list[float] = []
    f, plain = accel.optimize(looping(log)), looping(wanted_log)
    x = torch.randn(4, 8)
    wanted, handled, caught = plain(x), [0], 0
    assert served(lambda: f(x), 10) >= 20

    def handler(*_: Any) -> None:
        handled[0] += 1
        raise Overdue

    with handling(signal.SIGALRM, handler):
        for k in range(150):
            log.clear()
            try:
                signal.setitimer(signal.ITIMER_REAL, 5e-5 + k * 3e-6)
                result = f(x)
                time.sleep(0.01)
                assert torch.allclose(result, wanted)
            except Overdue:
                caught += 1
            assert log == pytest.approx(wanted_log[: len(log)])
    assert caught == handled[0] >= 100
    assert served(lambda: torch.testing.assert_close(f(x), wanted), 10) >= 20


def test_an_interrupt_in_backward() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w).softmax(-1)

    x, w = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(f(x, w).pow(2).sum(), w)
    accel.optimize(f)

    def step() -> None:
        (got,) = torch.autograd.grad(f(x, w).pow(2).sum(), w)
        torch.testing.assert_close(got, wanted)

    assert served(step) >= 4
    for point in ("output", "leaf"):
        runs = accel.counters()["backwards_compiled"]
        y = f(x, w)
        (y if point == "output" else w).register_hook(
            lambda grad: signal.raise_signal(signal.SIGINT)
        )
        with pytest.raises(KeyboardInterrupt):
            y.pow(2).sum().backward()
        if w._backward_hooks:
            w._backward_hooks.clear()
        w.grad = None
        ran = accel.counters()["backwards_compiled"] - runs
        assert ran == (1 if point == "leaf" else 0)
        assert served(step) >= 3
