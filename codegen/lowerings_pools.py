"""Lowerings of pooling: maxima and means over windows of images.

In: a node of the tensor graph. Out: loop nodes, over lines first, then along them: neighbours stay
neighbours in memory, and overlapping windows share the first sums. Rules as in
`lowerings_pointwise`; half precisions are summed in float, like ATen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from accel.codegen.affine import Affine
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, Iota, cast, op
from accel.codegen.lowerings_shapes import pad_into
from accel.codegen.symbols import hint
from accel.codegen.tensor_graph import Node, View, contiguous_strides, span

_DTYPE = {"f32": "float32", "f64": "float64"}


def lower_max_pool(b: Builder, node: Node, outs: list[View | None]) -> None:
    """Maxima over lines first, then along them: neighbours stay neighbours in memory."""
    out, indices = outs
    assert out is not None
    if indices is not None and indices.buffer in b.read:
        raise Unsupported("the indices are wanted")
    x, window, *rest = node.args
    defaults: list[Any] = [[], 0, 1, False]
    stride, padding, dilation, _ = [*rest, *defaults[len(rest) :]]
    pooling = _Pooling.of(x, out, window, stride, padding, dilation)
    image = pooling.padded(b, x, -math.inf)
    _over_windows(b, image, out, pooling, "max", x.dtype)


def lower_avg_pool(b: Builder, node: Node, out: View) -> None:
    """Sums over lines first, then along them, where windows overlap; divided by their extents."""
    x, window, *rest = node.args
    defaults: list[Any] = [[], 0, False, True, None]
    stride, padding, _, counts_padding, divisor = [*rest, *defaults[len(rest) :]]
    if node.kwargs:
        raise Unsupported("a mean over this tensor")
    pooling = _Pooling.of(x, out, window, stride, padding, 1)
    type_ = VALUE_TYPE[x.dtype]
    total = _temporary_like(b, out.sizes, _DTYPE[type_], out)
    _over_windows(b, pooling.padded(b, x, 0.0), total, pooling, "sum", _DTYPE[type_])

    def mean(index: Any) -> Expr:
        # Extents are whole numbers, as exact in these types as their product is.
        extents = [pooling.extent(d, index[2 + d], type_, counts_padding) for d in (0, 1)]
        count = Const(float(divisor), type_) if divisor else extents[0] * extents[1]
        return b.load(total, index) / count

    b.pointwise(out, mean)


@dataclass(frozen=True)
class _Pooling:
    """Windows over the last two of four dimensions; every field has a number for each of the two."""

    image: tuple[int, int]
    results: tuple[int, int]
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of(x: View, out: View, window: Any, stride: Any, padding: Any, dilation: Any) -> _Pooling:
        if len(x.sizes) != 4 or VALUE_TYPE.get(x.dtype) not in ("f32", "f64") or x.numel == 0:
            raise Unsupported("windows over this tensor")
        window = _pair(window)
        stride = _pair(stride) if stride else window
        image, results = _pair(x.sizes[2:]), _pair(out.sizes[2:])
        return _Pooling(image, results, window, stride, _pair(padding), _pair(dilation))

    def reach(self, d: int) -> int:
        """How far the windows reach, counted from where the padding begins."""
        return (self.results[d] - 1) * self.stride[d] + (self.window[d] - 1) * self.dilation[d] + 1

    def extent(self, d: int, at: Affine, type_: str, counts_padding: bool) -> Expr:
        """How many elements of the image, or of it and its padding, a window covers."""
        border = self.padding[d] if counts_padding else 0
        first, end = self.padding[d] - border, self.image[d] + self.padding[d] + border
        if first == 0 and self.reach(d) <= end:
            return Const(float(self.window[d]), type_)
        start = cast(Iota(at.times(self.stride[d])), type_)
        last = op("minimum", start + float(self.window[d]), Const(float(end), type_))
        return last - op("maximum", start, Const(float(first), type_))

    def padded(self, b: Builder, x: View, value: float) -> View:
        """`x` with a border of `value`, wherever windows reach (with ceil_mode beyond the padding)."""
        whole = [max(self.reach(d), self.image[d] + self.padding[d]) for d in (0, 1)]
        if not any(self.padding) and tuple(whole) == self.image:
            return x
        image = _temporary_like(b, (*x.sizes[:2], *whole), x.dtype, x)
        after = [whole[d] - self.image[d] - self.padding[d] for d in (0, 1)]
        pads = [self.padding[1], after[1], self.padding[0], after[0]]
        pad_into(b, image, x, pads, value)
        return image


def _over_windows(
    b: Builder, image: View, out: View, pooling: _Pooling, kind: str, dtype: str
) -> None:
    """`out` = `kind` over windows of `image`."""
    n, c, _, width = image.sizes
    (rows, columns), window, s = pooling.results, pooling.window, image.strides
    step, apart = pooling.stride, pooling.dilation
    type_ = VALUE_TYPE[dtype]
    if kind == "sum" and all(w <= k for w, k in zip(window, step, strict=True)):
        apart_by = (s[0], s[1], s[2] * step[0], s[3] * step[1], s[2], s[3])
        windows = (n, c, rows, columns, *window)
        over = View(image.buffer, windows, apart_by, image.offset, image.dtype)
        b.reduce(out, windows, [4, 5], kind, lambda i: cast(b.load(over, i), type_), False)
        return
    line = (s[0], s[1], s[2] * step[0], s[3])
    lines = View(image.buffer, (n, c, rows, width), line, image.offset, image.dtype)
    if window[0] > 1:
        strides = (*line, s[2] * apart[0])
        over = View(image.buffer, (*lines.sizes, window[0]), strides, image.offset, image.dtype)
        lines = _temporary_like(b, lines.sizes, dtype, image)
        b.reduce(lines, over.sizes, [4], kind, lambda i: cast(b.load(over, i), type_), False)
    t = lines.strides
    sizes = (n, c, rows, columns, window[1])
    strides = (t[0], t[1], t[2], t[3] * step[1], t[3] * apart[1])
    along = View(lines.buffer, sizes, strides, lines.offset, lines.dtype)
    b.reduce(out, sizes, [4], kind, lambda i: cast(b.load(along, i), type_), False)


def _temporary_like(b: Builder, sizes: tuple[int, ...], dtype: str, like: View) -> View:
    """A buffer whose dimensions lie in the order of those of `like`."""
    order = sorted(range(len(sizes)), key=lambda d: -hint(like.strides[d]))
    lying = contiguous_strides(tuple(sizes[d] for d in order))
    strides = tuple(lying[order.index(d)] for d in range(len(sizes)))
    numel = span(sizes, strides)
    return b.program.graph.new_buffer(numel, dtype, sizes, strides).view


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value if len(value) == 2 else (value[0], value[0])
    return first, second
