"""Builtin functions: what `len`, `getattr`, `print`, `torch.tensor` and their like do to a recording.

In: calls of C functions that a row of `policy.callable_rules()` covers. Out: a step for the
trampoline. Invariant: a rule is a method `_call_NAME`, found by its name in the table.
"""

from __future__ import annotations

import collections
import copy
import sys
import types
from typing import Any

import torch

from accel.capture.allowed_calls import AllowedCalls
from accel.capture.autograd_functions import AutogradFunctions
from accel.capture.class_questions import ClassQuestions
from accel.capture.library_calls import short_name
from accel.capture.numpy_rules import array_type
from accel.capture.operators import _BINARY, BINARY_NAMES, is_python_len
from accel.capture.polyfills import POLYFILLS
from accel.capture.state import Effect, c_length, user_location
from accel.capture.steps import CONSTRUCT, FOLD, NATIVE, OPERATION, Answer, Void
from accel.capture.streams import PlainStream, Waiting, is_ascii, printed
from accel.capture.values import (
    BUILTIN_CONTAINERS,
    BUILTIN_ITERATORS,
    CONSTANT_TYPES,
    PLAIN_TENSORS,
    holds_numpy,
    is_constant,
    is_static,
)
from accel.trace import Ref

_COMPARE_OPERATORS = {"lt": "<", "le": "<=", "eq": "==", "ne": "!=", "gt": ">", "ge": ">="}
_MAX_LITERALS = 64  # of torch.tensor([...]): more would be data, not a constant


