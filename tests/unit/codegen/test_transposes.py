"""Kernels whose operands lie in another order than their results; enlarging."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture_graph import check

randn = torch.randn
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
SHAPES = [(64, 64), (17, 33), (100, 16), (16, 100), (1000, 35), (5, 40, 70), (3, 20, 4, 50)]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (randn(shape) * 10).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = values(shape, dtype)
    check(lambda t: t.transpose(-1, -2).contiguous(), x, externs=0)
    check(lambda t: t.transpose(0, -1).contiguous(), x, externs=0)
    check(lambda t: t.transpose(0, 1).contiguous(), x, externs=0)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arithmetic(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = values(shape, dtype)
    y = values((*shape[:-2], shape[-1], shape[-2]), dtype)
    check(lambda a, b: a.transpose(-1, -2) * 2 + b, x, y, externs=0)
    check(lambda a, b: (a.transpose(-1, -2) + b.float()).relu(), x, y, externs=0)
    check(lambda a, b: a.transpose(-1, -2) * a.transpose(-1, -2) + b[:1], x, y, externs=0)
    check(lambda a, b: (a.transpose(-1, -2) + b).amax(-1), x, y, externs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nearest(dtype: torch.dtype) -> None:
    x = randn(2, 3, 7, 9).to(dtype)
    check(lambda t: F.interpolate(t, scale_factor=2), x, externs=0)
    check(lambda t: F.interpolate(t, scale_factor=(3, 1)), x, externs=0)
    check(lambda t: F.interpolate(t, size=(14, 27)) + 1, x, externs=0)
    check(lambda t: F.interpolate(t, size=(10, 9)), x, externs=1)
    check(lambda t: F.interpolate(t, scale_factor=1.5), x, externs=1)
