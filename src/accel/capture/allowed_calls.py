"""Calls of functions that the user allows in graphs: one operation each, whatever they do inside.

In: the call of such a function. Out: a step that runs it unwatched, and an operation whose target
is an operator made of it (`accel.allowed`). Invariant: what the operator could not do again
voids the recording: other results than plain tensors, writes to arguments, shared memory,
gradients.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accel import allowed, runtime
from accel.capture.library_calls import LibraryCalls
from accel.capture.state import user_location
from accel.capture.state import version as _version
from accel.capture.steps import OPERATION, Answer, Void
from accel.capture.values import PLAIN_TENSORS
from accel.trace import Operation, Ref, TensorMeta, map_values


class AllowedCalls(LibraryCalls):
    """Handlers of calls of allowed functions."""

    def has_open_sizes(self, tensor: Any) -> bool:
        """Whether a tensor's sizes may differ in another call."""
        return False

    def call_allowed(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        named = (self.refs(args), self.refs(kwargs or {}))
        tensors = _tensors_in((args, kwargs or {}))
        if not tensors:
            raise Void("not_allowed", f"{f.__qualname__} takes no tensor")
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise Void("not_allowed", f"{f.__qualname__} takes a tensor that requires grad")
        if any(self.has_open_sizes(t) for t in tensors):
            raise Void("dynamic", f"{f.__qualname__} takes sizes that change")
        token = (f, named, tensors, [_version(t) for t in tensors])
        return (OPERATION, f, args, kwargs, self._after_allowed, token)

    def _after_allowed(self, result: Any, token: Any) -> Answer:
        f, named, tensors, versions = token
        parts = _flat_results(result)
        if parts is None:
            raise Void("not_allowed", f"{f.__qualname__} gives a {type(result).__name__}")
        if [_version(t) for t in tensors] != versions:
            raise Void("not_allowed", f"{f.__qualname__} writes to its arguments")
        plain = all(t.layout is torch.strided and t.device.type == "cpu" for t in parts)
        if not plain or _shares_memory(tensors, parts):
            raise Void("not_allowed", f"{f.__qualname__} gives a part of its arguments")
        rebuild, operands = _rebuilder(named)
        name = _register(f, rebuild, [TensorMeta.of(t) for t in parts])
        made = f"v{len(self.operations)}"
        target = allowed.dotted_name(name)
        self.operations.append(
            Operation(made, "call_function", target, (operands,), {}, user_location())
        )
        self.bind(parts[0] if len(parts) == 1 else tuple(parts), made)
        return None


def _tensors_in(value: Any) -> list[Any]:
    """The tensors of a call's arguments, in order."""
    if type(value) in PLAIN_TENSORS:
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in _tensors_in(part)]
    if isinstance(value, dict):
        return [t for part in value.values() for t in _tensors_in(part)]
    return []


def _rebuilder(named: Any) -> tuple[Callable[[list[Any]], Any], list[Ref]]:
    """What makes a call's arguments of its tensors, and their names in the graph, once each."""
    operands: list[Ref] = []

    def position(ref: Ref) -> Ref:
        if ref not in operands:
            operands.append(ref)
        return ref

    map_values(named, position)
    places = {ref.name: k for k, ref in enumerate(operands)}

    def rebuild(tensors: list[Any]) -> Any:
        return map_values(named, lambda ref: tensors[places[ref.name]])

    return rebuild, operands


def _register(
    function: Callable[..., Any],
    rebuild: Callable[[list[torch.Tensor]], tuple[tuple[Any, ...], dict[str, Any]]],
    metas: Sequence[TensorMeta],
) -> str:
    """Makes an operator of calls of `function`; answers its name.

    `rebuild` makes a call's arguments of its tensors.
    """
    name = re.sub("[^0-9A-Za-z_]", "_", function.__qualname__)
    reference = weakref.ref(function)

    def run(operands: list[torch.Tensor]) -> Any:
        called = reference()
        if called is None:
            raise RuntimeError(f"{name} is gone")
        args, kwargs = rebuild(list(operands))
        versions = [t._version for t in operands if not t.is_inference()]
        runtime.native.pause()
        try:
            results = _flat_results(called(*args, **kwargs))
        finally:
            runtime.native.resume()
        if results is None or [TensorMeta.of(t) for t in results] != list(metas):
            raise RuntimeError(f"{name} gave other results than when it was recorded")
        if versions != [t._version for t in operands if not t.is_inference()]:
            raise RuntimeError(f"{name} has written to its arguments")
        if _shares_memory(operands, results):
            raise RuntimeError(f"{name} gave a part of its arguments")
        return results[0] if len(results) == 1 else tuple(results)

    return allowed.implement(name, metas, run)


def _flat_results(result: Any) -> list[torch.Tensor] | None:
    """The tensors of a result; None for what no operator gives."""
    parts = [result] if type(result) is torch.Tensor else result
    if type(parts) not in (tuple, list) or not parts:
        return None
    return list(parts) if all(type(t) is torch.Tensor for t in parts) else None


def _shares_memory(operands: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> bool:
    """Whether a result lies in the memory of an operand or of another result."""
    seen = {t.untyped_storage()._cdata for t in operands}
    for t in results:
        key = t.untyped_storage()._cdata
        if key in seen:
            return True
        seen.add(key)
    return False
