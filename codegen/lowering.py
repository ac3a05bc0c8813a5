"""Tensor graph -> program: every node becomes loop nodes, a small matrix product or a call.

In: a `TensorGraph`. Out: a `Program`. Invariant: nothing is unsupported, only unfused: a
node without a row in `LOWERINGS`, or whose row declines, calls its ATen operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accel.codegen import lowerings_gather as gather
from accel.codegen import lowerings_pointwise as pointwise
from accel.codegen import lowerings_pools as pools
from accel.codegen import lowerings_reduce as reduce
from accel.codegen import lowerings_scan as scan
from accel.codegen import lowerings_shapes as shapes
from accel.codegen.build import vector_bytes
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.convolutions import lower_convolution, lower_convolution_backward
from accel.codegen.embeddings import lower_embedding_backward
from accel.codegen.gpu_random import lower_state, lower_uniform, state_operator, uniform_operator
from accel.codegen.loop_ir import VALUE_TYPE
from accel.codegen.options import CodegenOptions, CompileError
from accel.codegen.products import PRODUCTS, count_uses, lower_product
from accel.codegen.program import ExternNode, LoopNode, Program, TemplateNode, reads, writes
from accel.codegen.random_masks import bernoulli_operator, lower_mask
from accel.codegen.shared_products import lower_shared_product
from accel.codegen.targets import Target
from accel.codegen.tensor_graph import Node, TensorGraph, View, map_views
from accel.codegen.trials import pays
from accel.errors import untraceable

aten = torch.ops.aten
Lowering = Callable[[Builder, Node, View], None]

# One result.
LOWERINGS: dict[Any, Lowering] = {
    **dict.fromkeys(pointwise.FORMULAS, pointwise.lower_formula),
    **dict.fromkeys(pointwise.COMPARISONS, pointwise.lower_comparison),
    **dict.fromkeys(pointwise.LOGICAL, pointwise.lower_logical),
    **dict.fromkeys(shapes.FILL_VALUES, shapes.lower_fill),
    **dict.fromkeys(shapes.FILL_ARGUMENT, shapes.lower_fill),
    **dict.fromkeys(reduce.EXTREMA, reduce.lower_extremum),
    **dict.fromkeys(reduce.TRUTHS, reduce.lower_truth),
    aten.gelu.default: pointwise.lower_gelu,
    aten.logical_not.default: pointwise.lower_logical_not,
    aten.where.self: pointwise.lower_where,
    aten.masked_fill.Scalar: pointwise.lower_masked_fill,
    aten.masked_fill.Tensor: pointwise.lower_masked_fill,
    aten.isnan.default: pointwise.lower_isnan,
    aten.isinf.default: pointwise.lower_isinf,
    aten.arange.default: shapes.lower_arange,
    aten.arange.start: shapes.lower_arange,
    aten.arange.start_step: shapes.lower_arange,
    aten.eye.default: shapes.lower_eye,
    aten.tril.default: shapes.lower_triangle,
    aten.triu.default: shapes.lower_triangle,
    aten.cat.default: shapes.lower_cat,
    aten.constant_pad_nd.default: shapes.lower_pad,
    aten.repeat.default: shapes.lower_repeat,
    aten.flip.default: shapes.lower_flip,
    aten.copy.default: lambda b, node, out: b.copy(out, node.args[1]),
    aten.sum.default: reduce.lower_sum,
    aten.sum.dim_IntList: reduce.lower_sum,
    aten.mean.default: reduce.lower_mean,
    aten.mean.dim: reduce.lower_mean,
    aten.prod.default: reduce.lower_prod,
    aten.prod.dim_int: reduce.lower_prod,
    aten.linalg_vector_norm.default: reduce.lower_vector_norm,
    aten._softmax.default: reduce.lower_softmax,
    aten._safe_softmax.default: reduce.lower_softmax,
    aten._log_softmax.default: reduce.lower_softmax,
    aten.convolution.default: lower_convolution,
    aten.bmm.default: lower_shared_product,
    aten.embedding_dense_backward.default: lower_embedding_backward,
    aten.avg_pool2d.default: pools.lower_avg_pool,
    bernoulli_operator(): lower_mask,
    uniform_operator(): lower_uniform,
    aten.upsample_nearest2d.default: shapes.lower_nearest,
    aten.upsample_nearest2d.vec: shapes.lower_nearest,
    **gather.LOWERINGS,
    **scan.SCANS,
    "copy": shapes.lower_copy,
    "write": shapes.lower_write,
}
# Several results, or results of which some may be missing.
MULTIPLE: dict[Any, Callable[[Builder, Node, list[View | None]], None]] = {
    aten.native_layer_norm.default: reduce.lower_layer_norm,
    aten._fused_rms_norm.default: reduce.lower_rms_norm,
    aten.max_pool2d_with_indices.default: pools.lower_max_pool,
    aten.convolution_backward.default: lower_convolution_backward,
    state_operator(): lower_state,
}
# Operations called with an out argument, so that their result lies in planned memory.
OUT_VARIANTS: dict[Any, str] = {
    aten.mm.default: "aten::mm.out",
    aten.addmm.default: "aten::addmm.out",
    aten.bmm.default: "aten::bmm.out",
    aten.baddbmm.default: "aten::baddbmm.out",
}


def lower_graph(
    graph: TensorGraph, options: CodegenOptions, target: Target, out_dir: Path | None = None
) -> Program:
    """The program for `graph`; the steps nobody reads are gone.

    What is measured on the way is kept in `out_dir`; without it nothing is measured.
    """
    program = Program(graph)
    builder = Builder(program)
    builder.splitting = target.splitting
    small = options.products and target.templates
    builder.templates = target.templates
    builder.asserts, builder.draws = target.asserts, target.draws
    builder.lanes = target.lanes
    builder.products = templates_run(options, target)
    builder.tiled_convolutions = options.tiled_convolutions
    if options.measure and out_dir is not None:
        builder.product_pays = lambda shape, epilogue: pays(shape, epilogue, out_dir, options)
    builder.read = {v.buffer for node in graph.nodes for v in node.views()}
    builder.read |= {v.buffer for v in graph.roots()}
    loops = [n for n in graph.nodes if n.target in LOWERINGS or n.target in MULTIPLE]
    builder.continued = {v.buffer for node in loops for v in node.views()}
    builder.uses = count_uses(graph)
    for node in graph.nodes:
        builder.location = node.location
        _lower_node(builder, node, small)
    _materialise_constants(builder)
    for commit in graph.commits:
        _lower_commit(builder, commit.region, commit.value)
    _drop_dead(program, builder.read if target.asserts else None)
    return program


def templates_run(options: CodegenOptions, target: Target) -> bool:
    """Whether the kernels of products.cpp, for vectors of 64 bytes, may be used."""
    wanted = options.products and target.templates
    return wanted and options.march == "native" and vector_bytes() == 64


def _moved(node: Node, outs: list[View | None]) -> tuple[Node, list[View | None]]:
    """A copy or a write of a dtype without arithmetic moves integers of its width instead."""
    views = [*(o for o in outs if o is not None), *node.views()]
    if len({v.dtype for v in views}) > 1 or views[0].dtype in VALUE_TYPE:
        return node, outs
    bits = replace(node, args=map_views(node.args, lambda v: v.bits))
    return bits, [None if o is None else o.bits for o in outs]


def _lower_node(b: Builder, node: Node, products: bool) -> None:
    mark = len(b.program.steps)
    known = [dict(m) for m in b.known()]
    try:
        outs = [None if r is None else b.program.graph.buffers[r].view for r in node.results]
        if isinstance(node.target, str):
            node, outs = _moved(node, outs)
        if node.target in MULTIPLE:
            b.supported(*(o for o in outs if o is not None))
            MULTIPLE[node.target](b, node, outs)
        elif node.target in PRODUCTS and products:
            lower_product(b, node)
        elif node.target in LOWERINGS and len(outs) == 1 and outs[0] is not None:
            b.supported(outs[0], *node.views())
            if outs[0].numel:
                LOWERINGS[node.target](b, node, outs[0])
        else:
            raise Unsupported("no lowering")
    except Unsupported as why:
        del b.program.steps[mark:]
        for mapping, before in zip(b.known(), known, strict=True):
            mapping.clear()
            mapping.update(before)
        if isinstance(node.target, str):
            target = node.origin or node.target
            raise CompileError(untraceable(target, node.location, str(why))) from None
        b.program.steps.append(_extern(node))


def _extern(node: Node) -> ExternNode:
    out = OUT_VARIANTS.get(node.target)
    if out is not None:
        return ExternNode(out, node.args, node.kwargs, [], node.results[0], node.location)
    schema = node.target._schema
    name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
    return ExternNode(name, node.args, node.kwargs, list(node.results), None, node.location)


def _asserts(step: LoopNode | ExternNode | TemplateNode, read: set[int]) -> bool:
    return isinstance(step, LoopNode) and bool(step.gathers()) and step.buffer not in read


def _materialise_constants(b: Builder) -> None:
    """Constants that calls or outputs want as memory get a node that writes them."""
    steps = b.program.steps
    wanted: set[int] = {view.buffer for view in b.program.graph.roots()}
    for step in steps:
        wanted |= reads(step)
    b.program.steps = []
    for buffer in list(b.program.graph.buffers):
        if buffer.constant is not None and buffer.id in wanted:
            try:
                b.copy(buffer.view, buffer.view)
            except Unsupported as why:
                raise CompileError(f"a constant tensor: {why}") from None
    b.program.steps += steps


def _lower_commit(b: Builder, region: View, value: View) -> None:
    steps, b.program.steps = b.program.steps, []
    try:
        # The value is read as memory: it was computed before the commit began.
        b.inlinable = {}
        b.copy(region, value, region=True)
    except Unsupported:
        b.program.steps.append(ExternNode("aten::copy_", (region, value), {}, [], None))
    finally:
        b.program.commit_steps += b.program.steps  # type: ignore[arg-type]
        b.program.steps = steps


def _drop_dead(program: Program, read: set[int] | None) -> None:
    """`read` are the buffers that some operation reads, where kernels assert what they gather by: what
    nobody reads is gathered all the same then. Readers assert what they have taken in."""
    needed = {view.buffer for view in program.graph.roots()}
    for write in program.commit_steps:
        needed |= reads(write)
    kept: list[LoopNode | ExternNode | TemplateNode] = []
    for step in reversed(program.steps):
        # A call may raise: it stays even when nobody reads its result.
        raises = isinstance(step, ExternNode) or (read is not None and _asserts(step, read))
        if raises or needed & writes(step):
            needed |= reads(step)
            kept.append(step)
    program.steps = kept[::-1]
