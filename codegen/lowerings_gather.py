"""Lowerings that read where other tensors say: embeddings, index_select, gather, indexing by numbers.

In: a node of the tensor graph. Out: loop nodes. Each tensor of indices is made places first: counted
from the front and bounded, so that no read leaves its tensor, in 32 bits where they suffice; then one
loop gathers. Invariant: no result of an index out of range is seen. On the processor the graph
expects that there is none (a speculation: the program's own code runs and raises eager's error);
kernels of a GPU assert it, as ATen's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel.codegen.affine import ZERO, Affine, address
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, Gather, cast, op
from accel.codegen.lowerings_reduce import reduce_values
from accel.codegen.symbols import hint, is_same, is_symbolic
from accel.codegen.tensor_graph import Node, View, span

aten = torch.ops.aten

_NARROW = 1 << 31


def lower_embedding(b: Builder, node: Node, out: View) -> None:
    table, index, *_ = node.args
    by = _Indexed(0, index, wraps=False)
    rank = len(index.sizes)
    _gather(b, out, table, [by], lambda i: ({by: i[:rank]}, [ZERO, *i[rank:]]))


def lower_index_select(b: Builder, node: Node, out: View) -> None:
    x, dim, index = node.args
    if not x.sizes:
        raise Unsupported("a selection of one number")
    dim %= len(x.sizes)
    by = _Indexed(dim, index, wraps=False)
    _gather(b, out, x, [by], lambda i: ({by: i[dim : dim + len(index.sizes)]}, i))


def lower_gather(b: Builder, node: Node, out: View) -> None:
    x, dim, index, *_ = node.args
    if len(x.sizes) != len(index.sizes) or not x.sizes:
        raise Unsupported("a gather of one number")
    by = _Indexed(dim % len(x.sizes), index, wraps=False)
    _gather(b, out, x, [by], lambda i: ({by: i}, i))


def lower_index(b: Builder, node: Node, out: View) -> None:
    """Dimensions with indices, which are broadcast, stand where the first is if they are neighbours, else in
    front of the others."""
    x, indices = node.args
    found = [_Indexed(d, v, wraps=True) for d, v in enumerate(indices) if v is not None]
    dims = [by.dim for by in found]
    rank = max(len(by.index.sizes) for by in found)
    neighbours = dims == list(range(dims[0], dims[0] + len(dims)))
    first = dims[0] if neighbours else 0

    def places(i: Sequence[Affine]) -> tuple[dict[_Indexed, Sequence[Affine]], Sequence[Affine]]:
        common, others = i[first : first + rank], iter([*i[:first], *i[first + rank :]])
        own = [ZERO if d in dims else next(others) for d in range(len(x.sizes))]
        return dict.fromkeys(found, common), own

    _gather(b, out, x, found, places)


@dataclass(frozen=True)
class _Indexed:
    """A dimension that a tensor's numbers go through; negative ones count from its end if it `wraps`."""

    dim: int
    index: View
    wraps: bool


def _gather(
    b: Builder,
    out: View,
    x: View,
    found: list[_Indexed],
    places: Callable[[Sequence[Affine]], tuple[dict[_Indexed, Sequence[Affine]], Sequence[Affine]]],
) -> None:
    """`places` answers for a place of `out` where that is in the tensors of indices and in the other
    dimensions of `x`. Errors: Unsupported, before anything is made."""
    b.supported(out, x)
    if any(VALUE_TYPE.get(by.index.dtype) not in ("i32", "i64") for by in found):
        raise Unsupported("a mask as an index")
    if any(by.index.dtype in ("int8", "int16", "uint8") for by in found):
        raise Unsupported("indices of this dtype")
    if not b.graph_may_speculate and not b.asserts:
        raise Unsupported("indices that nobody can ask about")
    if out.numel == 0 or any(is_same(x.sizes[by.dim], 0) for by in found):
        raise Unsupported("a gather of nothing")
    reach = span(x.sizes, x.strides)
    type_ = "i64" if is_symbolic(reach) or reach + hint(x.offset) >= _NARROW else "i32"
    made = {by: _places(b, by.index, x.sizes[by.dim], by.wraps, type_) for by in found}

    def value(index: list[Affine]) -> Expr:
        where, own = places(index)
        own = [ZERO if any(by.dim == d for by in found) else i for d, i in enumerate(own)]
        place: Expr | None = None
        for by in found:
            part = cast(b.load(made[by], where[by]), type_) * b.scalar(x.strides[by.dim], type_)
            place = part if place is None else place + part
        assert place is not None
        return Gather(x.buffer, address(x.offset, x.strides, own), place, x.dtype)

    b.pointwise(out, value)


def _places(b: Builder, index: View, count: Any, wraps: bool, type_: str) -> View:
    """The places that indices stand for, each inside of a dimension of `count`."""
    # Of what is repeated once is enough.
    once = [1 if is_same(s, 0) else n for n, s in zip(index.sizes, index.strides, strict=True)]
    index = replace(index, sizes=tuple(once))
    key = index, count, wraps, type_
    if key in b.places:
        return b.places[key]

    zero, end = Const(0, "i64"), b.scalar(count, "i64")

    def from_front(i: list[Affine]) -> Expr:
        raw = cast(b.load(index, i), "i64")
        return op("where", op("lt", raw, zero), raw + end, raw) if wraps else raw

    def is_outside(place: Expr) -> Expr:
        return cast(op("or", op("lt", place, zero), op("ge", place, end)), "i32")

    front = b.temporary(index.sizes, "int64")
    b.pointwise(front, from_front, inlined=False)
    made = b.temporary(index.sizes, {"i32": "int32", "i64": "int64"}[type_])
    b.pointwise(made, lambda i: cast(op("bounded", b.load(front, i), end), type_), inlined=False)
    if not b.asserts:
        any_outside = b.temporary((), "int32")
        axes = range(len(index.sizes))
        reduce_values(b, any_outside, front, axes, False, "max", is_outside)
        b.program.graph.speculations.append((any_outside, False))
    b.places[key] = made
    return made


# Each of them raises for an index out of range.
GATHERS: dict[Any, Callable[[Builder, Node, View], None]] = {
    aten.embedding.default: lower_embedding,
    aten.index_select.default: lower_index_select,
    aten.gather.default: lower_gather,
    aten.index.Tensor: lower_index,
}
