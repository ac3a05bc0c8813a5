"""Reads of a tensor that has been written in parts: from the parts, without the copy between.

In: a tensor graph. Out: the same graph, in which views that lie wholly inside or wholly outside
of what a "write" has replaced look at the written value, or at what was there before. Invariant:
every view has the values it had; writes that nobody reads any more are left to
`eliminate_dead`. Gates of a recurrent cell, changed in place piece by piece, become plain values.

Not for a joint graph of forward and backward: which tensor a backward saves, and which write makes that an
error, is then still to be read off it.
"""

from __future__ import annotations

from dataclasses import replace

from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Buffer, Node, TensorGraph, View, map_views

_LONGEST = 256  # writes that a read is followed through

# For each dimension of a buffer that has elements beside each other, outermost first: its stride, and
# the places from and to which a view lies in it.
Box = list[tuple[int, int, int]]


def forward_writes(graph: TensorGraph) -> None:
    writes: dict[int, Node] = {}
    for node in graph.nodes:

        def forwarded(view: View) -> View:
            for _ in range(_LONGEST):
                made = writes.get(view.buffer)
                further = None if made is None else _behind(view, made, graph)
                if further is None:
                    break
                view = further
            return view

        # The base of a write is copied as a whole anyway.
        if node.target == "write":
            base, placed, value = node.args
            node.args = (base, placed, forwarded(value))
            (result,) = node.results
            assert result is not None
            writes[result] = node
        else:
            node.args = map_views(node.args, forwarded)
            node.kwargs = map_views(node.kwargs, forwarded)


def _behind(view: View, write: Node, graph: TensorGraph) -> View | None:
    """The same values before the write's copy; None where it takes both sides to make them."""
    base, placed, value = write.args
    buffer = graph.buffers[view.buffer]
    mine, written = _box(view, buffer), _box(placed, buffer)
    if mine is None or written is None:
        return None
    pairs = list(zip(mine, written, strict=True))
    if any(a[2] <= b[1] or b[2] <= a[1] for a, b in pairs):
        return replace(view, buffer=base.buffer) if base is not None else None
    if value.dtype != placed.dtype or any(a[1] < b[1] or a[2] > b[2] for a, b in pairs):
        return None
    steps = {
        stride: step
        for n, stride, step in zip(placed.sizes, placed.strides, value.strides, strict=True)
        if n > 1
    }
    offset = value.offset + sum((a[1] - b[1]) * steps[a[0]] for a, b in pairs if a[1] != b[1])
    strides = tuple(steps[s] if n > 1 else 1 for n, s in zip(view.sizes, view.strides, strict=True))
    return View(value.buffer, view.sizes, strides, offset, view.dtype)


def _box(view: View, buffer: Buffer) -> Box | None:
    """Where a view lies in a dense buffer; None if it is no box of its elements."""
    numbers = (*view.sizes, *view.strides, view.offset, *buffer.sizes, *buffer.strides)
    if view.dtype != buffer.dtype or any(is_symbolic(n) for n in numbers) or 0 in view.sizes:
        return None
    dims = sorted(
        ((s, n) for n, s in zip(buffer.sizes, buffer.strides, strict=True) if n > 1), reverse=True
    )
    inner = 1
    for stride, size in reversed(dims):
        if stride != inner:
            return None
        inner *= size
    rest, box = view.offset, []
    extents = [(n, s) for n, s in zip(view.sizes, view.strides, strict=True) if n > 1]
    by_stride = {s: n for n, s in extents}
    if len(by_stride) != len(extents) or not by_stride.keys() <= {stride for stride, _ in dims}:
        return None
    for stride, size in dims:
        start, rest = divmod(rest, stride)
        stop = start + by_stride.get(stride, 1)
        if stop > size:
            return None
        box.append((stride, start, stop))
    return box if rest == 0 else None
