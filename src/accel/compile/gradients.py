"""Backwards that no plan serves: the recorded operations run again, eagerly.

In: a differentiable graph and what its compiler says about its autograd nodes. Out: the
`recompute` callable of `_native.Gradient`. Invariant: its gradients are those of the
forward's own inputs and outputs, differentiable again if asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from accel.histories import History, histories_behind, history
from accel.trace import SegmentGraph

Tensors = list[Any]  # of torch.Tensor or None


@dataclass(frozen=True)
class Use:
    """Why a backward runs the recorded operations again, or, in `zeros`, the plan with zeros for
    gradients that did not arrive."""

    why: str
    tangents: tuple[str, ...] = ()  # the outputs at which gradients arrive, others than expected
    ends: tuple[str, ...] = ()  # the operations that made inner outputs whose gradient is asked for
    zeros: bool = False


@dataclass(frozen=True)
class _End:
    """An output at which derivatives end: the operation that gave it its history, and the tensor
    that stands for it in what follows."""

    maker: str
    tensor: torch.Tensor


def recomputation(
    graph: SegmentGraph, spec: dict[str, Any], on_use: Callable[[Use], None]
) -> Callable[..., Tensors | None]:
    """`recompute(inputs, gradients, create_graph, random_state, cut) -> gradients`; `on_use` is
    told of each use first."""
    return _Recomputation(graph, spec, on_use).gradients


class _Recomputation:
    def __init__(
        self, graph: SegmentGraph, spec: dict[str, Any], on_use: Callable[[Use], None]
    ) -> None:
        self.graph, self.on_use = graph, on_use
        self.node_outputs = [graph.outputs[k] for k in spec["node_outputs"]]
        self.grads: list[int] = spec["grads"]
        self.leaves, self.written = frozenset(spec["leaves"]), frozenset(spec["written"])
        self.drawing: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        if spec["redraws"]:
            from accel.codegen.random_masks import Redrawing

            self.drawing = Redrawing
        self.program: fx.GraphModule | None = None

    def gradients(
        self,
        inputs: Tensors | None,
        gradients: Tensors | None,
        create_graph: bool | str,
        random_state: torch.Tensor | None,
        cut: list[int] | None,
    ) -> Tensors | None:
        """Those of the node's inputs; before them, with `cut`, those of the node outputs at these
        positions, where the derivatives end.

        Without inputs there is no answer: the plan runs, with zeros for the gradients that are
        None. Without gradients too, the third argument says why nothing serves this backward.
        """
        if gradients is None:
            self.on_use(Use(str(create_graph)))
            return None
        differentiable = bool(create_graph)
        pairs = zip(self.node_outputs, gradients, strict=True)
        arrived = {name: gradient for name, gradient in pairs if gradient is not None}
        if cut is None:
            self.on_use(self._use(arrived, differentiable, zeros=inputs is None))
        if inputs is None:
            return None
        ends: dict[str, _End] = {}
        with torch.enable_grad():
            run = self._run(inputs, differentiable, random_state, ends)
            if cut is not None:
                ends = run.ends([self.node_outputs[k] for k in cut], differentiable)
                makers = tuple(end.maker for end in ends.values())
                self.on_use(
                    Use("the gradient at a result that others are computed from", (), makers)
                )
                run = self._run(inputs, differentiable, random_state, ends)
            outputs = [run.values[name] for name in arrived]
            run.check(outputs)
            wanted = [*(end.tensor for end in ends.values()), *(run.aliases[i] for i in self.grads)]
            return list(
                torch.autograd.grad(
                    outputs,
                    wanted,
                    list(arrived.values()),
                    create_graph=differentiable,
                    allow_unused=True,
                )
            )

    def _use(self, arrived: Collection[str], differentiable: bool, zeros: bool) -> Use:
        if differentiable:
            return Use("second derivatives")
        assert self.graph.gradients is not None
        others = set(self.graph.gradients.tangents).difference(self.node_outputs)
        tangents = (name for name in self.graph.outputs if name in arrived or name in others)
        return Use(f"gradients of {', '.join(arrived)}", tuple(tangents), zeros=zeros)

    def _run(
        self,
        inputs: Tensors,
        differentiable: bool,
        random_state: torch.Tensor | None,
        ends: Mapping[str, _End],
    ) -> _Run:
        if self.program is None:
            self.program = self.graph.to_fx()
        # Aliases: gradients must not flow from one input on to another.
        aliases = [
            (t.view_as(t) if differentiable else t.detach().requires_grad_())
            if i in self.leaves
            else (t.clone() if i in self.written else t)
            for i, t in enumerate(inputs)
        ]
        run = _Run(self.program, self.graph.outputs, aliases, ends)
        with (
            _drawing_from(random_state, self.graph.output_metas[0].device),
            _without_hooks(),
            self.drawing(),
            self.graph.as_recorded(),
        ):
            run.run(*aliases)
        return run


class _Run(fx.Interpreter):  # type: ignore[misc]
    """The operations once more: `values` of the outputs by name, and who gave them their history.
    From the maker of an end on, its tensor stands for the output."""

    def __init__(
        self,
        program: fx.GraphModule,
        outputs: Sequence[str],
        aliases: Tensors,
        ends: Mapping[str, _End],
    ) -> None:
        super().__init__(program)
        self.extra_traceback = False  # an error is the program's own
        self.aliases, self.outputs, self.given = aliases, frozenset(outputs), ends
        self.values: dict[str, Any] = {}
        self.makers: dict[str, tuple[History, str]] = {}
        self.left: set[History] = set()  # where the outputs came from that an end stands for

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.outputs:
            self.values[n.name] = result
        for name, value in self.values.items():
            place = history(value)
            if name not in self.makers or self.makers[name][0] != place:
                self.makers[name] = place, n.name
        for name, end in self.given.items():
            if end.maker == n.name:
                result = self._end(self.values[name], end.tensor, result)
        return result

    def _end(self, value: Any, end: torch.Tensor, result: Any) -> Any:
        self.left.add(history(value))
        for held in (self.env, self.values):
            held.update({key: end for key, other in held.items() if other is value})
        return end if result is value else result

    def ends(self, names: Sequence[str], differentiable: bool) -> dict[str, _End]:
        """For another run."""
        found: dict[str, _End] = {}
        for name in names:
            value = self.values[name]
            tensor = value.view_as(value) if differentiable else value.detach().requires_grad_()
            found[name] = _End(self.makers[name][1], tensor)
        return found

    def check(self, outputs: Sequence[torch.Tensor]) -> None:
        """Errors: RuntimeError when derivatives of `outputs` go past an end, by way of a view."""
        for output in outputs if self.left else ():
            if not self.left.isdisjoint({history(output), *histories_behind(output)}):
                raise RuntimeError(
                    "accel: this backward asks for the gradient at a result of a compiled call that "
                    "others share memory with; call the function once more, it runs eagerly or in "
                    "parts from now on"
                )


@contextlib.contextmanager
def _without_hooks() -> Iterator[None]:
    """Hooks on saved tensors hear nothing: what they were told of this run was saved in the first."""
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


@contextlib.contextmanager
def _drawing_from(state: torch.Tensor | None, device: str) -> Iterator[None]:
    """The numbers of the first run once more; the program's stream goes on where it was."""
    if state is None:
        yield
        return
    on_gpu = device.startswith("cuda")
    present = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    set_state = functools.partial(torch.cuda.set_rng_state, device=device)
    put = set_state if on_gpu else torch.set_rng_state
    put(state)
    try:
        yield
    finally:
        put(present)
