"""Backends: who turns a graph into a callable, besides our own worker.

In: a name or `(gm, example_inputs) -> callable`, and a graph. Out: a function of a list of
tensors that answers a list of outputs, or None when a speculation failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accel.errors import UnknownBackendError
from accel.trace import SegmentGraph

OWN = ("native", "eager")


def check_name(name: str) -> None:
    """Errors: UnknownBackendError, naming those that exist."""
    if name in OWN:
        return
    from torch._dynamo.backends.registry import list_backends

    known = list_backends(exclude_tags=None)
    if name not in known:
        raise UnknownBackendError(
            f"no backend is called {name!r}; there are {', '.join([*OWN, *sorted(known)])}"
        )


def lookup(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(backend):
        return backend
    if backend == "eager":
        return lambda gm, _inputs: gm
    check_name(backend)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(backend)  # type: ignore[no-any-return]


def compile_with(backend: str | Callable[..., Any], graph: SegmentGraph) -> Callable[..., Any]:
    """Runs a backend on `graph` with example inputs of the recorded kind."""
    gm = graph.to_fx()
    examples = [
        torch.empty_strided(m.sizes, m.strides, dtype=m.torch_dtype, device=m.device).zero_()
        for _, m in graph.inputs
    ]
    compiled = lookup(backend)(gm, examples)
    count = len(graph.outputs)
    expected = [truth for _, truth in graph.speculations]
    writes = any(o.may_write for o in graph.operations)
    if isinstance(compiled, torch.fx.GraphModule):
        compiled = compiled.forward  # GraphModule.__call__ prints an error before it raises

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor] | None:
        if expected and writes:
            return None  # what this backend wrote could not be taken back: the call is eager
        with torch.no_grad():  # as recorded, whatever the caller's mode
            outputs = compiled(*inputs)
        if not all(bool(v) is e for v, e in zip(outputs[count:], expected, strict=True)):
            return None
        return list(outputs[:count])

    return run
