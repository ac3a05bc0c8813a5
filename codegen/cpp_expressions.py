"""Expressions of the loop IR -> C++.

In: an `Expr` inside a kernel. Out: the text of its value, a vector: of `L` lanes in loops over
lanes, elsewhere of `U`, since there all lanes are equal. Invariant: a value of `U` lanes is
spread over `L` where a loop over lanes uses it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine
from accel.codegen.emitted_lines import Lines
from accel.codegen.hoisting import is_outside, written
from accel.codegen.scalar_ops import SCALAR_OPS
from accel.codegen.symbols import is_same

MEMORY_TYPE = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int64": "i64",
    "int32": "int",
    "int16": "short",
    "int8": "signed char",
    "uint8": "unsigned char",
    "bool": "boolean",
}
_ROUNDED_TO = {name: dtype for dtype, name in ir.ROUNDING.items() if "float" in dtype}
# Operations that give one of their operands, or its negative: which of them.
_CHOICES = {"neg": (0,), "abs": (0,), "maximum": (0, 1), "minimum": (0, 1), "where": (1, 2)}
COMPUTE_TYPE = {"f32": "float", "f64": "double", "i32": "int", "i64": "i64", "bool": "int"}


class Expressions(Lines):
    def __init__(self, kernel: ir.Kernel, lanes: int) -> None:
        super().__init__()
        self.kernel, self.lanes = kernel, lanes
        self.tables: list[str] = []
        self.tiles: dict[str, str] = {}  # pointer of a strided load -> its tile
        self.uniform: set[str] = set()  # locals of U lanes
        self.divisors: dict[ir.Expr, str] = {}  # by which the loop at hand divides
        self.rounded: dict[str, str] = {}  # locals that are numbers of a narrow dtype
        self.moved: frozenset[str] = frozenset()  # locals that are bits, only stored again
        self.in_vector = False  # in a loop over lanes

    @property
    def width(self) -> str:
        return "L" if self.in_vector else "U"

    def address(self, address: Affine, without: str | None = None) -> str:
        # Sorted as numbered, so that equal kernels print equally.
        parts = sorted(
            ((self.var(v), c) for v, c in address.terms if v != without), key=lambda pair: pair[0]
        )
        text = [v if is_same(c, 1) else f"{c} * {v}" for v, c in parts]
        if not is_same(address.const, 0) or not text:
            text.append(str(address.const))
        return " + ".join(text)

    def _step(self, address: Affine) -> Any:
        vector = self.kernel.vector_var
        return address.coefficient(vector) if vector and self.in_vector else 0

    def _pointer(self, param: int, address: Affine) -> tuple[str, Any]:
        where = self.address(address)
        if param == ir.RESULTS:
            return f"results + {where}", self._step(address)
        pointer = f"p{param}" if where == "0" else f"p{param} + {where}"
        return pointer, self._step(address)

    def row_buffer(self, scratch: str, address: Affine) -> str:
        row = self.rename(scratch + "/row", "row")
        where = self.address(address)
        return f"{row} + ({where}) * L" if self.kernel.lanes_over_rows else f"{row} + {where}"

    def expr(self, e: ir.Expr) -> str:
        return str(getattr(self, f"_expr_{type(e).__name__.lower()}")(e))

    def _expr_const(self, e: ir.Const) -> str:
        return f"splat<{COMPUTE_TYPE[e.type]}, {self.width}>({literal(e.value, e.type)})"

    def _expr_iota(self, e: ir.Iota) -> str:
        type_, step = COMPUTE_TYPE[e.type], self._step(e.address)
        if is_same(step, 0):
            return f"splat<{type_}, {self.width}>({self.address(e.address)})"
        return f"iota<{type_}, L>({self.address(e.address)}, {step})"

    def _expr_local(self, e: ir.Local) -> str:
        spread = self.in_vector and e.name in self.uniform
        return f"spread<L>({self.local(e.name)})" if spread else self.local(e.name)

    def _expr_load(self, e: ir.Load) -> str:
        return self.load(e)

    def load(self, e: ir.Load, bits: bool = False) -> str:
        """What lies there as a number or, to be stored as it is, in its bits."""
        pointer, step = self._pointer(e.buffer, e.address)
        tile = self.tiles.get(pointer)
        if tile is not None and step not in (0, 1):
            assert self.kernel.tile_var is not None
            place = f"{tile} + ({self.var(self.kernel.tile_var)} - first) * L"
            return f"{'load_bits' if bits else 'load'}<L, L>({place})"
        return self._load(pointer, step, bits)

    def _expr_gather(self, e: ir.Gather) -> str:
        return self.gather(e)

    def gather(self, e: ir.Gather, bits: bool = False) -> str:
        """One place for all lanes moves the pointer; else each lane goes to its own."""
        pointer, step = self._pointer(e.buffer, e.address)
        if not self.in_vector or self._is_same_in_lanes(e.place):
            return self._load(f"{pointer} + {self.common_place(e.place)}", step, bits)
        load = "load_bits_gathered" if bits else "load_gathered"
        return f"{load}<L, K>({pointer}, {self.expr(e.place)}, {step})"

    def common_place(self, e: ir.Expr) -> str:
        """A place that is the same in all lanes, as a number."""
        outside, self.in_vector = self.in_vector, False
        text = f"i64(({self.expr(e)})[0])"
        self.in_vector = outside
        return text

    def _is_same_in_lanes(self, e: ir.Expr) -> bool:
        vector = self.kernel.vector_var
        for leaf in ir.leaves(e):
            if isinstance(leaf, ir.Local) and leaf.name not in self.uniform:
                return False
            if isinstance(leaf, ir.Kept) or any(
                vector in a.variables() for a in ir.addresses(leaf)
            ):
                return False
        return True

    def _load(self, pointer: str, step: Any, bits: bool = False) -> str:
        load = "load_bits" if bits else "load"
        if is_same(step, 0):
            return f"{load}_one<{self.width}>({pointer})"
        if is_same(step, 1):
            return f"{load}<L, K>({pointer})"
        return f"{load}_strided<L, K>({pointer}, {step})"

    def _expr_kept(self, e: ir.Kept) -> str:
        return f"load_raw<L, L>({self.row_buffer(e.scratch, e.address)})"

    def _expr_table(self, e: ir.Table) -> str:
        name = f"t{len(self.tables)}"
        memory = "boolean" if e.type == "bool" else COMPUTE_TYPE[e.type]
        values = ", ".join(
            f"{{{int(v)}}}" if e.type == "bool" else literal(v, e.type) for v in e.values
        )
        self.tables.append(f"static const {memory} {name}[] = {{{values}}};")
        return self._load(f"{name} + {self.address(e.address)}", self._step(e.address))

    def is_rounded(self, e: ir.Expr, dtype: str) -> bool:
        """True when rounding to a narrow floating point dtype would change nothing."""
        if isinstance(e, ir.Local):
            return self.rounded.get(e.name) == dtype
        if isinstance(e, (ir.Load, ir.Gather)):
            return e.dtype == dtype
        if isinstance(e, ir.Const):
            narrow = torch.tensor(e.value, dtype=getattr(torch, dtype)).item()
            return e.type == "f32" and narrow == e.value
        if not isinstance(e, ir.Op):
            return False
        if e.name in _CHOICES:
            return all(self.is_rounded(e.args[i], dtype) for i in _CHOICES[e.name])
        return _ROUNDED_TO.get(e.name) == dtype

    def _expr_op(self, e: ir.Op) -> str:
        if e.name in _ROUNDED_TO and self.is_rounded(e.args[0], _ROUNDED_TO[e.name]):
            return self.expr(e.args[0])
        args = [self.expr(a) for a in e.args]
        if e.name.startswith("to_") and e.args[0].type == "bool":
            args = [f"({args[0]} & 1)"]
        if e.name == "div" and e.args[1] in self.divisors:
            return f"v_over({args[0]}, {self.divisors[e.args[1]]})"
        return SCALAR_OPS[e.name].cpp.format(*args)

    # ------------------------------------------------------------ divisions

    def name_divisors(self, loop: ir.Loop) -> None:
        """What is the same number in all of a loop is divided by once."""
        self.divisors = {}
        inside = ir.names(loop)
        for e in ir.expressions(loop.body):
            if not isinstance(e, ir.Op) or e.name != "div" or e.type not in ("f32", "f64"):
                continue
            by = e.args[1]
            if by in self.divisors or not self._pays(by, inside):
                continue
            name = self.rename(f"{len(self.names)}/divisor", "by")
            self.line(f"const auto {name} = to_divide_by<L>({self.expr(by)});")
            self.divisors[by] = name

    def _pays(self, e: ir.Expr, inside: frozenset[str]) -> bool:
        if isinstance(e, ir.Const):  # halves and the like are multiplied with
            return e.value > 0 and math.frexp(e.value)[0] != 0.5
        return isinstance(e, (ir.Local, ir.Load)) and is_outside(e, inside, written(self.kernel))


def literal(value: Any, type_: str) -> str:
    """A C++ constant with exactly this value."""
    if type_ == "bool":
        return "-1" if value else "0"
    if type_ in ("i32", "i64"):
        if value == -(1 << 63):
            return "(-9223372036854775807L - 1)"
        return f"{int(value)}{'L' if type_ == 'i64' else ''}"
    suffix = "f" if type_ == "f32" else ""
    value = float(value)
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if type_ == "f32" and math.isfinite(value):
        import numpy as np

        with np.errstate(over="ignore"):
            value = float(np.float32(value))
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
    if value == int(value) and abs(value) < 1e6 and math.copysign(1, value) > 0:
        return f"{int(value)}.0{suffix}"
    return f"{value.hex()}{suffix}"
