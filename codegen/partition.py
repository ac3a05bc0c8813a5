"""Joint graph -> forward and backward: which values are saved, which computed again.

In: a `Joint`. Out: `Halves`. A minimum cut chooses the values to save, by their size; only
cheap elementwise nodes are computed again. Invariant: of the tensors that the program can
see, only such are saved as eager's backward would read (`visible_reads`), so that writing to
one of the others in between is no more an error than in eager.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from accel.codegen.gpu_random import uniform_operator
from accel.codegen.indices import questions
from accel.codegen.joint import Component, Joint
from accel.codegen.lowering import LOWERINGS, MULTIPLE
from accel.codegen.lowerings_pointwise import COMPARISONS, FORMULAS, LOGICAL
from accel.codegen.lowerings_shapes import FILL_ARGUMENT, FILL_VALUES
from accel.codegen.max_flow import INFINITE, Network
from accel.codegen.options import CompileError
from accel.codegen.random_masks import bernoulli_operator
from accel.codegen.tensor_graph import Node, TensorGraph, View, is_random
from accel.codegen.totality import may_raise

aten = torch.ops.aten

# Computed again in the backward rather than saved, when that is less to save.
_RECOMPUTABLE = frozenset(
    [
        *FORMULAS,
        *COMPARISONS,
        *LOGICAL,
        *FILL_VALUES,
        *FILL_ARGUMENT,
        aten.logical_not.default,
        aten.where.self,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.arange.default,
        aten.arange.start,
        bernoulli_operator(),
        uniform_operator(),
        "copy",
        "write",
    ]
)
# What costs next to nothing to save: the tensor exists anyway, and lives on.
_VISIBLE_WEIGHT = 0.01
# What a call reads or makes lies in memory anyway: of two tensors of one size the one to save.
_MATERIALISED_WEIGHT = 0.99


Place = tuple[str, int]


@dataclass
class Backward:
    """One component's backward: its inputs are `saved`, then the gradients that arrive.

    `saved` holds places: ("input", i) or ("output", k) of the forward.
    """

    graph: TensorGraph
    saved: list[Place]


@dataclass
class Halves:
    """The forward returns `output_count` tensors of the program's, then what only backwards read;
    these are in the order of the joint's components."""

    forward: TensorGraph
    backwards: list[Backward] = field(default_factory=list)


def split(joint: Joint) -> Halves:
    """Errors: CompileError when the backward needs an input's value that the forward
    overwrites."""
    return _Splitter(joint).split()


def visible_reads(joint: Joint) -> list[tuple[Place, int]]:
    """The program's tensors that eager's backward reads, and for which gradients: bit k stands
    for the one that arrives at `node_outputs[k]`."""
    return _Splitter(joint).visible_reads()


def of_component(reads: list[tuple[Place, int]], component: Component) -> list[tuple[Place, int]]:
    """Those that its backward reads; bit k stands for the gradient at `component.outputs[k]`."""
    local = [
        (place, sum(1 << k for k, at in enumerate(component.outputs) if bits >> at & 1))
        for place, bits in reads
    ]
    return [(place, bits) for place, bits in local if bits]


def needed_for(graph: TensorGraph, tangents: list[int]) -> list[list[int]]:
    """By saved tensor that a component's backward takes: at which of `tangents` gradients have to
    arrive for its value to count."""
    count = len(graph.inputs) - len(tangents)
    saved, arriving = graph.inputs[:count], graph.inputs[count:]
    arrived = {b: {k} for b, k in zip(arriving, tangents, strict=True)}
    made_of = {b: {b} for b in saved}  # what is computed before a gradient is met
    found: dict[int, set[int]] = {b: set() for b in saved}
    for node in graph.nodes:
        read = [view.buffer for view in node.views()]
        gradients = set().union(*(arrived.get(b, ()) for b in read))
        sources = set().union(*(made_of.get(b, ()) for b in read))
        results = [r for r in node.results if r is not None]
        if not gradients:
            made_of.update((r, sources) for r in results)
            continue
        arrived.update((r, gradients) for r in results)
        for b in sources:
            found[b] |= gradients
    for view in graph.outputs:
        for b in made_of.get(view.buffer, ()):
            found[b] |= set(tangents)
    return [sorted(found[b]) for b in saved]


