"""Backwards that no plan serves: the recorded operations run again, eagerly.

In: a differentiable graph and what its compiler says about its autograd node. Out: the
`recompute` callable of `_native.Gradient`. Invariant: its gradients are those of the
forward's own inputs and outputs, differentiable again if asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from accel.trace import SegmentGraph

Tensors = list[Any]  # of torch.Tensor or None


def recomputation(
    graph: SegmentGraph, spec: dict[str, Any], on_use: Callable[[str, tuple[str, ...]], None]
) -> Callable[[Tensors | None, Tensors | None, bool | str, Any], Tensors | None]:
    """`recompute(inputs, gradients, create_graph, random_state) -> gradients`; `on_use(why, names)` is told first;
    `names` are the outputs at which gradients arrived, if others than expected.

    Inputs that are gone or changed are None, and there is no answer; without gradients too, the
    third argument says why nothing serves this backward.
    """
    leaves, written = frozenset(spec["leaves"]), frozenset(spec["written"])
    programs: list[Any] = []

    def recompute(
        inputs: Tensors | None,
        gradients: Tensors | None,
        create_graph: bool | str,
        random_state: torch.Tensor | None,
    ) -> Tensors | None:
        if gradients is None:
            on_use(str(create_graph), ())
            return None
        if create_graph:
            on_use("second derivatives", ())
        else:
            arrived = zip(spec["node_outputs"], gradients, strict=True)
            names = tuple(graph.outputs[k] for k, gradient in arrived if gradient is not None)
            on_use(f"gradients of {', '.join(names)}", names)
        if inputs is None:  # the compiled backward does it once more, with zeros
            return None
        if not programs:
            programs.append(graph.to_fx())
        with torch.enable_grad():
            # Aliases: gradients must not flow from one input on to another.
            aliases = [
                (t.view_as(t) if create_graph else t.detach().requires_grad_())
                if i in leaves
                else (t.clone() if i in written else t)
                for i, t in enumerate(inputs)
            ]
            with _drawing_from(random_state), graph.autocasting():
                outputs = programs[0].forward(*aliases)
            pairs = [
                (outputs[k], gradient)
                for k, gradient in zip(spec["node_outputs"], gradients, strict=True)
                if gradient is not None
            ]
            return list(
                torch.autograd.grad(
                    [output for output, _ in pairs],
                    [aliases[i] for i in spec["grads"]],
                    [gradient for _, gradient in pairs],
                    create_graph=bool(create_graph),
                    allow_unused=True,
                )
            )

    return recompute


@contextlib.contextmanager
def _drawing_from(state: torch.Tensor | None) -> Iterator[None]:
    """The numbers of the first run once more; the program's stream goes on where it was."""
    if state is None:
        yield
        return
    present = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(present)
