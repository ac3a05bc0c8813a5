"""Calls of `torch.autograd.Function.apply` where autograd records nothing.

In: a call of `apply`, and the frame of the `forward` that torch's C code runs for it. Out: a step.
Invariant: with grad mode off, or when nothing given requires grad, `apply` is `forward` with a
context that nobody sees afterwards; wherever it would do more (a history, an input handed
through, a view of one) the recording is void.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.capture.library_calls import LibraryCalls
from accel.capture.steps import FOLD, NATIVE, Answer, Void
from accel.capture.values import PLAIN_TENSORS, class_lookup

# What a class has that leaves the context to `forward`.
_OWN_SETUP = class_lookup(torch.autograd.Function, "setup_context")


class AutogradFunctions(LibraryCalls):
    """Rules for autograd functions."""

    def fresh_event(self, obj: Any) -> Answer:
        """An object was made while recording."""
        raise NotImplementedError

    contexts: frozenset[type] = frozenset()  # classes of the contexts that torch makes now

    def _call_unwrap_if_dead(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """What is left of a tensor that a functorch transform has wrapped: a plain one itself."""
        if len(args) != 1 or type(args[0]) not in PLAIN_TENSORS:
            raise Void("opaque_call", "unwrapping a tensor of functorch")
        self.tensor_ref(args[0])
        return (FOLD, f, args, None, self._after_unwrap, args[0])

    def _after_unwrap(self, value: Any, given: Any) -> Answer:
        if value is not given:
            raise Void("tensor_kind", "a tensor that functorch has wrapped")
        return None

    def _method_autograd_apply(self, f: Any, cls: Any, rest: Any, kwargs: Any) -> Answer:
        name = f"{cls.__name__}.apply()"
        if kwargs or class_lookup(cls, "setup_context") is not _OWN_SETUP:
            raise Void("opaque_call", f"{name} with setup_context")
        tensors = [v for v in rest if isinstance(v, torch.Tensor)]
        if any(type(v) not in PLAIN_TENSORS for v in tensors):
            raise Void("tensor_subclass", name)
        if torch.is_grad_enabled() and any(v.requires_grad for v in tensors):
            raise Void("opaque_call", f"{name} of a tensor that requires grad")
        forward = class_lookup(cls, "forward")
        self.guards.add_class_attribute(cls, "forward", forward)
        self.guards.add_class_attribute(cls, "setup_context", _OWN_SETUP)
        self.assume_static(getattr(forward, "__func__", forward))
        self.contexts |= {cls._backward_cls}
        given = frozenset(map(id, tensors))
        return (NATIVE, f, rest, None, self._after_apply, (name, given))

    def admit_context(self, args: tuple[Any, ...]) -> None:
        """The first argument of a `forward` that C code calls: made by it just now."""
        if args and type(args[0]) in self.contexts:
            self.fresh_event(args[0])

    def _after_apply(self, result: Any, token: Any) -> Answer:
        name, given = token
        for value in result if isinstance(result, tuple) else (result,):
            self.check_value(value, name)
            if isinstance(value, torch.Tensor) and (id(value) in given or value._is_view()):
                raise Void("opaque_call", f"{name} gives a view")  # marked as a function's own
        return None


__all__ = ["AutogradFunctions"]
