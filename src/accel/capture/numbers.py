"""Numbers of the trace: sizes that differ between calls, followed through Python's arithmetic.

In: the events of a recording that leaves sizes open. Out: operations on numbers in the graph,
and predicates: the questions that the run asked of them, with its answers.
A traced number is an exact int that is no other object (`_native.own_number`), so its identity
follows it through locals, tuples, attributes and calls. Invariant: whoever else looks at its
value, `settle`s it first: the value becomes a predicate. What may look unseen voids the recording.

Rules for whoever changes an event's handler here:
1. An event without a method here settles every number in its operands, deeply.
2. A method here that hands on to the handler below must have settled what C code is going to
   read, or know that it only passes objects on.
"""

from __future__ import annotations

import builtins
import collections
import enum
import functools
import inspect
import itertools
import math
import operator
import types
from collections.abc import Callable
from typing import Any

import torch

from accel import runtime
from accel.capture.calls import CallEvents
from accel.capture.operators import BINARY_NAMES
from accel.capture.policy import callable_rules
from accel.capture.state import as_it_is, user_location
from accel.capture.steps import NATIVE, Answer, Void
from accel.capture.torch_calls import METADATA_METHODS, graph_functions
from accel.capture.values import (
    BUILTIN_CONTAINERS,
    BUILTIN_ITERATORS,
    PLAIN_TENSORS,
    SMALL_INTS,
    class_lookup,
    is_python_class,
)
from accel.capture.variation import Variation
from accel.sources import Source
from accel.trace import Operation, Ref, Sizes, Symbol

_IN_PLACE = 13  # of CPython's NB_* numbers
_ARITHMETIC = frozenset({"add", "sub", "mul", "floordiv", "mod"})
_COMPARE = {"<": "lt", "<=": "le", "==": "eq", "!=": "ne", ">": "gt", ">=": "ge"}
_SEQUENCES = (tuple, list, torch.Size)
_MAX_ELEMENTS = 10_000  # of a container that is searched for numbers

# Of tensors: what sizes and strides decide. Other metadata a guard fixes.
_SIZE_METHODS = frozenset(
    "size numel nelement stride is_contiguous storage_offset __len__ is_same_size".split()
)
_UNFOLLOWED_METHODS = frozenset({"dim_order", "is_set_to"})
_SIZE_FUNCTIONS = frozenset({"numel", "is_same_size"})
# C functions and types that pass their arguments on and do not look at them.
_PASSING = frozenset(
    id(f)
    for f in (
        zip, enumerate, reversed, list, tuple, iter, next, isinstance, type, super, slice,
        staticmethod, classmethod, property, getattr, hasattr, setattr, id, callable, int,
        functools.partial, types.MethodType, torch.Size, object, len, map,
    )
)  # fmt: skip
_PASSING_METHODS = frozenset(
    "append extend appendleft items values keys copy get setdefault pop popitem __iter__ __next__ "
    "__len__ __getitem__ __setitem__ __init__ __new__ __setattr__ __getattribute__ send "
    "update insert clear reverse".split()
)
_KEYED_METHODS = frozenset("get setdefault pop insert __getitem__ __setitem__".split())
_HASHED = (int, float, complex, str, bytes, set, frozenset)


