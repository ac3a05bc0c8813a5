"""Maxima and means over windows, beside ATen's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, check, compile_it, library_of
from plan_runner import run_plan

randn = torch.randn


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((1, 64, 112, 112), (3, 2, 1)),
        ((2, 3, 9, 11), (2,)),
        ((1, 3, 10, 10), (3, 2, 1, 1, True)),
        ((1, 2, 16, 16), ((3, 2), (2, 1), (1, 0))),
        ((1, 2, 16, 16), (3, 1, 1, 2)),
        ((1, 2, 7, 7), (3, 2, 0, 1, True)),
    ],
    ids=str,
)
def test_max_pool(shape: tuple[int, ...], arguments: tuple[object, ...]) -> None:
    x = randn(shape)
    check(lambda t: F.max_pool2d(t, *arguments), x, externs=0)
    x[0, 0, 3, 3] = float("nan")
    x[0, 1] = -float("inf")
    check(lambda t: F.max_pool2d(t, *arguments), x)
    check(lambda t: F.max_pool2d(t, *arguments, return_indices=True), x[:, :1], externs=1)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 3, 17, 20), (2,)),
        ((2, 3, 17, 20), ((3, 2), (1, 2))),
        ((2, 3, 17, 20), (3, 2, 1)),
        ((2, 3, 17, 20), (3, 1, 1, False, False)),
        ((1, 5, 14, 14), (3, 1, 1, False, False)),
        ((1, 2, 9, 33), (5, 2, 2, False, True)),
        ((1, 2, 7, 8), (3, 2, 0, True)),
        ((1, 2, 7, 8), (3, 2, 1, True, False)),
        ((1, 2, 7, 8), (3, 2, 1, True, True)),
        ((1, 2, 7, 8), ((4, 3), (3, 2), (2, 1), True, True)),
        ((1, 2, 7, 8), (2, 3, 1, True, True)),
        ((1, 2, 7, 8), (3, 2, 1, False, True, 5)),
        ((1, 2, 7, 8), (3, 2, 1, False, False, -2)),
        ((3, 1, 1, 1), (3, 1, 1, False, False)),
        ((1, 2, 40, 40), (7, 7)),
        ((1, 2, 40, 40), ((1, 5), 1, (0, 2))),
        ((1, 2, 40, 40), ((5, 1), 1, (2, 0), False, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_avg_pool(
    shape: tuple[int, ...], arguments: tuple[object, ...], dtype: torch.dtype
) -> None:
    x = randn(shape).to(dtype)
    check(lambda t: F.avg_pool2d(t, *arguments), x, externs=0)
    check(lambda t: F.avg_pool2d(t, *arguments) - 2 * t[:1, :1, :1, :1], x, externs=0)
    x[0, 0, 0, 0] = float("inf")
    check(lambda t: F.avg_pool2d(t.relu(), *arguments), x, externs=0)


@pytest.mark.parametrize("arguments", [(3, 2, 1), (3, 1, 1, False, False), (2, 2)], ids=str)
def test_avg_pool_of_other_layouts(arguments: tuple[object, ...]) -> None:
    """Channels last, slices and transposed images: values and strides as eager's."""
    x = randn(2, 8, 12, 10)
    check(lambda t: F.avg_pool2d(t, *arguments), x.to(memory_format=torch.channels_last), externs=0)
    check(lambda t: F.avg_pool2d(t[:, ::2, 1:, :-1], *arguments), x)
    check(lambda t: F.avg_pool2d(t.transpose(2, 3), *arguments), x)
    check(lambda t: F.max_pool2d(t, 3, 2, 1), x.to(memory_format=torch.channels_last), externs=0)


def test_errors_of_avg_pool_stay_small() -> None:
    """Sums over lines first err no more than sums in ATen's order."""
    x = randn(2, 16, 56, 56) + 3
    exact = F.avg_pool2d(x.double(), 7, 1, 3, count_include_pad=False)
    eager = F.avg_pool2d(x, 7, 1, 3, count_include_pad=False)
    graph, sources, _ = capture(lambda t: F.avg_pool2d(t, 7, 1, 3, count_include_pad=False), [x])
    compiled = compile_it(graph)
    ours = run_plan(compiled.plan, library_of(compiled), sources)
    assert ours is not None
    (got,) = ours
    error = (got.double() - exact).square().mean().sqrt()
    assert error <= 1.5 * (eager.double() - exact).square().mean().sqrt()
