"""Operations that are compiled as others together: group norm, pixel shuffles, log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from capture_graph import check
from test_training import check_each, leaf

NORMS: dict[str, Callable[..., torch.Tensor]] = {
    "plain": lambda x, w, b: F.group_norm(x, 3),
    "scaled": lambda x, w, b: F.group_norm(x, 2, w),
    "scaled, shifted, activated": lambda x, w, b: F.silu(F.group_norm(x * 2, 6, w, b, 1e-3)),
    "one group": lambda x, w, b: F.group_norm(x, 1, w, b),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "size", [(2, 6), (3, 6, 5), (1, 6, 7, 9), (2, 6, 2, 3, 4), (1, 6, 300, 301)]
)
def test_group_norm(name: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    x = torch.randn(size).to(dtype)
    w, b = torch.rand(6).to(dtype), torch.rand(6).to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    if len(size) > 2 or size[1] > 6:
        check(NORMS[name], x, w, b, externs=0, rtol=tolerance, atol=tolerance)


def test_group_norm_of_large_numbers_far_from_zero() -> None:
    x = torch.randn(2, 4, 64, 64) + 1000
    mine, eager = F.group_norm(x.double(), 2).float(), F.group_norm(x, 2)
    bound = 1.5 * (mine - eager).abs().max().item()
    check(lambda x: F.group_norm(x, 2), x, externs=0, rtol=0, atol=max(2 * bound, 1e-4))


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_group_norm(name: str) -> None:
    check_each(NORMS[name], leaf(2, 6, 4, 5), leaf(6), leaf(6))


def test_group_norm_of_images_by_channels_stays_eager_s() -> None:
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    check(lambda x: F.group_norm(x, 3), x, externs=1)


@pytest.mark.parametrize("size", [(8, 3, 5), (2, 8, 3, 5), (2, 3, 4, 6, 4), (0, 8, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_pixel_shuffles(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(size).mul(100).to(dtype)
    check(lambda x: F.pixel_shuffle(x, 2), x)
    if (
        not x.numel()
    ):  # torch's fake tensors know no better of unshuffling nothing: such calls stay eager
        return
    check(lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), x)
    check(lambda x: F.pixel_unshuffle(x.transpose(-1, -2).repeat_interleave(2, -1)[..., :4], 1), x)


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, 88.0, -1000.0, 1000.0, 3.0]


@pytest.mark.parametrize("dim", [0, 1, -1, (0, 1), (1, 0), (-2,)])
@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_sum_exp(dim: int | tuple[int, ...], keepdim: bool, dtype: torch.dtype) -> None:
    function = lambda x: torch.logsumexp(x, dim, keepdim)  # noqa: E731
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    finite = torch.randn(9, 33).to(dtype)
    check(function, finite, externs=0, rtol=tolerance, atol=tolerance)
    for value in SPECIAL:
        x = finite.clone()
        x[3] = value
        x[:, 5] = value
        check(function, x, rtol=tolerance, atol=tolerance)
    check(function, torch.full((2, 3), -math.inf, dtype=dtype), rtol=tolerance, atol=tolerance)


def test_log_sum_exp_of_one_number() -> None:
    check(lambda x: torch.logsumexp(x, 0), torch.tensor(3.0))
    check(lambda x: torch.logsumexp(x, 0), torch.tensor([math.nan]))
    check_each(lambda x: torch.logsumexp(x, -1), leaf(5, 7))
