"""Differentiable graphs: plans for forward and backwards, over one library.

In: a `SegmentGraph` with `gradients`. Out: the forward's plan, with those of backwards and what
autograd nodes have to know under "gradients" (docs/architecture.md). Invariant: as for
`pipeline.compile_graph`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from accel.codegen import pipeline
from accel.codegen.joint import Component, Joint, trace_joint
from accel.codegen.options import CodegenOptions, CompileError
from accel.codegen.partition import (
    Backward,
    Place,
    needed_for,
    of_component,
    split,
    visible_reads,
)
from accel.codegen.simplify import eliminate_common, eliminate_dead
from accel.codegen.tensor_graph import TensorGraph
from accel.errors import ONLY_VIEWS
from accel.trace import SegmentGraph

_HELD_BYTES = 1 << 24
_MAX_NODE_OUTPUTS = 62  # bits of a set


def compile_training(
    source: SegmentGraph, out_dir: Path, options: CodegenOptions
) -> dict[str, Any]:
    """Errors: CompileError with the reason."""
    assert source.gradients is not None
    everywhere = replace(source.gradients, tangents=source.gradients.outputs)
    whole = joint = _joint(replace(source, gradients=everywhere), options)
    if not whole.node_outputs:
        raise CompileError(ONLY_VIEWS)
    most = max(len(component.outputs) for component in whole.components)
    if most > _MAX_NODE_OUTPUTS:
        raise CompileError(f"{most} outputs carry gradients")
    if source.gradients != everywhere:
        joint = _joint(source, options)
    reads = visible_reads(whole)
    halves = split(joint)
    texts: dict[str, str] = {}
    forward = _half("forward", source, halves.forward, out_dir, options, texts)
    plans, gradients = [forward.plan], []
    for c, backward in enumerate(halves.backwards):
        half = _half(f"backward{c or ''}", source, backward.graph, out_dir, options, texts)
        plans.append(half.plan)
        gradients.append(
            {
                "plan": half.plan,
                # Masks that nobody reads are drawn, too: what comes after them depends on it.
                "redraws": options.fast_dropout
                and source.is_random
                and joint.graph.device == "cpu",
                **_facts(source, whole, c),
                **_saving(whole.components[c], joint.components[c], backward, reads),
            }
        )
    if texts:
        built = forward.target.build(texts, out_dir, options)
        for plan in plans:
            plan |= built
    forward.plan["gradients"] = gradients
    return forward.plan


def _joint(source: SegmentGraph, options: CodegenOptions) -> Joint:
    joint = trace_joint(source, options)
    eliminate_common(joint.graph)
    eliminate_dead(joint.graph)
    return joint


def _half(
    name: str,
    source: SegmentGraph,
    graph: TensorGraph,
    out_dir: Path,
    options: CodegenOptions,
    texts: dict[str, str],
) -> pipeline.Compilation:
    if options.dump_dir is not None:
        options = replace(options, dump_dir=options.dump_dir / name)
    c = pipeline.Compilation(source, options, out_dir, graph, texts=texts)
    pipeline.run(c, [p for p in pipeline.PASSES if p[0] not in ("trace", "build")])
    return c


def _kept(source: SegmentGraph) -> list[int]:
    """The inputs that a node holds so that its forward can be run again: for second derivatives,
    for gradients at some outputs only. Eager would not hold them all, so not very big ones."""
    sizes = [math.prod(meta.sizes) * meta.torch_dtype.itemsize for _, meta in source.inputs]
    return [i for i, size in enumerate(sizes) if size <= _HELD_BYTES]


def _buffers_behind(whole: Joint, buffer: int) -> set[int]:
    """The buffers that `buffer` is computed from, and itself."""
    makers = {result: node for node in whole.graph.nodes for result in node.results}
    seen: set[int] = set()
    todo = [buffer]
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if whole.graph.buffers[at].input is None and at in makers:
            todo += [view.buffer for view in makers[at].views()]
    return seen


def _facts(source: SegmentGraph, whole: Joint, number: int) -> dict[str, Any]:
    """What autograd sees of a component, wherever gradients arrive."""
    assert source.gradients is not None
    component = whole.components[number]
    node_outputs = [whole.node_outputs[k] for k in component.outputs]
    names = [name for name, _ in source.inputs]
    nodes = dict(zip(source.gradients.outputs, source.gradients.nodes, strict=True))
    commits = whole.graph.commits
    positions = (whole.graph.buffers[c.region.buffer].input for c in commits)
    written = sorted({position for position in positions if position is not None})
    behind = [_buffers_behind(whole, whole.graph.outputs[k].buffer) for k in node_outputs]
    inputs_of = [{whole.graph.buffers[at].input for at in buffers} for buffers in behind]
    reached = [inputs - {None} for inputs in inputs_of]
    return {
        "outputs": whole.output_count,
        "node_outputs": node_outputs,
        "names": [nodes[source.outputs[k]] for k in node_outputs],
        "detached": whole.detached if number == 0 else [],
        "grads": component.grads,
        "written": written,
        "needs": [
            [k for k, inputs in enumerate(reached) if i in inputs] for i in range(len(names))
        ],
        "stale": [i for i in written if any(i in inputs for inputs in reached)],
        "reach": component.reach,
        "inner": component.inner,
        "freed_with": component.freed_with,
        "kept": _kept(source),
        "leaves": [names.index(name) for name in source.gradients.inputs],
    }


def _saving(
    whole: Component,
    joint: Component,
    backward: Backward,
    reads: list[tuple[Place, int]],
) -> dict[str, Any]:
    """What this backward takes and gives, and whose versions any backward checks."""
    places = {place: k for k, place in enumerate(backward.saved)}
    return {
        "tangents": joint.tangents,
        "results": [joint.grads.index(i) if i in joint.grads else -1 for i in whole.grads],
        "saved": [list(place) for place in backward.saved],
        "needed_for": needed_for(backward.graph, joint.tangents),
        "watched": [
            [*place, bits, places.get(place, -1)] for place, bits in of_component(reads, whole)
        ],
    }
