"""The gradient at a result of a compiled call that another of its results was computed from (an
inner one): eager's, at once, and in compiled parts from then on."""

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


WEIGHT = torch.linspace(-1, 1, 9).view(3, 3).requires_grad_()


def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    return y, y.exp()


def chained(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a = (x @ WEIGHT).relu()
    b = (a @ WEIGHT).tanh()
    return a, b, (b @ WEIGHT + a).sum()


def written(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    y.add_(1)
    return y, y.exp()


def random(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.nn.functional.dropout(x @ WEIGHT)
    return y, (y * y).sum()


def loss_first(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = x @ WEIGHT
    return torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])), logits


def seen_before_a_write(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    view = y.view(-1)
    y.add_(1)
    return y, view.exp()


def retained(x: Any, *results: torch.Tensor) -> Any:
    for result in results:
        result.retain_grad()
    results[-1].sum().backward()
    return *(result.grad for result in results), x.grad, WEIGHT.grad


def asked(x: Any, *results: torch.Tensor) -> Any:
    total = results[-1].sum() + (results[0] * results[0]).sum()
    return torch.autograd.grad(total, [results[0], x, WEIGHT], allow_unused=True)


def changed(x: Any, *results: torch.Tensor) -> Any:
    for result in results:
        result.register_hook(lambda g: g * 0.5)
    sum(result.sum() for result in results).backward()  # type: ignore[union-attr]
    return x.grad, WEIGHT.grad


def watched_at_the_node(x: Any, *results: torch.Tensor) -> Any:
    seen: list[Any] = []
    results[0].grad_fn.register_prehook(lambda g: seen.append(g[0].clone()))  # type: ignore[union-attr]
    results[-1].sum().backward()
    return (*seen, x.grad)


def differentiated_twice(x: Any, *results: torch.Tensor) -> Any:
    inputs = [x, results[0]]
    gradients = torch.autograd.grad(results[-1].sum(), inputs, create_graph=True, allow_unused=True)
    sum((g * g).sum() for g in gradients if g is not None).backward()  # type: ignore[union-attr]
    return x.grad, WEIGHT.grad


def asked_late(x: Any, *results: torch.Tensor) -> Any:
    results[-1].sum().backward(retain_graph=True)
    results[0].retain_grad()
    results[-1].sum().backward()
    return results[0].grad, x.grad, WEIGHT.grad


def not_asked(x: Any, *results: torch.Tensor) -> Any:
    sum(result.sum() for result in results).backward()  # type: ignore[union-attr]
    return x.grad, WEIGHT.grad


def same(ours: Any, theirs: Any) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def outcomes(program: Any, asks: Asks, calls: int = 12) -> list[Any]:
    """Of each call, the error or whether its gradients are eager's."""
    function = types.FunctionType(program.__code__, program.__globals__)
    optimized: Any = accel.optimize(types.FunctionType(program.__code__, program.__globals__))
    found: list[Any] = []
    for seed in range(calls):

        def outcome(called: Any, seed: int = seed) -> Any:
            x = torch.linspace(-1, 1, 6).view(2, 3).clone().requires_grad_()
            WEIGHT.grad = None
            torch.manual_seed(seed)
            return asks(x, *called(x))

        want = outcome(function)
        try:
            got = outcome(optimized)
        except RuntimeError as error:
            found.append(str(error))
        else:
            found.append(len(got) == len(want) and all(map(same, got, want)))
        assert accel.wait(60)
    return found


ASKS = [
    retained,
    asked,
    changed,
    watched_at_the_node,
    differentiated_twice,
    asked_late,
]


@pytest.mark.parametrize("asks", ASKS)
@pytest.mark.parametrize("program", [both, chained, written, random])
def test_it_is_eagers(program: Any, asks: Asks) -> None:
    assert outcomes(program, asks) == [True] * 12
    counters = accel.counters()
    assert counters["backwards_recomputed"] >= 1  # somebody asked, and a compiled call was asked
    # Second derivatives are left to eager.
    assert counters["segments_served"] >= 3 or asks is differentiated_twice


@pytest.mark.parametrize("asks", ASKS)
def test_a_loss_beside_its_logits(asks: Asks) -> None:
    assert outcomes(loss_first, asks) == [True] * 12


@pytest.mark.parametrize("program", [both, chained, written, random, loss_first])
def test_nobody_asks(program: Any) -> None:
    """One plan serves the backward of all results, also where it goes from one to another."""
    assert outcomes(program, not_asked) == [True] * 12
    counters = accel.counters()
    assert counters["backwards_compiled"] >= 4 and counters["backwards_recomputed"] == 0


def test_a_view_from_before_a_write_is_an_error_once() -> None:
    first, error, *rest = outcomes(seen_before_a_write, retained)
    assert first is True and rest == [True] * 10
    assert "asks for the gradient at a result of a compiled call that others share" in error


def test_a_backward_that_fails_half_way_leaves_nothing_behind() -> None:
    """What one run of the engine carried is not taken for another's."""
    optimized: Any = accel.optimize(types.FunctionType(both.__code__, both.__globals__))
    for _ in range(3):
        x = torch.ones(2, requires_grad=True)
        y, e = optimized(x)
        assert accel.wait(60)

        def fail(_: Any) -> None:
            raise KeyError("mine")

        handle = e.register_hook(fail)
        with pytest.raises(KeyError):
            (y.sum() + e.sum()).backward(retain_graph=True)
        handle.remove()
        e.sum().backward()
        assert torch.allclose(x.grad, 2 * torch.exp(torch.tensor(2.0)))  # type: ignore[arg-type]