class _Splitter:
    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        self.graph = joint.graph
        self.producers = {r: n for n in self.graph.nodes for r in n.results if r is not None}
        self.primals = self.graph.inputs[: joint.input_count]
        self.tangents = self.graph.inputs[joint.input_count :]
        self.user_outputs = self.graph.outputs[: joint.output_count]
        self.gradients = self.graph.outputs[joint.output_count :]
        # In the forward, by whatever computes it there.
        forward = (n for n in self.graph.nodes if id(n) in joint.forward)
        self.answered = frozenset(q for node in forward for q in questions(node))
        self.overwritten = {c.region.buffer for c in self.graph.commits}
        self.states = self._states()
        self.materialised = {
            buffer
            for node in self.graph.nodes
            if id(node) in joint.forward and not isinstance(node.target, str)
            if node.target not in LOWERINGS and node.target not in MULTIPLE
            for buffer in (*(v.buffer for v in node.views()), *node.results)
        }
        # id() of the nodes that depend on a gradient.
        self.dependent: set[int] = set()
        computed = set(self.tangents)
        for node in self.graph.nodes:
            if any(v.buffer in computed for v in node.views()):
                self.dependent.add(id(node))
                computed.update(r for r in node.results if r is not None)

    def _states(self) -> dict[int, int]:
        """Buffers that inputs hold when the call has written them, and which inputs: what eager
        saves of them is the inputs themselves. Their memory has one order, whatever their sizes."""
        inputs = {b: i for i, b in enumerate(self.primals)}
        known = {*inputs, *(v.buffer for v in self.user_outputs)}
        found: dict[int, int] = {}
        for c in self.graph.commits:
            if c.state is None or c.region.buffer not in inputs or c.state.buffer in known:
                continue
            before, now = self.graph.buffers[c.region.buffer], self.graph.buffers[c.state.buffer]
            if before.numel == now.numel == before.view.numel and before.dtype == now.dtype:
                found[c.state.buffer] = inputs[c.region.buffer]
        return found

    def split(self) -> Halves:
        required = self._closure(self._forward_roots(), set())
        if required & self.dependent:
            raise CompileError("the forward depends on a gradient")
        reads = self.visible_reads()
        parts = [(self._backward(reads, *part), part[1]) for part in self._parts()]
        chosen = [graph.inputs[: len(graph.inputs) - len(tangents)] for graph, tangents in parts]
        saved = set().union(*chosen)
        forward_nodes = required | self._closure(saved, set()) | set(map(id, self._checks()))
        forward = self._half(forward_nodes, self.primals)
        halves = Halves(forward)
        forward.outputs = list(self.user_outputs)
        forward.output_identity = self.graph.output_identity[: self.joint.output_count]
        forward.output_severed = self.graph.output_severed[: self.joint.output_count]
        forward.commits = self.graph.commits
        forward.speculations = self.graph.speculations
        places: dict[int, Place] = {}
        for own, (graph, _) in zip(chosen, parts, strict=True):
            for buffer in own:
                if buffer not in places:
                    places[buffer] = self._place_of(buffer, forward)
            halves.backwards.append(Backward(graph, [places[buffer] for buffer in own]))
        return halves

    def _parts(self) -> Iterator[tuple[Component, list[int], slice]]:
        """Each component with its gradients that arrive, and where its results are."""
        tangent, gradient = 0, self.joint.output_count
        for component in self.joint.components:
            tangents = self.tangents[tangent : tangent + len(component.tangents)]
            grads = slice(gradient, gradient + len(component.grads))
            tangent, gradient = tangent + len(tangents), grads.stop
            yield component, tangents, grads

    def _backward(
        self,
        all_reads: list[tuple[Place, int]],
        component: Component,
        tangents: list[int],
        grads: slice,
    ) -> TensorGraph:
        """The component's backward, from what it is given and the gradients.

        A visible tensor counts only for gradients whose backward reads it in eager (`all_reads`), so
        nothing is computed again from it for the others.
        """
        needed = self._closure({v.buffer for v in self.graph.outputs[grads]}, set())
        direct = self._directly_read(needed, self.graph.outputs[grads])
        reads = dict(of_component(all_reads, component))
        visible = {v.buffer: ("output", k) for k, v in enumerate(self.user_outputs)}
        visible |= {b: ("input", i) for i, b in enumerate(self.primals)}
        visible |= {b: ("input", i) for b, i in self.states.items()}
        barred: set[int] = set()
        while True:
            graph = self._from_saved(self._choose(needed, direct, barred), tangents, grads)
            counts = zip(graph.inputs, needed_for(graph, component.tangents), strict=False)
            more = {
                b
                for b, positions in counts
                if b in visible and any(not reads.get(visible[b], 0) >> k & 1 for k in positions)
            }
            if more <= barred:
                return graph
            barred |= more

    def _from_saved(self, saved: set[int], tangents: list[int], grads: slice) -> TensorGraph:
        """A backward: its inputs are what it reads of `saved`, then `tangents`."""
        outputs = self.graph.outputs[grads]
        nodes = self._closure({v.buffer for v in outputs}, saved)
        read = {v.buffer for v in outputs}
        for node in self.graph.nodes:
            if id(node) in nodes:
                read |= {v.buffer for v in node.views()}
        backward = self._half(nodes, sorted(saved & read) + tangents)
        backward.may_speculate = False
        backward.answered = self.answered
        backward.outputs = list(outputs)
        backward.output_identity = self.graph.output_identity[grads]
        backward.output_severed = self.graph.output_severed[grads]
        return backward

    def visible_reads(self) -> list[tuple[Place, int]]:
        read = self._reads()
        places: list[tuple[Place, int]] = [
            (("output", k), v.buffer) for k, v in enumerate(self.user_outputs)
        ]
        places += [(("input", i), b) for i, b in enumerate(self.primals)]
        places += [(("input", i), b) for b, i in self.states.items()]
        aliases = set(self.primals)
        found: dict[Place, int] = {}
        for place, b in places:
            if read.get(b) and not (place[0] == "output" and b in aliases):
                found[place] = found.get(place, 0) | read[b]
        return list(found.items())

    def _reads(self) -> dict[int, int]:
        """By buffer that a backward reads: for which gradients, as bits."""
        needed = self._closure({v.buffer for v in self.gradients}, set())
        # By buffer: the set of gradients that it depends on, as bits.
        positions = [c.outputs[k] for c in self.joint.components for k in c.tangents]
        arrives = {b: 1 << k for b, k in zip(self.tangents, positions, strict=True)}
        read: dict[int, int] = {}
        for node in self.graph.nodes:
            if id(node) not in needed or id(node) not in self.dependent:
                continue
            bits = 0
            for view in node.views():
                bits |= arrives.get(view.buffer, 0)
            for view in node.views():
                read[view.buffer] = read.get(view.buffer, 0) | bits
            arrives.update((r, bits) for r in node.results if r is not None)
        return read

    def _forward_roots(self) -> set[int]:
        roots = {v.buffer for v in self.user_outputs}
        roots |= {c.value.buffer for c in self.graph.commits}
        roots |= {v.buffer for v, _ in self.graph.speculations}
        for node in self.graph.nodes:  # draws random numbers: once, in the forward
            if id(node) in self.joint.forward and is_random(node):
                roots.update(r for r in node.results if r is not None)
        for node in self._checks():
            roots.update(view.buffer for view in node.views())
        return roots

    def _checks(self) -> list[Node]:
        """Nodes of the forward that raise, or have another effect."""
        forward = (n for n in self.graph.nodes if id(n) in self.joint.forward)
        return [n for n in forward if not n.results or may_raise(n)]

    def _closure(self, buffers: set[int], known: set[int]) -> set[int]:
        """id() of the nodes that compute `buffers` from inputs and `known` ones."""
        found: set[int] = set()
        open_ = [b for b in buffers if b not in known]
        seen = set(open_)
        while open_:
            node = self.producers.get(open_.pop())
            if node is None or id(node) in found:
                continue
            found.add(id(node))
            for view in node.views():
                if view.buffer not in seen and view.buffer not in known:
                    seen.add(view.buffer)
                    open_.append(view.buffer)
        return found

    def _directly_read(self, needed: set[int], results: list[View]) -> set[int]:
        """Buffers that exist before the backward and that a dependent node reads."""
        read = {v.buffer for v in results}
        for node in self.graph.nodes:
            if id(node) in needed and id(node) in self.dependent:
                read |= {v.buffer for v in node.views()}
        dependent = {r for n in self.graph.nodes if id(n) in self.dependent for r in n.results}
        return {
            b
            for b in read
            if b not in dependent and b not in self.tangents and not self._is_constant(b)
        }

    def _is_constant(self, buffer: int) -> bool:
        return self.graph.buffers[buffer].constant is not None

    # ------------------------------------------------------------ the cut

    def _choose(self, needed: set[int], direct: set[int], barred: set[int]) -> set[int]:
        """`barred`: buffers from which nothing is computed again."""
        network = Network()
        visible = {v.buffer for v in self.user_outputs} | {*self.primals, *self.states}
        for node in self.graph.nodes:
            if id(node) not in needed or id(node) in self.dependent:
                continue
            again = node.target in _RECOMPUTABLE and not is_random(node)
            for result in node.results:
                if result is None:
                    continue
                network.add((result, "in"), (result, "out"), self._cost(result, visible, direct))
                if not again:
                    network.add("source", (result, "in"), INFINITE)
                for view in node.views():
                    if view.buffer in barred:
                        network.add("source", (result, "in"), INFINITE)
                    elif not self._is_constant(view.buffer):
                        network.add((view.buffer, "out"), (result, "in"), INFINITE)
        for buffer in self.primals:
            cost = self._cost(buffer, visible, direct)
            network.add("source", (buffer, "in"), INFINITE)
            network.add((buffer, "in"), (buffer, "out"), cost)
        for buffer in direct:
            network.add((buffer, "out"), "sink", INFINITE)
        value, reachable = network.minimum_cut("source", "sink")
        if value >= INFINITE:
            raise CompileError("the backward needs a value that the forward overwrites")
        return {
            b
            for b in self.producers.keys() | set(self.primals)
            if (b, "in") in reachable and (b, "out") not in reachable
        }

    def _cost(self, buffer: int, visible: set[int], direct: set[int]) -> float:
        b = self.graph.buffers[buffer]
        size = 64.0 + float(b.numel * getattr(torch, b.dtype).itemsize)
        if buffer not in visible:
            return size * (_MATERIALISED_WEIGHT if buffer in self.materialised else 1.0)
        if buffer in self.overwritten or buffer not in direct:
            return INFINITE
        return size * _VISIBLE_WEIGHT

    # ------------------------------------------------------------ the halves

    def _half(self, nodes: set[int], inputs: list[int]) -> TensorGraph:
        index = {b: i for i, b in enumerate(inputs)}
        buffers = [replace(b, input=index.get(b.id)) for b in self.graph.buffers]
        kept = [replace(n) for n in self.graph.nodes if id(n) in nodes]
        identity = [-1 - b for b in inputs]
        if inputs is self.primals:
            identity = self.graph.input_identity[: self.joint.input_count]
        else:
            known = dict(zip(self.graph.inputs, self.graph.input_identity, strict=True))
            identity = [known.get(b, -1 - b) for b in inputs]
        device = self.graph.device
        return TensorGraph(buffers, kept, list(inputs), input_identity=identity, device=device)

    def _place_of(self, buffer: int, forward: TensorGraph) -> Place:
        """Where the program's side finds a saved value; adds it to the forward's outputs."""
        if buffer in self.primals:
            return ("input", self.primals.index(buffer))
        if buffer in self.states:
            return ("input", self.states[buffer])
        whole: View = self.graph.buffers[buffer].view
        for k, view in enumerate(self.user_outputs):
            if view == whole:
                return ("output", k)
        forward.outputs.append(whole)
        forward.output_identity.append(-1 - buffer)
        forward.output_severed.append(None)
        return ("output", len(forward.outputs) - 1)
