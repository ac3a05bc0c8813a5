"""Losses, activations and their gradients as kernels: eager's special cases, no larger errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_graph import _OUT_DIR
from plan_runner import run_plan
from test_training import differentiable

from accel.codegen import CodegenOptions, compile_graph

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

REDUCTIONS = ("mean", "sum", "none")
ACTIVATIONS: dict[str, Function] = {
    "elu": lambda x, y: F.elu(x, 1.3) * y,
    "elu in place": lambda x, y: F.elu(x * y, inplace=True) * 2,
    "selu": lambda x, y: F.selu(x) * y,
    "celu": lambda x, y: F.celu(x, 0.7) * y,
    "leaky relu": lambda x, y: F.leaky_relu(x, 0.2) * y,
    "leaky relu in place": lambda x, y: F.leaky_relu(x * y, 0.2, inplace=True) * 2,
    "hardtanh": lambda x, y: F.hardtanh(x, -0.5, 3.0) * y,
    "relu6": lambda x, y: F.relu6(x) * y,
    "hardswish": lambda x, y: F.hardswish(x) * y,
    "hardsigmoid": lambda x, y: F.hardsigmoid(x) * y,
    "softplus": lambda x, y: F.softplus(x, 2.0, 10.0) * y,
    "mish": lambda x, y: F.mish(x) * y,
    "prelu": lambda x, y: F.prelu(x, y[0]),
    "glu": lambda x, y: F.glu(x * y),
    "glu over rows": lambda x, y: F.glu(x * y, 0),
    "softshrink": lambda x, y: F.softshrink(x) * y,
    "hardshrink": lambda x, y: F.hardshrink(x) * y,
    "log sigmoid": lambda x, y: F.logsigmoid(x) * y,
    "logaddexp": torch.logaddexp,
    "logit": lambda x, y: torch.logit(x) * y,
    "logit with a bound": lambda x, y: torch.logit(x, 0.1) * y,
    "softmax": lambda x, y: (x * y).softmax(-1),
    "log softmax": lambda x, y: (x * y).log_softmax(0),
    "differences": lambda x, y: x[:, 1:] * y[:, :-1] + x[:, 3:4],
    "every second": lambda x, y: x[::2, 1::3] * y[1::2, 1::3],
    "distances": F.pairwise_distance,
}  # fmt: skip
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": F.mse_loss,
    "smooth l1": lambda x, y, reduction: F.smooth_l1_loss(x, y, reduction=reduction, beta=0.5),
    "huber": lambda x, y, reduction: F.huber_loss(x, y, reduction=reduction, delta=0.5),
    "cross entropy with logits": lambda x, y, reduction: F.binary_cross_entropy_with_logits(
        x, y, reduction=reduction
    ),
    "weighted cross entropy": lambda x, y, reduction: F.binary_cross_entropy_with_logits(
        x, y, weight=y[1].detach(), pos_weight=y[0].detach() * 3, reduction=reduction
    ),
    "soft margin": lambda x, y, reduction: F.soft_margin_loss(
        x, y.detach().sign(), reduction=reduction
    ) + y.sum(),
}  # fmt: skip
SPECIAL = (0.0, -0.0, 3.0, -3.0, 6.0, 0.5, -0.5, 0.1, 0.9, 1.0, -1.0, 5.0, 30.0, -100.0)
NOT_FINITE = (math.inf, -math.inf, math.nan)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def cases() -> dict[str, Function]:
    found = dict(ACTIVATIONS)
    for name, loss in LOSSES.items():
        for reduction in REDUCTIONS:
            found[f"{name}, {reduction}"] = lambda x, y, f=loss, r=reduction: f(x, y, reduction=r)
    return found


CASES = cases()


def both(
    function: Function, x: torch.Tensor, y: torch.Tensor, arriving: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The result and the gradients, of the plans and of eager. Only kernels may have run."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, y)]
    graph, (out,) = differentiable(function, inputs)
    options = CodegenOptions(verify=True, measure=False)
    plan = compile_graph(graph, out_dir=_OUT_DIR, options=options)
    library = _OUT_DIR / plan["library"]
    mine = [t.detach().clone() for t in inputs]
    results = run_plan(plan, library, mine)
    assert results is not None
    (gradient,) = plan["gradients"]
    assert {s["op"] for p in (plan, gradient["plan"]) for s in p["steps"]} == {"kernel"}
    given = torch.ones_like(out) if arriving is None else arriving.to(out.dtype)
    wanted = [inputs[i] for i in gradient["grads"]]
    expected = torch.autograd.grad(out, wanted, given, allow_unused=True)
    saved = [mine[i] if kind == "input" else results[i] for kind, i in gradient["saved"]]
    found = run_plan(gradient["plan"], library, [*saved, given])
    assert found is not None
    pairs = [(results[0], out.detach())]
    pairs += [(found[k], e) for k, e in zip(gradient["results"], expected) if e is not None]
    for got, want in pairs:
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    return [got for got, _ in pairs], [want for _, want in pairs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_special_values_give_what_eager_gives(name: str, dtype: torch.dtype) -> None:
    values = SPECIAL if name.startswith(("soft margin", "weighted")) else SPECIAL + NOT_FINITE
    # Whole vectors: eager answers a NaN otherwise behind the last one.
    x = torch.tensor((values * 20)[:256], dtype=dtype).reshape(64, 4)
    y = torch.linspace(0.5, 2.0, x.numel(), dtype=dtype).reshape(x.shape)
    y = y.where(torch.arange(x.numel()).reshape(x.shape) % 5 != 0, x.nan_to_num(1.0, 4.0, -4.0))
    mine, eager = both(CASES[name], x, y)
    _, exact = both(CASES[name], x.double(), y.double())
    for got, want, truth in zip(mine, eager, exact, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        narrow = dtype == torch.bfloat16
        rtol, atol = (4e-2, 2e-2) if narrow else (1e-5, 1e-6)
        nearer = (got - truth).abs() <= (want - truth).abs()  # eager's kernel rounds in between
        expected = torch.where(nearer, got, want) if narrow else want
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_no_larger_than_eager_s(name: str, dtype: torch.dtype) -> None:
    """Against float64: at most 1.5 times eager's, or one unit in the last place."""
    torch.manual_seed(2)
    x, y = torch.randn(64, 96).to(dtype), torch.rand(64, 96).to(dtype)
    if name[:5] == "logit":
        x = x.sigmoid()
    arriving = torch.randn_like(CASES[name](x.double(), y.double())).to(dtype)
    mine, eager = both(CASES[name], x, y, arriving)
    _, exact = both(CASES[name], x.double(), y.double(), arriving.double())
    for got, want, truth in zip(mine, eager, exact, strict=True):
        unit = torch.finfo(dtype).eps * truth.abs().mean().item()
        assert error(got, truth) <= max(1.5 * error(want, truth), unit)


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return (found.double() - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_cross_entropy(reduction: str, smoothing: float, rows: int) -> None:
    x = torch.randn(rows, 77, requires_grad=True)
    target = torch.randint(0, 77, (rows,))
    target[rows // 2] = -100 if rows > 1 else 3

    def function(x: torch.Tensor, target: torch.Tensor) -> Any:
        return F.cross_entropy(x * 2, target, reduction=reduction, label_smoothing=smoothing)

    graph, (out,) = differentiable(function, [x, target])
    plan = compile_graph(graph, out_dir=_OUT_DIR, options=CodegenOptions(verify=True))
    results = run_plan(plan, _OUT_DIR / plan["library"], [x.detach(), target])
    assert results is not None
    torch.testing.assert_close(results[0], out.detach())
    (gradient,) = plan["gradients"]
    assert {s["op"] for s in gradient["plan"]["steps"]} == {"kernel"}
    arriving = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, x, arriving)
    given = {"input": [x.detach(), target], "output": results}
    saved = [given[kind][i] for kind, i in gradient["saved"]]
    found = run_plan(gradient["plan"], _OUT_DIR / plan["library"], [*saved, arriving])
    assert found is not None
    torch.testing.assert_close(found[gradient["results"][0]], want)


@pytest.mark.parametrize("name", CASES)
def test_layouts_of_gradients_are_eager_s(name: str) -> None:
    """Of images by channels, and of transposed matrices; of a result whose gradient is one number."""
    import accel

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return CASES[name](x * 2, y * 2).mean()

    if name.startswith(("glu", "distances", "differences", "every", "prelu")):
        shapes = [torch.rand(6, 4).t()]
    else:
        images = torch.rand(2, 4, 6, 4).contiguous(memory_format=torch.channels_last)
        shapes = [torch.rand(6, 4).t(), images]
    for tensor in shapes:
        x = tensor.clone(memory_format=torch.preserve_format).requires_grad_()
        y = torch.rand(tensor.shape).requires_grad_()
        wanted = torch.autograd.grad(function(x, y), [x, y], allow_unused=True)
        accel.reset()
        root = accel.optimize(function)
        for _ in range(4):
            found = torch.autograd.grad(root(x, y), [x, y], allow_unused=True)
            assert accel.wait()
        assert accel.counters()["calls_compiled"]
        for got, want in zip(found, wanted, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                assert got.stride() == want.stride()
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, equal_nan=True)
    accel.reset()
