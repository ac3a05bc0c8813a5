"""Lowerings that read and add where other tensors say: embeddings, index_select, gather, indexing by numbers,
and the additions that are their gradients.

In: a node of the tensor graph. Out: loop nodes; `indices.py` makes places of numbers. Rules as in
`lowerings_pointwise`. Additions to one place come in the order of the loops on the processor, where one thread does
them, and in any order on a GPU, as ATen's do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from accel.codegen.affine import ZERO, Affine, address
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.indices import INDEXED, Indexed, place_of
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, Gather, constant, op
from accel.codegen.symbols import hint, is_symbolic
from accel.codegen.tensor_graph import Node, View

aten = torch.ops.aten

# Where an element of the result is in each tensor of indices, and in the dimensions without one.
Where = tuple[Mapping[Indexed, Sequence[Affine]], Sequence[Affine]]

_ADDED = frozenset({"float32", "float64", "int32", "int64"})  # others ATen rounds at other times
# On the processor one thread adds: up to so many elements for each core that ATen could have beside two.
_MOST_ADDED = 1 << 22


def _gather(b: Builder, node: Node, out: View, where: Callable[[Sequence[Affine]], Where]) -> None:
    x, found = node.args[0], INDEXED[node.target](node)
    b.supported(out, x)
    if out.numel == 0:
        raise Unsupported("a gather of nothing")
    place = place_of(b, x, found)

    def value(index: list[Affine]) -> Expr:
        at, others = where(index)
        return Gather(x.buffer, address(x.offset, x.strides, others), place(at), x.dtype)

    b.pointwise(out, value)


def lower_embedding(b: Builder, node: Node, out: View) -> None:
    (by,) = INDEXED[node.target](node)
    rank = len(by.index.sizes)
    _gather(b, node, out, lambda i: ({by: i[:rank]}, [ZERO, *i[rank:]]))


def lower_index_select(b: Builder, node: Node, out: View) -> None:
    _gather(b, node, out, _selected(node))


def lower_gather(b: Builder, node: Node, out: View) -> None:
    _gather(b, node, out, _along(node))


def lower_index(b: Builder, node: Node, out: View) -> None:
    _gather(b, node, out, _positions(node)[0])


def _selected(node: Node) -> Callable[[Sequence[Affine]], Where]:
    """Of a dimension that goes through a line of indices."""
    (by,) = INDEXED[node.target](node)
    return lambda i: (
        {by: i[by.dim : by.dim + len(by.index.sizes)]},
        [*i[: by.dim], ZERO, *i[by.dim + 1 :]],
    )


def _along(node: Node) -> Callable[[Sequence[Affine]], Where]:
    """Of indices that have a number for every element."""
    (by,) = INDEXED[node.target](node)
    if len(by.index.sizes) != len(node.args[0].sizes):
        raise Unsupported("indices of another rank")
    return lambda i: ({by: i}, [*i[: by.dim], ZERO, *i[by.dim + 1 :]])


def _positions(node: Node) -> tuple[Callable[[Sequence[Affine]], Where], list[Any]]:
    """Of dimensions with indices, which are broadcast: they stand where the first is if they are neighbours, else
    in front of the others. Also the sizes of what they choose."""
    x, found = node.args[0], INDEXED[node.target](node)
    dims = [by.dim for by in found]
    shape = torch.broadcast_shapes(*(tuple(map(hint, by.index.sizes)) for by in found))
    rank = len(shape)
    first = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0

    def where(i: Sequence[Affine]) -> Where:
        common, others = i[first : first + rank], iter([*i[:first], *i[first + rank :]])
        own = [ZERO if d in dims else next(others) for d in range(len(x.sizes))]
        return dict.fromkeys(found, common), own

    rest = [n for d, n in enumerate(x.sizes) if d not in dims]
    return where, [*rest[:first], *shape, *rest[first:]]


def _scatter(
    b: Builder,
    node: Node,
    out: View,
    source: View,
    where: Callable[[Sequence[Affine]], Where],
) -> None:
    """Adds `source` to a copy of the first operand."""
    x, found = node.args[0], INDEXED[node.target](node)
    _check_added(b, out, source)
    place = place_of(b, out, found)
    b.copy(out, x, region=True)

    def value(index: list[Affine]) -> tuple[Sequence[Affine], Expr, Expr]:
        at, others = where(index)
        return others, place(at), b.load(source, index)

    b.scatter(out, source.sizes, value)


def _check_added(b: Builder, out: View, source: View) -> None:
    b.supported(out, source)
    if out.dtype not in _ADDED or source.dtype != out.dtype:
        raise Unsupported("additions of this dtype")
    if 0 in source.sizes or out.numel == 0:
        raise Unsupported("additions of nothing")
    if b.templates and hint(source.numel) * ((os.cpu_count() or 1) - 2) > _MOST_ADDED:
        raise Unsupported("additions enough for several threads")


def lower_scatter_add(b: Builder, node: Node, out: View) -> None:
    _, _, index, source = node.args
    part = View(source.buffer, index.sizes, source.strides, source.offset, source.dtype)
    if len(source.sizes) != len(index.sizes):
        raise Unsupported("a source of another rank")
    _scatter(b, node, out, part, _along(node))


def lower_index_add(b: Builder, node: Node, out: View) -> None:
    if node.kwargs.get("alpha", 1) != 1 or not node.args[0].sizes:
        raise Unsupported("index_add with a factor")
    _scatter(b, node, out, node.args[3], _selected(node))


def lower_index_put(b: Builder, node: Node, out: View) -> None:
    _, _, values, *rest = node.args
    if not (rest[0] if rest else node.kwargs.get("accumulate", False)):
        raise Unsupported("the last of several values for one place")
    where, sizes = _positions(node)
    if any(is_symbolic(n) for by in INDEXED[node.target](node) for n in by.index.sizes):
        raise Unsupported("values for places whose number differs between calls")
    missing = len(sizes) - len(values.sizes)
    if missing < 0:
        raise Unsupported("values of a higher rank")
    strides = [0] * missing
    for n, m, stride in zip(sizes[missing:], values.sizes, values.strides, strict=True):
        strides.append(stride if n == m else 0)
    spread = View(values.buffer, tuple(sizes), tuple(strides), values.offset, values.dtype)
    _scatter(b, node, out, spread, where)


def scatter_embedding_gradient(b: Builder, node: Node, out: View) -> None:
    """Rows of a gradient, added to zeros; those of the padding are left out."""
    gradient, index, _, padding, by_frequency = node.args
    if by_frequency:
        raise Unsupported("gradients scaled by frequency")
    _check_added(b, out, gradient)
    by, type_ = Indexed(0, index), VALUE_TYPE[out.dtype]
    place, nothing = place_of(b, out, [by]), Const(constant(0, type_), type_)
    b.pointwise(out, lambda _: nothing, region=True)

    def value(i: list[Affine]) -> tuple[Sequence[Affine], Expr, Expr]:
        at, term = i[:-1], b.load(gradient, i)
        if padding >= 0:
            number = b.load(index, at)
            term = op("where", op("eq", number, Const(padding, number.type)), nothing, term)
        return [ZERO, i[-1]], place({by: at}), term

    b.scatter(out, gradient.sizes, value)


LOWERINGS: dict[Any, Callable[[Builder, Node, View], None]] = {
    aten.embedding.default: lower_embedding,
    aten.index_select.default: lower_index_select,
    aten.gather.default: lower_gather,
    aten.index.Tensor: lower_index,
    aten.scatter_add.default: lower_scatter_add,
    aten.index_add.default: lower_index_add,
    aten.index_put.default: lower_index_put,
}
