"""Operators, subscripts, truth tests, iteration: the instructions other than calls.

In: operator events. Out: graph operations for tensors, guards for what containers are read.
Invariant: an operator of a user's class is left to CPython, whose frames are redirected.
"""

from __future__ import annotations

import cmath
import collections
import contextlib
import enum
import operator
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from accel.capture.attributes import AttributeEvents
from accel.capture.state import ABSENT, c_length, running_frame
from accel.capture.steps import FOLD, NATIVE, OPERATION, Answer, Void
from accel.capture.values import (
    BUILTIN_CONTAINERS,
    BUILTIN_ITERATORS,
    CONSTANT_TYPES,
    FOLDED_RESULTS,
    NUMPY_SCALARS,
    PLAIN_TENSORS,
    VALUE_TYPES,
    builtin_method,
    class_lookup,
    has_nan,
    holds_numpy,
    is_constant,
    is_fixed,
    is_python_class,
    is_static,
)
from accel.trace import IN_PLACE_NAMES

# CPython's NB_* numbers (3.11 to 3.13) and operator's names for them.
BINARY_NAMES = [
    "add",
    "and_",
    "floordiv",
    "lshift",
    "matmul",
    "mul",
    "mod",
    "or_",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
    *IN_PLACE_NAMES,
]
_BINARY = [getattr(operator, name) for name in BINARY_NAMES]
_COMPARE = {"<": "lt", "<=": "le", "==": "eq", "!=": "ne", ">": "gt", ">=": "ge"}
_UNARY = {"-": "neg", "+": "pos", "~": "invert"}
_IN_PLACE = 13
_CHANGED_IN_PLACE = (list, collections.deque, dict, set)
# Operators in which a numpy scalar gives way to the tensor on its right.
_NUMPY_YIELDS = frozenset({"add", "sub", "mul", "truediv", "pow"})
_TENSOR_META = type(torch.Tensor)


def _methods(name: str) -> tuple[str, ...]:
    """The methods that a binary operator may call on either side."""
    plain = name.rstrip("_")
    if plain in IN_PLACE_NAMES:
        return (f"__{plain}__", *_methods(plain[1:]))
    return (f"__{plain}__", f"__r{plain}__")


_BINARY_METHODS = {name: _methods(name) for name in BINARY_NAMES}
_COMPARE_METHODS = {
    "lt": ("__lt__", "__gt__"), "le": ("__le__", "__ge__"), "eq": ("__eq__",),
    "ne": ("__ne__", "__eq__"), "gt": ("__gt__", "__lt__"), "ge": ("__ge__", "__le__"),
}  # fmt: skip