class NumberEvents(CallEvents):
    """Handlers that follow numbers; as below them where a recording has none."""

    variation: Variation | None

    def follow_numbers(self, variation: Variation | None) -> None:
        """Called before the first event."""
        self.variation = variation if variation is not None and variation.is_enabled else None
        if self.variation is not None:
            self.variation.grad_mode = torch.is_grad_enabled()
        self.numbers: dict[int, tuple[Any, str]] = {}  # id -> (number, its name in the graph)
        self.settled: list[Any] = []  # kept, so that no other object gets their identities
        self.open_dims: dict[int, tuple[int, ...]] = {}  # id of a tensor -> its open dimensions
        self.open_inputs: dict[str, tuple[int, ...]] = {}
        # Of `capture/lifted.py`: numbers that come with the inputs, names and values.
        self.size_numbers: dict[int, tuple[str, int]] = {}
        self.hints: dict[str, Any] = {}
        self.tests_later = ""  # an iterator is alive with which C code tests what it is given
        self.predicates: dict[str, bool] = {}
        self.c_looks = False  # C code is running that looks at what callbacks give it

    def number_handler(self, name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        """The handler of an event that has no method here."""
        if self.variation is None or name in vars(NumberEvents) or name in _NO_OPERANDS:
            return handler

        def settled(*operands: Any) -> Any:
            if self.numbers:
                for operand in operands:
                    self.settle(operand)
            return handler(*operands)

        return settled

    # ------------------------------------------------------------ tensors

    def guard_tensor(self, tensor: Any, source: Source) -> None:
        dims = () if self.variation is None else self.variation.dims(tensor, source)
        if dims:
            if self.tests_later:
                raise Void("dynamic", self.tests_later)
            self.open_dims[id(tensor)] = dims
            self.guards.add(source, "TENSOR_KIND", as_it_is(tensor))
        else:
            super().guard_tensor(tensor, source)

    def name_tensor(self, tensor: torch.Tensor, name: str) -> None:
        dims = self.open_dims.get(id(tensor)) if self.variation is not None else None
        if dims is not None and id(tensor) in self.known:
            self.open_inputs[name] = dims
        super().name_tensor(tensor, name)

    def has_open_sizes(self, tensor: Any) -> bool:
        """Whether a tensor's sizes may differ in another call."""
        if self.variation is None:
            return False
        if not (self.open_dims or self.open_inputs or self.size_numbers):
            return False
        index = self.table.get(tensor)
        if index is None:
            if id(tensor) not in self.open_dims:
                return False
            self.tensor_ref(tensor)
            return True
        name = self.names[index]
        return not name.startswith("a") or name in self.open_inputs

    # ------------------------------------------------------------ numbers

    def number_of(self, value: Any) -> str | None:
        """The graph's name of a traced number."""
        found = self.numbers.get(id(value))
        return None if found is None else found[1]

    def refs(self, value: Any) -> Any:
        if self.numbers:
            kind = type(value)
            if kind is int or kind is float:
                name = self.number_of(value)
                return value if name is None else Ref(name)
            if kind is torch.Size:
                return tuple(self.refs(v) for v in value)
        return super().refs(value)

    def record_number(self, kind: str, target: str, args: tuple[Any, ...], value: Any) -> Any:
        """An operation that gives a number; what stands for its result from now on."""
        name = f"n{len(self.hints)}"
        self.operations.append(
            Operation(name, kind, target, tuple(self.refs(a) for a in args), {}, user_location())
        )
        self.hints[name] = value
        if type(value) is bool:
            self.predicates[name] = value
            return value
        own = runtime.native.own_number(value)
        self.numbers[id(own)] = (own, name)
        return own

    def ask(self, name: str, a: Any, b: Any) -> bool:
        """A comparison of numbers: its answer holds in every call that the graph serves."""
        answer = bool(getattr(operator, name)(a, b))
        if self.number_of(a) is not None or self.number_of(b) is not None:
            self.record_number("call_function", f"_operator.{name}", (a, b), answer)
        return answer

    def settle(self, value: Any, depth: int = 0, seen: set[int] | None = None) -> None:
        """C code is about to look at `value`: the numbers in it are the same in every call."""
        if not self.numbers:
            return
        kind = type(value)
        if kind is int or kind is float:
            if self.number_of(value) is not None:
                # A plain number for comparison: int(value) would be the very object.
                self.ask("eq", value, runtime.native.own_number(value))
                self.settled.append(self.numbers.pop(id(value)))
            return
        seen = set() if seen is None else seen
        if id(value) in seen:  # two ways to one container, or a circle
            return
        seen.add(id(value))
        if depth > 20:
            raise Void("dynamic", "deeply nested containers of sizes")
        if issubclass(kind, (tuple, list, set, frozenset)) or kind in _VIEWS:
            if len(value) > _MAX_ELEMENTS:
                raise Void("dynamic", f"{len(value)} values that may be sizes")
            for part in _ITERATE.get(_base(kind), iter)(value):
                self.settle(part, depth + 1, seen)
        elif issubclass(kind, dict):
            for key, part in dict.items(value):
                self.settle(key, depth + 1, seen)
                self.settle(part, depth + 1, seen)
        elif kind is slice:
            for part in (value.start, value.stop, value.step):
                self.settle(part, depth + 1, seen)
        elif kind in BUILTIN_ITERATORS:
            # What it is going to give, nobody can see in time.
            raise Void("dynamic", f"C code reads a {kind.__name__} that may give sizes")
        elif kind is functools.partial:
            for part in (*value.args, *value.keywords.values()):
                self.settle(part, depth + 1, seen)
        elif kind is types.MethodType or kind is types.BuiltinMethodType:
            self.settle(value.__self__, depth + 1, seen)
        elif issubclass(kind, BaseException):
            self.settle(value.args, depth + 1, seen)

    def settle_keys(self, container: Any) -> None:
        if not self.numbers:
            return
        if issubclass(type(container), dict):
            for key in dict.keys(container):
                self.settle(key)
        elif issubclass(type(container), (set, frozenset)):
            self.settle(container)

    def has_number(self, value: Any) -> bool:
        """Whether a number is in `value`, in slices and sequences at any depth."""
        if not self.numbers:
            return False
        waiting, seen = [value], set()
        while waiting:
            part = waiting.pop()
            kind = type(part)
            if kind is int or kind is float:
                if id(part) in self.numbers:
                    return True
            elif kind is slice:
                waiting += (part.start, part.stop, part.step)
            elif issubclass(kind, (tuple, list)) and id(part) not in seen:
                seen.add(id(part))  # two ways to one container, or a circle
                waiting += _ITERATE[_base(kind)](part)
        return False

    # ------------------------------------------------------------ metadata of tensors

    def _tensor_attr(self, tensor: Any, name: str) -> Answer:
        answer = super()._tensor_attr(tensor, name)
        if name == "shape" and self.has_open_sizes(tensor):
            return (self._sizes(tensor),)
        if name == "nbytes" and self.has_open_sizes(tensor):
            raise Void("dynamic", "a tensor's number of bytes")
        return answer

    def _sizes(self, tensor: Any) -> torch.Size:
        sizes = tuple(tensor.size())
        if not sizes:
            return tensor.size()
        return torch.Size(
            [self.record_number("call_method", "size", (tensor, d), n) for d, n in enumerate(sizes)]
        )

    def _tensor_method(
        self, name: str, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Answer:
        if name not in METADATA_METHODS or not self.has_open_sizes(args[0]):
            if name in METADATA_METHODS and self.numbers:
                self.settle((*args[1:], *kwargs.values()))
            return super()._tensor_method(name, f, args, kwargs)
        if name in _UNFOLLOWED_METHODS:
            raise Void("dynamic", f"tensor.{name}()")
        if name not in _SIZE_METHODS:
            return None
        tensor, *rest = args
        self.settle((*rest, *kwargs.values()))
        if name == "size" and not rest and not kwargs:
            return (self._sizes(tensor),)
        if kwargs:
            rest = [*rest, *kwargs.values()]
            if len(kwargs) > 1 or len(rest) > 1 or not set(kwargs) <= {"dim"}:
                raise Void("dynamic", f"tensor.{name}() with options")
        value = f(tensor, *rest)
        return (self._metadata(name, tensor, rest, value),)

    def _metadata(self, name: str, tensor: Any, rest: list[Any], value: Any) -> Any:
        if name == "__len__":
            name, rest = "size", [0]
        if type(value) is tuple:  # stride()
            return tuple(
                self.record_number("call_method", name, (tensor, d), n) for d, n in enumerate(value)
            )
        return self.record_number("call_method", name, (tensor, *rest), value)

    def _call_len(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) == 1 and not kwargs:
            if type(args[0]) in PLAIN_TENSORS and self.has_open_sizes(args[0]):
                return (self._metadata("__len__", args[0], [], len(args[0])),)
            if self.numbers:
                self.settle_keys(args[0])
        return super()._call_len(f, args, kwargs)

    def _call_fold(self, f: Any, args: Any, kwargs: Any) -> Answer:
        name = getattr(f, "__name__", "")
        tensors = [a for a in (*args, *(kwargs or {}).values()) if type(a) in PLAIN_TENSORS]
        if name in _SIZE_FUNCTIONS and any(self.has_open_sizes(t) for t in tensors):
            if kwargs:
                raise Void("dynamic", f"torch.{name}() with options")
            value = f(*args)
            return (self.record_number("call_method", name, args, value),)
        return super()._call_fold(f, args, kwargs)

    # ------------------------------------------------------------ operators

    def binary(self, a: Any, b: Any, op: int) -> Answer:
        if not self.numbers or type(a) in PLAIN_TENSORS or type(b) in PLAIN_TENSORS:
            if BINARY_NAMES[op] in ("floordiv", "ifloordiv"):
                self.settle(a)  # a number over a tensor is recorded by its value
            return super().binary(a, b, op)
        name = BINARY_NAMES[op - _IN_PLACE if op >= _IN_PLACE else op]
        if self.number_of(a) is not None or self.number_of(b) is not None:
            whole = type(a) is int and type(b) is int
            if whole and name in _ARITHMETIC and not (name in ("floordiv", "mod") and b == 0):
                value = getattr(operator, name)(a, b)
                target = f"_operator.{name}"
                return (self.record_number("call_function", target, (a, b), value),)
        joins = name == "add" and type(a) in _SEQUENCES and type(b) in _SEQUENCES
        repeats = name == "mul" and (type(a) in _SEQUENCES) != (type(b) in _SEQUENCES)
        if repeats:
            self.settle(b if type(a) in _SEQUENCES else a)
        elif not joins:
            self.settle(a)
            self.settle(b)
        return super().binary(a, b, op)

    def unary(self, a: Any, op: str) -> Answer:
        if self.number_of(a) is not None and type(a) is int:
            if op == "-":
                return (self.record_number("call_function", "_operator.neg", (a,), -a),)
            if op == "+":
                return (a,)
        self.settle(a)
        return super().unary(a, op)

    def compare(self, a: Any, b: Any, op: str) -> Answer:
        if not self.numbers or type(a) in PLAIN_TENSORS or type(b) in PLAIN_TENSORS:
            return super().compare(a, b, op)
        if type(a) is int and type(b) is int:
            return (self.ask(_COMPARE[op], a, b),)
        plain = type(a) in _SEQUENCES and type(b) in _SEQUENCES and op in ("==", "!=")
        if plain and (self.has_number(a) or self.has_number(b)):
            same = self._same_sequences(a, b)
            if same is not None:
                return (same is (op == "=="),)
        self.settle(a)
        self.settle(b)
        return super().compare(a, b, op)

    def _same_sequences(self, a: Any, b: Any) -> bool | None:
        """Whether two flat sequences of ints are equal; None for other ones."""
        if (type(a) is list) != (type(b) is list):
            return None
        if id(a) in self.known or id(b) in self.known:
            return None
        if any(type(v) is not int for v in (*a, *b)):
            return None
        if len(a) != len(b):
            return False
        return all(self.ask("eq", x, y) for x, y in zip(a, b, strict=True))

    def test(self, value: Any) -> Answer:
        if self.number_of(value) is not None:
            if type(value) is int:
                return (self.ask("ne", value, 0),)
            self.settle(value)
        return super().test(value)

    def not_(self, value: Any) -> Answer:
        if self.number_of(value) is not None and type(value) is int:
            return (not self.ask("ne", value, 0),)
        return super().not_(value)

    def is_(self, a: Any, b: Any) -> Answer:
        if self.number_of(a) is not None or self.number_of(b) is not None:
            same = type(a) is int and type(b) is int and self.ask("eq", a, b)
            self.settle(a)
            self.settle(b)
            return (a is b or (same and a in SMALL_INTS),)
        return super().is_(a, b)

    # ------------------------------------------------------------ containers

    def subscr(self, obj: Any, key: Any) -> Answer:
        if self.numbers and type(obj) not in PLAIN_TENSORS:
            self.settle(key)
            self.settle_keys(obj)
        return super().subscr(obj, key)

    def setitem(self, obj: Any, key: Any, value: Any) -> Answer:
        if self.numbers and type(obj) not in PLAIN_TENSORS:
            self.settle(key)
        return super().setitem(obj, key, value)

    def get_iter(self, obj: Any) -> Answer:
        if self.numbers:
            self.settle_keys(obj)
        return super().get_iter(obj)

    def unpack(self, obj: Any, count: int) -> Answer:
        return self.get_iter(obj)

    def consume_event(self, obj: Any) -> Answer:
        return self.get_iter(obj)

    def match(self, value: Any, pattern: Any) -> Answer:
        """A pattern asks for kinds, lengths and keys; what it takes out is passed on."""
        self.settle_keys(value)
        return super().match(value, pattern)

    def attr(self, obj: Any, name: str) -> Answer:
        return super().attr(obj, name)

    def setattr(self, obj: Any, value: Any, name: str) -> Answer:
        return super().setattr(obj, value, name)

    def store_deref(self, value: Any, cell: Any) -> Answer:
        return super().store_deref(value, cell)

    def store_global(self, value: Any, name: str) -> Answer:
        return super().store_global(value, name)

    def deref(self, value: Any, cell: Any) -> Answer:
        return super().deref(value, cell)

    def redirect(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        answer = super().redirect(f, args, kwargs)
        looked_at = self.variation is not None and f.__name__ in _LOOKED_AT
        if looked_at and answer is not None and len(answer) > 4:
            assert answer[4] is None
            return (*answer[:4], self._settle_result, None)
        return answer

    def _settle_result(self, value: Any, _token: Any) -> Answer:
        self.settle(value)
        return None

    def fresh_event(self, obj: Any) -> Answer:
        return super().fresh_event(obj)

    # ------------------------------------------------------------ calls

    def call(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        if self.variation is None:
            return super().call(f, args, kwargs)
        if self.numbers:
            own = _OWN_CALLS.get(id(f))
            given = args
            if type(f) is types.BuiltinMethodType and type(f.__self__) is torch.Size:
                own, given = _OWN_SIZE_METHODS.get(f.__name__), (f.__self__, *args)
            if own is not None and not kwargs:
                answer = own(self, given)
                if answer is not None:
                    return answer  # type: ignore[no-any-return]
        if self._passes_on(f, args):
            return super().call(f, args, kwargs)
        self.settle(f)
        self.settle(args)
        if kwargs:
            self.settle(tuple(kwargs.values()))
        return self._call_that_looks(f, args, kwargs)

    def _call_that_looks(self, f: Any, args: tuple[Any, ...], kwargs: Any) -> Answer:
        """A call of C code that may look at what functions and iterators give it.

        Errors: Void where it might see a number, then or later.
        """
        values = (*args, *(kwargs or {}).values())
        lazy = id(f) in _TEST_LATER or (f is iter and len(args) > 1)
        harmless = id(f) in _CALL_NOTHING
        gives = _is_iterator if _is_container_method(f) else _gives
        if harmless or (
            not lazy and not (kwargs and "key" in kwargs) and not any(map(gives, values))
        ):
            return super().call(f, args, kwargs)
        why = f"{getattr(f, '__name__', type(f).__name__)}() looks at what a function gives"
        if self.numbers or (lazy and self.open_dims):
            raise Void("dynamic", why)
        self.tests_later = self.tests_later or (why if lazy else "")
        answer = super().call(f, args, kwargs)
        return self._unseen((NATIVE, f, args, kwargs) if answer is None else answer, why)

    def _unseen(self, answer: tuple[Any, ...], why: str) -> Answer:
        """The same step; the recording is void if numbers are made while C code carries it out."""
        if len(answer) == 1:
            return answer
        post, token = answer[4:] if len(answer) > 4 else (None, None)
        before = len(self.hints), frozenset(self.numbers), self.c_looks
        self.c_looks = True
        return (*answer[:4], self._after_unseen, (before, why, post, token))

    def _after_unseen(self, result: Any, token: Any) -> Answer:
        (hints, numbers, self.c_looks), why, post, inner = token
        if len(self.hints) > hints or not numbers.issuperset(self.numbers):
            raise Void("dynamic", why)
        return None if post is None else post(result, inner)  # type: ignore[no-any-return]

    def contains(self, item: Any, container: Any) -> Answer:
        self.settle(item)
        if issubclass(type(container), dict):
            self.settle_keys(container)
        else:
            self.settle(container)
        answer = super().contains(item, container)
        if answer is not None and type(container) in BUILTIN_ITERATORS:
            return self._unseen(answer, "membership in an iterator")
        return answer

    def _own_product(self, args: tuple[Any, ...]) -> Answer:
        """math.prod() and Size.numel() of ints."""
        if len(args) != 1 or type(args[0]) not in _SEQUENCES:
            return None
        total: Any = 1
        for value in args[0]:
            if type(value) is not int:
                return None
            answer = self.binary(total, value, BINARY_NAMES.index("mul"))
            total = answer[0] if answer is not None and len(answer) == 1 else total * value
        return (total,)

    def _passes_on(self, f: Any, args: tuple[Any, ...]) -> bool:
        """Whether `f` is watched itself, or only hands its arguments on."""
        kind = type(f)
        if id(f) in _PASSING:
            return len(args) <= _PASSING_ARGUMENTS.get(f, len(args))
        if kind is types.FunctionType:
            return id(f) not in callable_rules()
        if kind is types.MethodType:
            return self._passes_on(f.__func__, (f.__self__, *args))
        if id(f) in graph_functions():
            return True
        rule = callable_rules().get(id(f))
        if rule in ("operator", "polyfill"):
            return True
        if f is dict or f is collections.OrderedDict:
            for mapping in args:
                self.settle_keys(mapping)
            return all(issubclass(type(mapping), dict) for mapping in args)
        if rule is not None:
            tensors = any(type(a) in PLAIN_TENSORS for a in args)
            return rule == "fold" and tensors
        if issubclass(kind, type):
            return is_python_class(f) and not issubclass(f, (*_HASHED, enum.Enum))
        if kind in _METHODS_OF_C:
            return self._method_passes_on(f, args)
        if kind is functools.partial or kind in (
            torch._ops.OpOverload, torch._ops.OpOverloadPacket
        ):  # fmt: skip
            return True
        return is_python_class(kind) and type(class_lookup(kind, "__call__")) is types.FunctionType

    def _method_passes_on(self, f: Any, args: tuple[Any, ...]) -> bool:
        bound = type(f) in (types.BuiltinFunctionType, types.MethodWrapperType)
        receiver = f.__self__ if bound else (args[0] if args else None)
        if type(receiver) in PLAIN_TENSORS:
            return True
        if f.__name__ not in _PASSING_METHODS:
            return False
        if issubclass(type(receiver), type):
            return f.__name__ == "__new__" and receiver in _MADE_OF_PARTS
        if type(receiver) in (int, float, str, bytes):
            return False
        rest = args if bound else args[1:]
        if f.__name__ in _KEYED_METHODS and rest:
            self.settle(rest[0])
        if f.__name__ == "update":
            for other in rest:
                self.settle_keys(other)
        self.settle_keys(receiver)
        return not issubclass(type(receiver), (set, frozenset))

    def _own_extremum(self, name: str, args: tuple[Any, ...]) -> Answer:
        """min() and max() of ints: the choice is a question; the result is one of them."""
        if len(args) < 2 or any(type(a) is not int for a in args):
            return None
        best = args[0]
        for other in args[1:]:
            if self.ask(name, other, best):
                best = other
        return (best,)

    def _own_abs(self, args: tuple[Any, ...]) -> Answer:
        if len(args) != 1 or type(args[0]) is not int:
            return None
        return (args[0],) if self.ask("ge", args[0], 0) else self.unary(args[0], "-")

    def _own_divmod(self, args: tuple[Any, ...]) -> Answer:
        if len(args) != 2 or any(type(a) is not int for a in args) or args[1] == 0:
            return None
        a, b = args
        parts = (("floordiv", a // b), ("mod", a % b))
        return (
            tuple(
                self.record_number("call_function", f"_operator.{name}", (a, b), value)
                for name, value in parts
            ),
        )

    # ------------------------------------------------------------ the end

    def lifted_source(self, value: Any) -> Source | None:
        """Where a lifted number comes from; none is lifted here."""
        return None

    def lifted_output(self, value: Any) -> int | None:
        """Where a number of the program's state is among those that a call computes."""
        return None

    def open_sizes(self, outputs: list[str]) -> Sizes | None:
        """What the graph needs besides tensors; None where every size is fixed."""
        symbols = [
            Symbol(("size", i, d), meta.sizes[d])
            for i, (name, _, meta) in enumerate(self.inputs)
            for d in self.open_inputs.get(name, ())
        ]
        given = list(self.size_numbers.values())
        symbols += [Symbol(("number", k), value) for k, (_, value) in enumerate(given)]
        if not symbols:
            if self.hints:
                raise Void("dynamic", "sizes without an input")
            return None
        names = tuple(name for name, _ in given)
        hints = tuple(self.hints.items())
        return Sizes(tuple(symbols), names, hints, tuple(self.predicates.items()), tuple(outputs))


# Methods whose result C code looks at.
_LOOKED_AT = frozenset(
    f"__{name}__"
    for name in "len bool index int float complex hash contains length_hint eq ne lt le gt ge "
    "format repr str bytes round trunc floor ceil instancecheck subclasscheck".split()
)
# With more arguments than these, C code computes with one of them.
_PASSING_ARGUMENTS: dict[Any, int] = {enumerate: 1, iter: 1, int: 1}
_MADE_OF_PARTS = frozenset({object, tuple, list, dict})  # by `__new__`
# C code that tests what it is given when somebody asks it for the next element.
_TEST_LATER = frozenset(
    id(f)
    for f in (
        filter, itertools.filterfalse, itertools.takewhile, itertools.dropwhile,
        itertools.groupby, itertools.compress,
    )
)  # fmt: skip
_METHODS_OF_C = frozenset(
    {
        types.BuiltinFunctionType,
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
        types.MethodWrapperType,
        types.ClassMethodDescriptorType,
    }
)
_VIEWS = frozenset({type({}.keys()), type({}.values()), type({}.items())})
_ITERATE: dict[Any, Callable[[Any], Any]] = {
    base: base.__iter__ for base in (tuple, list, set, frozenset)
}
# Events whose operands are names, code and the like.
_NO_OPERANDS = frozenset({
    "finish", "void", "checkpoint", "glob", "imported", "delete_global", "delete_deref",
    "with_", "fresh", "consume", "delattr", "grown", "caught",
})  # fmt: skip
_OWN_CALLS: dict[int, Callable[..., Answer]] = {
    id(builtins.min): lambda recorder, args: recorder._own_extremum("lt", args),
    id(builtins.max): lambda recorder, args: recorder._own_extremum("gt", args),
    id(builtins.abs): lambda recorder, args: recorder._own_abs(args),
    id(builtins.divmod): lambda recorder, args: recorder._own_divmod(args),
    id(math.prod): lambda recorder, args: recorder._own_product(args),
    id(builtins.bool): lambda recorder, args: recorder.test(args[0]) if len(args) == 1 else None,
}


_OWN_SIZE_METHODS: dict[str, Callable[..., Answer]] = {
    "numel": lambda recorder, args: recorder._own_product(args),
}


# They look at functions and never call them.
_CALL_NOTHING = frozenset(map(id, (callable, id, inspect.signature)))


def _gives(value: Any) -> bool:
    """Whether C code that is given this may get numbers from it that nobody has seen."""
    return _is_iterator(value) or (callable(value) and not isinstance(value, type))


def _is_iterator(value: Any) -> bool:
    return type(value) in BUILTIN_ITERATORS


def _is_container_method(f: Any) -> bool:
    """A method of a builtin container that takes functions as it takes any object: `set.add`."""
    if type(f) not in _METHODS_OF_C or f.__name__ == "sort":
        return False
    return getattr(f, "__objclass__", type(getattr(f, "__self__", None))) in BUILTIN_CONTAINERS


def _base(kind: type) -> Any:
    for base in (tuple, list, set, frozenset):
        if issubclass(kind, base):
            return base
    return None
