"""Loop IR -> Triton.

In: a verified `Kernel` without vector loops, and its `Tiles`. Out: the text of one function,
without the preamble it needs (`triton_preamble.py`). Every value is a block whose rank is
the number of axes; an axis a value does not depend on has length 1 in it. Invariant: names
are numbered in order of appearance, so kernels that do the same on other buffers have the
same text; `@` stands for the function's name.
"""

from __future__ import annotations

import math
import re
from typing import Any

from accel import expressions
from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine
from accel.codegen.emitted_lines import Lines
from accel.codegen.scalar_ops import SCALAR_OPS
from accel.codegen.symbols import is_same, is_symbolic
from accel.codegen.tiles import Axis, Tiles, accesses

COMPUTE_TYPE = {
    "f32": "tl.float32",
    "f64": "tl.float64",
    "i32": "tl.int32",
    "i64": "tl.int64",
    "bool": "tl.int1",
}
# A parameter's type in the signature of a compiled kernel.
POINTER_TYPE = {
    "float32": "*fp32",
    "float64": "*fp64",
    "bfloat16": "*bf16",
    "float16": "*fp16",
    "int64": "*i64",
    "int32": "*i32",
    "int16": "*i16",
    "int8": "*i8",
    "uint8": "*u8",
    "bool": "*i1",
}
_MEMORY_TYPE = {
    **{name: f"tl.{name}" for name in POINTER_TYPE if name != "bool"},
}
COMBINE = {
    "sum": "{0} + {1}",
    "prod": "{0} * {1}",
    "max": "maximum({0}, {1})",
    "min": "minimum({0}, {1})",
    "any": "{0} | {1}",
    "all": "{0} & {1}",
}
# Over the second axis of a block.
ACROSS = {
    "sum": "tl.sum({0}, 1, keep_dims=True)",
    "prod": "tl.reduce({0}, 1, multiply, keep_dims=True)",
    "max": "tl.reduce({0}, 1, maximum, keep_dims=True)",
    "min": "tl.reduce({0}, 1, minimum, keep_dims=True)",
    "any": "(tl.max({0}.to(tl.int32), 1, keep_dims=True) != 0)",
    "all": "(tl.min({0}.to(tl.int32), 1, keep_dims=True) != 0)",
}
# Likewise, of each element and those before it.
ALONG = {"sum": "tl.cumsum({0}, 1)", "prod": "tl.cumprod({0}, 1)"}
_BOUNDS = {
    "f32": (-math.inf, math.inf),
    "f64": (-math.inf, math.inf),
    "i32": (-(1 << 31), (1 << 31) - 1),
    "i64": (-(1 << 63), (1 << 63) - 1),
}
# The line above a function: its parameters' types, and by how many warps a program runs.
HEAD = "# {} by {} warps"
STAGES = " in {} stages"  # ... how many rounds of a loop over products are under way at once
_INDEX = ("x", "r")
SUMS = "sums"  # a product's, in a kernel that has one
_NARROW = 1 << 31


def emit_triton(kernel: ir.Kernel, tiles: Tiles) -> str:
    """The Triton function `@`."""
    return Emitter(kernel, tiles).text()


def identity(kind: str, type_: str) -> Any:
    if kind in ("max", "min"):
        return _BOUNDS[type_][kind == "min"]
    return {"sum": 0, "prod": 1, "any": False, "all": True}[kind]


