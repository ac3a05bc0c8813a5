"""Modules reloaded, roots deleted, collectors at work: around roots in every state."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from disturbing import WAIT_S, inside, new_function, root_of, served

import accel
from accel import driver, runtime, trial
from accel.capture.operations import OperationEvents
from accel.driver import Driver

STATES = ("recorded", "pending", "compiled")
_numbers = iter(range(1, 10**6))


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trial, "FIRST_REVIEW", 10**9)  # what is compiled stays, slow or not
    yield
    assert accel.wait(WAIT_S)
    accel.reset()


def current() -> Driver:
    assert driver.current is not None
    return driver.current


# ------------------------------------------------------------------ reloading


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """source(text) writes a module anew and gives it, imported or reloaded."""
    name = f"reloaded_{next(_numbers)}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str) -> Any:
        (tmp_path / f"{name}.py").write_text(f"import torch\n{text}")
        importlib.invalidate_caches()
        if name in sys.modules:
            return importlib.reload(sys.modules[name])
        return importlib.import_module(name)

    yield write
    sys.modules.pop(name, None)


def bring(state: str, call: Callable[[], Any], root: Any) -> None:
    """A root into a state, which is shown to be that."""
    call()
    if state == "recorded":
        call()
    elif state == "compiled":
        assert served(call) >= 4 and root.state == "compiled"
    else:
        assert root.pending == 1


OLD = "SCALE = {}\ndef f(x):\n    return torch.relu(x * SCALE + 1.0).softmax(-1)\n"
NEW = "SCALE = {}\ndef f(x):\n    y = x - 7.0\n    return torch.relu(y * SCALE)\n"


@pytest.mark.parametrize("enabled", [False, True], ids=["optimize", "enable"])
@pytest.mark.parametrize("state", STATES)
def test_the_module_of_a_root_is_reloaded(state: str, enabled: bool, source: Any) -> None:
    number, x = next(_numbers), torch.randn(4, 8)
    module = source(OLD.format(number))
    if enabled:
        accel.enable(module.__name__)
        module.f(x)  # enabled roots are recorded at their second call
    else:
        accel.optimize(module.f)
    bring(state, lambda: module.f(x), root_of(module.f))
    old = module.f
    again = source(NEW.format(number))
    assert again is module and module.f is not old
    if not enabled:
        accel.optimize(module.f)
    plain = torch.relu((x - 7.0) * number)
    assert served(lambda: torch.testing.assert_close(module.f(x), plain)) >= 3
    # The old function lives on in the new namespace, as Python has it.
    plain = torch.relu(x * number + 1.0).softmax(-1)
    served(lambda: torch.testing.assert_close(old(x), plain))
    accel.disable(module.__name__)


@pytest.mark.parametrize("state", STATES)
def test_the_module_of_a_callee_is_reloaded(state: str, source: Any) -> None:
    number, x = next(_numbers), torch.randn(4, 8)
    module = source(OLD.format(number))

    def root(x: torch.Tensor) -> torch.Tensor:
        return module.f(x) + 1.0

    accel.optimize(root)
    bring(state, lambda: root(x), root_of(root))
    source(NEW.format(number + 0.5))
    wanted = torch.relu((x - 7.0) * (number + 0.5)) + 1.0
    assert served(lambda: torch.testing.assert_close(root(x), wanted)) >= 3
    # A name that the new text does not have stays, as Python has it; what changes is noticed.
    source(f"SCALE = {number + 1}\n")
    wanted = torch.relu((x - 7.0) * (number + 1)) + 1.0
    for _ in range(4):
        torch.testing.assert_close(root(x), wanted)
        accel.wait(WAIT_S)


def test_a_module_is_reloaded_while_it_is_recorded(source: Any) -> None:
    number, x = next(_numbers), torch.randn(4, 8)
    module = source(OLD.format(number))

    def root(x: torch.Tensor) -> torch.Tensor:
        return module.f(x) + 1.0

    accel.optimize(root)
    change = lambda: source(NEW.format(number))  # noqa: E731
    with inside(OperationEvents, "after_operation", change, at=2) as hit:
        root(x)
    assert hit.recording
    wanted = torch.relu((x - 7.0) * number) + 1.0
    assert served(lambda: torch.testing.assert_close(root(x), wanted)) >= 3


# ------------------------------------------------------------------- deletion


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) * self.linear.weight.sum()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("make", [lambda: new_function(next(_numbers) + 0.25), Model])
def test_a_root_is_deleted(make: Callable[[], Any], state: str) -> None:
    target, x = accel.optimize(make()), torch.randn(4, 8)
    bring(state, functools.partial(target, x), root_of(target))
    dead = weakref.ref(target)
    del target
    assert accel.wait(WAIT_S)
    gc.collect()
    assert dead() is None
    other = accel.optimize(make())
    assert served(lambda: other(x)) >= 4


def resident_kb() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])


@pytest.mark.parametrize("drops", ["pending", "compiled"])
@pytest.mark.parametrize("kind", ["closure", "module"])
def test_hundreds_of_roots_come_and_go(kind: str, drops: str) -> None:
    def closure() -> Callable[[torch.Tensor], torch.Tensor]:
        def f(x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x * 2.5).softmax(-1)

        return f

    make = closure if kind == "closure" else Model
    x, dead = torch.randn(4, 8), []

    def one() -> None:
        target = accel.optimize(make())
        for _ in range(3 if drops == "compiled" else 1):
            target(x)
            if drops == "compiled":
                accel.wait(WAIT_S)
        dead.append(weakref.ref(target))

    for _ in range(250):
        one()
    accel.wait(WAIT_S)
    gc.collect()
    assert [r() for r in dead] == [None] * 250
    roots, objects, memory = len(current().roots), len(gc.get_objects()), resident_kb()
    for _ in range(250):
        one()
    accel.wait(WAIT_S)
    gc.collect()
    assert [r() for r in dead] == [None] * 500
    dead.clear()
    assert len(current().roots) - roots < 200  # the last dead ones are kept, for the summary
    assert len(gc.get_objects()) - objects < 400
    assert resident_kb() - memory < 8192


# ----------------------------------------------------------------- collectors


@pytest.fixture
def eager_collector() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    yield
    gc.set_threshold(*before)


class Node(SimpleNamespace):
    """Can be referred to weakly."""


class Cyclic:
    """Garbage for the collector, with something to do at its end."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.me, self.action = self, action

    def __del__(self) -> None:
        self.action()


