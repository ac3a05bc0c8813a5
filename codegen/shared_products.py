"""Batches of matrix products that share their right side: one product of all rows.

In: a `bmm` whose right side is one matrix, repeated (what `F.linear` becomes for rows that do not lie
one behind the other). Out: one product, by a kernel or by BLAS, and its result in the batch's order.
ATen reads the matrix once for each batch. Invariant: sums are those of one matrix product.
"""

from __future__ import annotations

import torch

from accel.codegen.builder import Builder, Unsupported
from accel.codegen.products import lower_product
from accel.codegen.program import ExternNode
from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Node, View

aten = torch.ops.aten


def lower_shared_product(b: Builder, node: Node, out: View) -> None:
    """Errors: Unsupported for any other batch."""
    left, right = node.args
    numbers = [n for v in (left, right, out) for n in (*v.sizes, *v.strides)]
    if any(map(is_symbolic, numbers)):
        raise Unsupported("a batch of products whose extents differ between calls")
    (batch, rows, _), columns = left.sizes, right.sizes[2]
    if batch < 2 or right.strides[0] != 0 or 0 in (*left.sizes, *right.sizes):
        raise Unsupported("a batch of products of its own")
    together, in_order = _rows_of(b, left)
    matrix = View(right.buffer, right.sizes[1:], right.strides[1:], right.offset, right.dtype)
    product = b.temporary((batch * rows, columns), out.dtype)
    mm = Node(aten.mm.default, (together, matrix), {}, [product.buffer], location=node.location)
    known = dict(b.packed_rows), dict(b.turned_rights)
    mark = len(b.program.steps)
    try:
        if not b.products:
            raise Unsupported("no kernels for products")
        lower_product(b, mm)
    except Unsupported:
        del b.program.steps[mark:]
        b.packed_rows, b.turned_rights = known
        step = ExternNode("aten::mm.out", mm.args, {}, [], product.buffer, node.location)
        b.program.steps.append(step)
    steps = (rows * columns, columns) if in_order else (columns, batch * columns)
    result = View(product.buffer, (batch, rows, columns), (*steps, 1), 0, out.dtype)
    b.copy(out, result)


def _rows_of(b: Builder, left: View) -> tuple[View, bool]:
    """All rows as one matrix, and whether those of one batch lie together in it."""
    batch, rows, inner = left.sizes
    of_batch, of_row, of_column = left.strides
    sizes = (batch * rows, inner)
    if rows == 1 or of_batch == rows * of_row:
        step = of_batch if rows == 1 else of_row
        return View(left.buffer, sizes, (step, of_column), left.offset, left.dtype), True
    if of_row == batch * of_batch:
        return View(left.buffer, sizes, (of_batch, of_column), left.offset, left.dtype), False
    copied = b.temporary(left.sizes, left.dtype)
    b.copy(copied, left)
    return View(copied.buffer, sizes, (inner, 1), 0, left.dtype), True
