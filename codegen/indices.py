"""Which dimensions an operation goes through by the numbers of other tensors, and the places that these stand for.

In: nodes that gather or scatter. Out: their tensors of indices; loop nodes that make places of them: counted from
the front and bounded, so that no access leaves its tensor, in 32 bits where they suffice. Invariant: no
result of an index out of range is seen. On the processor the graph expects that there is none (a
speculation: the program's own code runs and raises eager's error), unless the forward has asked already;
kernels of a GPU assert it, as ATen's do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel.codegen.affine import Affine
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, cast, op
from accel.codegen.lowerings_reduce import reduce_values
from accel.codegen.symbols import is_same, is_symbolic
from accel.codegen.tensor_graph import Node, View, span

aten = torch.ops.aten

_NARROW = 1 << 31
_DTYPES = frozenset({"int32", "int64"})


@dataclass(frozen=True)
class Indexed:
    """A dimension that a tensor's numbers go through; negative ones count from its end if it `wraps`."""

    dim: int
    index: View
    wraps: bool = False

    @property
    def once(self) -> View:
        """Its numbers without repetition."""
        pairs = zip(self.index.sizes, self.index.strides, strict=True)
        return replace(self.index, sizes=tuple(1 if is_same(s, 0) else n for n, s in pairs))


def _along(node: Node) -> list[Indexed]:
    x, dim, index, *_ = node.args
    return [Indexed(dim % max(len(x.sizes), 1), index)]


def _by_position(node: Node) -> list[Indexed]:
    return [Indexed(d, v, wraps=True) for d, v in enumerate(node.args[1]) if v is not None]


# By operation whose first operand is indexed. Each of them raises for an index out of range.
INDEXED: dict[Any, Callable[[Node], list[Indexed]]] = {
    aten.embedding.default: lambda node: [Indexed(0, node.args[1])],
    aten.index_select.default: _along,
    aten.gather.default: _along,
    aten.index.Tensor: _by_position,
    aten.scatter_add.default: _along,
    aten.index_add.default: _along,
    aten.index_put.default: _by_position,
}
# A tensor of indices, how long the dimension is, and whether negative ones count from its end.
Question = tuple[View, Any, bool]


def questions(node: Node) -> list[Question]:
    """What an operation that may raise for its indices asks about them."""
    if node.target not in INDEXED or not node.args[0].sizes:
        return []
    found, sizes = INDEXED[node.target](node), node.args[0].sizes
    if any(by.index.dtype not in _DTYPES for by in found):  # masks stand for several dimensions
        return []
    return [(by.once, sizes[by.dim], by.wraps) for by in found]


def place_of(
    b: Builder, x: View, found: Sequence[Indexed]
) -> Callable[[Mapping[Indexed, Sequence[Affine]]], Expr]:
    """Answers for a place in each tensor of indices how far from where its other dimensions begin the element of
    `x` is. Errors: Unsupported, before anything is made."""
    if not x.sizes or any(by.index.dtype not in _DTYPES for by in found):
        raise Unsupported("indices of this kind")
    asked = [(by.once, x.sizes[by.dim], by.wraps) for by in found]
    graph = b.program.graph
    if not b.asserts and not graph.may_speculate and not graph.answered.issuperset(asked):
        raise Unsupported("indices that nobody can ask about")
    if any(0 in (count, index.numel) for index, count, _ in asked):
        raise Unsupported("indices into nothing")
    reach = span(x.sizes, x.strides)
    type_ = "i64" if is_symbolic(reach) or reach >= _NARROW else "i32"
    places = {by: _places(b, q, type_) for by, q in zip(found, asked, strict=True)}

    def place(where: Mapping[Indexed, Sequence[Affine]]) -> Expr:
        total: Expr | None = None
        for by in found:
            part = b.load(places[by], where[by]) * b.scalar(x.strides[by.dim], type_)
            total = part if total is None else total + part
        assert total is not None
        return total

    return place


def _places(b: Builder, question: Question, type_: str) -> View:
    """The bounded places of a tensor of indices."""
    key = question, type_
    if key in b.places:
        return b.places[key]
    index, count, wraps = question
    zero, end = Const(0, "i64"), b.scalar(count, "i64")

    def from_front(i: list[Affine]) -> Expr:
        raw = cast(b.load(index, i), "i64")
        return op("where", op("lt", raw, zero), raw + end, raw) if wraps else raw

    def is_outside(place: Expr) -> Expr:
        return cast(op("or", op("lt", place, zero), op("ge", place, end)), "i32")

    front = b.temporary(index.sizes, "int64")
    b.pointwise(front, from_front, inlined=False)
    made = b.temporary(index.sizes, next(d for d in _DTYPES if VALUE_TYPE[d] == type_))
    b.pointwise(made, lambda i: cast(op("bounded", b.load(front, i), end), type_), inlined=False)
    graph = b.program.graph
    if not b.asserts and question not in graph.answered:
        any_outside = b.temporary((), "int32")
        axes = range(len(index.sizes))
        reduce_values(b, any_outside, front, axes, False, "max", is_outside)
        graph.speculations.append((any_outside, False))
    b.places[key] = made
    return made
