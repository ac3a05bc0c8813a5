"""Loop nests -> blocks of a GPU: which part of a kernel's iterations one program runs.

In: a `Kernel` without vector loops (`schedule_tiled`). Out: `Tiles`: the loop variables on
one or two axes of a block, how long each axis is, and whether the second is walked in a
loop. Invariant: blocks are powers of two; every iteration lies in exactly one program, and
all iterations of a row in the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine
from accel.codegen.symbols import hint, is_same, is_symbolic

# Rows up to this many elements stay in registers from their first phase to their last.
LONGEST_TILE = 16384
# Elements of a block, where there are enough.
_FLAT_BLOCK = 1024
_ROW_BLOCK = 2048
_SQUARE = (32, 64)  # where two accesses are contiguous along different variables
_COLUMNS = 32  # of a reduction whose rows lie side by side in memory
_ELEMENTS_PER_WARP = 256
_MAX_WARPS = 16


@dataclass(frozen=True)
class Axis:
    """Loop variables with their sizes, the last one fastest, and the length of a block."""

    variables: tuple[tuple[str, Any], ...]
    block: int

    @property
    def numel(self) -> Any:
        count: Any = 1
        for _, size in self.variables:
            count *= size
        return count

    @property
    def is_ragged(self) -> bool:
        """Whether some block may end behind the last iteration."""
        return is_symbolic(self.numel) or self.numel % self.block != 0


@dataclass(frozen=True)
class Tiles:
    axes: tuple[Axis, ...]
    rows: bool  # the second axis is a row, which one program runs whole
    looped: bool  # ... block after block
    warps: int

    def grid(self) -> Any:
        """How many programs run."""
        count: Any = 1
        for axis in self.axes[:1] if self.rows else self.axes:
            count *= (axis.numel + axis.block - 1) // axis.block
        return count


def choose_tiles(kernel: ir.Kernel) -> Tiles:
    rows = list(_row_variables(kernel.body))
    outer = list(kernel.outer)
    if rows:
        return _rows(kernel, outer, rows)
    pair = _transposed(kernel)
    if pair is not None:
        return _square(outer, *pair)
    axis = Axis(tuple(outer), min(_FLAT_BLOCK, _power(_numel(outer))))
    return Tiles((axis,), False, False, _warps(axis.block))


def _row_variables(body: list[Any]) -> Iterator[tuple[str, Any]]:
    """The variables of the first nest of loops; all nests of a kernel have the same."""
    for statement in body:
        if isinstance(statement, ir.Loop):
            yield statement.var, statement.size
            yield from _row_variables(statement.body)
            return


def _rows(kernel: ir.Kernel, outer: list[Any], rows: list[Any]) -> Tiles:
    length, count = _numel(rows), _numel(outer)
    symbolic = any(is_symbolic(size) for _, size in rows)
    whole = bool(kernel.scratch)  # values of the row are kept for a later phase
    limit = max((n for n, _ in kernel.scratch.values()), default=length)
    beside = bool(outer) and _contiguous(kernel, outer[-1][0]) > _contiguous(kernel, rows[-1][0])
    budget = 2 * _ROW_BLOCK
    if whole or (not symbolic and length <= (budget // _COLUMNS if beside else budget)):
        block = _power(limit)
        across = max(min(_power(count), budget // block), 1)
        return _tiles(outer, rows, across, block, looped=False)
    if beside:
        across = min(_power(count), _COLUMNS)
        return _tiles(outer, rows, across, min(_power(length), budget // across), looped=True)
    return _tiles(outer, rows, 1, min(_power(length), _ROW_BLOCK), looped=True)


def _tiles(outer: list[Any], rows: list[Any], across: int, block: int, looped: bool) -> Tiles:
    axes = (Axis(tuple(outer), across), Axis(tuple(rows), block))
    return Tiles(axes, True, looped, _warps(across * block))


def _square(outer: list[Any], first: str, second: str) -> Tiles:
    """Both of two variables along which memory is contiguous get an axis."""
    rest = [(v, n) for v, n in outer if v not in (first, second)]
    sizes = dict(outer)
    one = Axis((*rest, (first, sizes[first])), min(_SQUARE[0], _power(hint(sizes[first]))))
    other = Axis(((second, sizes[second]),), min(_SQUARE[1], _power(hint(sizes[second]))))
    return Tiles((one, other), False, False, _warps(one.block * other.block))


def _transposed(kernel: ir.Kernel) -> tuple[str, str] | None:
    """Two variables that both are the contiguous one of some access."""
    long = [v for v, n in kernel.outer if hint(n) >= 16]
    found = [v for v in long if _contiguous(kernel, v)]
    return (found[-2], found[-1]) if len(found) >= 2 else None


def _contiguous(kernel: ir.Kernel, var: str) -> int:
    """How many accesses are contiguous along a variable."""
    return sum(is_same(a.coefficient(var), 1) for a in accesses(kernel))


def accesses(kernel: ir.Kernel) -> set[Affine]:
    return set(_accesses(kernel.body))


def _accesses(body: list[Any]) -> Iterator[Affine]:
    for s in ir.statements(body):
        if isinstance(s, ir.Store):
            yield s.address
        if hasattr(s, "expr"):
            yield from (e.address for e in ir.leaves(s.expr) if isinstance(e, (ir.Load, ir.Gather)))


def _numel(variables: list[Any]) -> int:
    count = 1
    for _, size in variables:
        count *= hint(size)
    return count


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int) -> int:
    return min(max(elements // _ELEMENTS_PER_WARP, 1), _MAX_WARPS)
