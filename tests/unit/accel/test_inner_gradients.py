"""The gradient at a result of a compiled call that another of its results was computed from: never
a wrong one. What asks for it gets an error once, and eager's answer from then on."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import accel

Asks = Callable[[Any, torch.Tensor, torch.Tensor], Any]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    yield
    accel.reset()


def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * 2
    return y, y.exp()


def retained(x: Any, y: torch.Tensor, e: torch.Tensor) -> Any:
    y.retain_grad()
    e.sum().backward()
    return y.grad, x.grad


def asked(x: Any, y: torch.Tensor, e: torch.Tensor) -> Any:
    return torch.autograd.grad((y * e).sum(), y)


def hooked(x: Any, y: torch.Tensor, e: torch.Tensor) -> Any:
    y.register_hook(lambda g: g * 0)
    e.sum().backward()
    return (x.grad,)


def of_leaf(x: Any, y: torch.Tensor, e: torch.Tensor) -> Any:
    (y + e).sum().backward()
    return (x.grad,)


def of_last(x: Any, y: torch.Tensor, e: torch.Tensor) -> Any:
    e.retain_grad()
    e.register_hook(lambda g: g * 3)
    (y + e).sum().backward()
    return x.grad, e.grad


def outcomes(asks: Asks, calls: int = 5) -> list[Any]:
    """Of each call, the error or whether its gradients are eager's."""
    function = types.FunctionType(both.__code__, both.__globals__)
    optimized: Any = accel.optimize(types.FunctionType(both.__code__, both.__globals__))
    found: list[Any] = []
    for _ in range(calls):
        x, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        want = asks(x, *function(x))
        try:
            got = asks(other, *optimized(other))
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append(all(map(torch.equal, got, want)))
        assert accel.wait(60)
    return found


@pytest.mark.parametrize("asks", [retained, asked, hooked])
def test_it_is_an_error_once(asks: Asks) -> None:
    first, error, *rest = outcomes(asks)
    assert first is True and rest == [True] * 3
    assert "asks for the gradient at a result of a compiled call that another" in error


@pytest.mark.parametrize("asks", [of_leaf, of_last])
def test_other_gradients_are_served(asks: Asks) -> None:
    assert outcomes(asks) == [True] * 5
    assert accel.counters()["backwards_compiled"] >= 3
