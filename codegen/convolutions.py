"""Convolutions with a kernel of one pixel, as matrix products over `products.cpp`.

In: convolution nodes. Out: template nodes: out[co, pixel] = sum over ci of
weight[co, ci] * x[ci, pixel] for every image, on tensors as they lie. Larger kernels stay
with oneDNN, which is as fast there.
"""

from __future__ import annotations

import torch

from accel.codegen.affine import Affine
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import Expr
from accel.codegen.products import packer, row_block, shared_text, wide_units
from accel.codegen.program import TemplateNode
from accel.codegen.symbols import is_symbolic
from accel.codegen.tensor_graph import Node, View, contiguous_strides

aten = torch.ops.aten

_MIN_CHANNELS = 16
_PARALLEL_WORK = 1 << 20


def lower_convolution(b: Builder, node: Node, out: View) -> None:
    """Errors: Unsupported for every other convolution."""
    x, weight, bias, stride, padding, _, transposed, output_padding, groups = node.args
    if any(is_symbolic(n) for v in (*node.views(), out) for n in (*v.sizes, *v.strides)):
        raise Unsupported("a convolution whose sizes differ between calls")
    dense = all(
        v.dtype == "float32" and v.strides == contiguous_strides(v.sizes) for v in (x, weight, out)
    )
    plain = not transposed and groups == 1 and not any(padding) and not any(output_padding)
    if not b.products or not dense or not plain or len(x.sizes) != 4:
        raise Unsupported("not a dense plain convolution")
    if weight.sizes[2:] != (1, 1) or len(set(stride)) != 1:
        raise Unsupported("a kernel of several pixels")
    images, channels, _, line = x.sizes
    filters, (height, width) = weight.sizes[0], out.sizes[2:]
    pixels = height * width
    if min(channels, filters, pixels) < _MIN_CHANNELS:
        raise Unsupported("too few channels")
    plane = x.sizes[2] * line
    image = "(const float*)e.p[0] + e.row / FILTERS * PLANES"
    if stride[0] == 1:
        call = f"pack_rows({image}, {plane}, "
    else:
        call = f"pack_pixels({image}, {plane}, {width}, {line}, {stride[0]}, "
    call = call.replace("FILTERS", str(filters)).replace("PLANES", str(channels * plane))
    pack = packer(call).replace(
        "{ ", "{ const epilogue_context& e = *(const epilogue_context*)context; ", 1
    )
    units = wide_units(filters, pixels)
    text = shared_text(
        "  while (begin < end) {\n"
        f"    const i64 image = begin / {units}, first = begin - image * {units};\n"
        f"    const i64 left = end - image * {units}, last = left < {units} ? left : {units};\n"
        f"    const epilogue_context context = {{p, image * {filters}}};\n"
        f"    wide_f32((const float*)p[1], {channels}, {filters}, {pixels}, {channels}, "
        f"{row_block(filters, pixels)}, first, last, {pack}, @_finish, &context, 0, 0, 0);\n"
        f"    begin = image * {units} + last;\n"
        "  }\n",
        units * images,
    )
    parallel = images * filters * pixels * channels > _PARALLEL_WORK
    sums = b.temporary(out.sizes, "float32")
    rows = images * filters
    b.program.steps.append(
        TemplateNode(sums.buffer, (x, weight), text, parallel, node.location, rows, pixels)
    )

    def value(index: list[Affine]) -> Expr:
        total = b.load(sums, index)
        return total if bias is None else total + b.load(bias, [index[1]])

    b.pointwise(out, value)
