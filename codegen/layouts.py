"""Which intermediate matrices lie by columns: those that only small products hand to each other.

In: a tensor graph. Out: the same graph, with other strides for some of its buffers. A small
product of few rows is fastest as `out.T = weight @ rows.T`: the weight is read as it lies, and
nothing of it is turned or packed (`products.py`). What such products hand on, through pointwise
operations or at once, then lies as the next one wants it; only at the ends of a chain are
rows turned. Invariant: no buffer that anybody outside these operations sees is changed.
"""

from __future__ import annotations

import torch

from accel.codegen.lowerings_pointwise import FORMULAS
from accel.codegen.products import count_uses, may_go_by_columns
from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Node, TensorGraph, View, contiguous_strides, map_views

_POINTWISE = frozenset({*FORMULAS, torch.ops.aten.gelu.default})


def choose_layouts(graph: TensorGraph) -> None:
    uses = count_uses(graph)
    products = [n for n in graph.nodes if may_go_by_columns(graph, n, uses)]
    turned = _handed_on(graph, products)
    for buffer in turned:
        mine = graph.buffers[buffer]
        mine.strides = _columns(mine.sizes)

    def moved(view: View) -> View:
        if view.buffer not in turned:
            return view
        return View(view.buffer, view.sizes, _columns(view.sizes), 0, view.dtype)

    for node in graph.nodes:
        node.args = map_views(node.args, moved)
        node.kwargs = map_views(node.kwargs, moved)


def _handed_on(graph: TensorGraph, products: list[Node]) -> set[int]:
    """The buffers that are made by `products`, or of such buffers, and read by nobody else."""
    ids = {id(n) for n in products}
    visible = {v.buffer for v in graph.roots()} | {c.region.buffer for c in graph.commits}
    found: set[int] = set()
    for node in graph.nodes:  # candidates, in program order: all that a chain may reach
        out = _only_result(node)
        if out is None or out in visible or not _lies_by_rows(graph.buffers[out].view):
            continue
        if id(node) in ids or (
            node.target in _POINTWISE and any(v.buffer in found for v in node.views())
        ):
            found.add(out)
    while True:
        wrong = set()
        for node in graph.nodes:
            out = _only_result(node)
            views = list(node.views())
            if id(node) in ids:
                # The rows may lie either way, bias and weight only as they do.
                wrong |= {v.buffer for v in views if v is not node.args[-2]}
                wrong |= {v.buffer for v in views if not _is_whole(graph, v)}
                continue
            ends = out not in found or node.target not in _POINTWISE
            fits = not ends and all(_goes_along(graph, v, found, out) for v in views)
            if not fits:
                wrong |= {v.buffer for v in views}
                wrong |= {out} if out is not None else set()
        if not wrong & found:
            return found
        found -= wrong


def _only_result(node: Node) -> int | None:
    return node.results[0] if len(node.results) == 1 else None


def _goes_along(graph: TensorGraph, view: View, found: set[int], out: int | None) -> bool:
    """Whether an operand is one of the buffers, or the same for each row or column of them."""
    if view.buffer in found:
        same = out is not None and graph.buffers[out].sizes == view.sizes
        return same and _is_whole(graph, view)
    return sum(n > 1 for n in view.sizes) <= 1


def _is_whole(graph: TensorGraph, view: View) -> bool:
    buffer = graph.buffers[view.buffer]
    return (
        _lies_by_rows(view)
        and view.dtype == buffer.dtype
        and view.numel == buffer.numel
        and view.sizes[-1] == buffer.sizes[-1]
    )


def _lies_by_rows(view: View) -> bool:
    return (
        len(view.sizes) >= 2
        and not any(is_symbolic(n) for n in (*view.sizes, *view.strides, view.offset))
        and view.offset == 0
        and view.strides == contiguous_strides(view.sizes)
        and view.dtype == "float32"
    )


def _columns(sizes: tuple[int, ...]) -> tuple[int, ...]:
    rows = contiguous_strides(sizes[:-1])
    return (*rows, rows[0] * sizes[0])
