"""Backends: who turns a graph into a callable, besides our own worker.

In: a name or `(gm, example_inputs) -> callable`, and a graph. Out: a function of a list of
tensors that answers a list of outputs, or None when a speculation failed. Invariant: when it
answers None or raises, no input has changed, and no random number was drawn.
"""

from __future__ import annotations

import contextlib
import mmap
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from accel.casts import autocast_kept
from accel.compile.writes import written_inputs
from accel.errors import CompileError, UnknownBackendError
from accel.trace import SegmentGraph, TensorMeta

Backend = Callable[..., Any]
Runner = Callable[[list[torch.Tensor]], "list[torch.Tensor] | None"]

# The names that torch's registry does not know.
OWN = ("native", "eager")
_MAPPED_ELEMENTS = 1 << 16  # of an example tensor that is mapped and not filled


def check_name(name: str) -> None:
    """Errors: UnknownBackendError, naming the nearest of those that exist."""
    if name in OWN:
        return
    import difflib

    from torch._dynamo.backends.registry import list_backends

    known = [*OWN, *sorted(list_backends(exclude_tags=None))]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownBackendError(
            f"no backend is called {name!r}; {hint}there are {', '.join(known)}"
        )


def lookup(backend: str | Backend) -> Backend:
    """Errors: UnknownBackendError."""
    if callable(backend):
        return backend
    if backend == "eager":
        return lambda gm, _inputs: gm.forward
    check_name(backend)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(backend)  # type: ignore[no-any-return]


def compile_with(backend: str | Backend, graph: SegmentGraph) -> Runner:
    """Runs a backend on `graph` with example inputs of the recorded kind.

    Errors: whatever the backend raises; CompileError when it returns no callable.
    """
    gm = graph.to_fx()
    written = written_inputs(graph, gm)
    differentiable = graph.gradients is not None
    with _undisturbed(), torch.set_grad_enabled(differentiable), graph.as_recorded():
        compiled = lookup(backend)(gm, _examples(graph))
    if not callable(compiled):
        raise CompileError(f"the backend returned a {type(compiled).__name__}, not a callable")
    count = len(graph.outputs)
    expected = [truth for _, truth in graph.speculations]
    total = count + len(expected)

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor] | None:
        saved = [(inputs[i], inputs[i].clone()) for i in written]
        stream = torch.get_rng_state() if graph.is_random else None
        # As recorded, whatever mode this call comes from.
        with torch.set_grad_enabled(differentiable):
            try:
                with autocast_kept():
                    outputs = compiled(*inputs)
                if len(outputs) != total:
                    raise CompileError(f"the backend gave {len(outputs)} outputs, not {total}")
                held = all(bool(v) is e for v, e in zip(outputs[count:], expected, strict=True))
            except BaseException:
                _restore(saved, stream)
                raise
            if not held:
                _restore(saved, stream)
                return None
        return list(outputs[:count])

    return run


def _restore(saved: list[tuple[torch.Tensor, torch.Tensor]], stream: torch.Tensor | None) -> None:
    """As before the run, which Python does again."""
    if stream is not None:
        torch.set_rng_state(stream)
    with torch.no_grad():
        for tensor, copy in saved:
            tensor.copy_(copy)


def _examples(graph: SegmentGraph) -> list[torch.Tensor]:
    differentiable = graph.gradients.inputs if graph.gradients is not None else ()
    return [_zeros(m).requires_grad_(name in differentiable) for name, m in graph.inputs]


def _zeros(meta: TensorMeta) -> torch.Tensor:
    """Zeros that take memory only where somebody looks: examples are as large as the model."""
    elements = 1 + sum((n - 1) * s for n, s in zip(meta.sizes, meta.strides, strict=True))
    if meta.device != "cpu" or 0 in meta.sizes or elements < _MAPPED_ELEMENTS:
        return torch.empty_strided(
            meta.sizes, meta.strides, dtype=meta.torch_dtype, device=meta.device
        ).zero_()
    pages = mmap.mmap(-1, elements * meta.torch_dtype.itemsize)
    storage = torch.frombuffer(pages, dtype=meta.torch_dtype).untyped_storage()
    return torch.empty(0, dtype=meta.torch_dtype).set_(storage, 0, meta.sizes, meta.strides)  # type: ignore[call-overload,no-any-return]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A backend compiles in the program's process; the program's random numbers stay its own."""
    python_state = random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
