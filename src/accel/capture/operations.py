"""Tensors and their operations: names in the graph, arguments, results, speculations.

In: calls that the event handlers know to be torch operations. Out: operations and inputs of the
recording's graph. Invariant: every tensor of an operation has a name: an input's or an operation's.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from typing import Any

import torch

from accel.capture import branches
from accel.capture.casts import CastRules
from accel.capture.deep_guards import base_value
from accel.capture.state import user_location, version
from accel.capture.steps import OPERATION, Answer, Void
from accel.capture.values import (
    CONSTANT_BASES,
    CONSTANT_TYPES,
    NUMPY_SCALARS,
    PLAIN_TENSORS,
    class_lookup,
)
from accel.trace import Operation, Ref, TensorMeta, map_values

_DEVICES = ("cpu", "cuda")  # whose tensors are recorded; codegen/targets.py has their kernels


class OperationEvents(CastRules):
    """The recorder's memory of tensors."""

    def tensor_ref(self, tensor: torch.Tensor) -> Ref:
        """The graph's name of a plain tensor; a known one becomes an input."""
        if type(tensor) not in PLAIN_TENSORS:
            raise Void("tensor_subclass", type(tensor).__name__)
        index = self.table.get(tensor)
        if index is not None:
            return Ref(self.names[index])
        source = self.source_of(tensor)
        if source is None:
            raise Void("unknown_tensor", str(tuple(tensor.shape)))
        if not (tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad):
            self.place(tensor)  # numbers go with any device
        name = f"a{len(self.inputs)}"
        self.inputs.append((name, source, TensorMeta.of(tensor)))
        self.versions[name] = version(tensor)
        if tensor.requires_grad:
            self.grad_inputs.append(name)
        self.name_tensor(tensor, name)
        return Ref(name)

    def place(self, tensor: torch.Tensor) -> None:
        """Errors: Void for a tensor that no kernel takes, or none that takes the others."""
        device = tensor.device
        if tensor.layout is not torch.strided or device.type not in _DEVICES:
            raise Void("tensor_kind", f"{tensor.layout} on {device}")
        if self.device is None:
            self.device = device
        elif device != self.device:
            raise Void("devices", f"{device} beside {self.device}")

    def name_tensor(self, tensor: torch.Tensor, name: str) -> None:
        self.table.set(tensor, len(self.names))
        self.names.append(name)

    def refs(self, value: Any) -> Any:
        """`value` with tensors replaced by graph names: an operation's argument."""
        kind = type(value)
        if kind in PLAIN_TENSORS:
            return self.tensor_ref(value)
        if kind in CONSTANT_TYPES:
            if kind in NUMPY_SCALARS:
                return self._python_number(value)
            if kind is torch.device or kind is str:
                return with_gpu_number(value)
            return tuple(value) if kind is torch.Size else value
        if kind is tuple or kind is list:
            if id(value) in self.known:
                self.consume(value)
            return kind(self.refs(v) for v in value)
        if kind is slice:
            return self._slice(value)
        if kind is dict:
            if id(value) in self.known:
                self.consume(value)
            return {k: self.refs(v) for k, v in value.items()}
        if issubclass(kind, torch.Tensor):
            raise Void("tensor_subclass", kind.__name__)
        if issubclass(kind, tuple):  # torch's named tuples of tensors
            return tuple(self.refs(v) for v in value)
        if issubclass(kind, enum.Enum) and type(value._value_) in CONSTANT_TYPES:
            return value._value_  # an IntEnum: its identity is guarded where it was read
        known = id(value) in self.known
        if known and issubclass(kind, CONSTANT_BASES) and _says_its_value(kind):
            return base_value(value)
        raise Void("operand", f"a {kind.__name__}")

    def _slice(self, value: slice) -> slice:
        parts = (value.start, value.stop, value.step)
        if any(type(part) in PLAIN_TENSORS for part in parts):
            raise Void("value_from_tensor", "a tensor as the bound of a slice")
        return slice(*(self.refs(part) for part in parts))

    @staticmethod
    def _python_number(value: Any) -> Any:
        """What torch makes of a numpy scalar: except for bools, a number as Python's."""
        if type(value).__name__.startswith("bool"):
            raise Void("operand", "a numpy bool")
        return value.item()

    def operation(
        self, kind: str, target: str, f: Callable[..., Any], args: Any, kwargs: Any
    ) -> Answer:
        """A step that runs a torch operation and records it."""
        self.leave_if_untraceable(target)
        token = (kind, target, self.refs(args), self.refs(kwargs) if kwargs else {})
        if kwargs and kwargs.get("out") is not None:
            outs = [(t, t.size(), t.stride()) for t in _tensors_of(kwargs["out"])]
            return (OPERATION, f, args, kwargs, self._after_out, (token, outs))
        return (OPERATION, f, args, kwargs or None, self.after_operation, token)

    @staticmethod
    def leave_if_untraceable(target: str) -> None:
        """Errors: Void for an operation that the compiler could not follow here."""
        if branches.untraceable and (target, user_location()) in branches.untraceable:
            raise Void("opaque_operation", target.removeprefix("_operator."))

    def _after_out(self, result: Any, token: Any) -> Answer:
        """Post of an operation with `out=`.

        Errors: Void when it gave a tensor another size, which its source's guard would not show.
        """
        inner, outs = token
        for tensor, size, stride in outs:
            if tensor.size() != size or tensor.stride() != stride:
                raise Void("opaque_operation", f"{inner[1]} resizes its out")
        return self.after_operation(result, inner)

    def add_operation(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ref:
        """An operation of the graph that was no call of the program's own."""
        return Ref(self.append_operation("call_function", target, args, kwargs))

    def append_operation(
        self, kind: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str:
        """The name of one more operation, which runs in the regions that are open now."""
        if self.casts_unsettled:
            self.settle_casts()
        name = f"v{len(self.operations)}"
        self._append(Operation(name, kind, target, args, kwargs, user_location()))
        return name

    def _append(self, operation: Operation) -> None:
        self.operations.append(operation)
        used: list[str] = []
        map_values((operation.args, operation.kwargs), lambda ref: used.append(ref.name))
        if self.inputless.issuperset(used):
            self.inputless.add(operation.name)

    def after_operation(self, result: Any, token: Any) -> Answer:
        kind, target, args, kwargs = token
        name = self.append_operation(kind, target, args, kwargs)
        if not torch.is_grad_enabled():
            self.no_grad.add(name)
        self.bind(result, name)
        return None

    def bind(self, result: Any, name: str) -> None:
        kind = type(result)
        if kind in PLAIN_TENSORS:
            if result.requires_grad and torch.is_grad_enabled():
                self.differentiable = True
            if name not in self.inputless or result.requires_grad or result.device.type != "cpu":
                self.place(result)  # the others are computed wherever the graph is
            if result.device.type != "cpu" and not result.is_contiguous():
                self.layouts[name] = result.stride()
            if self.table.get(result) is None and id(result) not in self.known:
                self.name_tensor(result, name)
            elif self.table.get(result) is None:
                self.tensor_ref(result)
            return
        if result is None:
            return
        if issubclass(kind, (tuple, list)):
            for i, part in enumerate(result):
                if part is None:
                    continue
                item = f"v{len(self.operations)}"
                self._append(Operation(item, "call_function", "_operator.getitem", (Ref(name), i)))
                self.bind(part, item)
            return
        raise Void("value_from_tensor", f"{self.operations[-1].target} gave a {kind.__name__}")

    def speculate(self, tensor: torch.Tensor) -> bool:
        """The truth of a one-element tensor, assumed by the rest of the trace."""
        ref = self.tensor_ref(tensor)
        if tensor.numel() != 1:
            raise Void("value_from_tensor", "truth of a tensor with several elements")
        place = branches.here()
        if place in branches.both_ways and not self.assumes_all:
            raise Void("branch", "as a tensor decides")
        truth = bool(tensor)
        if (ref.name, truth) not in self.speculations:
            self.speculations.append((ref.name, truth))
            self.assumed.append((place, truth))
        return truth


def with_gpu_number(device: Any) -> Any:
    """ "cuda" as the GPU that it means now, which the compiler cannot ask; ambient guards keep it so."""
    if device == "cuda":
        return f"cuda:{torch.cuda.current_device()}"
    if type(device) is torch.device and device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _says_its_value(kind: type) -> bool:
    """Whether a class below one of them leaves it to C code what number its instances are."""
    names = ("__index__", "__int__", "__float__", "__complex__")
    return not any(type(class_lookup(kind, name)) is types.FunctionType for name in names)


def _tensors_of(out: Any) -> list[torch.Tensor]:
    """The tensors of an `out` argument: one, or a tuple or list of them."""
    parts = out if type(out) in (tuple, list) else (out,)
    return [part for part in parts if type(part) in PLAIN_TENSORS]
