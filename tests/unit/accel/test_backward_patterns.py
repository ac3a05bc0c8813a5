"""A backward at some of the results only: zeros serve for the others until its own plan is there."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

import accel


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    yield
    accel.reset()


WEIGHT = torch.linspace(-1, 1, 9).view(3, 3).requires_grad_()


def loss_and_logits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (x @ WEIGHT).tanh()
    return (logits * logits).sum(), logits


def gradient_of(loss: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, WEIGHT)
    return found


def test_calls_are_served_while_the_plan_is_compiled() -> None:
    x = torch.randn(4, 3)
    expected = gradient_of(loss_and_logits(x)[0])
    root = accel.optimize(loss_and_logits)
    gradient_of(root(x)[0])
    assert accel.wait()
    before = accel.counters()
    calls, deadline = 0, time.monotonic() + 60
    while accel.counters()["variants"] == before["variants"] and time.monotonic() < deadline:
        torch.testing.assert_close(gradient_of(root(x)[0]), expected)
        calls += 1
    for _ in range(5):
        torch.testing.assert_close(gradient_of(root(x)[0]), expected)
        calls += 1
    after = accel.counters()
    assert after["variants"] == before["variants"] + 1
    assert after["calls_compiled"] == before["calls_compiled"] + calls
    assert after["recordings"] == before["recordings"]


def test_the_plan_that_is_replaced_is_not_compiled_again() -> None:
    """Its backwards go on where they were begun, after it has been replaced."""
    x = torch.randn(4, 3)
    root = accel.optimize(loss_and_logits)
    gradient_of(root(x)[0])
    assert accel.wait()
    begun = [root(x)[0] for _ in range(12)]
    for loss in begun[:6]:
        gradient_of(loss)
    assert accel.wait()
    gradient_of(root(x)[0])
    variants = accel.counters()["variants"]
    for loss in begun[6:]:
        gradient_of(loss)
    assert accel.wait()
    for _ in range(3):
        gradient_of(root(x)[0])
    assert accel.counters()["variants"] == variants


def test_two_losses_in_turn_after_many_steps_with_one() -> None:
    def losses(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(x @ WEIGHT)
        return h.sin().sum(), (h * 2).exp().sum()

    x = torch.randn(4, 3)
    expected = [gradient_of(losses(x)[which]) for which in (0, 1)]
    root = accel.optimize(losses)
    for step in range(60):
        which = 0 if step < 20 else step % 2
        torch.testing.assert_close(gradient_of(root(x)[which]), expected[which])
        assert accel.wait()
    before = accel.counters()["calls_compiled"]
    for step in range(20):
        gradient_of(root(x)[step % 2])
    assert accel.counters()["calls_compiled"] == before + 20
