"""Small matrix products: when to generate a kernel instead of calling BLAS, and its text.

In: mm or addmm nodes. Out: C++ text of one kernel. Shapes: a[M,K] * b[K,N] + bias -> [M,N],
all float32. Invariant: only products whose operands fit the first-level caches are taken;
there a call costs more than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.codegen.tensor_graph import Node, TensorGraph, View

aten = torch.ops.aten

_MAX_EXTENT = 128
_MAX_WORK = 1 << 19  # multiplications; above, BLAS is as fast


def is_small_gemm(node: Node, graph: TensorGraph) -> bool:
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return False
    operands = list(node.args)
    if any(not isinstance(v, View) or v.dtype != "float32" for v in operands):
        return False
    left, right = operands[-2:]
    (m, k), n = left.sizes, right.sizes[1]
    result = node.results[0]
    if result is None or graph.buffers[result].strides not in ((n, 1), (max(n, 1), 1)):
        return False
    if min(m, n, k) == 0 or max(m, n, k) > _MAX_EXTENT or m * n * k > _MAX_WORK:
        return False
    rows = left.strides[1] == 1 or k == 1
    columns = right.strides[1] == 1 or n == 1 or right.strides[0] == 1 or k == 1
    return bool(rows and columns)


def gemm_text(left: View, right: View, bias: View | None, name: str) -> str:
    """The kernel: p[0] = a, p[1] = b, p[2] = out, p[3] = bias if there is one."""
    (m, k), n = left.sizes, right.sizes[1]
    lda = left.strides[0]
    transposed = right.strides[1] != 1 and n > 1
    layout, ldb = ("true", right.strides[1]) if transposed else ("false", right.strides[0])
    bias_m, bias_n = _bias_strides(bias)
    bias_pointer = "(const float*)p[3]" if bias is not None else "nullptr"
    return (
        f'extern "C" void {name}(void* const* p, long) {{\n'
        f"  small_gemm<{m}, {n}, {k}, {layout}>((const float*)p[0], {lda}, (const float*)p[1], "
        f"{ldb}, {bias_pointer}, {bias_m}, {bias_n}, (float*)p[2]);\n"
        "}\n"
    )


def _bias_strides(bias: Any) -> tuple[int, int]:
    if bias is None:
        return 0, 0
    sizes, strides = bias.sizes, bias.strides
    column = strides[-1] if sizes and sizes[-1] > 1 else 0
    row = strides[0] if len(sizes) == 2 and sizes[0] > 1 else 0
    return row, column
