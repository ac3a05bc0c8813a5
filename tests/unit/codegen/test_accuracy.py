"""Errors against float64: at most 1.5 times eager's, or one unit in the last place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, compile_it, library_of
from plan_runner import run_plan

Function = Callable[..., torch.Tensor]
SIZES = [(0, 8), (1, 1), (3, 7), (33, 129), (64, 1024), (16, 70_001)]


def _rms_norm(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    total = x + residual
    return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)


FAMILIES: dict[str, Function] = {
    "gelu": lambda x, y: F.gelu(x) * y + x,
    "gelu tanh": lambda x, y: F.gelu(x, approximate="tanh") * y,
    "silu": lambda x, y: F.silu(x) * y,
    "sigmoid and tanh": lambda x, y: torch.sigmoid(x) * torch.tanh(y),
    "erf": lambda x, y: torch.erf(x) + y,
    "exp and log": lambda x, y: torch.log(torch.exp(x) + 1) - y,
    "sin and cos": lambda x, y: torch.sin(x) * torch.cos(y),
    "softmax": lambda x, y: F.softmax(x, -1),
    "log softmax": lambda x, y: F.log_softmax(x, -1),
    "softmax of columns": lambda x, y: F.softmax(x, 0),
    "layer norm": lambda x, y: F.layer_norm(x + y, x.shape[-1:]),
    "rms norm": _rms_norm,
    "sum of rows": lambda x, y: (x * y).sum(-1),
    "sum of columns": lambda x, y: (x * y).sum(0),
    "sum": lambda x, y: (x + 1).sum(),
    "mean": lambda x, y: (x + 1).mean(-1),
    "variance": lambda x, y: x.var(-1, correction=0),
    "norm": lambda x, y: x.norm(dim=-1),
}


def _rmse(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_error(name: str, dtype: torch.dtype) -> None:
    function = FAMILIES[name]
    torch.manual_seed(11)
    for rows, columns in SIZES:
        if columns == 1 and name in ("layer norm", "rms norm"):
            continue  # nothing but rounding is left
        # One column more: rows are not aligned.
        x, y = (torch.randn(rows, columns + 1).to(dtype)[:, 1:] for _ in range(2))
        graph, sources, (eager,) = capture(function, [x, y])
        c = compile_it(graph)
        ours = run_plan(c.plan, library_of(c), sources)
        assert ours is not None
        assert ours[0].dtype == eager.dtype and ours[0].shape == eager.shape
        if eager.numel() == 0:
            continue
        exact = function(x.double(), y.double())
        unit = torch.finfo(dtype).eps * float(exact.square().mean().sqrt())
        bound = max(1.5 * _rmse(eager, exact), unit)
        assert _rmse(ours[0], exact) <= bound, (rows, columns)


@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize(
    "shape", [(100, 128, 1), (1, 128, 128), (4, 128, 16), (8, 100, 3), (2, 64, 64), (33, 47, 1)]
)
def test_error_of_few_rows_and_columns(shape: tuple[int, int, int], uses: int) -> None:
    """BLAS libraries sum along the rows there, in many short sums."""
    m, k, n = shape

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x + i, w) for i in range(uses)])

    torch.manual_seed(5)
    samples = [(torch.randn(m, k), torch.randn(n, k)) for _ in range(max(4000 // (m * n), 8))]
    graph, _, _ = capture(model, list(samples[0]))
    c = compile_it(graph)
    library = library_of(c)
    ours = torch.stack([run_plan(c.plan, library, list(s))[0] for s in samples])
    eager = torch.stack([model(*s) for s in samples])
    exact = torch.stack([model(*(t.double() for t in s)) for s in samples])
    unit = torch.finfo(torch.float32).eps * float(exact.square().mean().sqrt())
    assert _rmse(ours, exact) <= max(1.5 * _rmse(eager, exact), unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale, offset", [(1e30, 0.0), (1e-30, 0.0), (1e-3, 1e4), (1.0, -1e6)])
def test_variances_of_hard_numbers(scale: float, offset: float, dtype: torch.dtype) -> None:
    """Squares that overflow or vanish in float32, and deviations that its mean hides."""
    torch.manual_seed(4)
    x = (torch.randn(7, 3000) * scale + offset).to(dtype)
    for function in (
        lambda x: x.std(),
        lambda x: x.std(-1, correction=0),
        lambda x: x.std(0),
        lambda x: torch.var_mean(x, -1)[0].sqrt(),
    ):
        graph, sources, (eager,) = capture(function, [x])
        c = compile_it(graph)
        ours = run_plan(c.plan, library_of(c), sources)[0]
        exact = function(x.double())
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= max(
            1.5 * (eager.double() - exact).abs().max(), 2 * unit
        )
