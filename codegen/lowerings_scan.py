"""Lowerings of scans: cumsum, cumprod.

In: a node of the tensor graph. Out: a loop node that scans; what is computed before and behind it
joins by fusion. Invariant: elements are combined in the type in which ATen combines them: float32 in
float64, half precisions in float32, whole numbers around the end of their type. Lanes of a vector are
combined in eager's order unless nothing can overflow on the way that does not in eager. On a GPU they
are combined by parts, as by ATen there. Where ATen's loop is as fast as ours, it is ATen's call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from accel.codegen.affine import Affine
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import ITEM_BYTES, VALUE_TYPE, Expr, cast, rounded
from accel.codegen.symbols import hint, is_same
from accel.codegen.tensor_graph import Node, View

aten = torch.ops.aten

_KINDS: dict[Any, str] = {aten.cumsum.default: "sum", aten.cumprod.default: "prod"}
# What a running value of elements of a dtype is computed with.
_TYPE = {"float32": "f64"}
# A vector of these is combined by parts: its sums and products are far from the type's end.
_BY_PARTS = {
    "sum": ("float32", "float16", "int64", "int32", "int16", "int8", "uint8"),
    "prod": ("float32", "int64", "int32", "int16", "int8", "uint8"),
}
# What is no faster than ATen's loop, measured at 1,000 to 4,000,000 elements (of fewer ours always is):
# lines of a few columns, which fill no vector and wait for each other; short rows of wide numbers; few
# rows that are walked element by element; operands that do not lie along the result's rows.
_FEW_ELEMENTS = 1000
_FEW_COLUMNS, _FEW_LINES = range(2, 5), 16
_SHORT_WIDE_ROWS = range(3, 8)
_FEW_ROWS, _LONG_ROWS = 8, 4096


def lower_scan(b: Builder, node: Node, out: View) -> None:
    x, dim, *_ = node.args
    if out.dtype == "bool":
        raise Unsupported("a scan of truths")
    kind, type_ = _KINDS[node.target], VALUE_TYPE[out.dtype]

    def element(index: list[Affine]) -> Expr:
        return rounded(cast(b.load(x, index), type_), out.dtype)

    if not out.sizes:
        return b.pointwise(out, element)
    axis, in_order = dim % len(out.sizes), out.dtype not in _BY_PARTS[kind]
    if is_same(out.sizes[axis], 1):  # zero and it: of a negative zero a positive one
        return b.pointwise(out, lambda i: element(i) + 0 if kind == "sum" else element(i))
    if b.lanes and _is_fast_in_eager(x, out, axis, in_order):
        raise Unsupported("a scan of this shape")

    def value(index: list[Affine]) -> Expr:
        return cast(element(index), _TYPE.get(out.dtype, type_))

    b.scan(out, axis, kind, value, in_order)


def _is_fast_in_eager(x: View, out: View, axis: int, in_order: bool) -> bool:
    length, numel = hint(out.sizes[axis]), hint(out.numel)
    columns = math.prod(hint(n) for n in out.sizes[axis + 1 :])
    steps = [s for n, s in zip(x.sizes, x.strides, strict=True) if not is_same(n, 1)]
    if numel <= _FEW_ELEMENTS:
        return False
    if not (is_same(steps[-1], 1) or is_same(steps[-1], 0)):
        return True
    if columns > 1:
        return columns in _FEW_COLUMNS and length > _FEW_LINES
    if ITEM_BYTES[out.dtype] == 8 and length in _SHORT_WIDE_ROWS:
        return True
    return in_order and numel // length < _FEW_ROWS and length > _LONG_ROWS


SCANS: dict[Any, Callable[[Builder, Node, View], None]] = dict.fromkeys(_KINDS, lower_scan)
