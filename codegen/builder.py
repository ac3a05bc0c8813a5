"""What lowerings build with: loop nodes from functions of an index.

In: views and functions `index -> Expr`. Out: loop nodes appended to a `Program`.
Invariant: a value whose expression reads no memory (constants, aranges, masks made of
them) is written into its readers' expressions and costs no buffer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accel.codegen.affine import ZERO, Affine, address, invert
from accel.codegen.loop_ir import (
    VALUE_TYPE,
    Const,
    Expr,
    Gather,
    Iota,
    Load,
    Table,
    cast,
    constant,
    leaves,
    op,
    rounded,
    substitute,
)
from accel.codegen.loop_ir import Op as OpExpr
from accel.codegen.program import LoopNode, Program
from accel.codegen.symbols import Dim, hint, is_same
from accel.codegen.tensor_graph import Buffer, View, contiguous_strides, span
from accel.codegen.trials import Shape

Index = Sequence[Affine]
# A value of at most this cost, read from one small tensor, is computed again by readers.
_INLINE_COST = 4.0
_INLINE_OPERATIONS = 24
_PARTS = (64, 32, 16, 8, 50, 49, 25, 7, 5, 4, 3, 2)
_INTEGER_BITS = {"int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8}


class Unsupported(Exception):
    """This use of the operation has no lowering: it stays an ATen call."""


@dataclass(frozen=True)
class Splitting:
    """When a reduction is done in two steps: to fewer than `results`, over `elements` or more.

    `programs` is how many partial results to aim at; `columns` says that long columns are
    reduced several lines at a time.
    """

    results: int = 16
    elements: int = 1 << 15
    programs: int | None = None
    columns: bool = True

    def parts(self, results: int) -> tuple[int, ...]:
        """Into how many parts to cut, the best number first."""
        if self.programs is None:
            return _PARTS
        wanted = max(self.programs // max(results, 1), 2)
        halves = [wanted >> k for k in range(wanted.bit_length())]
        return tuple(sorted({n for n in (*halves, *_PARTS) if 1 < n <= wanted}, reverse=True))


class Builder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.splitting = Splitting()
        self.definitions: dict[int, LoopNode] = {}
        self.inlinable: dict[int, tuple[LoopNode, bool]] = {}
        self.templates = False  # kernels written by hand may be used
        self.products = False  # the templates of products.cpp may be used
        self.tiled_convolutions = True  # ... and those of winograd.cpp
        # Whether they are as fast as ATen's: by shape, and whether an epilogue may follow.
        self.product_pays: Callable[[Shape, bool], bool] = lambda _shape, _epilogue: True
        self.asserts = False  # kernels may end a run with an assertion
        self.draws = False  # kernels are given a part of a generator's stream
        self.lanes = True  # kernels walk with vectors of lanes
        self.places: dict[Any, View] = {}  # of tensors of indices -> bounded ones
        self.continued: set[int] = set()  # buffers that some node reads which becomes a loop
        self.read: set[int] = set()  # buffers that some node, output or commit reads
        self.packed_rows: dict[View, View] = {}  # rows of a product -> their packed form
        self.turned_rights: dict[View, View] = {}  # a product's right side -> the same, by rows
        self.uses: Counter[View] = Counter()  # products that a view is the right side of
        self.location = ""
        self._reader_numel = 1

    def known(self) -> tuple[dict[Any, Any], ...]:
        """What the nodes so far have left for later ones."""
        return (
            self.definitions,
            self.inlinable,
            self.packed_rows,
            self.turned_rights,
            self.places,
        )

    # ------------------------------------------------------------ values

    def buffer(self, view: View) -> Buffer:
        return self.program.graph.buffers[view.buffer]

    def temporary(self, sizes: Sequence[int], dtype: str) -> View:
        sizes = tuple(sizes)
        strides = contiguous_strides(sizes)
        return self.program.graph.new_buffer(span(sizes, strides), dtype, sizes, strides).view

    def supported(self, *views: View) -> None:
        for view in views:
            if view.dtype not in VALUE_TYPE:
                raise Unsupported(f"dtype {view.dtype}")

    def load(self, view: View, index: Index) -> Expr:
        """The element of `view` at `index`, which is broadcast to the view's rank."""
        self.supported(view)
        index = list(index)[len(index) - len(view.sizes) :]
        index = [ZERO if is_same(n, 1) else i for n, i in zip(view.sizes, index, strict=True)]
        where = address(view.offset, view.strides, index)
        inlined = self._inline(view, where)
        return Load(view.buffer, where, view.dtype) if inlined is None else inlined

    def _inline(self, view: View, where: Affine) -> Expr | None:
        buffer = self.buffer(view)
        if buffer.constant is not None and buffer.dtype == view.dtype:
            type_ = VALUE_TYPE[view.dtype]
            values = tuple(constant(v, type_) for v in buffer.constant)
            if len(values) == 1:
                return Const(values[0], type_)
            return Table(values, where, type_)
        found = self.inlinable.get(view.buffer)
        if found is None or buffer.dtype != view.dtype:
            return None
        node, reads_memory = found
        if reads_memory and hint(buffer.numel) * 2 > hint(self._reader_numel):
            return None
        index = invert(where, self.program.sizes, buffer.strides, buffer.sizes)
        if index is None:
            return None
        by = {}
        dims = iter(node.dims)
        for n, i in zip(buffer.sizes, index, strict=True):
            if not is_same(n, 1):
                by[next(dims)] = i
        return substitute(node.expr, by)

    # ------------------------------------------------------------ nodes

    def index_space(self, sizes: Sequence[int]) -> tuple[list[Affine], list[str]]:
        """One variable for every dimension that has more than one element."""
        index, names = [], []
        for n in sizes:
            if is_same(n, 1):
                index.append(ZERO)
            else:
                names.append(self.program.variable(n))
                index.append(Affine.var(names[-1]))
        return index, names

    def pointwise(
        self,
        out: View,
        value: Callable[[list[Affine]], Expr],
        region: bool = False,
        inlined: bool = True,
    ) -> None:
        """`out[index] = value(index)`; `inlined`: where that is cheap, readers compute it again."""
        self.supported(out)
        if 0 in out.sizes:
            return
        index, names = self.index_space(out.sizes)
        self._reader_numel = out.numel
        expr = rounded(value(index), out.dtype)
        node = LoopNode(
            self.program.fresh("n"),
            out.buffer,
            address(out.offset, out.strides, index),
            out.dtype,
            expr,
            names,
            region=region,
            location=self.location,
        )
        self._append(node)
        if inlined and not region and self.buffer(out).view == out:
            self._consider_inlining(node, expr)

    def _consider_inlining(self, node: LoopNode, expr: Expr) -> None:
        if any(isinstance(e, Gather) for e in leaves(expr)):
            return
        loads = [e for e in leaves(expr) if isinstance(e, Load)]
        operations = _count(expr)
        if not loads and operations <= _INLINE_OPERATIONS:
            self.inlinable[node.buffer] = (node, False)
        elif len(loads) == 1 and operations <= _INLINE_COST:
            source = self.definitions.get(loads[0].buffer)
            if source is None or source.kind is None:
                self.inlinable[node.buffer] = (node, True)

    def scatter(
        self,
        out: View,
        sizes: Sequence[int],
        value: Callable[[list[Affine]], tuple[Sequence[Affine], Expr, Expr]],
    ) -> None:
        """`out[where][place elements behind it] += term` for `value(index)` = where, place, term, with index
        over `sizes`; `out` holds something already."""
        index, names = self.index_space(sizes)
        self._reader_numel = math.prod(hint(n) for n in sizes)
        where, place, term = value(index)
        self._append(
            LoopNode(
                self.program.fresh("n"),
                out.buffer,
                address(out.offset, out.strides, where),
                out.dtype,
                op("placed", cast(term, VALUE_TYPE[out.dtype]), place),
                names,
                region=True,
                scatters=True,
                location=self.location,
            )
        )

    def reduce(
        self,
        out: View,
        sizes: Sequence[int],
        axes: Sequence[int],
        kind: str,
        value: Callable[[list[Affine]], Expr],
        keepdim: bool,
    ) -> None:
        """`out[kept] = kind over axes of value(index)`, index over `sizes`."""
        self.supported(out)
        if 0 in sizes:
            raise Unsupported("a reduction over nothing")
        index, _ = self.index_space(sizes)
        kept = [ZERO if d in axes else i for d, i in enumerate(index)]
        if not keepdim:
            kept = [i for d, i in enumerate(kept) if d not in axes]
        dims = [v for d, i in enumerate(index) if d not in axes for v in i.variables()]
        reduced = [v for d, i in enumerate(index) if d in axes for v in i.variables()]
        self._reader_numel = 1
        for n in sizes:
            self._reader_numel *= n
        type_ = VALUE_TYPE[out.dtype]
        expr = cast(value(index), type_)
        where = address(out.offset, out.strides, kept)
        if not reduced:
            expr = rounded(expr, out.dtype)
        self._append(
            LoopNode(
                self.program.fresh("n"),
                out.buffer,
                where,
                out.dtype,
                expr,
                dims,
                reduced,
                kind if reduced else None,
                location=self.location,
            )
        )

    def scan(
        self,
        out: View,
        axis: int,
        kind: str,
        value: Callable[[list[Affine]], Expr],
        in_order: bool,
    ) -> None:
        """`out[index] = kind of value up to index along axis`, which is longer than one, in the
        type of `value`."""
        self.supported(out)
        index, names = self.index_space(out.sizes)
        self._reader_numel = out.numel
        self._append(
            LoopNode(
                self.program.fresh("n"),
                out.buffer,
                address(out.offset, out.strides, index),
                out.dtype,
                value(index),
                names,
                location=self.location,
                scanned=list(index[axis].variables()),
                scan=kind,
                in_order=in_order,
            )
        )

    def _append(self, node: LoopNode) -> None:
        self.program.steps.append(node)
        self.definitions[node.buffer] = node

    # ------------------------------------------------------------ pieces lowerings share

    def copy(self, out: View, source: View, region: bool = False) -> None:
        type_ = VALUE_TYPE.get(out.dtype)
        if type_ is None:
            raise Unsupported(f"dtype {out.dtype}")
        self.pointwise(out, lambda i: cast(self.load(source, i), type_), region)

    def scalar(self, value: Any, type_: str, dtype: str = "") -> Expr:
        """A Python number as ATen converts it to `dtype` before it computes."""
        if isinstance(value, Dim):
            if dtype and _INTEGER_BITS.get(dtype, 64) < 64:
                raise Unsupported("a size as a narrow integer")
            return cast(Iota(Affine(value)), type_)
        if isinstance(value, complex):
            raise Unsupported("a complex number")
        bits = _INTEGER_BITS.get(dtype)
        if bits and not isinstance(value, bool):
            if not math.isfinite(value):
                raise Unsupported("an infinite number as an integer")
            low = 0 if dtype == "uint8" else -(1 << (bits - 1))
            value = (int(value) - low) % (1 << bits) + low
        return Const(constant(value, type_), type_)


def _count(expr: Expr) -> int:
    if not isinstance(expr, OpExpr):
        return 0
    return 1 + sum(_count(a) for a in expr.args)