class Emitter(Lines):
    INDENT = "    "

    def __init__(self, kernel: ir.Kernel, tiles: Tiles) -> None:
        super().__init__()
        self.kernel, self.tiles = kernel, tiles
        self.accumulators: dict[str, tuple[str, str]] = {}  # name -> kind, type
        self.available: set[str] = set()  # locals that exist where the next line stands
        self.loaded: dict[str, str] = {}  # text of a load -> the local with its value, likewise
        self.axis_of = {v: i for i, axis in enumerate(tiles.axes) for v, _ in axis.variables}
        self.rank = len(tiles.axes)
        self.in_row = False
        self.stored: set[int] = set()  # parameters that an earlier phase has written
        self.wide = self._is_wide()
        self.drawn = run_numbers(kernel)

    def _is_wide(self) -> bool:
        """Whether positions need 64 bits."""
        sizes = {v: n for axis in self.tiles.axes for v, n in axis.variables}
        found = accesses(self.kernel)
        numbers = [*sizes.values(), *(a.const for a in found)]
        numbers += [c for a in found for _, c in a.terms]
        if any(is_symbolic(n) for n in numbers):
            return True
        # Lanes behind the end compute positions as well, up to a block more on every axis.
        spans = [axis.numel + axis.block for axis in self.tiles.axes]
        for a in found:
            spans.append(abs(a.const) + sum(abs(c) * 2 * sizes[v] for v, c in a.terms))
        return is_wide(spans)

    # ------------------------------------------------------------ function

    def text(self) -> str:
        self._programs()
        self.body()
        return self.function(self.tiles.warps)

    def body(self) -> None:
        for statement in self.kernel.body:
            if isinstance(statement, ir.Loop):
                self._row_loop(statement)
            else:
                self.statement(statement)

    def function(self, warps: int, stages: int = 0) -> str:
        """The lines so far as the body of `@`; `stages` of a loop over products."""
        body = "\n".join(self.lines)
        symbols = symbols_of(body)
        numbers = [f"s{n}" for n in symbols] + [f"d{i}" for i in range(len(self.drawn))]
        rows = list(enumerate(self.kernel.params))
        numbers += [f"h{i}" for i, p in rows if p.host]
        params = [f"p{i}" for i, p in rows if not p.host] + numbers
        types = [POINTER_TYPE[p.dtype] for _, p in rows if not p.host] + ["i64"] * len(numbers)
        head = HEAD.format(" ".join(types), warps) + (STAGES.format(stages) if stages else "")
        return f"{head}\ndef @({', '.join(params)}):\n{body}\n"

    def _programs(self) -> None:
        """Which part of the iterations this program runs."""
        self.line("program = tl.program_id(0)" + (".to(tl.int64)" if self.wide else ""))
        rest = "program"
        split = self.tiles.axes[:1] if self.tiles.rows else self.tiles.axes
        for i in reversed(range(len(split))):
            axis = split[i]
            at = rest
            if i > 0:
                blocks = number((axis.numel + axis.block - 1) // axis.block)
                self.line(f"part{i} = program % {blocks}")
                self.line(f"rest{i} = program // {blocks}")
                at, rest = f"part{i}", f"rest{i}"
            self._positions(i, f"{at} * {axis.block}")
        if self.tiles.rows and not self.tiles.looped:
            self._positions(1, "0")

    def _positions(self, i: int, start: str) -> None:
        """The positions of a block on an axis, and the variables they stand for."""
        shape = "" if self.rank == 1 else "[:, None]" if i == 0 else "[None, :]"
        self.positions(self.tiles.axes[i], _INDEX[i], shape, start)

    def positions(self, axis: Axis, name: str, shape: str, start: str) -> None:
        offset = "" if start == "0" else f"{start} + "
        wide = ".to(tl.int64)" if self.wide else ""
        self.line(f"{name} = {offset}tl.arange(0, {axis.block}){shape}{wide}")
        if axis.is_ragged:
            self.line(f"{name}_inside = {name} < {number(axis.numel)}")
        self.variables(axis.variables, name)

    def variables(self, variables: tuple[tuple[str, Any], ...], name: str) -> None:
        """Loop variables of the positions of that name."""
        rest = name
        for k in range(len(variables) - 1, -1, -1):
            v, size = variables[k]
            if k == 0:
                self.line(f"{self.var(v)} = {rest}")
                continue
            self.line(f"{self.var(v)} = {rest} % {number(size)}")
            self.line(f"{name}{k} = {rest} // {number(size)}")
            rest = f"{name}{k}"

    # ------------------------------------------------------------ statements

    def statement(self, s: Any) -> None:
        getattr(self, f"_emit_{type(s).__name__.lower()}")(s)

    def _row_loop(self, nest: ir.Loop) -> None:
        body: list[Any] = [nest]
        while len(body) == 1 and isinstance(body[0], ir.Loop):
            body = body[0].body
        if self.stored & self._loaded(body):
            self.line("tl.debug_barrier()")  # other threads have written what is read now
        outside, loaded = set(self.available), dict(self.loaded)
        self.in_row = True
        if self.tiles.looped:
            axis = self.tiles.axes[1]
            self.line(f"for first in range(0, {number(axis.numel)}, {axis.block}):")
            self.depth += 1
            self._positions(1, "first")
        for s in body:
            self.statement(s)
        if self.tiles.looped:
            self.depth -= 1
            # Values of a block are gone; later phases compute or load them again.
            self.available, self.loaded = outside, loaded
        self.in_row = False
        self.stored |= {s.param for s in body if isinstance(s, ir.Store)}

    def _loaded(self, body: list[Any]) -> set[int]:
        """The parameters that these statements read memory of."""
        return {
            e.buffer
            for s in body
            if hasattr(s, "expr") and not (isinstance(s, ir.Let) and s.name in self.available)
            for e in ir.leaves(s.expr)
            if isinstance(e, (ir.Load, ir.Gather))
        }

    def _emit_let(self, s: ir.Let) -> None:
        if s.name in self.available:
            return  # an earlier phase of the same block has it
        self.line(f"{self.local(s.name)} = {self.expr(s.expr)}")
        self.available.add(s.name)

    def _emit_store(self, s: ir.Store) -> None:
        value = self.expr(s.expr)
        self.line(f"tl.store({self._pointer(s.param, s.address)}, {value}{self._mask(s.address)})")
        self.loaded = {
            t: v for t, v in self.loaded.items() if not t.startswith(f"tl.load(p{s.param} ")
        }
        if not self.in_row:
            self.stored.add(s.param)

    def _emit_scatter(self, s: ir.Scatter) -> None:
        assert isinstance(s.expr, ir.Op)
        value, place = (self.expr(a) for a in s.expr.args)
        # Each iteration adds once, also along axes that neither cell nor value depend on.
        axes = range(1 if self.tiles.rows and not self.in_row else self.rank)
        shape = [self.tiles.axes[i].block if i in axes else 1 for i in range(self.rank)]
        inside = [f"{_INDEX[i]}_inside" for i in axes if self.tiles.axes[i].is_ragged]
        mask = f", mask=tl.broadcast_to({' & '.join(inside)}, {shape})" if inside else ""
        pointer = f"tl.broadcast_to({self._pointer(s.param, s.address)} + {place}, {shape})"
        value = f"tl.broadcast_to({value}, {shape})"
        self.line(f'tl.atomic_add({pointer}, {value}{mask}, sem="relaxed")')

    def _emit_keep(self, s: ir.Keep) -> None:
        assert not self.tiles.looped and isinstance(s.expr, ir.Local)

    def _emit_begin(self, s: ir.Begin) -> None:
        self.accumulators[s.name] = s.kind, s.type
        if self.tiles.looped:
            scans = s.name in ir.scanned(self.kernel.body)
            shape = f"[{self.tiles.axes[0].block}, 1]" if scans else self._shape()
            first = literal(identity(s.kind, s.type), s.type, shape)
            self.line(f"{self.local(s.name)} = {first}")

    def _emit_accumulate(self, s: ir.Accumulate) -> None:
        kind, type_ = self.accumulators[s.name]
        value = f"tl.broadcast_to({self.expr(s.expr)}, {self._shape()})"
        if self.tiles.axes[1].is_ragged:
            nothing = literal(identity(kind, type_), type_, "[1, 1]")
            value = f"tl.where(r_inside, {value}, {nothing})"
        name = self.local(s.name)
        if self.tiles.looped:
            value = COMBINE[kind].format(name, value)
        self.line(f"{name} = {value}")

    def _emit_scan(self, s: ir.Scan) -> None:
        kind, type_ = self.accumulators[s.accumulator]
        name, total = self.local(s.name), self.local(s.accumulator)
        value = ALONG[kind].format(f"tl.broadcast_to({self.expr(s.expr)}, {self._shape()})")
        if self.tiles.looped:
            value = COMBINE[kind].format(total, value)
        self.line(f"{name} = {value}")
        self.available.add(s.name)
        if self.tiles.looped:
            last = f"{_INDEX[1]} == first + {self.tiles.axes[1].block - 1}"
            at_end = f"tl.where({last}, {name}, {literal(0, type_, '[1, 1]')})"
            self.line(f"{total} = {ACROSS['sum'].format(at_end)}")

    def _emit_finish(self, s: ir.Finish) -> None:
        kind, type_ = self.accumulators[s.accumulator]
        total = ACROSS[kind].format(self.local(s.accumulator))
        if type_ in ("i32", "i64"):
            total += f".to({COMPUTE_TYPE[type_]})"
        self.line(f"{self.local(s.name)} = {total}")
        self.available.add(s.name)

    def _shape(self) -> str:
        return f"[{', '.join(str(a.block) for a in self.tiles.axes)}]"

    # ------------------------------------------------------------ memory

    def address(self, address: Affine) -> str:
        # Sorted as numbered, so that equal kernels print equally.
        parts = sorted((self.var(v), c) for v, c in address.terms)
        text = [v if is_same(c, 1) else f"{number(c)} * {v}" for v, c in parts]
        if not is_same(address.const, 0) and text:
            text.append(number(address.const))
        if not text:
            type_ = "tl.int64" if self.wide else "tl.int32"
            return f"tl.full({[1] * self.rank}, {number(address.const)}, {type_})"
        return " + ".join(text)

    def _pointer(self, param: int, address: Affine) -> str:
        return f"p{param} + ({self.address(address)})"

    def _mask(self, address: Affine) -> str:
        """The mask argument of an access; lanes behind the end touch no memory."""
        used = {self.axis_of[v] for v in address.variables()}
        parts = [f"{_INDEX[i]}_inside" for i in sorted(used) if self.tiles.axes[i].is_ragged]
        return f", {' & '.join(parts)}" if parts else ""

    # ------------------------------------------------------------ expressions

    def expr(self, e: ir.Expr) -> str:
        return str(getattr(self, f"_expr_{type(e).__name__.lower()}")(e))

    def _expr_const(self, e: ir.Const) -> str:
        return literal(e.value, e.type, str([1] * self.rank))

    def _expr_iota(self, e: ir.Iota) -> str:
        return f"({self.address(e.address)}).to({COMPUTE_TYPE[e.type]})"

    def _expr_runnumber(self, e: ir.RunNumber) -> str:
        return f"tl.full({[1] * self.rank}, d{self.drawn.index(e.blocks)}, tl.int64)"

    def _expr_local(self, e: ir.Local) -> str:
        return self.local(e.name)

    def _expr_load(self, e: ir.Load) -> str:
        if e.buffer == ir.RESULTS:
            return SUMS
        if self.kernel.params[e.buffer].host:
            return self._host_number(e)
        return self._loaded_from(self._pointer(e.buffer, e.address), e)

    def _host_number(self, e: ir.Load) -> str:
        """The value behind a number's bits, of which those of its dtype count."""
        bits = f"tl.full({[1] * self.rank}, h{e.buffer}, tl.int64)"
        if e.dtype == "bool":
            return f"(({bits} & 255) != 0)"
        narrow = f"{bits}.to(tl.int{8 * ir.ITEM_BYTES[e.dtype]}).to({_MEMORY_TYPE[e.dtype]}, bitcast=True)"
        return f"{narrow}.to({COMPUTE_TYPE[e.type]})"

    def _expr_gather(self, e: ir.Gather) -> str:
        # Behind the end places are those of zeros, inside of the table.
        return self._loaded_from(f"{self._pointer(e.buffer, e.address)} + {self.expr(e.place)}", e)

    def _loaded_from(self, pointer: str, e: ir.Load | ir.Gather) -> str:
        mask = self._mask(e.address)
        other = ", other=0" if mask else ""
        text = f"tl.load({pointer}{mask}{other})"
        if e.type != "bool":
            text += f".to({COMPUTE_TYPE[e.type]})"
        if text not in self.loaded:
            name = self.loaded[text] = self.local(f"load {len(self.names)}")
            self.line(f"{name} = {text}")
        return self.loaded[text]

    def _expr_kept(self, e: ir.Kept) -> str:
        return self.local(e.scratch)

    def _expr_table(self, e: ir.Table) -> str:
        """A constant's element, selected by halves."""
        where = self.local(f"table {len(self.names)}")
        self.line(f"{where} = {self.address(e.address)}")
        return self._select(where, list(e.values), 0, e.type)

    def _select(self, where: str, values: list[Any], first: int, type_: str) -> str:
        if len(set(map(repr, values))) == 1:
            return literal(values[0], type_, str([1] * self.rank))
        half = len(values) // 2
        low = self._select(where, values[:half], first, type_)
        high = self._select(where, values[half:], first + half, type_)
        return f"tl.where({where} < {first + half}, {low}, {high})"

    def _expr_op(self, e: ir.Op) -> str:
        return SCALAR_OPS[e.name].triton.format(*(self.expr(a) for a in e.args))


def is_wide(positions: list[Any]) -> bool:
    """Whether some of these need 64 bits."""
    return bool(max(positions) >= _NARROW)


def symbols_of(text: str) -> list[int]:
    """The symbols that a kernel takes as numbers behind its pointers."""
    return sorted({int(n) for n in re.findall(r"\bs(\d+)\b", text)})


def run_numbers(kernel: ir.Kernel) -> list[int | None]:
    """The numbers of the generator's stream that it takes behind those, in order of appearance."""
    found = (e.blocks for e in ir.expressions(kernel.body) if isinstance(e, ir.RunNumber))
    return list(dict.fromkeys(found))


def number(value: Any) -> str:
    """A size, stride or offset as Triton text."""
    return expressions.triton(value.printable()) if is_symbolic(value) else str(value)


def literal(value: Any, type_: str, shape: str) -> str:
    """A block full of exactly this value."""
    if type_ == "bool":
        return f"(tl.full({shape}, {int(bool(value))}, tl.int32) != 0)"
    if type_ in ("i32", "i64"):
        return f"tl.full({shape}, {int(value)}, {COMPUTE_TYPE[type_]})"
    value = float(value)
    if type_ == "f32" and math.isfinite(value):
        import numpy as np

        with np.errstate(over="ignore"):
            value = float(np.float32(value))
    text = repr(value) if math.isfinite(value) else f'float("{value}")'
    return f"tl.full({shape}, {text}, {COMPUTE_TYPE[type_]})"
