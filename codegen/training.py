"""Differentiable graphs: two plans, for forward and backward, over one library.

In: a `SegmentGraph` with `gradients`. Out: the forward's plan, with the backward's and what
an autograd node has to know under "gradient" (docs/architecture.md). Invariant: as for
`pipeline.compile_graph`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.codegen import pipeline
from accel.codegen.build import build
from accel.codegen.joint import Joint, trace_joint
from accel.codegen.options import CodegenOptions
from accel.codegen.partition import Halves, split
from accel.codegen.simplify import eliminate_common, eliminate_dead
from accel.codegen.tensor_graph import TensorGraph
from accel.trace import SegmentGraph

_SMALL_BYTES = 1 << 18


def compile_training(
    source: SegmentGraph, out_dir: Path, options: CodegenOptions
) -> dict[str, Any]:
    """Errors: CompileError with the reason."""
    joint = trace_joint(source)
    eliminate_common(joint.graph)
    eliminate_dead(joint.graph)
    halves = split(joint)
    forward = _half("forward", source, halves.forward, out_dir, options)
    backward = _half("backward", source, halves.backward, out_dir, options, forward.texts)
    library = build(pipeline.kernel_texts(backward), out_dir, options) if backward.texts else None
    forward.plan["library"] = backward.plan["library"] = library
    forward.plan["gradient"] = _gradient(source, joint, halves, backward.plan)
    return forward.plan


def _half(
    name: str,
    source: SegmentGraph,
    graph: TensorGraph,
    out_dir: Path,
    options: CodegenOptions,
    texts: dict[str, str] | None = None,
) -> pipeline.Compilation:
    if options.dump_dir is not None:
        options = replace(options, dump_dir=options.dump_dir / name)
    c = pipeline.Compilation(source, options, out_dir, graph, texts={} if texts is None else texts)
    pipeline.run(c, [p for p in pipeline.PASSES if p[0] not in ("trace", "build")])
    return c


def _kept(source: SegmentGraph, joint: Joint) -> list[int]:
    """The inputs that a node holds so that its forward can be run again.

    With one output, only second derivatives ask for that, and whoever wants them holds the
    inputs; so big ones are held only where gradients may arrive at some outputs only.
    """
    if len(joint.node_outputs) > 1:
        return list(range(joint.input_count))
    sizes = [math.prod(meta.sizes) * meta.torch_dtype.itemsize for _, meta in source.inputs]
    return [i for i, size in enumerate(sizes) if size <= _SMALL_BYTES]


def _gradient(
    source: SegmentGraph, joint: Joint, halves: Halves, plan: dict[str, Any]
) -> dict[str, Any]:
    assert source.gradients is not None
    names = [name for name, _ in source.inputs]
    written = sorted({halves.forward.buffers[c.region.buffer].input for c in joint.graph.commits})
    return {
        "plan": plan,
        "outputs": joint.output_count,
        "node_outputs": joint.node_outputs,
        "tangents": joint.tangents,
        "detached": joint.detached,
        "grads": joint.grads,
        "saved": [list(place) for place in halves.saved],
        "watched": [list(place) for place in halves.watched],
        "written": written,
        "kept": _kept(source, joint),
        "leaves": [names.index(name) for name in source.gradients.inputs],
        "name": source.gradients.name,
    }
