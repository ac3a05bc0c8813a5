"""Convolutions as matrix products over `products.cpp`.

In: convolution nodes. Out: template nodes: out[filter, pixel] = sum over k of weight[filter, k] *
patches[k, pixel], where k counts the taps of the kernel in every channel. Weights are multiplied as
they lie; the patches are packed on the way (`products.h`), from the images as they lie. Invariant:
nothing is remembered from one call to the next.

Padding counts as zeros, so that a weight that is not finite gives NaN there, as in ATen's own
convolutions; oneDNN, which eager calls, leaves the padding of some sizes out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from accel.codegen import winograd
from accel.codegen.affine import Affine
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import Expr
from accel.codegen.products import packer, row_block, shared_text, wide_units
from accel.codegen.program import ExternNode, TemplateNode
from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Node, View, contiguous_strides

aten = torch.ops.aten

_MIN_EXTENT = 16  # of filters, pixels and products a sum
_MIN_FILTERS = 32  # that share the packing of patches of several taps
_MAX_TAPS = 64
# From so many pixels of several images on oneDNN's own layout of the weights, made anew in each call,
# costs less than it gains: it skips the taps that fall outside of an image.
_PIXELS_FOR_ONEDNN = 256
_FEW_CHANNELS, _FIRST_IMAGES, _FIRST_FILTERS = 16, 4, 32
_MAX_NUMEL = 1 << 30  # places in the images are 32-bit
_WIDE = 64  # columns of a unit, as in products.cpp
_PARALLEL_WORK = 1 << 20


@dataclass(frozen=True)
class _Convolution:
    """Sizes of a convolution over images; over sequences, over images of one line."""

    images: int
    channels: int
    size: tuple[int, int]
    filters: int
    taps: tuple[int, int]
    size_out: tuple[int, int]
    step: tuple[int, int]
    padding: tuple[int, int]
    apart: tuple[int, int]
    by_channels: bool = False  # a pixel's channels lie beside each other
    weights_by_channels: bool = False
    may_be_tiled: bool = True

    @property
    def plane(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def pixels(self) -> int:
        return self.size_out[0] * self.size_out[1]

    @property
    def products(self) -> int:
        """Terms of one sum."""
        return self.channels * self.taps[0] * self.taps[1]

    @property
    def tiling(self) -> winograd.Tiling | None:
        """Where fewer multiplications pay."""
        if (
            not self.may_be_tiled
            or self.taps != (3, 3)
            or self.step != (1, 1)
            or self.apart != (1, 1)
        ):
            return None
        sizes = (*self.size, self.filters, *self.size_out, *self.padding)
        layout = self.by_channels, self.weights_by_channels
        tiling = winograd.Tiling(self.images, self.channels, *sizes, *layout)
        return tiling if tiling.pays() else None

    @property
    def is_plain(self) -> bool:
        """Patches are the image's own lines."""
        flat = self.taps == (1, 1) and self.step == (1, 1) and self.padding == (0, 0)
        return flat and (self.images == 1 or self.pixels % _WIDE == 0)


def lower_convolution(b: Builder, node: Node, out: View) -> None:
    """Errors: Unsupported where oneDNN is the better choice."""
    bias = node.args[2]
    if any(is_symbolic(n) for v in (*node.views(), out) for n in (*v.sizes, *v.strides)):
        raise Unsupported("a convolution whose sizes differ between calls")
    c = _convolution(b, node, out)
    sums = _temporary_like(b, out)
    _append(b, c, node, sums)

    def value(index: list[Affine]) -> Expr:
        total = b.load(sums, index)
        return total if bias is None else total + b.load(bias, [index[1]])

    b.pointwise(out, value)


