"""Lowerings of scans: cumsum, cumprod.

In: a node of the tensor graph. Out: a loop node that scans; what is computed before and behind it
joins by fusion. Invariant: elements are combined in the type in which ATen combines them: float32 in
float64, half precisions in float32, whole numbers around the end of their type. Lanes of a vector are
combined in eager's order unless nothing can overflow on the way that does not in eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accel.codegen.affine import Affine
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import VALUE_TYPE, Expr, cast, rounded
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


def lower_scan(b: Builder, node: Node, out: View) -> None:
    x, dim, *_ = node.args
    if out.dtype == "bool":
        raise Unsupported("a scan of truths")
    kind, type_ = _KINDS[node.target], VALUE_TYPE[out.dtype]

    def element(index: list[Affine]) -> Expr:
        return rounded(cast(b.load(x, index), type_), out.dtype)

    if not out.sizes:
        return b.pointwise(out, element)
    b.scan(
        out,
        dim % len(out.sizes),
        kind,
        lambda index: cast(element(index), _TYPE.get(out.dtype, type_)),
        in_order=out.dtype not in _BY_PARTS[kind],
    )


SCANS: dict[Any, Callable[[Builder, Node, View], None]] = dict.fromkeys(_KINDS, lower_scan)
