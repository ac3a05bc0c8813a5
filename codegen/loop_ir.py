"""The loop IR: what a kernel computes, before it is printed for a machine.

    kernel  := Kernel(name, params, scratch, body, parallel)
    param   := Param(dtype, written)                    p[i], addresses in elements
    stmt    := Loop(var, size, vector, body)
             | Let(name, expr)                          one value, SSA
             | Store(param, address, expr, dtype)
             | Scatter(param, address, placed(expr, place), dtype)   added to what lies there
             | Keep(scratch, address, expr)             a row's value, for a later loop
             | Begin(name, kind, type)                  an accumulator gets its identity
             | Accumulate(name, kind, expr)
             | Finish(name, accumulator, kind)          the accumulator's value over all lanes
             | Scan(name, accumulator, kind, expr)      the same after this iteration, for it to use
    expr    := Const(value, type) | Iota(address) | Local(name, type)
             | Load(buffer | param, address, dtype) | Kept(scratch, address, type)
             | Gather(buffer | param, address, place, dtype)   at address + place, an expr
             | Table(values, address, type)
             | RunNumber(blocks)                        of a GPU's random stream, known at launch
             | Op(name, args, type)
    address := Affine over loop variables
    type    := f32 | f64 | i32 | i64 | bool             what is computed with
    dtype   := torch's name                             what lies in memory

Invariants, held by `verify`: every variable used is bound by an enclosing loop; every
local is defined before it is used, in the same or an enclosing body; at most one loop on
each path is a vector loop; loops between an accumulator's Begin and a Scan of it are walked
in order; types fit the table of scalar operations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accel.codegen.affine import Affine

# What values of a memory dtype are computed with.
VALUE_TYPE = {
    "float32": "f32",
    "float64": "f64",
    "bfloat16": "f32",
    "float16": "f32",
    "int64": "i64",
    "int32": "i32",
    "int16": "i32",
    "int8": "i32",
    "uint8": "i32",
    "bool": "bool",
}
VALUE_BYTES = {"f32": 4, "f64": 8, "i32": 4, "i64": 8, "bool": 4}
ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# The operation that makes a computed value what memory would hold.
ROUNDING = {
    "bfloat16": "round_bfloat16",
    "float16": "round_float16",
    "int16": "wrap_int16",
    "int8": "wrap_int8",
    "uint8": "wrap_uint8",
}
# The parameter that stands for the results of the template around an epilogue.
RESULTS = -1
REDUCTIONS = ("sum", "prod", "max", "min", "any", "all")
SCANS = ("sum", "prod")


class Expr:
    """Base of expressions, with operators for lowerings to write formulas with."""

    type: str

    def _binary(self, name: str, other: Any, swap: bool = False) -> Expr:
        other = other if isinstance(other, Expr) else Const(other, self.type)
        return op(name, other, self) if swap else op(name, self, other)

    def __add__(self, other: Any) -> Expr:
        return self._binary("add", other)

    def __radd__(self, other: Any) -> Expr:
        return self._binary("add", other, True)

    def __sub__(self, other: Any) -> Expr:
        return self._binary("sub", other)

    def __rsub__(self, other: Any) -> Expr:
        return self._binary("sub", other, True)

    def __mul__(self, other: Any) -> Expr:
        return self._binary("mul", other)

    def __rmul__(self, other: Any) -> Expr:
        return self._binary("mul", other, True)

    def __truediv__(self, other: Any) -> Expr:
        return self._binary("div", other)

    def __rtruediv__(self, other: Any) -> Expr:
        return self._binary("div", other, True)

    def __neg__(self) -> Expr:
        return op("neg", self)


@dataclass(frozen=True, eq=True)
class Const(Expr):
    value: Any
    type: str


@dataclass(frozen=True)
class Iota(Expr):
    address: Affine
    type: str = "i64"


@dataclass(frozen=True)
class Local(Expr):
    name: str
    type: str


@dataclass(frozen=True)
class Load(Expr):
    buffer: int
    address: Affine
    dtype: str

    @property
    def type(self) -> str:  # type: ignore[override]
        return VALUE_TYPE[self.dtype]


@dataclass(frozen=True)
class Gather(Expr):
    """A load `place` elements behind `address`; a whole number that is computed, or loaded itself."""

    buffer: int
    address: Affine
    place: Expr
    dtype: str

    @property
    def type(self) -> str:  # type: ignore[override]
        return VALUE_TYPE[self.dtype]


@dataclass(frozen=True)
class Kept(Expr):
    scratch: str
    address: Affine
    type: str


@dataclass(frozen=True)
class Table(Expr):
    """Element `address` of a list of constants."""

    values: tuple[Any, ...]
    address: Affine
    type: str


@dataclass(frozen=True)
class RunNumber(Expr):
    """Of the generator that a run draws from: its seed (None), or its place in blocks of four
    numbers when the run has drawn so many."""

    blocks: int | None
    type: str = "i64"


@dataclass(frozen=True)
class Op(Expr):
    name: str
    args: tuple[Expr, ...]
    type: str


def op(name: str, *args: Expr) -> Expr:
    """An operation on expressions; its type follows from the table of scalar operations."""
    from accel.codegen.scalar_ops import SCALAR_OPS

    return Op(name, args, SCALAR_OPS[name].result_type(args))


def cast(value: Expr, type_: str) -> Expr:
    if value.type == type_:
        return value
    if isinstance(value, Const):
        exact = ctypes.c_float(value.value).value if value.type == "f32" else value.value
        return Const(constant(exact, type_), type_)
    return Op(f"to_{type_}", (value,), type_)


def constant(value: Any, type_: str) -> Any:
    if type_ == "bool":
        return bool(value)
    if type_ in ("i32", "i64"):
        return int(value)
    return float(value)


def rounded(value: Expr, dtype: str) -> Expr:
    """`value` as a memory cell of `dtype` would give it back."""
    value = cast(value, VALUE_TYPE[dtype])
    name = ROUNDING.get(dtype)
    if name is None or (isinstance(value, (Load, Gather)) and value.dtype == dtype):
        return value
    return Op(name, (value,), value.type)


@dataclass(frozen=True)
class Param:
    dtype: str
    written: bool
    host: bool = False  # one element in the processor's memory: a GPU's kernel is given its value


@dataclass
class Let:
    name: str
    expr: Expr


@dataclass
class Store:
    param: int
    address: Affine
    expr: Expr
    dtype: str


@dataclass
class Scatter(Store):
    """Adds to a cell, which other iterations may add to as well. Its expression is `placed`: a value, and how
    many elements behind the address the cell is."""


@dataclass
class Keep:
    scratch: str
    address: Affine
    expr: Expr


@dataclass
class Begin:
    name: str
    kind: str
    type: str


@dataclass
class Accumulate:
    name: str
    kind: str
    expr: Expr


@dataclass
class Finish:
    name: str
    accumulator: str
    kind: str
    type: str


@dataclass
class Scan:
    """`in_order`: elements are taken one by one also where they are lanes of a vector, since
    parts of a row may overflow where what stands before them does not."""

    name: str
    accumulator: str
    kind: str
    expr: Expr
    in_order: bool


# Statements with an expression.
VALUED = (Let, Store, Keep, Accumulate, Scan)


@dataclass
class Loop:
    var: str
    size: int
    vector: bool
    body: list[Any]


@dataclass
class Jammed:
    """A kernel's body for `rows` neighbouring units at once, and its row buffers."""

    rows: int
    body: list[Any]
    scratch: dict[str, tuple[int, str]]