def lower_convolution_backward(b: Builder, node: Node, outs: list[View | None]) -> None:
    """The gradient for the images over tiles, as the convolution of the results' gradient with the turned weight;
    the others are ATen's. Errors: Unsupported where it is all ATen's."""
    into, (grad, _, weight, *_) = outs[0], node.args
    if into is None:
        raise Unsupported("no gradient for the images")
    c = _backward_convolution(b, node, into)
    turned = b.temporary((c.filters, c.channels, 3, 3), "float32")

    def turned_weight(index: list[Affine]) -> Expr:
        places = [index[1], index[0], *(i.times(-1).plus(2) for i in index[2:])]
        return b.load(weight, places)

    b.pointwise(turned, turned_weight)
    sums = b.temporary(into.sizes, "float32")
    assert c.tiling is not None
    winograd.append(b, c.tiling, grad, turned, sums, node.location)
    b.pointwise(into, lambda index: b.load(sums, index))
    *args, mask = node.args
    if any(mask[1:]):
        args.append([False, *mask[1:]])
        rest: list[int | None] = [None, *node.results[1:]]
        step = ExternNode("aten::convolution_backward", tuple(args), {}, rest, None, node.location)
        b.program.steps.append(step)


def _backward_convolution(b: Builder, node: Node, into: View) -> _Convolution:
    grad, x, weight, _, stride, padding, apart, transposed, output_padding, groups, _ = node.args
    views = (grad, x, weight, into)
    if any(is_symbolic(n) for v in views for n in (*v.sizes, *v.strides)):
        raise Unsupported("a convolution whose sizes differ between calls")
    plain = not transposed and groups == 1 and not any(output_padding) and len(x.sizes) == 4
    if not b.products or not plain or not all(_is_dense(v) for v in views):
        raise Unsupported("not a dense plain convolution")
    down, across = _pair(padding, 0, 2)
    if max(down, across) > 2:
        raise Unsupported("tiles that see padding only")
    c = _Convolution(
        images=x.sizes[0],
        channels=weight.sizes[0],
        size=_pair(grad.sizes[2:], 1),
        filters=weight.sizes[1],
        taps=_pair(weight.sizes[2:], 1),
        size_out=_pair(x.sizes[2:], 1),
        step=_pair(stride, 1, 2),
        padding=(2 - down, 2 - across),
        apart=_pair(apart, 1, 2),
        may_be_tiled=b.tiled_convolutions,
    )
    tiled = c.tiling is not None and c.tiling.pays(turned=True)
    if not tiled or max(grad.numel, x.numel) > _MAX_NUMEL:
        raise Unsupported("not over tiles")
    return c


def _temporary_like(b: Builder, out: View) -> View:
    if _is_dense(out):
        return b.temporary(out.sizes, "float32")
    n, filters, height, width = out.sizes
    lines = b.temporary((n, height, width, filters), "float32")
    return replace(lines, sizes=out.sizes, strides=out.strides)


def _lies_by_channels(v: View) -> bool:
    if v.dtype != "float32" or len(v.sizes) != 4:
        return False
    _, channels, height, width = v.sizes
    return v.strides == (channels * height * width, 1, channels * width, channels)


def _is_dense(v: View) -> bool:
    return v.dtype == "float32" and v.strides == contiguous_strides(v.sizes)


def _append(b: Builder, c: _Convolution, node: Node, sums: View) -> None:
    x, weight = node.args[:2]
    if c.tiling is not None:
        return winograd.append(b, c.tiling, x, weight, sums, node.location)
    if c.is_plain:
        body, units = _by_image(c)
    else:
        body, units = _all_images(c)
    parallel = c.images * c.filters * c.pixels * c.products > _PARALLEL_WORK
    rows = c.images * c.filters
    b.program.steps.append(
        TemplateNode(
            sums.buffer,
            (x, weight),
            shared_text(body, units),
            parallel,
            node.location,
            rows,
            c.pixels,
            pieces=c.images > 1 and not c.is_plain,
        )
    )


