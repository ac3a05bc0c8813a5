"""Every row of the lowering tables beside eager, over dtypes, sizes and layouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from capture_graph import check

from accel.codegen import lowering
from accel.codegen import lowerings_pointwise as pointwise
from accel.codegen import lowerings_reduce as reduce
from accel.codegen import lowerings_shapes as shapes

aten = torch.ops.aten
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS, torch.bool]
TOLERANCE = {
    torch.float32: (2e-6, 1e-6),
    torch.float64: (1e-12, 1e-12),
    torch.bfloat16: (1.6e-2, 1e-3),
    torch.float16: (2e-3, 1e-4),
}


def make(dtype: torch.dtype, *sizes: int, low: float = -3, high: float = 3) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(sizes) > 0.5
    if not dtype.is_floating_point:
        return torch.randint(0 if dtype == torch.uint8 else -9, 10, sizes).to(dtype)
    return (torch.rand(sizes, dtype=torch.float64) * (high - low) + low).to(dtype)


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    "sliced": lambda t: torch.cat([t, t], -1)[..., ::2] if t.dim() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
}
SIZES = [(), (1,), (0, 3), (17,), (5, 33), (3, 16)]

# Calls for each row, by operation name; None: by `UNARY_DEFAULT` / `BINARY_DEFAULT`.
EXTRA: dict[Any, list[Any]] = {
    aten.add.Tensor: [lambda f, x, y: f(x, y, alpha=2)],
    aten.clamp.default: [lambda f, x, y: f(x, -1, 1), lambda f, x, y: f(x, None, 1)],
    aten.clamp.Tensor: [lambda f, x, y: f(x, y, None)],
    aten.clamp_min.default: [lambda f, x, y: f(x, 0)],
    aten.clamp_max.default: [lambda f, x, y: f(x, 1)],
    aten.div.Tensor_mode: [
        lambda f, x, y: f(x, 2, rounding_mode="floor"),
        lambda f, x, y: f(x, 2, rounding_mode="trunc"),
    ],
    aten.div.Scalar_mode: [lambda f, x, y: f(x, 3, rounding_mode="floor")],
    aten.pow.Tensor_Scalar: [
        lambda f, x, y: f(x, 2),
        lambda f, x, y: f(x, 3),
        lambda f, x, y: f(x.abs() + 1, 0.5),
        lambda f, x, y: f(x.abs() + 1, -0.5),
        lambda f, x, y: f(x.abs() + 1, 1.7),
    ],
    aten.pow.Tensor_Tensor: [lambda f, x, y: f(x.abs() + 1, y)],
    aten.pow.Scalar: [lambda f, x, y: f(2, x)],
    aten.lerp.Scalar: [lambda f, x, y: f(x, y, 0.3), lambda f, x, y: f(x, y, 0.7)],
    aten.lerp.Tensor: [lambda f, x, y: f(x, y, y.sigmoid())],
    aten.addcmul.default: [lambda f, x, y: f(x, x, y, value=2)],
    aten.addcdiv.default: [lambda f, x, y: f(x, x, y.abs() + 1, value=2)],
    aten.threshold.default: [lambda f, x, y: f(x, 0.5, 7)],
    aten.threshold_backward.default: [lambda f, x, y: f(x, y, 0)],
    aten.gelu.default: [lambda f, x, y: f(x), lambda f, x, y: f(x, approximate="tanh")],
    aten.gelu_backward.default: [
        lambda f, x, y: f(x, y),
        lambda f, x, y: f(x, y, approximate="tanh"),
    ],
    aten._to_copy.default: [
        lambda f, x, y, dtype=dtype: f(x, dtype=dtype)
        for dtype in [*FLOATS, torch.int64, torch.bool]
    ],
    aten.floor_divide.Scalar: [lambda f, x, y: f(x, 3)],
    aten.floor_divide.default: [lambda f, x, y: f(x, 3), lambda f, x, y: f(x, -2)],
    aten.remainder.Scalar: [lambda f, x, y: f(x, 3), lambda f, x, y: f(x, -2)],
    aten.remainder.Tensor: [lambda f, x, y: f(x, y.abs() + 1)],
    aten.fmod.Scalar: [lambda f, x, y: f(x, 3)],
    aten.log.default: [lambda f, x, y: f(x.abs() + 0.1)],
    aten.log2.default: [lambda f, x, y: f(x.abs() + 0.1)],
    aten.log10.default: [lambda f, x, y: f(x.abs() + 0.1)],
    aten.log1p.default: [lambda f, x, y: f(x.abs())],
    aten.sqrt.default: [lambda f, x, y: f(x.abs())],
    aten.rsqrt.default: [lambda f, x, y: f(x.abs() + 1)],
    aten.acosh.default: [lambda f, x, y: f(x.abs() + 1)],
    aten.asin.default: [lambda f, x, y: f(x / 4)],
    aten.acos.default: [lambda f, x, y: f(x / 4)],
    aten.atanh.default: [lambda f, x, y: f(x / 4)],
    aten.tan.default: [lambda f, x, y: f(x / 4)],
    # One ulp of a half differs by more than the default tolerance there.
    aten.nextafter.default: [lambda f, x, y: f(x, y)],
}
# Rows eager itself never reaches with these arguments, or that are not callable alone.
SKIPPED = {aten.contiguous.default}


def calls(target: Any) -> list[Any]:
    if target in EXTRA:
        return EXTRA[target]
    tensors = sum(str(a.type) == "Tensor" for a in target._schema.arguments)
    needed = [a for a in target._schema.arguments if a.default_value is None and not a.kwarg_only]
    if len(needed) == 1:
        return [lambda f, x, y: f(x)]
    if tensors >= 2:
        return [lambda f, x, y: f(x, y)]
    return [lambda f, x, y: f(x, 2)]


def works(call: Any, target: Any, x: torch.Tensor, y: torch.Tensor) -> bool:
    try:
        call(target, x, y)
    except (RuntimeError, TypeError, NotImplementedError, ZeroDivisionError, IndexError):
        return False
    return True


TARGETS = [
    *pointwise.FORMULAS,
    *pointwise.COMPARISONS,
    *pointwise.LOGICAL,
    aten.logical_not.default,
    aten.isnan.default,
    aten.isinf.default,
]


def close(dtype: torch.dtype) -> dict[str, float]:
    rtol, atol = TOLERANCE.get(dtype, (0.0, 0.0))
    # Results of integers are float32.
    return {"rtol": max(rtol, 2e-6), "atol": max(atol, 2e-6)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_elementwise_rows_equal_eager(dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(1)
    x, y = (LAYOUTS[layout](make(dtype, 5, 33)) for _ in range(2))
    rows = [
        (target, call)
        for target in TARGETS
        if target not in SKIPPED
        for call in calls(target)
        if works(call, target, x, y)
    ]
    assert len(rows) > (20 if dtype == torch.bool else 40)
    # In parts, so that a failure names few rows.
    for i in range(0, len(rows), 40):
        part = rows[i : i + 40]
        check(
            lambda a, b, part=part: [call(target, a, b) for target, call in part],
            x,
            y,
            **close(dtype),
        )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_sizes(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    x, y = make(dtype, *sizes), make(dtype, *sizes)
    check(lambda a, b: (a + b, (a * b - a).abs(), a > b, torch.where(a > b, a, b)), x, y)


def test_every_row_is_reached() -> None:
    """A new row needs a call that eager accepts for some dtype."""
    unreached = []
    for target in TARGETS:
        if target in SKIPPED:
            continue
        reached = any(
            works(call, target, make(dtype, 3, 4), make(dtype, 3, 4))
            for dtype in DTYPES
            for call in calls(target)
        )
        if not reached:
            unreached.append(target)
    assert not unreached


REDUCTIONS: dict[Any, Any] = {
    aten.sum.default: lambda x: (x.sum(),),
    aten.sum.dim_IntList: lambda x: (x.sum(1), x.sum((0, 2), keepdim=True), x.sum(-1)),
    aten.mean.default: lambda x: (x.mean(),),
    aten.mean.dim: lambda x: (x.mean(0), x.mean((1, 2)), x.mean(-1, keepdim=True)),
    aten.prod.default: lambda x: ((x * 0.5).prod(),),
    aten.prod.dim_int: lambda x: ((x * 0.5).prod(1),),
    aten.linalg_vector_norm.default: lambda x: (
        torch.linalg.vector_norm(x, 2, dim=1),
        torch.linalg.vector_norm(x, 1),
        torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True),
    ),
    aten.amax.default: lambda x: (x.amax(1), x.amax((0, 1), keepdim=True)),
    aten.amin.default: lambda x: (x.amin(-1), x.amin()),
    aten.max.default: lambda x: (x.max(),),
    aten.min.default: lambda x: (x.min(),),
    aten.any.default: lambda x: ((x > 2).any(),),
    aten.any.dim: lambda x: ((x > 2).any(1),),
    aten.any.dims: lambda x: (aten.any.dims(x > 2, [0, 1]),),
    aten.all.default: lambda x: ((x > -9).all(),),
    aten.all.dim: lambda x: ((x < 2).all(0, keepdim=True),),
    aten.all.dims: lambda x: (aten.all.dims(x < 2, [1, 2]),),
    aten._softmax.default: lambda x: (x.softmax(-1), x.softmax(1), (x + 1).softmax(0)),
    aten._safe_softmax.default: lambda x: (aten._safe_softmax.default(x, -1),),
    aten._log_softmax.default: lambda x: (x.log_softmax(-1), x.log_softmax(1)),
    aten.native_layer_norm.default: lambda x: (
        torch.nn.functional.layer_norm(x, x.shape[-1:]),
        torch.nn.functional.layer_norm(x, x.shape[-2:], x[0], x[1]),
    ),
    aten._fused_rms_norm.default: lambda x: (
        torch.nn.functional.rms_norm(x, x.shape[-1:], x[0, 0]),
    ),
    aten.var.correction: lambda x: (x.var(), x.var(1), x.var((0, 2), unbiased=False)),
    aten.std.correction: lambda x: (x.std(-1, keepdim=True),),
    aten.var_mean.correction: lambda x: torch.var_mean(x, 1),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target", REDUCTIONS, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_reductions_equal_eager(target: Any, dtype: torch.dtype, order: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    x = make(dtype, 4, 37, 5).permute(order)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}.get(dtype, 2e-2)
    check(REDUCTIONS[target], x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool], ids=str)
def test_integer_reductions(dtype: torch.dtype) -> None:
    x = make(dtype, 6, 35)
    check(lambda a: (a.sum(), a.sum(1), a.amax(0), a.amin(1), a.prod(0), a.any(), a.all(1)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
@pytest.mark.parametrize("sizes", [(6, 35), (3, 5000)])
def test_what_a_reduction_begins_with(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Results of which zero, one or a lane behind the end would be taken for an element."""
    x = (torch.rand(sizes) * 7 + 3).to(dtype)
    check(lambda a: (a.amin(1), (-a).amax(1), a.amin(0), (-a).amax(0), (-a).amax()), x)
    check(lambda a: ((a > 0).all(1), (a < 0).any(1), (a > 0).all(0), (a > 9).any(0)), x)
    check(lambda a: (a[:, :3].prod(1), (a * 0 - 1).prod(0), a.sum(1)), x, rtol=1e-5, atol=0.0)