class BuiltinRules(ClassQuestions, AutogradFunctions, AllowedCalls):
    """Rules for functions."""

    def _call_iterate(self, f: Any, args: Any, kwargs: Any) -> Answer:
        receiver = getattr(f, "__self__", args[0] if args else None)
        if id(receiver) in self.known:
            raise Void("container", f"a {type(receiver).__name__} from outside")
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_deep(self, f: Any, args: Any, kwargs: Any) -> Answer:
        receiver = getattr(f, "__self__", None)
        textual = f in (repr, ascii, format) or getattr(f, "__name__", "") == "__repr__"
        for value in (receiver, *args, *kwargs.values()):
            if type(value) in PLAIN_TENSORS:
                raise Void("value_from_tensor", short_name(f))
            if isinstance(value, types.ModuleType):
                continue
            if textual:
                self._text_of(value)
            elif type(value) in BUILTIN_ITERATORS:
                self._about_to_read(value)
            else:
                self.consume_deeply(value)
        if not textual:
            operands = args if receiver is None else (receiver, *args)
            self.check_nans(*operands) if operands else None
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_hash(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """hash(x) or x.__hash__(): a number of where an object lies, or of what it holds."""
        for value in (getattr(f, "__self__", None), *args):
            if not isinstance(value, types.ModuleType):
                self.pin_address(value)
                self.check_own_code(value)
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_hashed(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """`callbacks.hashed`: C code is about to hash this."""
        self.hashed(*args)
        return (None,)

    def _call_pure(self, f: Any, args: Any, kwargs: Any) -> Answer:
        for value in (*args, *kwargs.values()):
            if type(value) in PLAIN_TENSORS:
                if f in (abs, pow, divmod, round):
                    name = f"builtins.{f.__name__}"
                    return self.operation("call_function", name, f, args, kwargs)
                raise Void("value_from_tensor", short_name(f))
            if type(value) in CONSTANT_TYPES or is_constant(value) or is_static(value):
                continue
            if type(value) in BUILTIN_CONTAINERS or type(value) in BUILTIN_ITERATORS:
                self._text_of(value) if f.__name__ in ("format", "join") and type(
                    value
                ) in BUILTIN_CONTAINERS else self._about_to_read(value)
                continue
            if f.__name__ in ("format", "__format__", "format_map"):
                self._text_of(value)
                continue
            if id(value) not in self.known and id(value) not in self.fresh:
                raise Void("unknown_value", f"argument of {short_name(f)}")
            self.check_own_code(value)
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_pure_sequence(self, f: Any, args: Any, kwargs: Any) -> Answer:
        for value in (*args, *kwargs.values()):
            self.consume_deeply(value) if type(value) in BUILTIN_CONTAINERS else None
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_fold(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (FOLD, f, args, kwargs or None, self.adopt_constant, None)

    def _call_as_tensor(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """torch.as_tensor: `to` for a tensor, torch.tensor for numbers."""
        if args and type(args[0]) in PLAIN_TENSORS:
            if not kwargs and len(args) == 1:
                return (args[0],)
            return self.operation("call_method", "to", torch.Tensor.to, args, kwargs)
        return self._call_torch_tensor(f, args, kwargs)

    def _call_fold_frozen(self, f: Any, args: Any, kwargs: Any) -> Answer:
        for value in args:
            self.pin_function(value)
        return (FOLD, f, args, kwargs or None, self.adopt_frozen, None)

    def _call_passes(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return None

    def _call_opaque(self, f: Any, args: Any, kwargs: Any) -> Answer:
        raise Void("opaque_call", short_name(f))

    def _call_polyfill(self, f: Any, args: Any, kwargs: Any) -> Answer:
        polyfill: Any = POLYFILLS[id(f)]
        self.assume_static(polyfill)
        return self.call_python(polyfill, args, kwargs)

    def _call_construct(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (CONSTRUCT, f, args, kwargs or None, None, None)

    def _call_len(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 1 or kwargs:
            return None
        kind = type(args[0])
        if kind in PLAIN_TENSORS or kind in CONSTANT_TYPES:
            return None
        families = (tuple, list, dict, set, frozenset, collections.deque)
        if issubclass(kind, families) and not is_python_len(kind):
            self.length(args[0])
            return (c_length(args[0]),)
        if kind in BUILTIN_CONTAINERS:
            self.consume(args[0])
            return None
        self.check_own_code(args[0])
        return (NATIVE, f, args, None, None, None)

    def _call_getattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) < 2 or type(args[1]) is not str:
            return None
        answer = self.attr(args[0], args[1])
        if len(args) == 2 or (answer is not None and len(answer) == 1):
            return answer
        post = answer[4] if answer is not None else None
        token = answer[5] if answer is not None else None
        return (NATIVE, f, args, None, post if post is not None else self.checked, token)

    def _call_hasattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 2 or type(args[1]) is not str:
            return None
        if type(args[0]) in PLAIN_TENSORS:
            return self.has_tensor_attr(args[0], args[1])
        answer = self.attr(args[0], args[1])
        if answer is not None and len(answer) == 1:
            return (True,)
        return (NATIVE, f, args, None, None, None)

    def _call_setattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 3 or type(args[1]) is not str:
            return None
        return self.setattr(args[0], args[2], args[1])

    def _call_delattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return self.delattr(*args) if len(args) == 2 else None

    def _call_type(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 1 or kwargs:
            raise Void("opaque_call", "making a class")
        if type(args[0]) not in PLAIN_TENSORS:
            self.check_value(args[0], "type()")
        self.assume_static(type(args[0]))
        return (type(args[0]),)

    def _call_print(self, f: Any, args: Any, kwargs: Any) -> Answer:
        words = {name: value for name, value in kwargs.items() if name not in ("file", "flush")}
        for value in (*args, *words.values()):
            if not is_constant(value) or holds_numpy(value):  # numpy has options for its text
                raise Void("opaque_call", "print() of more than constants")
        stream = kwargs.get("file")
        if stream is None:
            stream = self._standard_output()
        if stream is not None:
            try:
                texts = printed(args, **words)
            except (TypeError, ValueError):
                raise Void("opaque_call", "print() that raises") from None
            self.write_texts(stream, texts, kwargs.get("flush", False))
        return (FOLD, f, args, kwargs or None, None, None)

    def _standard_output(self) -> Any:
        if not hasattr(sys, "stdout"):
            raise Void("opaque_call", "print() without sys.stdout")
        self.attr(sys, "stdout")
        return sys.stdout

    def write_texts(self, stream: Any, texts: list[str], flush: Any) -> None:
        """They are written at commit, one by one."""
        source = self.source_of(stream)
        if source is None or type(flush) is not bool:
            raise Void("opaque_call", f"writing to a {type(stream).__name__}")
        try:
            every = not all(map(is_ascii, texts))
            if (id(source), every) not in self.streams:
                self.guards.add(source, "CALL", PlainStream(stream, every))
                self.streams[id(source), every] = source
        except ValueError as error:
            raise Void("opaque_call", f"writing to {error}") from None
        if self.waiting is None:
            position = self.position_in_root()
            self.waiting = Waiting(len(self.operations), position, user_location())
        if (
            not self.effects
            or self.effects[-1].kind != "write_texts"
            or (self.effects[-1].target is not source)
        ):
            self.effects.append(Effect("write_texts", source, ([],)))
        self.effects[-1].operands[0].extend([*texts, None] if flush else texts)

    def _call_globals(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (FOLD, f, args, None, self._after_globals, None)

    def _after_globals(self, value: Any, _token: Any) -> Answer:
        # `globals()` ran from a C trampoline: the running frame is the twin's.
        self.known.setdefault(id(value), (value, self.constant_source(value)))
        return None

    def _call_vars(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 1:
            return None
        return self.attr(args[0], "__dict__")

    def _call_scalar(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """int(), float(), bool(), str() of one value."""
        if not args:
            return None
        value = args[0]
        if type(value) in PLAIN_TENSORS:
            if f is bool:
                return (self.speculate(value),)
            raise Void("value_from_tensor", f"{f.__name__}(tensor)")
        if type(value) in CONSTANT_TYPES:
            return None
        if f is bool:
            answer = self.test(value)
            return (NATIVE, f, args, None, None, None) if answer is None else answer
        if f is str:
            self._text_of(value)
            return (NATIVE, f, args, kwargs or None, None, None)
        if id(value) not in self.known and id(value) not in self.fresh:
            raise Void("unknown_value", f"{f.__name__}() of a {type(value).__name__}")
        self.check_own_code(value)
        return (NATIVE, f, args, kwargs or None, None, None)

    def _call_operator(self, f: Any, args: Any, kwargs: Any) -> Answer:
        name = f.__name__
        if name in BINARY_NAMES and len(args) == 2:
            return self.binary(args[0], args[1], BINARY_NAMES.index(name)) or (
                NATIVE,
                _BINARY[BINARY_NAMES.index(name)],
                args,
                None,
                None,
                None,
            )
        if name in _COMPARE_OPERATORS and len(args) == 2:
            return self.compare(args[0], args[1], _COMPARE_OPERATORS[name])
        if name == "getitem":
            return self.subscr(*args)
        if name == "setitem":
            return self.setitem(*args)
        if name in ("neg", "pos", "invert", "inv"):
            return self.unary(args[0], {"neg": "-", "pos": "+"}.get(name, "~"))
        if name == "contains":
            return self.contains(args[1], args[0])
        if name == "is_" or name == "is_not":
            self.is_(*args)
            return None
        if name == "truth":
            return self.test(args[0])
        if name == "not_":
            return self.not_(args[0])
        if name == "abs":
            return self._call_pure(abs, args, kwargs)
        if name == "index" and type(args[0]) in CONSTANT_TYPES:
            return None
        raise Void("opaque_call", f"operator.{name}")

    def _call_id(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """Identities differ at each run; copy's memo only tells objects apart by them."""
        if user_location().startswith(copy.__file__ + ":"):
            for value in args:
                self.tell_apart(value)
            return None
        raise Void("opaque_call", "id()")

    def _call_grad_mode(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (FOLD, f, args, kwargs or None, None, None)

    def _call_torch_tensor(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """torch.tensor of scalars and lists of them: recorded as fulls, stacked."""
        for target in ("torch.full", "torch.stack", "torch.reshape"):
            self.leave_if_untraceable(target)
        is_leaf = kwargs.get("requires_grad", False) is not False
        if len(args) != 1 or is_leaf or not set(kwargs) <= {"dtype", "device", "requires_grad"}:
            raise Void("opaque_call", "torch.tensor() with options")
        if id(args[0]) in self.frozen:
            is_array = type(args[0]) is array_type()
            leaves = _flatten(args[0].tolist()) if is_array else None
        else:
            self.consume_deeply(args[0])
            leaves = _flatten(args[0])
        if leaves is None or len(leaves) > _MAX_LITERALS:
            raise Void("opaque_call", "torch.tensor() of more than a few numbers")
        return (OPERATION, f, args, kwargs or None, self._after_torch_tensor, leaves)

    def _after_torch_tensor(self, tensor: Any, leaves: Any) -> Answer:
        dtype = {"dtype": tensor.dtype, "device": tensor.device}

        def add(target: str, *operands: Any, **options: Any) -> Ref:
            return self.add_operation(target, operands, options)

        if tensor.dim() == 0:
            made = add("torch.full", (), leaves[0], **dtype)
        elif not leaves:
            made = add("torch.full", tuple(tensor.shape), 0, **dtype)
        else:
            made = add("torch.stack", [add("torch.full", (), v, **dtype) for v in leaves])
            if tensor.dim() > 1:
                made = add("torch.reshape", made, tuple(tensor.shape))
        self.bind(tensor, made.name)
        return None


def _flatten(value: Any) -> list[Any] | None:
    """The numbers of a nest of lists and tuples, in order; None for anything else."""
    if type(value) in (bool, int, float, complex):
        return [value] if type(value) is not int or abs(value) < 1 << 62 else None
    if type(value) not in (list, tuple):
        return None
    leaves: list[Any] = []
    for part in value:
        inner = _flatten(part)
        if inner is None:
            return None
        leaves += inner
    return leaves
