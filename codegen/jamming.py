"""Rows side by side: what waits in one row is hidden behind the work of others.

In: a kernel whose rows are reduced over their lanes, or scanned element by element. Out: the same with `jammed`, its body for
several rows at once: their loops are one loop, all else stands once for each. Between two loops
of a row stand a sum over lanes, a root, a division, each waiting for the one before; in short rows
that is a fifth of the time. Invariant: a row is computed by the same operations in the same order
in either body, so that its bits do not depend on how rows are shared out.
"""

from __future__ import annotations

from typing import Any

from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine
from accel.codegen.symbols import hint

_LONGEST_ROW = 64  # vectors; what waits is little of longer ones
_SHORT_ROW = 8
_REDUCTIONS = 2  # one after the other; rows with one gain nothing
_SCRATCH_BYTES = 1 << 13


def jam_rows(kernel: ir.Kernel, lanes: int, vector_bytes: int) -> None:
    """Sets `kernel.jammed` where rows gain from it."""
    if kernel.lanes_over_rows or kernel.vector_var is None or not kernel.outer:
        return
    loops = [s for s in kernel.body if isinstance(s, ir.Loop)]
    # Where elements are taken one by one, each waits for the one before.
    waits = any(isinstance(s, ir.Scan) and s.in_order for s in ir.statements(kernel.body))
    if sum(isinstance(s, ir.Finish) for s in kernel.body) < _REDUCTIONS and not waits:
        return
    vectors = hint(loops[0].size) / lanes
    if (vectors > _LONGEST_ROW and not waits) or not all(s.vector for s in loops):
        return
    # Vectors of 64 bytes come with 32 registers, others with 16.
    rows = 4 if (vectors < _SHORT_ROW or waits) and vector_bytes == 64 else 2
    kept = sum(ir.VALUE_BYTES[type_] * n for n, type_ in kernel.scratch.values())
    units = 1
    for _, size in kernel.outer:
        units *= hint(size)
    if units < 2 * rows or rows * kept > _SCRATCH_BYTES:
        return
    outer = {v for v, _ in kernel.outer}
    scratch = {
        copied(name, row): what for name, what in kernel.scratch.items() for row in range(rows)
    }
    kernel.jammed = ir.Jammed(rows, _jam(kernel.body, outer, rows), scratch)


def copied(name: str, row: int) -> str:
    """What a variable, a local or a row buffer is called in one of several rows."""
    return f"{name}~{row}"


def _jam(body: list[Any], outer: set[str], rows: int) -> list[Any]:
    jammed: list[Any] = []
    for s in body:
        if isinstance(s, ir.Loop):
            jammed.append(ir.Loop(s.var, s.size, s.vector, _jam(s.body, outer, rows)))
        else:
            jammed += [_copy(s, outer, row) for row in range(rows)]
    return jammed


def _copy(s: Any, outer: set[str], row: int) -> Any:
    moved = {v: Affine.var(copied(v, row)) for v in outer}

    def leaf(e: ir.Expr) -> ir.Expr:
        if isinstance(e, ir.Local):
            return ir.Local(copied(e.name, row), e.type)
        if isinstance(e, ir.Kept):
            return ir.Kept(copied(e.scratch, row), e.address, e.type)
        return e

    def expr(e: ir.Expr) -> ir.Expr:
        return ir.substitute(ir.transform(e, leaf), moved)

    if isinstance(s, ir.Let):
        return ir.Let(copied(s.name, row), expr(s.expr))
    if isinstance(s, ir.Store):
        return type(s)(s.param, s.address.substitute(moved), expr(s.expr), s.dtype)
    if isinstance(s, ir.Keep):
        return ir.Keep(copied(s.scratch, row), s.address, expr(s.expr))
    if isinstance(s, ir.Begin):
        return ir.Begin(copied(s.name, row), s.kind, s.type)
    if isinstance(s, ir.Accumulate):
        return ir.Accumulate(copied(s.name, row), s.kind, expr(s.expr))
    if isinstance(s, ir.Scan):
        name, accumulator = copied(s.name, row), copied(s.accumulator, row)
        return ir.Scan(name, accumulator, s.kind, expr(s.expr), s.in_order)
    assert isinstance(s, ir.Finish)
    return ir.Finish(copied(s.name, row), copied(s.accumulator, row), s.kind, s.type)
