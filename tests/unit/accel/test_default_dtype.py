"""Graphs are compiled with the default dtype that the program had, wherever they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

import accel


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
    accel.reset()


Function = Callable[[torch.Tensor], torch.Tensor]

FUNCTIONS: dict[str, Function] = {
    "a constant tensor": lambda x: x * torch.full((3, 4), 0.3),
    "whole numbers by a number": lambda x: x + torch.arange(4) * 0.1,
    "a range": lambda x: x + torch.linspace(0, 1, 4) / 3,
    "drawn numbers": lambda x: torch.bernoulli(torch.full((3, 4), 0.3)) * x * x,
    "noise": lambda x: x * x * torch.rand(3, 4),
    "a mean of whole numbers": lambda x: x * (torch.arange(5) / 3).mean(),
    "dropout": lambda x: F.dropout(x * torch.full((3, 4), 0.1)) * x,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_and_gradients(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    x = (torch.rand(3, 4, dtype=torch.float64) + 1).requires_grad_()
    torch.manual_seed(3)
    expected = FUNCTIONS[name](x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    root = accel.optimize(lambda x: FUNCTIONS[name](x))
    for _ in range(3):
        root(x).sum().backward()
        assert accel.wait()
    for differentiable in (False, True):
        torch.manual_seed(3)
        before = accel.counters()["calls_compiled"]
        y = root(x)
        assert accel.counters()["calls_compiled"] == before + 1
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
        torch.set_default_dtype(torch.float32 if differentiable else dtype)
        (found,) = torch.autograd.grad(y.sum(), x, create_graph=differentiable)
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=0)