def leave_garbage(way: str, action: Callable[[], Any]) -> contextlib.AbstractContextManager[Any]:
    """Whenever the collector runs, `action` does: in the way that is named."""
    stack = contextlib.ExitStack()
    if way == "gc.callbacks":
        callback = lambda phase, info: action()  # noqa: E731
        gc.callbacks.append(callback)
        stack.callback(gc.callbacks.remove, callback)
        return stack

    def again() -> None:
        action()
        if alive[0]:
            make()

    def make() -> None:
        enabled = gc.isenabled()
        gc.disable()  # garbage before the collector comes: else it is taken for long-lived
        if way == "__del__":
            Cyclic(again)
        else:
            cycle = Node()
            cycle.me = cycle
            if way == "finalize":
                weakref.finalize(cycle, again).atexit = False
            else:
                references.append(weakref.ref(cycle, lambda _: again()))
            del cycle
        if enabled:
            gc.enable()

    references: list[Any] = []
    alive = [True]
    stack.callback(alive.__setitem__, 0, False)
    stack.callback(references.clear)  # and they live until then
    make()
    return stack


WAYS = ("gc.callbacks", "__del__", "finalize", "weakref callback")


@pytest.mark.parametrize("way", WAYS)
def test_what_a_collector_runs_is_no_part_of_a_trace(way: str, eager_collector: None) -> None:
    state = SimpleNamespace(flag=0, runs=0, recorded=0, noise=torch.zeros(3))

    def f(x: torch.Tensor) -> torch.Tensor:
        state.flag = 0
        y = torch.relu(x * 2.0 + 1.0)
        parts = [[y], [y + 1.0], (y, [y - 1.0])]
        z = parts[0][0] + parts[1][0]
        if state.flag:
            z = z * 100.0
        return z.softmax(-1)

    busy = [False]

    def action() -> None:
        if busy[0]:
            return
        busy[0] = True
        state.runs += 1
        state.recorded += runtime.native.is_recording()
        state.flag = 1
        state.noise = (state.noise + 1.0) * torch.ones(3)
        busy[0] = False

    x = torch.randn(4, 8)
    right = f(x)
    accel.optimize(f)
    with leave_garbage(way, action):
        for _ in range(12):
            accel.reset()
            f(x)  # its own answer may have been changed by the collector, as in eager
            accel.wait(WAIT_S)
            with_collector = gc.isenabled()
            gc.disable()
            for _ in range(2):
                torch.testing.assert_close(f(x), right)
            if with_collector:
                gc.enable()
    assert state.runs > 20 and state.recorded > 10, vars(state)
    gc.collect()
    accel.reset()
    assert served(lambda: torch.testing.assert_close(f(x), right)) >= 3
    for root in current().roots:
        for variant in root.variants:
            assert variant.operations <= 9


@pytest.mark.parametrize("way", WAYS)
def test_a_collection_in_a_recorded_function(way: str) -> None:
    """An exit; what it runs is Python's."""
    seen: list[float] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x * 2.0 + 1.0)
        gc.collect()
        return (y + float(len(seen) > 10**6)).softmax(-1)

    x = torch.randn(4, 8)
    right = f(x)
    accel.optimize(f)
    with leave_garbage(way, lambda: seen.append(float((torch.ones(2) * 3.0).sum()))):
        for _ in range(8):
            before = len(seen)
            torch.testing.assert_close(f(x), right)
            assert len(seen) > before
            accel.wait(WAIT_S)
    assert set(seen) == {6.0}


def test_an_object_dies_in_the_middle_of_a_call() -> None:
    """Its finaliser runs where it runs in eager."""

    class Dying:
        def __init__(self, log: list[str]) -> None:
            self.log, self.scale = log, 2.0

        def __del__(self) -> None:
            self.log.append("dead")

    def f(holder: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * holder.it.scale
        holder.it = None
        holder.log.append("after")
        return torch.relu(y)

    plain = types.FunctionType(f.__code__, f.__globals__)
    accel.optimize(f)
    for function in (plain, f, f, f, f):
        log: list[str] = []
        holder = SimpleNamespace(it=Dying(log), log=log)
        torch.testing.assert_close(function(holder, torch.ones(3)), torch.full((3,), 2.0))
        assert log == ["dead", "after"], function
        accel.wait(WAIT_S)
