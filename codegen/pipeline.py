"""The compiler as one list of passes: recorded graph -> plan and library.

In: a `SegmentGraph`. Out: the plan of docs/architecture.md and at most one shared library.
Invariant: every pass's result is dumped under the pass's name, and verified when asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accel.codegen.build import vector_bytes
from accel.codegen.emit_cpp import emit_epilogue, reads_symbols
from accel.codegen.forwarding import forward_writes
from accel.codegen.fusion import Group, Step, fuse, new_group
from accel.codegen.layouts import choose_layouts
from accel.codegen.loop_ir import ITEM_BYTES
from accel.codegen.lowering import lower_graph, templates_run
from accel.codegen.options import CodegenOptions
from accel.codegen.plan import KernelUse, Planner
from accel.codegen.products import store_results
from accel.codegen.program import LoopNode, Program, TemplateNode, reads
from accel.codegen.schedule import Scheduled, lanes_for, schedule_epilogue, spilled
from accel.codegen.simplify import eliminate_common, eliminate_dead
from accel.codegen.symbols import hint
from accel.codegen.targets import Target, target_of
from accel.codegen.tensor_graph import TensorGraph
from accel.codegen.tracing import trace_graph
from accel.codegen.verifier import verify
from accel.trace import SegmentGraph

# An output of this size has left the caches before anybody reads it.
_STREAM_BYTES = 8 << 20


@dataclass
class Compilation:
    """What the passes hand on; every pass fills in its part."""

    source: SegmentGraph
    options: CodegenOptions
    out_dir: Path
    graph: TensorGraph = field(default_factory=TensorGraph)
    program: Program | None = None
    steps: list[Step] = field(default_factory=list)
    commit: list[Step] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)
    scheduled: dict[int, Scheduled] = field(default_factory=dict)  # by id(step)
    texts: dict[str, str] = field(default_factory=dict)  # text -> symbol
    kernels: dict[int, KernelUse] = field(default_factory=dict)  # by id(step)
    plan: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        return target_of(self.graph.device)


def trace_(c: Compilation) -> str:
    c.graph = trace_graph(c.source, c.options)
    return c.graph.dump()


def simplify_(c: Compilation) -> str:
    eliminate_common(c.graph)
    forward_writes(c.graph)
    eliminate_dead(c.graph)
    return c.graph.dump()


def layout_(c: Compilation) -> str:
    if templates_run(c.options, c.target):
        choose_layouts(c.graph)
    return c.graph.dump()


def lower_(c: Compilation) -> str:
    c.program = lower_graph(c.graph, c.options, c.target, c.out_dir)
    return "\n".join(_show_step(s) for s in [*c.program.steps, *c.program.commit_steps]) + "\n"


def fuse_(c: Compilation) -> str:
    assert c.program is not None
    if c.options.fuse:
        c.steps = fuse(c.program, c.program.steps)
    else:
        c.steps = [_alone(s) for s in c.program.steps]
    c.commit = [_alone(s) for s in c.program.commit_steps]
    kept = {v.buffer for v in c.graph.roots()}
    for step in c.commit:
        kept |= step.reads() if isinstance(step, Group) else reads(step)
    if c.options.fuse:
        c.steps = c.target.join(c.program, c.steps, kept, c.options, c.out_dir)
    c.stored = stored_buffers(c)
    return "\n".join(_show_group(s, c.stored) for s in [*c.steps, *c.commit]) + "\n"


def schedule_(c: Compilation) -> str:
    assert c.program is not None
    groups = [s for s in [*c.steps, *c.commit] if isinstance(s, Group)]
    for i, group in enumerate(groups):
        result = c.target.schedule(group, c.program.sizes, c.stored, f"g{i}")
        for k, buffer in enumerate(result.buffers):
            if c.graph.buffers[buffer].host:
                result.kernel.params[k] = replace(result.kernel.params[k], host=True)
        result.kernel.streamed = _streamed(c, result)
        if c.options.verify:
            for kernel in result.kernels():
                verify(kernel)
        c.scheduled[id(group)] = result
    for step in c.steps:
        if isinstance(step, TemplateNode) and step.epilogue is not None:
            result = schedule_epilogue(
                step.epilogue, c.program.sizes, c.stored, step.out, vector_bytes()
            )
            if c.options.verify:
                verify(result.kernel)
            c.scheduled[id(step)] = result
    return "\n".join(repr(k) for s in c.scheduled.values() for k in s.kernels()) + "\n"


def _streamed(c: Compilation, scheduled: Scheduled) -> frozenset[int]:
    """The parameters that are big outputs which no step reads again."""
    outputs = {v.buffer for v in c.graph.outputs}
    again: set[int] = set()
    for step in [*c.steps, *c.commit]:
        again |= step.reads() if isinstance(step, Group) else reads(step)
    found = set()
    for i, (buffer, param) in enumerate(
        zip(scheduled.buffers, scheduled.kernel.params, strict=True)
    ):
        big = hint(c.graph.buffers[buffer].numel) * ITEM_BYTES[param.dtype] >= _STREAM_BYTES
        fresh = c.graph.buffers[buffer].input is None
        if param.written and big and fresh and buffer in outputs - again:
            found.add(i)
    return frozenset(found)


def emit_(c: Compilation) -> str:
    """Equal kernels share one function."""
    for step in [*c.steps, *c.commit]:
        if isinstance(step, Group):
            scheduled = c.scheduled[id(step)]
            text, launch = c.target.emit(step, scheduled)
            buffers, parallel = scheduled.buffers, scheduled.kernel.parallel
        elif isinstance(step, TemplateNode):
            text, buffers, parallel, launch = _template_text(c, step), [], step.parallel, None
            if step.epilogue is not None:
                buffers = c.scheduled[id(step)].buffers
        else:
            continue
        symbol = c.texts.setdefault(text, f"k{len(c.texts)}")
        takes_symbols = launch is None and reads_symbols(text)
        c.kernels[id(step)] = KernelUse(symbol, buffers, parallel, takes_symbols, launch)
    return "\n".join(text.replace("@", symbol) for text, symbol in c.texts.items())


def _template_text(c: Compilation, step: TemplateNode) -> str:
    if not step.columns:
        return step.text
    first = len(step.operands)
    if step.epilogue is None:
        return store_results(first, step.columns) + step.text
    kernel = c.scheduled[id(step)].kernel
    lanes = lanes_for(step.epilogue, vector_bytes())
    return emit_epilogue(kernel, lanes, first, step.columns, step.pieces) + step.text


def plan_(c: Compilation) -> str:
    import json

    assert c.program is not None
    c.plan = Planner(c.program, c.steps, c.commit, c.stored).plan(c.kernels)
    return json.dumps(c.plan, indent=1) + "\n"


def build_(c: Compilation) -> str:
    if c.texts:
        c.plan |= c.target.build(c.texts, c.out_dir, c.options)
    return f"{c.plan['library']}\n"


PASSES = (
    ("trace", trace_),
    ("simplify", simplify_),
    ("layout", layout_),
    ("lower", lower_),
    ("fuse", fuse_),
    ("schedule", schedule_),
    ("emit", emit_),
    ("plan", plan_),
    ("build", build_),
)


def compile_graph(
    graph: SegmentGraph, *, out_dir: Path, options: CodegenOptions | None = None
) -> dict[str, Any]:
    """Compiles `graph`: the plan as data; its library lies in `out_dir`.

    Errors: CompileError with the reason; nothing is left behind then.
    """
    if graph.gradients is not None:
        from accel.codegen.training import compile_training

        return compile_training(graph, Path(out_dir), options or CodegenOptions())
    return run_passes(graph, Path(out_dir), options or CodegenOptions()).plan


def run_passes(graph: SegmentGraph, out_dir: Path, options: CodegenOptions) -> Compilation:
    c = Compilation(graph, options, out_dir)
    run(c, PASSES)
    return c


# What `accel bench kernel` reads from a dump.
_REPLAYED = {"emit": "kernels.cpp", "plan": "plan.json"}


def run(c: Compilation, passes: Sequence[tuple[str, Callable[[Compilation], str]]]) -> None:
    for number, (name, function) in enumerate(passes):
        text = function(c)
        if c.options.dump_dir is not None:
            c.options.dump_dir.mkdir(parents=True, exist_ok=True)
            (c.options.dump_dir / f"{number:02}_{name}.txt").write_text(text)
            if name in _REPLAYED:
                (c.options.dump_dir / _REPLAYED[name]).write_text(text)


def _alone(step: Any) -> Step:
    """A loop node as a group of its own."""
    if not isinstance(step, LoopNode):
        return step  # type: ignore[no-any-return]
    return new_group(step)


def stored_buffers(c: Compilation) -> set[int]:
    """Buffers that somebody outside the kernel that writes them reads, and inputs."""
    assert c.program is not None
    stored = set(c.graph.inputs) | {v.buffer for v in c.graph.roots()}
    stored |= {commit.region.buffer for commit in c.graph.commits}
    steps = [*c.steps, *c.commit]
    for step in steps:
        if isinstance(step, Group):
            stored |= _visible(step)
        elif isinstance(step, TemplateNode):
            stored |= {v.buffer for v in step.operands}
            stored |= {step.out} if step.epilogue is None else _visible(step.epilogue) - {step.out}
        else:
            stored |= reads(step) | _extern_writes(step)
    for step in steps:
        if isinstance(step, Group):
            stored |= spilled(step, c.program.sizes, stored, c.target.longest_row)
    return stored


def _visible(group: Group) -> set[int]:
    """What the group reads from memory, and what it cannot keep in its own values."""
    single = {b for b in group.writes() if group.writer(b) is not None}
    return (group.reads() | group.writes()) - single


def _extern_writes(step: Any) -> set[int]:
    return {r for r in [*step.results, step.out] if r is not None}


def _show_step(step: Any) -> str:
    if isinstance(step, LoopNode):
        kind = f"{step.kind} over {step.reduced}: " if step.kind else ""
        kind = f"{step.scan} along {step.scanned}: " if step.scan else kind
        return (
            f"{step.name}: b{step.buffer}[{step.address.show()}] = {kind}{step.expr}"
            f"  {step.dims} {step.dtype}{' region' if step.region else ''}"
        )
    return str(step)


def _show_group(step: Any, stored: set[int]) -> str:
    if not isinstance(step, Group):
        return _show_step(step)
    kept = sorted(step.writes() & stored)
    head = f"{step.show()} stores={kept}"
    return "\n".join([head, *("  " + _show_step(n) for n in step.nodes)])
