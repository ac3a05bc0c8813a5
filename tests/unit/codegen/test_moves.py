"""What only moves elements, over strides, tails and dtypes: bit for bit what eager gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, compile_it, library_of
from plan_runner import run_plan

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
]
# Of x with 5 rows of 4 n + 3 elements.
MOVES: dict[str, Any] = {
    "every second, third and fourth": lambda x: (x[:, ::2].clone(), x[:, ::3].clone(), x[:, 1::4].clone()),
    "backwards": lambda x: (x.flip(-1), x.flip(0), x.flip(0, 1), x[:, ::2].flip(-1), x.t().flip(0)),
    "interleaved": lambda x: (torch.stack([x, x], -1), torch.stack([x, x, x], -1), x.repeat_interleave(2, -1)),
    "turned": lambda x: (x.t().contiguous(), x[:, :-3].reshape(5, -1, 4).permute(0, 2, 1).contiguous()),
    "turned wide": lambda x: (x.repeat(4, 1).t().contiguous(), x.repeat(3, 1)[:, :16].t().contiguous()),
    "padded and rolled": lambda x: (F.pad(x, (1, 2)), x.roll(1, -1), x.roll((2, -1), (1, 0)), x.roll(3)),
    "joined": lambda x: (torch.cat([x, x], -1), torch.cat([x[:, 3:], x[:, :3]], 1), torch.cat([x, x.flip(0)])),
    "spread": lambda x: (x[:, :1].expand(5, 40).contiguous(), x[:1].expand(5, x.shape[1]).contiguous()),
    "chosen": lambda x: (torch.where(x == x[0, 0], x, x.flip(0)), x.masked_fill(x == x[0, 1], 0), x.tril(1)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MOVES)
def test_moves_keep_every_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n in (3, 4, 8, 11, 16, 25):
        x = (torch.randn(5, 4 * n + 3) * 9).to(dtype)
        if dtype.is_floating_point:
            x[1, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-7]).to(dtype)
        graph, _, expected = capture(MOVES[name], [x])
        compiled = compile_it(graph)
        assert not [s for s in compiled.plan["steps"] if s["op"] == "extern"]
        got = run_plan(compiled.plan, library_of(compiled), [x])
        for g, e in zip(got, expected, strict=True):
            assert g.stride() == e.stride()
            assert torch.equal(_bits(g), _bits(e)), (n, g, e)


def _bits(x: torch.Tensor) -> torch.Tensor:
    by_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(by_size[x.element_size()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_of_a_row_leave_its_loop(dtype: torch.dtype) -> None:
    """A root and a division for each row, not for each element: a compiler may not move the load."""
    x, mean, var = torch.randn(2, 40, 7, 7), torch.randn(40), torch.rand(40) + 0.5
    x, mean, var = x.to(dtype), mean.to(dtype), var.to(dtype)
    graph, _, (expected,) = capture(lambda x, m, v: F.batch_norm(x, m, v), [x, mean, var])
    compiled = compile_it(graph)
    (got,) = run_plan(compiled.plan, library_of(compiled), [x, mean, var])
    torch.testing.assert_close(got, expected)
    for text in compiled.texts:
        inside = text.partition("auto step")[2]
        assert "v_sqrt" not in inside or "load_one" not in inside
