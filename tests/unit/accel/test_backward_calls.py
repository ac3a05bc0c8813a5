"""`loss.backward()` by the short way: eager's gradients, errors, tracebacks and hooks."""

from __future__ import annotations

import cProfile
import inspect
import logging
import pstats
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import accel
from accel import backward_calls
from accel.rewriter import prologue


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    accel.optimize(lambda x: x)  # starts the driver
    backward_calls.install()
    yield
    accel.reset()
    backward_calls.install()


def is_short(tensor: torch.Tensor, **given: Any) -> bool:
    """Whether others than torch's functions call the engine."""
    seen: list[Any] = []

    def hook(_gradient: torch.Tensor) -> None:
        frame: Any = sys._getframe(1)
        while frame.f_code is not is_short.__code__:
            seen.append(frame.f_code)
            frame = frame.f_back

    handle = tensor.register_hook(hook)
    tensor.backward(**given)
    handle.remove()
    names = ["_engine_run_backward", "backward", "backward"]
    assert [code.co_name for code in seen][:3] == names
    return torch.autograd.backward.__code__ not in seen


def loss(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(sizes, dtype=dtype, requires_grad=True)
    return x * 3


def test_the_common_case_is_short() -> None:
    assert prologue.has_prologue(torch.Tensor.backward.__code__)
    assert is_short(loss())
    assert is_short(loss(1, 1))
    assert is_short(loss(3), gradient=torch.ones(3))
    assert is_short(loss(3), gradient=torch.ones(3, dtype=torch.float64))
    assert is_short(loss(), retain_graph=True)
    assert is_short(torch.nn.Parameter(torch.ones(())) * 1)


def test_everything_else_is_torch_s() -> None:
    x = torch.ones((), requires_grad=True)
    assert not is_short(x * 2, inputs=[x])
    assert not is_short(x * 2, create_graph=True)
    assert not is_short(x * 2, retain_graph=0)
    with accel.set_stance("force_eager"):
        assert not is_short(x * 2)

    class Mine(torch.Tensor):
        pass

    with torch._C.DisableTorchFunction():
        mine = (x * 2).as_subclass(Mine)
        assert not is_short(mine)


@pytest.mark.parametrize("name", ["backward", "_make_grads"])
def test_what_somebody_has_replaced_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = getattr(torch.autograd, name), []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, name, mine)
    loss().backward()
    assert calls == [name]


def test_a_replaced_ones_like_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.ones_like
    monkeypatch.setattr(torch, "ones_like", lambda *args, **kwargs: original(*args, **kwargs) * 128)
    x = torch.ones((), requires_grad=True)
    (x * 3).backward()
    assert x.grad == 384


def test_an_engine_that_somebody_has_replaced_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import autograd

    original, calls = autograd._engine_run_backward, []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(autograd, "_engine_run_backward", mine)
    y = loss()
    y.backward(retain_graph=True)
    backward_calls.uninstall()
    y.backward(retain_graph=True)
    (short, options), (long, others) = calls
    assert options == others
    assert short[0][0] is long[0][0] is y
    assert short[2:] == long[2:]
    assert torch.equal(short[1][0], long[1][0])


def test_code_that_somebody_has_replaced_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*args: Any, **kwargs: Any) -> None:
        raise KeyError("mine")

    monkeypatch.setattr(torch.autograd.backward, "__code__", mine.__code__)
    with pytest.raises(KeyError, match="mine"):
        loss().backward()


def test_a_mode_sees_the_call() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    y = loss()
    with Mode():
        y.backward()
    assert torch.Tensor.backward in seen


def test_a_profiler_sees_torch_s_functions() -> None:
    profiler = cProfile.Profile()
    profiler.runcall(lambda: loss().backward())
    names = {name for _, _, name in pstats.Stats(profiler).stats}  # type: ignore[attr-defined]
    assert {"backward", "_make_grads", "_engine_run_backward"} <= names


def test_torch_s_log_is_written(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "torch.autograd.graph"):
        loss().backward()
    assert "MulBackward0" in caplog.text


def twice() -> None:
    y = loss()
    y.backward()
    y.backward()


def failing_hook() -> None:
    y = loss()
    y.register_hook(lambda g: 1 / 0)
    y.backward()


def failing_function() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            raise ValueError("in the program")

    Failing.apply(loss()).backward()


def in_a_hook_of_a_hook() -> None:
    y = loss()
    y.register_hook(lambda g: failing_hook())
    y.backward()


ERRORS: list[Callable[[], Any]] = [
    twice, failing_hook, failing_function, in_a_hook_of_a_hook,
    lambda: torch.ones(()).backward(), lambda: loss(3).backward(),
    lambda: loss(3).backward(torch.ones(4)), lambda: loss(3).backward(1.0),
    lambda: loss(3).backward(torch.ones(3, dtype=torch.complex64)),
    lambda: (loss(1).to(torch.complex64)).backward(),
    lambda: loss().detach().backward(), lambda: loss().backward(inputs=[]),
    lambda: torch.Tensor.backward(3), lambda: loss().backward(retain_graph="yes", wrong=1),
    lambda: torch.ones(2, 2).to_sparse().backward(),
]  # fmt: skip


def text_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception:
        return traceback.format_exc()
    return "no error"


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors_look_as_torch_s(number: int) -> None:
    short = text_of(ERRORS[number])
    backward_calls.uninstall()
    assert short == text_of(ERRORS[number])
    assert short != "no error"


def seen_from_a_hook() -> tuple[list[Any], list[Any]]:
    """The stack, and where warnings are placed."""
    stacks: list[Any] = []

    def hook(_gradient: torch.Tensor) -> None:
        stacks.extend(
            (f.filename, f.lineno, f.function, f.code_context, f.positions) for f in inspect.stack()
        )
        for level in range(1, 7):
            warnings.warn(f"level {level}", stacklevel=level)

    y = loss()
    y.register_hook(hook)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        y.backward()
    return stacks, [(str(w.message), w.filename, w.lineno) for w in told]


def test_from_within_the_stack_looks_as_torch_s() -> None:
    found = []
    for installed in (True, False):
        if not installed:
            backward_calls.uninstall()
        found.append(seen_from_a_hook())
    assert found[0] == found[1]
    assert len(found[0][1]) == 6


def test_no_reference_is_lost_or_kept() -> None:
    x = torch.ones((), requires_grad=True)
    gradient = torch.ones(())
    error = ValueError("mine")

    def fail(_gradient: torch.Tensor) -> None:
        raise error

    def once(fails: bool) -> None:
        y = x * 2
        if fails:
            y.register_hook(fail)
            with pytest.raises(ValueError, match="mine"):
                y.backward(gradient)
            error.__traceback__ = None
        else:
            y.backward(gradient)
            (x * 2).backward()

    def counts() -> list[int]:
        watched = (x, gradient, error, torch.autograd, torch.Tensor.backward.__code__,
                   torch.autograd.backward.__code__, None, True, False)  # fmt: skip
        return [sys.getrefcount(o) for o in watched]

    for fails in (True, False):
        for _ in range(3):
            once(fails)
    before = counts()
    for _ in range(200):
        once(True)
        once(False)
    assert all(abs(a - b) < 20 for a, b in zip(before, counts(), strict=True))


def test_functions_that_are_not_known_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backward_calls.uninstall()
    monkeypatch.setattr(backward_calls, "_rewritten", [])
    monkeypatch.setattr(torch.autograd, "_make_grads", lambda *args, **kwargs: surprise(*args))
    backward_calls.install()
    assert not prologue.has_prologue(torch.Tensor.backward.__code__)


def surprise(*_: Any) -> None: ...
