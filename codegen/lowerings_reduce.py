"""Lowerings of reductions and of what is made of them: softmax, normalisations.

In: a node of the tensor graph. Out: loop nodes over temporaries; fusion puts the nodes of
one row back together. Rules as in `lowerings_pointwise`; half precisions are summed in
float, like ATen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, cast, op
from accel.codegen.symbols import hint, is_same, is_symbolic
from accel.codegen.tensor_graph import Node, View

aten = torch.ops.aten

_SUM_DTYPE = {"f32": "float32", "f64": "float64", "i64": "int64", "i32": "int64"}
_LANES = 16  # the most of a vector
_ENOUGH_PARTS, _SHORT_RUN = 16, 128
# Lines of a long column that are reduced together.
_LINES = (32, 28, 24, 20, 18, 16, 14, 12, 10, 8)


def _dims(node: Node, position: int) -> Any:
    """The dimensions that are named: None, one, or a list that may be empty."""
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim")


def _axes(node: Node, rank: int, position: int = 1) -> tuple[list[int], bool]:
    dims = _dims(node, position)
    keepdim = (
        node.args[position + 1]
        if len(node.args) > position + 1
        else node.kwargs.get("keepdim", False)
    )
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank)), bool(keepdim)
    if isinstance(dims, int):
        dims = [dims]
    return [d % max(rank, 1) for d in dims] if rank else [], bool(keepdim)


def reduce_values(
    b: Builder,
    out: View,
    x: View,
    axes: Sequence[int],
    keepdim: bool,
    kind: str,
    value: Callable[[Expr], Expr],
) -> None:
    """Reduces `value(x)`; a long reduction to few results goes through partial results."""
    b.supported(x)
    kept = hint(x.numel)
    for d in axes:
        kept //= max(hint(x.sizes[d]), 1)
    split = b.splitting
    axis = _split_axis(x, axes, split.parts(kept))
    if kind in ("sum", "max", "min") and kept < split.results and hint(x.numel) >= split.elements:
        if axis is not None:
            return _reduce_in_parts(b, out, x, axes, keepdim, kind, value, axis)
    columns = _column_axis(x, axes, kind) if split.columns else None
    if columns is not None:
        return _reduce_in_parts(b, out, x, axes, keepdim, kind, value, columns)
    b.reduce(out, x.sizes, axes, kind, lambda i: value(b.load(x, i)), keepdim)


def _column_axis(x: View, axes: Sequence[int], kind: str) -> tuple[int, int] | None:
    """For a reduction over long columns: the axis to cut, and into how many parts.

    The lines of one part are walked side by side, each of them in its order in memory.
    """
    if len(axes) != 1 or kind not in ("sum", "max", "min"):
        return None
    (d,) = axes
    lines = x.sizes[d]
    contiguous = any(
        is_same(s, 1) and hint(x.sizes[i]) >= 64 for i, s in enumerate(x.strides) if i != d
    )
    if is_symbolic(lines) or not contiguous:
        return None
    if hint(x.strides[d]) < 64 or lines < 2 * _LINES[-1]:
        return None
    for length in _LINES:
        if lines % length == 0 and lines > length:
            return d, lines // length
    return None


def _split_axis(x: View, axes: Sequence[int], candidates: Sequence[int]) -> tuple[int, int] | None:
    """An axis to cut, with its number of parts: enough of them, of long runs of whole vectors."""
    whole = [d for d in axes if not is_symbolic(x.sizes[d])]
    cuts = [
        (d, parts)
        for d in sorted(whole, key=lambda d: -x.sizes[d])
        for parts in (*candidates, *(n for n in (x.sizes[d],) if n <= 2 * candidates[0]))
        if parts > 1 and x.sizes[d] % parts == 0
    ]

    def key(cut: tuple[int, int]) -> tuple[bool, int, bool]:
        run = _run(x, *cut)
        return run < _SHORT_RUN, -min(cut[1], _ENOUGH_PARTS), run % _LANES != 0

    best = min(cuts, key=key, default=None)  # of equals the first
    if best is not None and is_same(x.strides[-1], 1) and _run(x, *best) < _SHORT_RUN:
        return None
    return best


def _run(x: View, d: int, parts: int) -> int:
    """How many neighbours in memory one of the parts of an axis has at a stretch."""
    run = 1
    for i in range(len(x.sizes) - 1, -1, -1):
        if not is_same(x.strides[i], run):
            break
        run *= hint(x.sizes[i]) // (parts if i == d else 1)
        if i == d:
            break
    return run


def _reduce_in_parts(
    b: Builder,
    out: View,
    x: View,
    axes: Sequence[int],
    keepdim: bool,
    kind: str,
    value: Callable[[Expr], Expr],
    split: tuple[int, int],
) -> None:
    d, parts = split
    size, stride = x.sizes[d] // parts, x.strides[d]
    cut = View(
        x.buffer,
        (parts, *x.sizes[:d], size, *x.sizes[d + 1 :]),
        (stride * size, *x.strides[:d], stride, *x.strides[d + 1 :]),
        x.offset,
        x.dtype,
    )
    kept = [1 if i in axes else n for i, n in enumerate(x.sizes)]
    partial = b.temporary(
        (parts, *kept),
        out.dtype
        if out.dtype in ("float64", "int64")
        else _SUM_DTYPE[VALUE_TYPE[out.dtype]]
        if kind == "sum"
        else out.dtype,
    )
    b.reduce(partial, cut.sizes, [i + 1 for i in axes], kind, lambda i: value(b.load(cut, i)), True)
    flat = View(
        partial.buffer,
        (parts, *(n for i, n in enumerate(kept) if keepdim or i not in axes)),
        (
            partial.strides[0],
            *(s for i, s in enumerate(partial.strides[1:]) if keepdim or i not in axes),
        ),
        0,
        partial.dtype,
    )
    reduce_values(b, out, flat, [0], False, kind, lambda v: v)


def _summed(out: View) -> str:
    """The value type sums to `out` are made in."""
    type_ = VALUE_TYPE.get(out.dtype)
    if type_ is None or type_ == "bool":
        raise Unsupported(f"a sum of dtype {out.dtype}")
    return "i64" if type_ == "i32" else type_


def _check_rounding(x: View, out: View) -> None:
    """ATen makes 16-bit numbers of other terms before it adds or multiplies them."""
    if out.dtype in ("bfloat16", "float16") and x.dtype != out.dtype:
        raise Unsupported(f"a {out.dtype} result of {x.dtype} terms")


def lower_sum(b: Builder, node: Node, out: View) -> None:
    x = node.args[0]
    _check_rounding(x, out)
    axes, keepdim = _axes(node, len(x.sizes))
    if x.numel == 0:
        return b.pointwise(out, lambda _: b.scalar(0, VALUE_TYPE[out.dtype]))
    type_ = _summed(out)
    return reduce_values(b, out, x, axes, keepdim, "sum", lambda v: cast(v, type_))


def lower_mean(b: Builder, node: Node, out: View) -> None:
    x = node.args[0]
    _check_rounding(x, out)
    axes, keepdim = _axes(node, len(x.sizes))
    type_ = _summed(out)
    if type_ not in ("f32", "f64") or x.numel == 0:
        raise Unsupported("a mean of integers or of nothing")
    count = 1
    for d in axes:
        count *= x.sizes[d]
    total = b.temporary(out.sizes, _SUM_DTYPE[type_])
    reduce_values(b, total, x, axes, keepdim, "sum", lambda v: cast(v, type_))
    b.pointwise(out, lambda i: b.load(total, i) / b.scalar(count, type_))


def lower_extremum(b: Builder, node: Node, out: View) -> None:
    """amax, amin, max, min."""
    x = node.args[0]
    axes, keepdim = _axes(node, len(x.sizes))
    kind = EXTREMA[node.target]
    if x.dtype == "bool":
        kind = {"max": "any", "min": "all"}[kind]
    reduce_values(b, out, x, axes, keepdim, kind, lambda v: v)


def lower_truth(b: Builder, node: Node, out: View) -> None:
    """any, all."""
    x = node.args[0]
    axes, keepdim = _axes(node, len(x.sizes))
    if out.dtype != "bool" or x.numel == 0:
        raise Unsupported("uint8 or nothing")
    if _dims(node, 1) in ([], ()):  # all of them to sums, none to these
        raise Unsupported("any or all over no dimensions")
    kind = TRUTHS[node.target]
    reduce_values(b, out, x, axes, keepdim, kind, lambda v: cast(v, "bool"))


def lower_prod(b: Builder, node: Node, out: View) -> None:
    x = node.args[0]
    _check_rounding(x, out)
    axes, keepdim = _axes(node, len(x.sizes))
    type_ = _summed(out)
    reduce_values(b, out, x, axes, keepdim, "prod", lambda v: cast(v, type_))


def lower_vector_norm(b: Builder, node: Node, out: View) -> None:
    x = node.args[0]
    order = float(node.args[1] if len(node.args) > 1 else node.kwargs.get("ord", 2))
    axes, keepdim = _axes(node, len(x.sizes), 2)
    type_ = _summed(out)
    if type_ not in ("f32", "f64") or VALUE_TYPE.get(x.dtype) != type_:
        raise Unsupported("a norm of another dtype")
    if order not in (1.0, 2.0, math.inf):
        raise Unsupported(f"a norm of order {order}")
    total = b.temporary(out.sizes, _SUM_DTYPE[type_])
    if order == 2.0:
        reduce_values(b, total, x, axes, keepdim, "sum", lambda v: v * v)
        b.pointwise(out, lambda i: op("sqrt", b.load(total, i)))
        return
    kind = "sum" if order == 1.0 else "max"
    reduce_values(b, total, x, axes, keepdim, kind, lambda v: op("abs", v))
    b.pointwise(out, lambda i: b.load(total, i))


def _float_temporary(b: Builder, sizes: Sequence[int], type_: str) -> View:
    return b.temporary(sizes, _SUM_DTYPE[type_])


def lower_softmax(b: Builder, node: Node, out: View) -> None:
    """_softmax, _safe_softmax and _log_softmax over one dimension."""
    x, dim = node.args[0], node.args[1]
    type_ = VALUE_TYPE.get(out.dtype)
    if type_ not in ("f32", "f64") or not x.sizes or x.numel == 0:
        raise Unsupported("softmax of this tensor")
    dim %= len(x.sizes)
    row = tuple(1 if d == dim else n for d, n in enumerate(x.sizes))
    top = _float_temporary(b, row, type_)
    shifted = _float_temporary(b, x.sizes, type_)
    total = _float_temporary(b, row, type_)
    safe = node.target is aten._safe_softmax.default
    b.reduce(top, x.sizes, [dim], "max", lambda i: cast(b.load(x, i), type_), True)
    log = node.target is aten._log_softmax.default
    if log:
        b.pointwise(shifted, lambda i: cast(b.load(x, i), type_) - b.load(top, i))
        b.reduce(total, x.sizes, [dim], "sum", lambda i: op("exp", b.load(shifted, i)), True)
        log_total = _float_temporary(b, row, type_)
        b.pointwise(log_total, lambda i: op("log", b.load(total, i)))
        b.pointwise(out, lambda i: b.load(shifted, i) - b.load(log_total, i))
        return
    b.pointwise(shifted, lambda i: op("exp", cast(b.load(x, i), type_) - b.load(top, i)))
    b.reduce(total, x.sizes, [dim], "sum", lambda i: b.load(shifted, i), True)
    # One division a row: the sum lies between 1 and the row's length.
    inverse = _float_temporary(b, row, type_)
    b.pointwise(inverse, lambda i: 1.0 / b.load(total, i))

    def value(index: Any) -> Expr:
        quotient = b.load(shifted, index) * b.load(inverse, index)
        if not safe:
            return quotient
        empty = op("eq", b.load(top, index), Const(-math.inf, type_))
        return op("where", empty, Const(0.0, type_), quotient)

    b.pointwise(out, value)


def lower_layer_norm(b: Builder, node: Node, outs: list[View | None]) -> None:
    x, shape, weight, bias, eps = node.args
    out, mean_out, rstd_out = outs
    assert out is not None
    _normalise_rows(b, x, len(shape), weight, bias, eps, out, mean_out, rstd_out, True)


def lower_rms_norm(b: Builder, node: Node, outs: list[View | None]) -> None:
    x, shape, weight, eps = node.args
    out = outs[0]
    assert out is not None
    if eps is None:
        eps = torch.finfo(getattr(torch, x.dtype)).eps
    rstd = outs[1] if len(outs) > 1 else None
    _normalise_rows(b, x, len(shape), weight, None, eps, out, None, rstd, False)


def _normalise_rows(
    b: Builder,
    x: View,
    inner: int,
    weight: View | None,
    bias: View | None,
    eps: float,
    out: View,
    mean_out: View | None,
    rstd_out: View | None,
    centre: bool,
) -> None:
    type_ = VALUE_TYPE.get(x.dtype)
    if type_ not in ("f32", "f64") or x.numel == 0:
        raise Unsupported("normalisation of this tensor")
    rank = len(x.sizes)
    axes = list(range(rank - inner, rank))
    row = tuple(1 if d in axes else n for d, n in enumerate(x.sizes))
    count = 1
    for d in axes:
        count *= x.sizes[d]

    def element(index: Any) -> Expr:
        return cast(b.load(x, index), type_)

    centred: Callable[[Any], Expr] = element
    mean = _float_temporary(b, row, type_)
    if centre:
        total = _float_temporary(b, row, type_)
        b.reduce(total, x.sizes, axes, "sum", element, True)
        b.pointwise(mean, lambda i: b.load(total, i) / b.scalar(count, type_))
        difference = _float_temporary(b, x.sizes, type_)
        b.pointwise(difference, lambda i: element(i) - b.load(mean, i))

        def centred(index: Any) -> Expr:
            return b.load(difference, index)

    squares = _float_temporary(b, row, type_)
    b.reduce(squares, x.sizes, axes, "sum", lambda i: centred(i) * centred(i), True)
    rstd = _float_temporary(b, row, type_)
    b.pointwise(rstd, lambda i: op("rsqrt", b.load(squares, i) / b.scalar(count, type_) + eps))

    def value(index: Any) -> Expr:
        result = centred(index) * b.load(rstd, index)
        if weight is not None:
            result = result * cast(b.load(weight, index), type_)
        if bias is not None:
            result = result + cast(b.load(bias, index), type_)
        return result

    b.pointwise(out, value)
    for target, source in ((mean_out, mean), (rstd_out, rstd)):
        if target is not None:
            b.copy(View(target.buffer, row, _kept_strides(target, row), 0, target.dtype), source)


def _kept_strides(target: View, row: tuple[int, ...]) -> tuple[int, ...]:
    if len(target.sizes) == len(row):
        return target.strides
    return (*target.strides, *([0] * (len(row) - len(target.sizes))))


EXTREMA: dict[Any, str] = {
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.max.default: "max",
    aten.min.default: "min",
}
TRUTHS: dict[Any, str] = {
    aten.any.default: "any",
    aten.any.dim: "any",
    aten.any.dims: "any",
    aten.all.default: "all",
    aten.all.dim: "all",
    aten.all.dims: "all",
}
