"""Products of a GPU -> Triton: the loop over the sums, with what comes before and behind it.

In: a `Product` and its schedule. Out: the text of one function, as of `emit_triton`, and how many
programs run. One program computes the sums of one block of rows by one of columns; blocks are walked so
that neighbours share what they read (`grouped` in the preamble). Invariant: sums are float32,
in steps of the blocks' `inner`; what lies behind a ragged end counts as zero on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine
from accel.codegen.emit_triton import SUMS, Emitter, is_wide, number
from accel.codegen.products_triton import Product, ScheduledProduct
from accel.codegen.schedule import Scheduled
from accel.codegen.symbols import is_symbolic
from accel.codegen.tiles import Axis, Tiles

_DOT_TYPE = {"float16": "tl.float16", "bfloat16": "tl.bfloat16"}
_PRECISION = {"tf32": ', input_precision="tf32"', "float32": ', input_precision="ieee"'}


def emit_product(product: Product, scheduled: Scheduled) -> tuple[str, Any]:
    """The Triton function `@`, and its grid."""
    assert isinstance(scheduled, ScheduledProduct)
    emitter = _ProductEmitter(product, scheduled)
    return emitter.text(), emitter.grid()


class _ProductEmitter(Emitter):
    """Axis 0 are the product's rows, axis 1 its columns; a position in the batch is one number, and the
    terms of a sum lie along axis 1 of the left side and axis 0 of the right one."""

    def __init__(self, product: Product, scheduled: ScheduledProduct) -> None:
        assert product.blocks is not None
        self.product, self.scheduled, self.blocks = product, scheduled, product.blocks
        self.sizes = scheduled.sizes
        self.rows = self._axis(product.rows, self.blocks.rows)
        self.columns = self._axis(product.columns, self.blocks.columns)
        self.batch = self._axis(product.batch, 1)
        self.inner = [self._axis(side.inner, self.blocks.inner) for side in product.sides]
        # In which positions a variable lies, and whether these may end behind the last one.
        self.ends: dict[str, str] = {}
        left, right = product.sides
        names = (("x", self.rows, left.extent), ("r", self.columns, right.extent))
        for name, axis, own in names:
            if axis.is_ragged:
                self.ends |= dict.fromkeys(
                    [*(v for v, _ in axis.variables), *own], f"{name}_inside"
                )
        for name, axis in zip(("kc", "kr"), self.inner, strict=True):
            if self._is_ragged_sum:
                self.ends |= dict.fromkeys((v for v, _ in axis.variables), f"{name}_inside")
        super().__init__(scheduled.kernel, Tiles((self.rows, self.columns), False, False, 1))

    @property
    def _is_ragged_sum(self) -> bool:
        size = self.product.inner_size
        return is_symbolic(size) or size % self.blocks.inner != 0

    def _axis(self, names: list[str], block: int) -> Axis:
        return Axis(tuple((v, self.sizes[v]) for v in names), block)

    def grid(self) -> Any:
        return self._blocks_of(self.rows) * self._blocks_of(self.columns) * self.batch.numel

    def _blocks_of(self, axis: Axis) -> Any:
        return (axis.numel + axis.block - 1) // axis.block

    def _is_wide(self) -> bool:
        axes = (self.rows, self.columns, self.batch, *self.inner)
        if any(is_symbolic(n) for axis in axes for _, n in axis.variables):
            return True
        # Lanes behind the end compute positions as well, up to a block more.
        spans: list[Any] = [self.grid()]
        for a in self._addresses():
            numbers = [a.const, *(c for _, c in a.terms)]
            if any(is_symbolic(n) for n in numbers):
                return True
            spans.append(abs(a.const) + sum(abs(c) * self._reach(v) for v, c in a.terms))
        return is_wide(spans)

    def _reach(self, variable: str) -> int:
        """More than a variable's value in any lane."""
        return int(self.sizes[variable]) + 2 * max(
            self.blocks.rows, self.blocks.columns, self.blocks.inner
        )

    def _addresses(self) -> Iterator[Affine]:
        for s in ir.statements(self.kernel.body):
            if isinstance(s, ir.Store):
                yield s.address
        everything = [e for e in ir.expressions(self.kernel.body)]
        for side in self.scheduled.sides:
            everything += ir.expressions(side.body)
        for e in everything:
            yield from ir.addresses(e)

    def _mask(self, address: Affine) -> str:
        found = {self.ends[v] for v in address.variables() if v in self.ends}
        return f", {' & '.join(sorted(found))}" if found else ""

    def _ends_with_sum(self, side: int, value: ir.Load) -> bool:
        """Whether a load's own mask makes zeros behind the last term."""
        inner = {v for v, _ in self.inner[side].variables}
        return not self._is_ragged_sum or bool(value.address.variables() & inner)

    def _emit_store(self, s: ir.Store) -> None:
        if all(axis.variables for axis in self.tiles.axes):
            return super()._emit_store(s)
        # A single row or column is the first of the block's, at position 0; others are not stored.
        single = [n for n, axis in zip("xr", self.tiles.axes, strict=True) if not axis.variables]
        pointer = " + ".join([self._pointer(s.param, s.address), *single])
        ends = [f"{n}_inside" for n, a in zip("xr", self.tiles.axes, strict=True) if a.is_ragged]
        value = f"tl.broadcast_to({self.expr(s.expr)}, {self._shape()})"
        self.line(f"tl.store({pointer}, {value}, {' & '.join(ends)})")
        return None

    # ------------------------------------------------------------ the function

    def text(self) -> str:
        self._place()
        self._sums()
        self.body()
        return self.function(self.blocks.warps, self.blocks.stages)

    def _place(self) -> None:
        """Which block of which product this program computes, and its positions."""
        b = self.blocks
        tall, wide = (number(self._blocks_of(a)) for a in (self.rows, self.columns))
        self.line("program = tl.program_id(0)" + (".to(tl.int64)" if self.wide else ""))
        tile = "program"
        if self.batch.variables:
            tiles = number(self._blocks_of(self.rows) * self._blocks_of(self.columns))
            self.line(f"tile = program % {tiles}")
            type_ = "tl.int64" if self.wide else "tl.int32"
            self.line(f"b = tl.full([1, 1], 0, {type_}) + program // {tiles}")
            tile = "tile"
        self.line(f"row, column = grouped({tile}, {tall}, {wide}, {b.group})")
        self.positions(self.rows, "x", "[:, None]", f"row * {b.rows}")
        self.positions(self.columns, "r", "[None, :]", f"column * {b.columns}")
        self.variables(self.batch.variables, "b")
        for name, side in zip(("x", "r"), self.product.sides, strict=True):
            self.variables(self._axis(side.batch, 1).variables, "b")
            self.variables(self._axis(side.extent, 1).variables, name)

    def _sums(self) -> None:
        b, size = self.blocks, number(self.product.inner_size)
        for kernel in self.scheduled.sides:
            self._load_outside(kernel.body)
        self.line(f"{SUMS} = tl.full([{b.rows}, {b.columns}], 0.0, tl.float32)")
        available, loaded = set(self.available), dict(self.loaded)
        self.line(f"for first in range(0, {size}, {b.inner}):")
        self.depth += 1
        operands = []
        shapes = ((b.rows, b.inner), (b.inner, b.columns))
        spread = (("kc", "[None, :]"), ("kr", "[:, None]"))
        for side, (name, shape) in enumerate(spread):
            wide = ".to(tl.int64)" if self.wide else ""
            self.line(f"{name} = first + tl.arange(0, {b.inner}){shape}{wide}")
            if self._is_ragged_sum:
                self.line(f"{name}_inside = {name} < {size}")
            self.variables(self.inner[side].variables, name)
            operands.append(self._operand(side, name, shapes[side]))
        precision = _PRECISION.get(self.product.kind, "")
        self.line(f"{SUMS} = tl.dot({', '.join(operands)}, {SUMS}{precision})")
        self.depth -= 1
        self.available, self.loaded = available, loaded

    def _load_outside(self, body: list[Any]) -> None:
        """What is the same for all terms of a sum is read once; an operand that is only loaded is not."""
        inner = {v for axis in self.inner for v, _ in axis.variables}
        if len(body) == 1 and isinstance(body[0].expr, ir.Load):
            return
        for e in (e for s in body for e in ir.leaves(s.expr)):
            if isinstance(e, ir.Load) and not e.address.variables() & inner:
                self.expr(e)

    def _operand(self, side: int, name: str, shape: tuple[int, int]) -> str:
        """The block of one side in this round."""
        *body, last = self.scheduled.sides[side].body
        value = last.expr
        kind = self.product.kind
        result = ("left", "right")[side]
        if isinstance(value, ir.Load) and not body and self._ends_with_sum(side, value):
            mask = self._mask(value.address)
            other = ", other=0" if mask else ""
            text = f"tl.load({self._pointer(value.buffer, value.address)}{mask}{other})"
        else:
            for s in body:
                self.statement(s)
            text = self.expr(value)
            if self._is_ragged_sum:
                # Of zeros behind the end it may have made anything.
                text = f"tl.where({name}_inside, {text}, 0.0)"
        # What is only loaded may have another type in memory: the preparation is a cast.
        text = f"({text}).to({_DOT_TYPE.get(kind, 'tl.float32')})"
        self.line(f"{result} = tl.broadcast_to({text}, {list(shape)})")
        if kind == "tf32":
            self.line(f"{result} = round_tf32({result})")
        return result