SPLIT = {  # sizes -> sizes of the partial results
    (85, 768): (85, 1, 1),
    (2, 12, 197, 64): (12, 1, 1, 1, 1),
    (64, 1000): (32, 1, 1),  # of whole vectors
    (100_000,): (50, 1),
    (50_257, 3): None,  # three parts would be three columns
    (3, 33_001): (3, 1, 1),
}


@pytest.mark.parametrize("sizes", SPLIT, ids=str)
def test_long_reductions_are_cut_into_long_runs(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(sizes)
    compilation = check(lambda a: a.abs().max(), x, rtol=0.0, atol=0.0)
    made = [tuple(b["sizes"]) for b in compilation.plan["buffers"] if b["kind"] == "arena"]
    assert made == ([] if SPLIT[sizes] is None else [SPLIT[sizes]])
    check(lambda a: (a * a).sum(), x)
    check(lambda a: a.transpose(0, -1).sum(), x)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 4096, 70_000, 300_007])
def test_long_sums_are_accurate(length: int) -> None:
    torch.manual_seed(3)
    x = torch.rand(2, length)
    compilation = check(lambda a: (a.sum(1), a.sum(), a.amax()), x, rtol=1e-6, atol=0.0)
    assert compilation.texts
    exact = x.double().sum(1)
    from capture_graph import library_of
    from plan_runner import run_plan

    ours = run_plan(compilation.plan, library_of(compilation), [x])
    assert ours is not None
    error = (ours[0].double() - exact).abs() / exact
    assert error.max() <= 3e-7


