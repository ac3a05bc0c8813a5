"""Differentiable graph -> joint tensor graph: the forward's nodes, then the backward's.

In: a `SegmentGraph` with `gradients`. Out: a `Joint`. The forward runs on fake tensors that
require grad, above the tracer that writes ATen down; then autograd itself runs backward, so
the formulas are eager's own. Invariant: what the forward returns, writes and speculates on
is what it would be without gradients.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from accel.casts import Casts
from accel.codegen.options import CodegenOptions, CompileError
from accel.codegen.tensor_graph import TensorGraph, contiguous_strides, span
from accel.codegen.tracing import Tracer
from accel.histories import (
    components_of,
    freed_with,
    gradient_place,
    histories_behind,
    history,
    inner_of,
)
from accel.trace import Gradients, SegmentGraph, TensorMeta


@dataclass
class Component:
    """Node outputs whose backwards have nodes in common. Its backward is one plan; what it saves
    is freed together."""

    outputs: list[int]  # positions in the joint's node_outputs
    inner: list[list[int]]  # by output: positions in `outputs` of those it was computed from
    freed_with: list[list[int]]  # by output: those whose backward frees what its own needs
    tangents: list[int] = field(default_factory=list)  # positions in `outputs`
    # The inputs that get a gradient, in the order in which eager's backward comes to them.
    grads: list[int] = field(default_factory=list)
    reach: list[list[int]] = field(default_factory=list)  # by input of `grads`: what leads to it


@dataclass
class Joint:
    """Both halves in one graph.

    The graph's inputs are the segment's, then for each component one gradient for each of its
    `tangents`; its outputs are the segment's, then one gradient for each of their `grads`.
    """

    graph: TensorGraph
    input_count: int
    output_count: int
    forward: set[int] = field(default_factory=set)  # id() of the forward's nodes
    node_outputs: list[int] = field(default_factory=list)  # outputs whose history is a node
    detached: list[int] = field(default_factory=list)  # aliases of inputs, without history
    components: list[Component] = field(default_factory=list)


def trace_joint(graph: SegmentGraph, options: CodegenOptions) -> Joint:
    """The joint graph. Errors: CompileError, as `tracing.trace_graph`; also when outputs that
    carry gradients share memory, or autograd refuses the backward."""
    assert graph.gradients is not None
    return _JointTracer(graph, graph.gradients, options).trace()


class _JointTracer(Tracer):
    def __init__(self, graph: SegmentGraph, gradients: Gradients, options: CodegenOptions) -> None:
        super().__init__(graph, options)
        self.gradients = gradients
        self.joint = Joint(self.graph, len(graph.inputs), len(graph.outputs))

    def trace(self) -> Joint:
        values: dict[str, Any] = {}
        with self.fake_mode:
            for index, (name, meta) in enumerate(self.source.inputs):
                fake = self._input(index, meta)
                if name in self.gradients.inputs:
                    fake = fake.detach().requires_grad_()  # no view: a leaf, as eager's are
                    self.alive.append(fake)
                values[name] = fake
                self.graph.input_identity.append(id(fake))
        with torch.enable_grad(), self.source.as_recorded() as casts, self.fake_mode, self:
            self._run_operations(values, casts)
        with torch.no_grad():
            self._finish(values)
        self.joint.forward = {id(node) for node in self.graph.nodes}
        self._sort_outputs(values)
        self._backward(values)
        self._sever_outputs(values)
        severed = self.graph.output_severed
        self.joint.detached = [k for k in self.joint.detached if severed[k] is None]
        return self.joint

    def _run_operations(self, values: dict[str, Any], casts: Casts) -> None:
        for o in self.source.operations:
            casts.before(o.name)
            records = o.name not in self.gradients.no_grad
            with torch.set_grad_enabled(records), _plain_rnn(o.target):
                values[o.name] = self._run_operation(o, values)

    def _sort_outputs(self, values: dict[str, Any]) -> None:
        """What each output is to autograd: of the node, an alias of an input, or nothing."""
        owners: dict[int, list[str]] = defaultdict(list)
        sources = {id(values[name]) for name, _ in self.source.inputs}
        for index, name in enumerate(self.source.outputs):
            value = values[name]
            wanted = name in self.gradients.outputs
            if value.requires_grad != wanted:
                raise CompileError(f"output {name} requires grad only in one of eager and trace")
            buffer = self.graph.outputs[index].buffer
            if self.graph.buffers[buffer].input is None:
                owners[buffer].append(name)
                if wanted:
                    self.joint.node_outputs.append(index)
            elif id(value) not in sources and not wanted:
                self.joint.detached.append(index)
            elif wanted and self.source.inputs[_input_of(self.graph, buffer)][0] not in (
                self.gradients.inputs
            ):
                raise CompileError(f"aliasing: output {name} is an input that got a history")
        for names in owners.values():
            if len(names) > 1 and any(n in self.gradients.outputs for n in names):
                # Autograd has to know one as the other's view, which only Python can make.
                view = next((n for n in names if values[n]._base is not None), names[-1])
                with self._blaming(self._maker(view)):
                    raise CompileError(f"aliasing: outputs {names} share memory and require grad")

    def _backward(self, values: dict[str, Any]) -> None:
        tensors = [values[self.source.outputs[i]] for i in self.joint.node_outputs]
        buffers = {k: s.buffer for k, s in self.storages.items() if s.input is not None}
        for outputs in components_of(tensors):
            members = [tensors[k] for k in outputs]
            component = Component(outputs, inner_of(members), freed_with(members))
            self._differentiate(component, members, values)
            self.joint.components.append(component)
        if any(self.storages[k].buffer != buffer for k, buffer in buffers.items()):
            raise CompileError("the backward writes an input")

    def _differentiate(
        self, component: Component, members: list[Any], values: dict[str, Any]
    ) -> None:
        names = [self.source.outputs[self.joint.node_outputs[k]] for k in component.outputs]
        expected = [k for k, name in enumerate(names) if name in self.gradients.tangents]
        component.tangents = expected or list(range(len(names)))
        tangents = [self._tangent(members[k]) for k in component.tangents]
        inputs = [
            (i, name)
            for i, (name, _) in enumerate(self.source.inputs)
            if name in self.gradients.inputs
        ]
        self.location, self.origin = "backward", ""
        visited: list[int] = []
        handles = [
            values[name].register_hook(functools.partial(_visit, visited, i)) for i, name in inputs
        ]
        with self.fake_mode, self:
            try:
                grads = torch.autograd.grad(
                    [members[k] for k in component.tangents],
                    [values[name] for _, name in inputs],
                    tangents,
                    allow_unused=True,
                )
            except RuntimeError as error:
                text = (str(error).splitlines() or [""])[0]
                raise CompileError(f"autograd refuses the backward: {text}") from error
        for handle in handles:
            handle.remove()
        found = dict(zip(inputs, grads, strict=True))
        behind = [histories_behind(member) | {history(member)} for member in members]
        for (index, name), grad in sorted(
            found.items(), key=lambda item: _rank(visited, item[0][0])
        ):
            if grad is not None:
                component.grads.append(index)
                leaf = gradient_place(values[name])
                component.reach.append([k for k, places in enumerate(behind) if leaf in places])
                self._add_gradient(name, grad)

    def _tangent(self, output: Any) -> FakeTensor:
        sizes, strides = tuple(output.shape), tuple(output.stride())
        if span(sizes, strides) != output.numel():
            strides = contiguous_strides(sizes)
        dtype = str(output.dtype).removeprefix("torch.")
        meta = TensorMeta(sizes, strides, dtype, str(output.device))
        with self.fake_mode, torch.no_grad():
            fake = self._input(len(self.graph.inputs), meta)
        self.graph.input_identity.append(id(fake))
        return fake

    def _add_gradient(self, name: str, grad: Any) -> None:
        if grad.layout != torch.strided:
            raise CompileError(f"the gradient of {name} has layout {grad.layout}")
        self.graph.outputs.append(self.view_of(grad))
        self.graph.output_identity.append(id(grad))
        self.graph.output_severed.append(None)
        self.alive.append(grad)


def _visit(visited: list[int], index: int, _gradient: Any) -> None:
    visited.append(index)


def _rank(visited: list[int], index: int) -> int:
    """When the backward came to this input."""
    return visited.index(index) if index in visited else len(visited)


@contextlib.contextmanager
def _plain_rnn(target: str) -> Iterator[None]:
    """oneDNN's LSTM keeps a workspace for its backward whose size no fake tensor has; without it
    torch makes an LSTM of plain operations."""
    if target.rpartition(".")[2] != "lstm":
        yield
        return
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)


def _input_of(graph: TensorGraph, buffer: int) -> int:
    index = graph.buffers[buffer].input
    assert index is not None
    return index
