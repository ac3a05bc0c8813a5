"""Lowerings that make or move elements: fills, ranges, concatenation, padding, writes.

In: a node of the tensor graph. Out: loop nodes. Rules for a new row as in
`lowerings_pointwise`; here a row writes its own index expressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accel.codegen.affine import Affine
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, Iota, cast, constant, op
from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Node, View, contiguous_strides

aten = torch.ops.aten


def _value_type(out: View) -> str:
    if out.dtype not in VALUE_TYPE:
        raise Unsupported(f"dtype {out.dtype}")
    return VALUE_TYPE[out.dtype]


def _fill(b: Builder, out: View, value: Any) -> None:
    b.pointwise(out, lambda _: b.scalar(value, _value_type(out), out.dtype))


FILL_VALUES: dict[Any, Any] = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    # Uninitialised memory: zeros are as good as any.
    aten.empty.memory_format: 0,
    aten.empty_like.default: 0,
    aten.empty_strided.default: 0,
    aten.new_empty.default: 0,
    aten.new_empty_strided.default: 0,
}
# The position of the value among the arguments.
FILL_ARGUMENT: dict[Any, int] = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.fill.Scalar: 1,
    aten.scalar_tensor.default: 0,
}


def lower_fill(b: Builder, node: Node, out: View) -> None:
    if node.target in FILL_VALUES:
        return _fill(b, out, FILL_VALUES[node.target])
    return _fill(b, out, node.args[FILL_ARGUMENT[node.target]])


def lower_arange(b: Builder, node: Node, out: View) -> None:
    args = list(node.args)
    if node.target is aten.arange.default:
        args = [0, *args]
    start, step = args[0], args[2] if len(args) > 2 else node.kwargs.get("step", 1)
    type_ = _value_type(out)
    if type_ in ("i64", "i32") or all(_is_whole(v) for v in (start, step)):
        if not all(_is_whole(v) for v in (start, step)):
            raise Unsupported("a fractional step with an integer dtype")
        first, stride = (v if is_symbolic(v) else int(v) for v in (start, step))

        def whole(index: list[Affine]) -> Expr:
            return cast(Iota(index[0].times(stride).plus(first)), type_)

        return b.pointwise(out, whole)
    if type_ not in ("f32", "f64"):
        raise Unsupported("a range of this dtype")

    def value(index: list[Affine]) -> Expr:  # ATen computes start + i * step in double
        i = cast(Iota(index[0]), "f64")
        return cast(Const(float(start), "f64") + i * float(step), type_)

    return b.pointwise(out, value)


def _is_whole(value: Any) -> bool:
    return is_symbolic(value) or float(value).is_integer()


def lower_eye(b: Builder, node: Node, out: View) -> None:
    type_ = _value_type(out)
    b.pointwise(out, lambda i: cast(op("eq", Iota(i[0]), Iota(i[1])), type_))


def lower_triangle(b: Builder, node: Node, out: View) -> None:
    """tril, triu."""
    x = node.args[0]
    diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
    compare = "le" if node.target is aten.tril.default else "ge"
    type_ = _value_type(out)

    def value(index: list[Affine]) -> Expr:
        inside = op(compare, Iota(index[-1]), Iota(index[-2].plus(diagonal)))
        zero = Const(constant(0, type_), type_)
        return op("where", inside, cast(b.load(x, index), type_), zero)

    b.pointwise(out, value)


def lower_copy(b: Builder, node: Node, out: View) -> None:
    b.copy(out, node.args[0])


def lower_write(b: Builder, node: Node, out: View) -> None:
    """A copy of the base with a region replaced."""
    base, placed, value = node.args
    b.supported(placed, value)
    if base is not None:
        target = View(placed.buffer, base.sizes, base.strides, base.offset, base.dtype)
        b.copy(target, base, region=True)
    b.copy(placed, value, region=base is not None)


def lower_cat(b: Builder, node: Node, out: View) -> None:
    tensors = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim %= max(len(out.sizes), 1)
    # ATen skips tensors of shape [0] whatever the others' rank is.
    tensors = [t for t in tensors if t.sizes != (0,)]
    b.supported(out, *tensors)
    start = 0
    for t in tensors:
        b.copy(_part(out, dim, start, t.sizes[dim]), t, region=True)
        start += t.sizes[dim]


def _part(out: View, dim: int, start: int, length: int) -> View:
    sizes = (*out.sizes[:dim], length, *out.sizes[dim + 1 :])
    return View(out.buffer, sizes, out.strides, out.offset + start * out.strides[dim], out.dtype)


def lower_pad(b: Builder, node: Node, out: View) -> None:
    x, pads = node.args[0], node.args[1]
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    b.supported(out, x)
    pad_into(b, out, x, pads, value)


def pad_into(b: Builder, out: View, x: View, pads: Sequence[int], value: Any) -> None:
    """`x` with borders of `value`; `pads` are (before, after) from the last dimension on."""
    inside = out
    frame: list[View] = []
    for i in range(len(pads) // 2):
        dim = len(x.sizes) - 1 - i
        before, after = pads[2 * i], pads[2 * i + 1]
        if before < 0 or after < 0:
            raise Unsupported("negative padding")
        length = inside.sizes[dim]
        frame.append(_part(inside, dim, 0, before))
        frame.append(_part(inside, dim, length - after, after))
        inside = _part(inside, dim, before, length - before - after)
    for border in frame:
        b.pointwise(border, lambda _: b.scalar(value, _value_type(out), out.dtype), region=True)
    b.copy(inside, x, region=True)


def lower_nearest(b: Builder, node: Node, out: View) -> None:
    """Enlarging by whole factors: every element becomes a block of equal ones."""
    x = node.args[0]
    factors = [n // max(m, 1) for n, m in zip(out.sizes[2:], x.sizes[2:], strict=True)]
    whole = [m * f for m, f in zip(x.sizes[2:], factors, strict=True)] == list(out.sizes[2:])
    scales = [v for a in node.args[1:] if isinstance(a, (list, tuple, float)) for v in _flat(a)]
    fractional = any(isinstance(v, float) and not v.is_integer() for v in scales)
    if not whole or fractional or out.strides != contiguous_strides(out.sizes):
        raise Unsupported("enlarging by a fraction")
    sizes, strides = list(out.sizes[:2]), list(out.strides[:2])
    for m, f, step in zip(x.sizes[2:], factors, out.strides[2:], strict=True):
        sizes += [m, f]
        strides += [step * f, step]
    blocks = View(out.buffer, tuple(sizes), tuple(strides), out.offset, out.dtype)
    type_ = _value_type(out)
    b.pointwise(blocks, lambda i: cast(b.load(x, [*i[:2], *i[2::2]]), type_))


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def lower_flip(b: Builder, node: Node, out: View) -> None:
    x, dims = node.args
    turned = {d % max(len(x.sizes), 1) for d in dims}

    def value(index: list[Affine]) -> Expr:
        places = [
            i.times(-1).plus(x.sizes[d] - 1) if d in turned else i for d, i in enumerate(index)
        ]
        return b.load(x, places)

    b.supported(out, x)
    b.pointwise(out, value)


def lower_repeat(b: Builder, node: Node, out: View) -> None:
    """Every dimension of the result is a number of copies, one behind the other."""
    x, counts = node.args
    b.supported(out, x)
    added = len(counts) - len(x.sizes)
    sizes: list[Any] = []
    strides: list[Any] = []
    for count, length, step in zip(counts, (*[1] * added, *x.sizes), out.strides, strict=True):
        sizes += [count, length]
        strides += [step * length, step]
    blocks = View(out.buffer, tuple(sizes), tuple(strides), out.offset, out.dtype)
    type_ = _value_type(out)
    b.pointwise(blocks, lambda i: cast(b.load(x, i[1::2][added:]), type_))