@dataclass
class Kernel:
    """One function over memory.

    `outer` are the loops that threads share out (row-major), `scratch` maps a row buffer's
    name to (elements, type), `lanes_over_rows` says that the vector variable is the last
    of the outer loops instead of the innermost of the inner ones.
    """

    name: str
    params: list[Param]
    outer: list[tuple[str, int]]
    body: list[Any]
    scratch: dict[str, tuple[int, str]] = field(default_factory=dict)
    vector_var: str | None = None
    lanes_over_rows: bool = False
    parallel: bool = False
    cost_ns: float = 0.0
    streamed: frozenset[int] = frozenset()  # parameters whose stores go past the caches
    jammed: Jammed | None = None
    tile_var: str | None = None  # an outer variable that is walked in tiles with the vector one


def children(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Gather):
        return (expr.place,)
    return expr.args if isinstance(expr, Op) else ()


def transform(expr: Expr, leaf: Callable[[Expr], Expr]) -> Expr:
    """`expr` with every leaf replaced by `leaf(leaf)`; a gather's place goes before it."""
    if isinstance(expr, Gather):
        place = transform(expr.place, leaf)
        return leaf(Gather(expr.buffer, expr.address, place, expr.dtype))
    if not isinstance(expr, Op):
        return leaf(expr)
    args = tuple(transform(a, leaf) for a in expr.args)
    return expr if args == expr.args else Op(expr.name, args, expr.type)


