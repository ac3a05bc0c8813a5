"""Batches of products whose right side is one matrix, repeated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture_graph import check

from accel.codegen.pipeline import Compilation

randn = torch.randn


def calls_bmm(compilation: Compilation) -> bool:
    return any(row.get("target") == "aten::bmm.out" for row in compilation.plan["steps"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 2, 96), (2, 40, 160), (5, 1, 33)], ids=str)
def test_rows_that_do_not_lie_one_behind_the_other(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, rows, inner = shape
    weight, bias = randn(17, inner).to(dtype), randn(17).to(dtype)
    close = (
        {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for x in (
        randn(rows, batch, inner).to(dtype).transpose(0, 1),
        randn(batch, rows + 2, inner).to(dtype)[:, 1:-1],
        randn(batch, rows, 2 * inner).to(dtype)[:, :, ::2],
        randn(inner, rows, batch).to(dtype).permute(2, 1, 0),
    ):
        c = check(lambda x, w, b: F.linear(x, w, b).relu(), x, weight, bias, **close)
        assert not calls_bmm(c)
        c = check(lambda x, w: x.bmm(w.t().expand(len(x), -1, -1)), x, weight, **close)
        assert not calls_bmm(c)
        check(lambda x, w: x.bmm(w.t().contiguous().expand(len(x), -1, -1)), x, weight, **close)


def test_matrices_of_their_own_stay_a_batch() -> None:
    c = check(lambda x, y: torch.bmm(x, y) + 1, randn(3, 4, 5), randn(3, 5, 6))
    assert calls_bmm(c)
    check(lambda x, y: torch.bmm(x, y), randn(3, 0, 5), randn(5, 6).expand(3, 5, 6))
    check(lambda x, y: torch.bmm(x, y), randn(3, 4, 0), randn(0, 6).expand(3, 0, 6))
    check(lambda x, y: torch.bmm(x, y), randn(1, 4, 5), randn(5, 6).expand(1, 5, 6))