class OperatorEvents(AttributeEvents):
    """Handlers of every instruction that is not a call or an attribute access."""

    # ------------------------------------------------------------ operators

    def binary(self, a: Any, b: Any, op: int) -> Answer:
        ta, tb = type(a), type(b)
        if ta in CONSTANT_TYPES and tb in CONSTANT_TYPES:
            return None
        if ta in PLAIN_TENSORS or tb in PLAIN_TENSORS:
            if self._own_operator(a, b, BINARY_NAMES[op]):
                return (NATIVE, _BINARY[op], (a, b), None, self.checked, f"{BINARY_NAMES[op]}()")
            if op >= _IN_PLACE and ta not in PLAIN_TENSORS:
                op -= _IN_PLACE  # `n += tensor` with a number n makes a new tensor
            name = BINARY_NAMES[op]
            if ta in NUMPY_SCALARS and name not in _NUMPY_YIELDS:
                raise Void("operand", f"a {ta.__name__} on the left of {name}")
            self._tensor_operands(_BINARY_METHODS[name], a, b)
            if name == "floordiv" and ta not in PLAIN_TENSORS:
                return (OPERATION, _BINARY[op], (a, b), None, self._after_number_divided, (a, b))
            return self.operation("call_function", f"_operator.{name}", _BINARY[op], (a, b), {})
        if id(a) in self.frozen or id(b) in self.frozen:
            return self._frozen_binary(a, b, op)
        self._operand(a, deeply=False)
        self._operand(b, deeply=False)
        if BINARY_NAMES[op] == "ior" and issubclass(ta, dict):
            for pair in b if issubclass(tb, (list, tuple)) else ():
                self.consume(pair)
        if op >= _IN_PLACE and issubclass(ta, _CHANGED_IN_PLACE) and id(a) in self.known:
            return self.write_in_place(a, b, BINARY_NAMES[op])
        if op in (6, 19) and ta is str:
            self._text_of(b)
        return (NATIVE, _BINARY[op], (a, b), None, self.checked, f"{BINARY_NAMES[op]}()")

    def _after_number_divided(self, result: Any, operands: Any) -> Answer:
        """`7 // tensor`: ATen divides tensors only, and the number takes the result's dtype."""
        number, divisor = self.refs(operands[0]), operands[1]
        dtype = result.dtype
        limits = None if dtype.is_floating_point or dtype is torch.bool else torch.iinfo(dtype)
        if limits is None or not limits.min <= number <= limits.max:
            if not dtype.is_floating_point:
                raise Void("operand", f"{number!r} as {dtype}")
        options = {"dtype": dtype, "requires_grad": False}
        made = self.add_operation("torch.full_like", (self.tensor_ref(divisor), number), options)
        return self.after_operation(
            result,
            ("call_function", "_operator.floordiv", (made, self.tensor_ref(divisor)), {}),
        )

    def _own_operator(self, a: Any, b: Any, name: str) -> bool:
        """A user's object that says itself, in Python, what an operator with a tensor is."""
        left = type(b) in PLAIN_TENSORS
        value = a if left else b
        kind = type(value)
        if kind in CONSTANT_TYPES or kind in PLAIN_TENSORS or not is_python_class(kind):
            return False
        if id(value) not in self.known and id(value) not in self.fresh:
            return False
        methods = _BINARY_METHODS[name]
        own = []
        for method in methods[:-1] if left else methods[-1:]:
            found = class_lookup(kind, method, self.missing)
            self.guards.add_class_attribute(kind, method, found)
            own.append(type(found) is types.FunctionType)
        foreign = class_lookup(kind, "__torch_function__", self.missing)
        self.guards.add_class_attribute(kind, "__torch_function__", foreign)
        return any(own) and foreign is self.missing

    def _frozen_binary(self, a: Any, b: Any, op: int) -> Answer:
        """An operator of what a fold made, an array of constants."""
        for value in (a, b):
            if id(value) not in self.frozen and not is_constant(value):
                raise Void("opaque_operation", f"operator on a {type(value).__name__}")
        if op >= _IN_PLACE:
            raise Void("opaque_operation", f"in-place {BINARY_NAMES[op]} on a {type(a).__name__}")
        return (FOLD, _BINARY[op], (a, b), None, self.after_fold, _BINARY[op])

    def after_fold(self, value: Any, f: Any) -> Answer:
        """Post of a fold of constants: constants, or what nobody else holds and nothing changes."""
        kind = type(value)
        if kind in (list, tuple, dict):
            for part in (*value.keys(), *value.values()) if kind is dict else value:
                self.after_fold(part, f)
        elif kind in NUMPY_SCALARS:
            if not cmath.isfinite(value.item()):  # a warning went with it, perhaps
                raise Void("opaque_call", f"{f.__name__} gave {value!r}")
        elif kind in FOLDED_RESULTS:
            self.frozen[id(value)] = value
        elif kind not in CONSTANT_TYPES and kind not in BUILTIN_ITERATORS:
            raise Void("opaque_call", f"{f.__name__} gave a {kind.__name__}")
        return None

    def compare(self, a: Any, b: Any, op: str) -> Answer:
        ta, tb = type(a), type(b)
        if ta in CONSTANT_TYPES and tb in CONSTANT_TYPES:
            return None
        if ta in PLAIN_TENSORS or tb in PLAIN_TENSORS:
            if a is None or b is None:
                return (op == "!=",) if op in ("==", "!=") else None
            name = _COMPARE[op]
            if ta in NUMPY_SCALARS:
                raise Void("operand", f"a {ta.__name__} on the left of {op}")
            f = getattr(operator, name)
            self._tensor_operands(_COMPARE_METHODS[name], a, b)
            return self.operation("call_function", f"_operator.{name}", f, (a, b), {})
        self._operand(a)
        self._operand(b)
        self.check_nans(a, b)
        self._identity_counts(a, b)
        f = getattr(operator, _COMPARE[op])
        return (NATIVE, f, (a, b), None, self.checked, f"comparison {op}")

    def _tensor_operands(self, methods: tuple[str, ...], *operands: Any) -> None:
        for operand in operands:
            if type(operand) in PLAIN_TENSORS:
                self.tensor_class(operand, *methods)

    def _operand(self, value: Any, deeply: bool = True) -> None:
        """An operand that C code will read: containers (to compare them, deeply), others by
        their own methods."""
        kind = type(value)
        if kind in CONSTANT_TYPES or is_static(value):
            self.pin_function(value)
            return
        if kind in BUILTIN_CONTAINERS or issubclass(
            kind, (tuple, list, dict, set, frozenset, collections.deque)
        ):
            self.consume_deeply(value) if deeply else self.consume(value)
        elif not is_python_class(kind) or issubclass(kind, torch.Tensor):
            raise Void("opaque_operation", f"operator on a {kind.__name__}")
        elif id(value) not in self.known and id(value) not in self.fresh:
            raise Void("unknown_value", f"operator on a {kind.__name__}")

    @staticmethod
    def check_nans(container: Any, *others: Any) -> None:
        """C code compares what lies in containers: a NaN is equal to itself as an object only.

        Errors: Void where it may meet one on both sides.
        """
        if type(container) in CONSTANT_TYPES or not has_nan(container):
            return
        if any(has_nan(other) for other in others):
            raise Void("container", "a NaN, which only equals itself as an object")

    def _identity_counts(self, a: Any, b: Any) -> None:
        """The outcome may hang on whether two known objects are one (object.__eq__)."""
        if type(a) in CONSTANT_TYPES or type(b) in CONSTANT_TYPES:
            return
        if is_constant(a) and is_constant(b) and not (has_nan(a) or has_nan(b)):
            return
        self.is_(a, b)

    def is_(self, a: Any, b: Any) -> Answer:
        if type(a) is type(b) and type(a) in VALUE_TYPES and is_constant(a) and is_constant(b):
            self._guard_identity(a, b)
        if a is b or type(a) in CONSTANT_TYPES or type(b) in CONSTANT_TYPES:
            return None
        sa, sb = self.source_of(a), self.source_of(b)
        if sa is not None and sb is not None and not (is_fixed(a) and is_fixed(b)):
            self.guards.add(sa, "NOT_SAME", sb)
        return None

    def _guard_identity(self, a: Any, b: Any) -> None:
        """Guards look at values: whether equal ones are one object has to be asked for."""
        if a is not b:
            if a == b:
                raise Void("unknown_value", "whether two equal values are one object")
            return
        if id(a) in self.read_at:
            first, *others = self.read_at[id(a)][1].values()
            for other in others:
                self.guards.add(first, "SAME", other)

    def unary(self, a: Any, op: str) -> Answer:
        if type(a) in PLAIN_TENSORS:
            name = _UNARY[op]
            f = getattr(operator, name)
            self.tensor_class(a, f"__{name}__")
            return self.operation("call_function", f"_operator.{name}", f, (a,), {})
        if type(a) in CONSTANT_TYPES:
            return None
        self._operand(a)
        f = getattr(operator, _UNARY[op])
        return (NATIVE, f, (a,), None, self.checked, f"unary {op}")

    # ---------------------------------------------------------------- truth

    def test(self, value: Any) -> Answer:
        if value is True or value is False or value is None:
            return None
        kind = type(value)
        if kind in PLAIN_TENSORS:
            self.tensor_class(value, "__bool__")
            return (self.speculate(value),)
        if kind in CONSTANT_TYPES or (is_static(value) and not issubclass(kind, enum.Enum)):
            return None
        if issubclass(kind, (tuple, list, dict, set, frozenset, collections.deque)):
            if class_lookup(kind, "__bool__") is None and not is_python_len(kind):
                self.length(value)
            return None
        if kind in BUILTIN_CONTAINERS:
            self.consume(value)
            return None
        if kind is re.Match and id(value) in self.frozen:
            return (True,)
        if id(value) in self.known or id(value) in self.fresh:
            for name in ("__bool__", "__len__"):
                found = class_lookup(kind, name, self.missing)
                self.guards.add_class_attribute(kind, name, found)
                if found is not self.missing:
                    self.check_own_code(value)
                    return (NATIVE, bool, (value,), None, None, None)
            return (True,)
        if kind in BUILTIN_ITERATORS or kind.__module__ in ("builtins", "functools"):
            return None
        raise Void("unknown_value", f"truth of a {kind.__name__}")

    def not_(self, value: Any) -> Answer:
        answer = self.test(value)
        if answer is None or len(answer) == 1:
            return None if answer is None else (not answer[0],)
        return (NATIVE, operator.not_, (value,), None, None, None)

    def length(self, value: Any) -> None:
        source = self.source_of(value)
        if source is None:
            return
        self.reads(value)
        if issubclass(type(value), (list, collections.deque)):
            self.length_before(value, source)
        else:
            before = self.before.get(id(value))
            self.guard_length(source, c_length(value) if before is None else len(before))

    # ----------------------------------------------------------- containers

    def contains(self, item: Any, container: Any) -> Answer:
        kind = type(container)
        if self._by_identity(item, container):
            return (NATIVE, operator.contains, (container, item), None, None, None)
        if kind in PLAIN_TENSORS or (type(item) in PLAIN_TENSORS and kind in BUILTIN_CONTAINERS):
            raise Void("value_from_tensor", "membership of tensors")
        source = self.source_of(container)
        if issubclass(kind, dict) and not _overrides(kind, "__contains__", dict):
            if source is not None and self.entry_known(container, item, source):
                return None
            self._operand_key(item)
            return (NATIVE, operator.contains, (container, item), None, None, None)
        if kind in BUILTIN_CONTAINERS or issubclass(
            kind, (list, tuple, set, frozenset, collections.deque)
        ):
            self.consume_deeply(container)
            self.consume_deeply(item)
            self.check_nans(container, item)
        elif kind in CONSTANT_TYPES or kind is enum.EnumMeta:
            return None
        elif source is None and id(container) not in self.fresh and not is_static(container):
            raise Void("unknown_value", f"membership in a {kind.__name__}")
        else:
            self.check_own_code(container)
        return (NATIVE, operator.contains, (container, item), None, None, None)

    def _by_identity(self, item: Any, container: Any) -> bool:
        """Membership of tensors and modules in a set made in the trace: hashed and compared by
        identity."""
        if type(container) is not set or id(container) in self.known:
            return False
        if not all(self._has_identity(value) for value in (item, *container)):
            return False
        for value in (item, *container):
            self.tell_apart(value)
        return True

    def _has_identity(self, value: Any) -> bool:
        kind = type(value)
        if kind in PLAIN_TENSORS:
            self.guards.add_class_attribute(kind, "__hash__", class_lookup(kind, "__hash__"))
            return True
        if not issubclass(kind, torch.nn.Module):
            return False
        for name in ("__hash__", "__eq__"):
            found = class_lookup(kind, name)
            self.guards.add_class_attribute(kind, name, found)
            if found is not object.__dict__[name]:
                return False
        return id(value) in self.known or id(value) in self.fresh

    def entry_known(self, table: Any, key: Any, source: Any) -> bool:
        """Guards presence or absence of one key of a known dict."""
        if not _is_key(key):
            self.consume(table)
            return False
        self.pin_function(key)
        value = dict.get(table, key, ABSENT)
        if self.is_written(table, key, value):
            return True
        if value is not ABSENT:
            self.track(value, source.child("dict_item", key))
        else:
            self.guards.add(source, "DICT_ABSENT", key)
        return True

    def _operand_key(self, key: Any) -> None:
        if not (is_constant(key) or is_fixed(key)):
            self.tell_apart(key)

    def subscr(self, obj: Any, key: Any) -> Answer:
        kind = type(obj)
        if kind in PLAIN_TENSORS:
            self.tensor_class(obj, "__getitem__")
            return self.operation(
                "call_function", "_operator.getitem", operator.getitem, (obj, key), {}
            )
        if kind in CONSTANT_TYPES:
            return None
        if type(key) in PLAIN_TENSORS:
            raise Void("value_from_tensor", "a tensor as an index")
        if issubclass(kind, type) or kind.__module__ == "typing":
            return None
        if issubclass(kind, dict) and not _overrides(kind, "__getitem__", dict):
            return self._dict_item(obj, key)
        if issubclass(kind, (list, tuple)) and not _overrides(kind, "__getitem__", list, tuple):
            return self._sequence_item(obj, key)
        if id(obj) in self.frozen and is_constant(key):
            return (FOLD, operator.getitem, (obj, key), None, self.after_fold, operator.getitem)
        if issubclass(kind, collections.deque) and not _overrides(kind, "__getitem__"):
            return self._sequence_item(obj, key)
        if kind in BUILTIN_CONTAINERS:
            raise Void("container", f"subscript of a {kind.__name__}")
        if id(obj) not in self.known and id(obj) not in self.fresh:
            raise Void("unknown_value", f"subscript of a {kind.__name__}")
        self.check_own_code(obj)
        return (NATIVE, operator.getitem, (obj, key), None, self.checked, "subscript")

    def _dict_item(self, obj: Any, key: Any) -> Answer:
        source = self.source_of(obj)
        missing = class_lookup(type(obj), "__missing__")
        if source is not None:
            self.entry_known(obj, key, source)
            if not dict.__contains__(obj, key) and missing is not None:
                raise Void("container_write", "__missing__ of a dict from outside")
        else:
            self._operand_key(key)
        return (NATIVE, operator.getitem, (obj, key), None, self.checked, "subscript")

    def _sequence_item(self, obj: Any, key: Any) -> Answer:
        source = self.source_of(obj)
        if source is None:
            return (NATIVE, operator.getitem, (obj, key), None, self.checked, "subscript")
        if type(key) is slice:
            self.consume(obj)
            return None
        self.reads(obj)
        if type(key) is not int and type(key) is not bool:
            return None
        self.length(obj)
        length = c_length(obj)
        index = key + length if key < 0 else int(key)
        if 0 <= index < length:
            if isinstance(obj, tuple):
                self.track(self.item_of(obj, index), source.child("tuple_item", index))
            else:
                self.sequence_item(obj, index, source)
        return None

    def setitem(self, obj: Any, key: Any, value: Any) -> Answer:
        kind = type(obj)
        if kind in PLAIN_TENSORS:
            self.tensor_class(obj, "__setitem__")
            return self.operation(
                "call_function", "_operator.setitem", operator.setitem, (obj, key, value), {}
            )
        if id(obj) not in self.known:
            if kind not in BUILTIN_CONTAINERS and id(obj) not in self.fresh:
                raise Void("unknown_value", f"item store to a {kind.__name__}")
            if issubclass(kind, dict):
                self.hashed(key)
            return None
        if kind in (dict, list) or (
            issubclass(kind, (dict, list)) and not _overrides(kind, "__setitem__", dict, list)
        ):
            return self.raw_setitem(obj, key, value)
        if is_python_class(kind):
            return None
        raise Void("container_write", f"item store to a {kind.__name__}")

    def raw_setitem(self, obj: Any, key: Any, value: Any) -> Answer:
        """dict.__setitem__ or list.__setitem__ on a known container."""
        if not is_constant(key) or type(key) is slice or has_nan(key):
            raise Void("container_write", "a store under a key that is no constant")
        source = self.source_of(obj)
        assert source is not None
        if issubclass(type(obj), dict):
            # Whether the key exists decides the dict's order afterwards.
            self.entry_known(obj, key, source)
            self.check_replaced(dict.get(obj, key))
        else:
            self.length_before(obj, source)
            length = c_length(obj)
            if type(key) not in (int, bool) or not -length <= key < length:
                return None  # it raises
            key = key + length if key < 0 else int(key)
            self.check_replaced_item(obj, key, source)
        self.effect("setitem", obj, key, value)
        if id(obj) in self.origins:
            self.origins[id(obj)][key] = ~id(value)
        else:
            self.written[id(obj), key] = id(value)
        return (
            NATIVE,
            builtin_method(type(obj), "__setitem__"),
            (obj, key, value),
            None,
            None,
            None,
        )

    def delitem(self, obj: Any, key: Any) -> Answer:
        if type(obj) in PLAIN_TENSORS:
            raise Void("delete", f"item of a {type(obj).__name__}")
        return self.delete_item(obj, key) if id(obj) in self.known else None

    # ------------------------------------------------------------ iteration

    def get_iter(self, obj: Any) -> Answer:
        kind = type(obj)
        if id(obj) in self.frozen:
            for part in list(obj):
                self.adopt_frozen(part, None)
            return None
        if kind in PLAIN_TENSORS:
            self.check_has_rows(obj)
            return self.operation("call_method", "unbind", torch.Tensor.unbind, (obj,), {})
        if id(obj) in self.known:
            if kind is types.GeneratorType or kind in BUILTIN_ITERATORS:
                raise Void("container", f"a {kind.__name__} from outside")
            families = (list, tuple, dict, set, frozenset, collections.deque)
            if issubclass(kind, families) or kind in BUILTIN_CONTAINERS:
                if not _overrides(kind, "__iter__", *families):
                    self.consume(obj)
            else:
                self.check_own_code(obj)
        elif issubclass(kind, (set, frozenset)):
            self.consume(obj)
        elif (
            kind not in CONSTANT_TYPES
            and kind not in BUILTIN_CONTAINERS
            and kind not in BUILTIN_ITERATORS
            and id(obj) not in self.fresh
            and not issubclass(kind, (tuple, list, type))
        ):
            raise Void("unknown_value", f"iteration over a {kind.__name__}")
        return None

    def check_has_rows(self, tensor: Any) -> None:
        """To iterate over the tensor is to iterate over what `unbind` gives."""
        self.tensor_class(tensor, "__iter__", "unbind")
        if tensor.dim() == 0:  # an error, whose type is another than that of unbind's
            raise Void("tensor_method", "__iter__ without a dimension")

    def unpack(self, obj: Any, _count: int) -> Answer:
        return self.get_iter(obj)

    def consume_event(self, obj: Any) -> Answer:
        return self.get_iter(obj)

    def match(self, value: Any, pattern: Any) -> Answer:
        """One test of a `match` statement; see `_match_class` in rewriter/opcodes.py."""
        if type(pattern) is tuple:
            self._match_class(value, *pattern)
        elif pattern == "class":
            self.matched_class = value
        elif type(value) in CONSTANT_TYPES or type(value) in PLAIN_TENSORS:
            return None
        elif issubclass(type(value), (list, tuple, dict)) or type(value) in BUILTIN_CONTAINERS:
            if pattern == "MATCH_KEYS" and class_lookup(type(value), "get") is not dict.get:
                raise Void("opaque_operation", f"match on the keys of a {type(value).__name__}")
            self.consume(value)
        elif not is_static(value) and not (id(value) in self.known or id(value) in self.fresh):
            raise Void("unknown_value", f"match on a {type(value).__name__}")
        elif pattern == "MATCH_KEYS":
            raise Void("opaque_operation", f"match on the keys of a {type(value).__name__}")
        return None

    def _match_class(self, value: Any, positional: int, names: tuple[str, ...]) -> None:
        """`case Class(...)`: an isinstance() and reads of attributes, done by one instruction."""
        cls, self.matched_class = self.matched_class, None
        if type(cls) is not type and type(cls) is not _TENSOR_META:
            raise Void("opaque_operation", "match on a class with a metaclass")
        kind = type(value)
        if kind not in CONSTANT_TYPES and kind not in PLAIN_TENSORS:
            self.check_value(value, "match")
            self.guards.add_class_attribute(kind, "__class__", class_lookup(kind, "__class__"))
            if class_lookup(kind, "__class__") is not object.__dict__["__class__"]:
                raise Void("opaque_operation", f"match on a {kind.__name__}")
        if not issubclass(kind, cls):
            return
        if positional:
            fields = class_lookup(cls, "__match_args__", self.missing)
            self.guards.add_class_attribute(cls, "__match_args__", fields)
            if type(fields) is tuple:
                names = (*fields[:positional], *names)
        for name in names:
            answer = self.attr(value, name)
            if answer is not None and len(answer) != 1:
                raise Void("opaque_operation", f"match on a computed attribute, {name!r}")

    # ----------------------------------------------------------------- text

    def format_(self, value: Any, _conversion: Any, _spec: Any) -> Answer:
        self._text_of(value)
        return None

    def _text_of(self, value: Any, depth: int = 0) -> None:
        """`value` is about to become text: no addresses, no tensor values, no unread state."""
        kind = type(value)
        if kind in NUMPY_SCALARS:
            raise Void("text_of_object", f"a {kind.__name__}")  # as numpy's options say
        if issubclass(kind, type):
            for name in ("__module__", "__qualname__"):
                self.guards.add(
                    self.assume_static(value).child("attribute", name),
                    "EQUALS",
                    getattr(value, name),
                )
            return
        if kind in CONSTANT_TYPES or issubclass(kind, (enum.Enum, types.ModuleType)):
            return
        if issubclass(kind, torch.Tensor):
            raise Void("value_from_tensor", "text of a tensor")
        if issubclass(kind, (tuple, list, dict, set, frozenset)) and depth < 20:
            self.consume(value)
            for part in dict.items(value) if issubclass(kind, dict) else value:
                self._text_of(part, depth + 1)
            return
        if issubclass(kind, BaseException):
            self.check_known_exception(value)
            for part in value.args:
                self._text_of(part, depth + 1)
            return
        own = class_lookup(kind, "__repr__") is not object.__repr__ or (
            class_lookup(kind, "__str__") is not object.__str__ and depth == 0
        )
        if own and is_python_class(kind) and (id(value) in self.known or id(value) in self.fresh):
            return  # text made by the class's own methods, in watched frames
        raise Void("text_of_object", f"a {kind.__name__}")

    def check_known_exception(self, value: BaseException) -> None:
        if id(value) in self.known:
            raise Void("text_of_object", f"a {type(value).__name__} from outside")

    # ------------------------------------------------- names and closures

    def deref(self, value: Any, cell: Any) -> Answer:
        found = self.cells.get(id(cell))
        if found is not None and not self.is_written(cell, "cell_contents", value):
            self.track(value, found[1])
        return None

    def glob(self, value: Any, name: str, namespace: dict[str, Any]) -> Answer:
        key = (id(namespace), name)
        if self.seen_globals.get(key, self) is value:
            return None
        if name in namespace and self.is_written(namespace, name, value):
            return None
        source = self.constant_source(namespace)
        if name in namespace:
            self.track(value, source.child("dict_item", name))
        else:
            self.guards.add(source, "DICT_ABSENT", name)
            builtins = self.constant_source(self.builtins)
            self.track(value, builtins.child("dict_item", name))
        self.seen_globals[key] = value
        return None

    def store_deref(self, value: Any, cell: Any) -> Answer:
        """A variable of an enclosing function, of this call or from outside."""
        found = self.cells.get(id(cell))
        if found is None:
            return None
        assert found[1].base is not None
        with contextlib.suppress(ValueError):  # it is empty
            self.check_replaced(cell.cell_contents, None if self.is_stored(cell) else found[1])
        self.known[id(cell)] = (cell, found[1].base)
        self.effect("setattr", cell, "cell_contents", value)
        self.written[id(cell), "cell_contents"] = id(value)
        return None

    def is_stored(self, cell: Any) -> bool:
        """Whether the trace itself has put into the cell what lies there."""
        return (id(cell), "cell_contents") in self.written

    def store_global(self, value: Any, name: str) -> Answer:
        namespace = running_frame().f_globals
        self.assume_static(namespace)
        self.raw_setitem(namespace, name, value)  # which CPython does
        self.seen_globals.pop((id(namespace), name), None)
        return None

    def delete_global(self, name: str) -> Answer:
        raise Void("global_store", name)

    def delete_deref(self, _cell: Any) -> Answer:
        raise Void("closure_store")

    def with_(self, manager: Any) -> Answer:
        kind = type(manager)
        if id(manager) in self.known or id(manager) in self.fresh:
            for name in ("__enter__", "__exit__"):
                found = class_lookup(kind, name, self.missing)
                self.guards.add_class_attribute(kind, name, found)
                if type(found) is types.FunctionType:
                    self.assume_static(found)
            return None
        raise Void("unknown_value", f"with a {kind.__name__}")

    def caught(self, error: Any) -> Answer:
        """An exception handler begins. Most exceptions follow from what is guarded.

        Errors: Void for those of names and modules that were not there: nothing was read.
        """
        if type(error) is NameError or issubclass(type(error), ImportError):
            raise Void("opaque_operation", f"a {type(error).__name__} that is caught")
        return None

    def imported(self, value: Any, name: str) -> Answer:
        """`import` or `from ... import`, which cannot be told apart: a module is the one that
        sys.modules has, anything may be an item of the module imported before."""
        finder = self.builtins["__import__"]
        self.guards.add(
            self.constant_source(self.builtins).child("dict_item", "__import__"), "IS", finder
        )
        holders = [m for m in self.imported_from if vars(m).get(name, self.missing) is value]
        for module in holders:
            self.track(value, self.constant_source(vars(module)).child("dict_item", name))
        if not issubclass(type(value), types.ModuleType):
            if not holders:
                raise Void("import", name)
            return None
        keys = {name, vars(value).get("__name__")}
        found = [key for key in keys if is_constant(key) and sys.modules.get(key) is value]
        if not found and not holders:
            raise Void("import", name)
        for key in found:
            source = self.constant_source(sys.modules).child("dict_item", key)
            self.guards.add(source, "IS", value)
        self.assume_static(value)
        self.imported_from = [value, *holders]
        return None

    # Of `accel.capture.container_writes`.
    delete_item: Callable[[Any, Any], Answer]
    write_in_place: Callable[[Any, Any, str], Answer]

    position_in_root: Callable[[], Any]  # of `accel.capture.recorder`

    seen_globals: dict[tuple[int, str], Any]
    builtins: dict[str, Any]
    imported_from: list[types.ModuleType]  # modules that the next item may come from
    missing: object
    matched_class: Any = None


def _is_key(key: Any) -> bool:
    """True for what a guard may look up in a dict: constants, static objects, tuples of them."""
    if type(key) is tuple and not is_constant(key):
        return all(is_constant(part) or type(part) is type for part in key)
    return (is_constant(key) or is_static(key)) and not (holds_numpy(key) or has_nan(key))


def is_python_len(kind: type) -> bool:
    return type(class_lookup(kind, "__len__")) is types.FunctionType


def _overrides(kind: type, name: str, *bases: type) -> bool:
    """True when a Python class changed what its builtin base does under `name`."""
    return type(class_lookup(kind, name)) is types.FunctionType