def _convolution(b: Builder, node: Node, out: View) -> _Convolution:
    x, weight, _, stride, padding, apart, transposed, output_padding, groups = node.args
    by_channels = _lies_by_channels(x) and _lies_by_channels(out)
    dense = by_channels or (_is_dense(x) and _is_dense(out))
    weights_by_channels = by_channels and _lies_by_channels(weight)
    dense = dense and (weights_by_channels or _is_dense(weight))
    if not b.products or not dense or transposed or groups != 1 or any(output_padding):
        raise Unsupported("not a dense plain convolution")
    images, channels, *size = x.sizes
    filters, _, *taps = weight.sizes
    if len(size) not in (1, 2):
        raise Unsupported("a convolution over volumes")
    c = _Convolution(
        images,
        channels,
        _pair(size, 1),
        filters,
        _pair(taps, 1),
        _pair(out.sizes[2:], 1),
        _pair(stride, 1, len(size)),
        _pair(padding, 0, len(size)),
        _pair(apart, 1, len(size)),
        by_channels and not (_is_dense(x) and _is_dense(out)),
        weights_by_channels and not _is_dense(weight),
        b.tiled_convolutions,
    )
    if c.taps[0] * c.taps[1] > _MAX_TAPS or images * channels * c.plane > _MAX_NUMEL:
        raise Unsupported("too big")
    if c.tiling is not None:
        return c
    if c.by_channels:
        raise Unsupported("oneDNN's layout")
    fewest = _MIN_EXTENT if c.taps == (1, 1) else _MIN_FILTERS
    if c.filters < fewest or min(c.pixels, c.products) < _MIN_EXTENT:
        raise Unsupported("too small")
    if c.images > 1 and c.taps != (1, 1) and c.images * c.pixels >= _PIXELS_FOR_ONEDNN:
        # Of the first layer of a network oneDNN makes little: a handful of channels.
        first = c.channels < _FEW_CHANNELS and c.images >= _FIRST_IMAGES
        if not first or (c.step == (1, 1) and c.filters > _FIRST_FILTERS):
            raise Unsupported("enough pixels for oneDNN")
    return c


def _pair(values: Sequence[int], missing: int, count: int = 0) -> tuple[int, int]:
    """Down and across; one number for several dimensions counts for each of them."""
    values = list(values)
    if len(values) == 1 and count == 2:
        values *= 2
    return (missing, values[0]) if len(values) == 1 else (values[0], values[1])


def _by_image(c: _Convolution) -> tuple[str, int]:
    """Every image is a matrix of its own. Answers the body and the units."""
    image = f"(const float*)e.p[0] + e.row / {c.filters} * {c.channels * c.plane}"
    block = row_block(c.filters, c.pixels)
    units = wide_units(c.filters, c.pixels, block)
    body = (
        "  while (begin < end) {\n"
        f"    const i64 image = begin / {units}, first = begin - image * {units};\n"
        f"    const i64 left = end - image * {units}, last = left < {units} ? left : {units};\n"
        f"    const epilogue_context context = {{p, image * {c.filters}}};\n"
        f"    {_call(c, c.pixels, block, 'first, last', f'pack_rows({image}, {c.plane}, ', '@_results')}"
        f"    begin = image * {units} + last;\n"
        "  }\n"
    )
    return body, units * c.images


def _all_images(c: _Convolution) -> tuple[str, int]:
    """The pixels of all images are the columns of one matrix, of which some lie in one image."""
    numbers = (*c.taps, *c.step, *c.padding, *c.apart)
    pack = (
        f"pack_patches<{', '.join(map(str, numbers))}>((const float*)e.p[0], "
        f"{c.channels * c.plane}, {c.size[0]}, {c.size[1]}, {c.size_out[0]}, {c.size_out[1]}, "
    )
    results = "@_results" if c.images == 1 else f"of_images<{c.filters}, {c.pixels}, @_results>"
    columns = c.images * c.pixels
    # Patches are packed once in every unit.
    block = row_block(c.filters, columns, os.cpu_count() or 1)
    body = (
        "  const epilogue_context context = {p, 0};\n"
        f"  {_call(c, columns, block, 'begin, end', pack, results)}"
    )
    return body, wide_units(c.filters, columns, block)


def _call(c: _Convolution, columns: int, block: int, units: str, pack: str, results: str) -> str:
    head = "{ const epilogue_context& e = *(const epilogue_context*)context; "
    # Patches lie near each other, lines of images do not: the next ones are fetched in time.
    fetched = (
        f"(const char*)((const float*)p[0] + image * {c.channels * c.plane}), {c.plane * 4}, 4"
    )
    return (
        f"wide_f32((const float*)p[1], {c.products}, {c.filters}, {columns}, {c.products}, "
        f"{block}, {units}, {packer(pack).replace('{ ', head, 1)}, "
        f"&{results}, &context, {fetched if c.is_plain else '0, 0, 0'});\n"
    )