SHAPES: dict[str, Any] = {
    "view": lambda x: (x.view(-1, 8) + 1, x.reshape(8, -1) * 2),
    "permute": lambda x: (x.permute(2, 0, 1) + 1).contiguous(),
    "merge heads": lambda x: (x.transpose(0, 1).reshape(x.shape[1], -1) * 2).sum(1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1, -1) + x[0],
    "slice": lambda x: x[:, 1::2, :3] * 2 + x[:, :2, 1:4],
    "select": lambda x: x.select(1, 2) - x[:, 0],
    "split": lambda x: [t * 2 for t in x.split([1, 3], 1)],
    "unbind": lambda x: sum(t * 2 for t in (x + 1).unbind(1)),
    "cat": lambda x: torch.cat([x + 1, x[:, :1] * 2, x], 1),
    "stack": lambda x: torch.stack([x, x * 2], -1),
    "pad": lambda x: torch.nn.functional.pad(x * 2, (1, 2, 0, 3), value=4.5),
    "diagonal": lambda x: x[0].diagonal() * 2,
    "unfold": lambda x: x.unfold(2, 2, 1) * 2,
    "triangles": lambda x: x.tril() + x.triu(1) + torch.tril(x, -1),
    "eye": lambda x: x[0, :4, :4] * torch.eye(4),
    "arange": lambda x: x + torch.arange(8) * torch.arange(4, 8)[:, None] + torch.arange(0, 4, 0.5),
    "fills": lambda x: (
        torch.zeros_like(x) + torch.ones(8) + torch.full((4, 1), 2.5) + x.new_full((8,), 3)
    ),
    "repeat": lambda x: x[:, :1].repeat(1, 4, 1) + x,
    "tile": lambda x: x.repeat(2, 1, 1) * 2,
    "roll": lambda x: torch.roll(x * 2, 1, -1),
    "flip": lambda x: x.flip(1) * 2,
    "constants": lambda x: x * torch.tensor([1.0, -2.0, 3.0, 0.5])[:, None],
    "masks": lambda x: x.masked_fill(torch.ones(4, 8).triu(1).bool(), float("-inf")).softmax(-1),
    "broadcast row values": lambda x: (
        (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1)
    ),
    "two axes": lambda x: x.softmax(1) + x.softmax(2),
    "view as": lambda x: x.view(torch.int32) + 1,
    "where scalar": lambda x: torch.where(x > 0, 1.0, x),
    "swap": lambda x: x.movedim(0, 2).unflatten(1, (2, 4)).flatten(1, 2) * 3,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_equal_eager(name: str) -> None:
    torch.manual_seed(4)
    check(SHAPES[name], torch.randn(3, 4, 8))


def test_tables_have_one_row_each() -> None:
    rows = [
        *pointwise.FORMULAS,
        *pointwise.COMPARISONS,
        *pointwise.LOGICAL,
        *shapes.FILL_VALUES,
        *shapes.FILL_ARGUMENT,
        *reduce.EXTREMA,
        *reduce.TRUTHS,
    ]
    assert len(rows) == len(set(rows))
    assert set(rows) <= set(lowering.LOWERINGS)
    assert not set(lowering.LOWERINGS) & set(lowering.MULTIPLE)