def leaves(expr: Expr) -> Iterator[Expr]:
    """What reads memory or stands for itself: also a gather, behind the leaves of its place."""
    for a in children(expr):
        yield from leaves(a)
    if not isinstance(expr, Op):
        yield expr


def substitute(expr: Expr, by: Mapping[str, Affine]) -> Expr:
    """`expr` with loop variables replaced in every address."""

    def leaf(e: Expr) -> Expr:
        if isinstance(e, Load):
            return Load(e.buffer, e.address.substitute(by), e.dtype)
        if isinstance(e, Gather):
            return Gather(e.buffer, e.address.substitute(by), e.place, e.dtype)
        if isinstance(e, Iota):
            return Iota(e.address.substitute(by), e.type)
        if isinstance(e, Table):
            return Table(e.values, e.address.substitute(by), e.type)
        return e

    return transform(expr, leaf) if by else expr


def addresses(expr: Expr) -> Iterator[Affine]:
    for e in leaves(expr):
        if isinstance(e, (Load, Gather, Iota, Kept, Table)):
            yield e.address


def expressions(body: list[Any]) -> Iterator[Expr]:
    """All expressions of these statements, also the parts of others."""
    for s in statements(body):
        if isinstance(s, VALUED):
            yield from _parts(s.expr)


def _parts(expr: Expr) -> Iterator[Expr]:
    yield expr
    for part in children(expr):
        yield from _parts(part)


def names(loop: Loop) -> frozenset[str]:
    """The variables and locals that a loop and those in it define."""
    found = {loop.var}
    for s in loop.body:
        if isinstance(s, Loop):
            found |= names(s)
        elif isinstance(s, (Let, Finish, Scan)):
            found.add(s.name)
    return frozenset(found)


def moved(body: list[Any]) -> frozenset[str]:
    """Locals that are loaded from narrow memory only to be stored to such memory again."""
    loaded: dict[str, str] = {}
    used: set[str] = set()
    for s in statements(body):
        if isinstance(s, Let) and isinstance(s.expr, (Load, Gather)):
            if ITEM_BYTES[s.expr.dtype] <= 2 and s.expr.buffer != RESULTS:
                loaded[s.name] = s.expr.dtype
        elif isinstance(s, Store) and isinstance(s.expr, Local):
            if loaded.get(s.expr.name) != s.dtype:
                used.add(s.expr.name)
        elif isinstance(s, VALUED):
            used |= {e.name for e in leaves(s.expr) if isinstance(e, Local)}
    return frozenset(loaded) - used


def scanned(body: list[Any]) -> frozenset[str]:
    """The accumulators that scans take."""
    return frozenset(s.accumulator for s in statements(body) if isinstance(s, Scan))


def statements(body: list[Any]) -> Iterator[Any]:
    """All statements of this body and of its loops, without the loops."""
    for s in body:
        if isinstance(s, Loop):
            yield from statements(s.body)
        else:
            yield s
