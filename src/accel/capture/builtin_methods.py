"""Methods of builtin types: what `dict.get`, `list.append`, `object.__reduce_ex__` and their like
do to a recording.

In: calls of C methods that a row of `policy.METHODS` covers. Out: a step for the trampoline.
Invariant: a rule is a method `_method_NAME`, found by its name in the table.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from accel.capture.builtin_rules import BuiltinRules
from accel.capture.callbacks import hashes_parts
from accel.capture.steps import FOLD, NATIVE, Answer, Void
from accel.capture.values import (
    BUILTIN_CONTAINERS,
    builtin_method,
    class_lookup,
    is_python_class,
    is_static,
)

_OBJECT_GETSTATE = getattr(object, "__getstate__", None)  # since CPython 3.11


class BuiltinMethods(BuiltinRules):
    """Rules for methods."""

    def _method_dict_get(self, f: Any, table: Any, rest: Any, kwargs: Any) -> Answer:
        source = self.source_of(table)
        if source is not None and rest and self.entry_known(table, rest[0], source):
            if dict.__contains__(table, rest[0]):
                return (dict.__getitem__(table, rest[0]),)
        elif rest:
            self.hashed(rest[0])
        return (NATIVE, f, self._call_args(f, table, rest), None, self.checked, "dict.get()")

    def _method_subscr(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self.subscr(obj, *rest) and (
            NATIVE,
            f,
            self._call_args(f, obj, rest),
            None,
            self.checked,
            "__getitem__",
        )

    def _method_contains(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        self.contains(rest[0], obj)
        return (NATIVE, f, self._call_args(f, obj, rest), None, None, None)

    def _method_setitem(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if id(obj) in self.known:
            method = builtin_method(type(obj), "__setitem__")
            if f not in (method, method.__get__(obj)):  # type: ignore[attr-defined]
                raise Void("container_write", f"{f.__name__}() of a base class")
            return self.raw_setitem(obj, *rest)
        self.hashed(rest[0])
        return None

    def _method_setdefault(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        source = self.source_of(obj)
        if source is None:
            self.hashed(rest[0])
            return (NATIVE, f, self._call_args(f, obj, rest), None, self.checked, "setdefault()")
        return self.write_known(f, obj, rest, kwargs)

    def _method_append(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self.write_known(f, obj, rest, kwargs) if id(obj) in self.known else None

    def _method_extend(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        for value in rest:
            self._about_to_read(value)
        return self.write_known(f, obj, rest, kwargs) if id(obj) in self.known else None

    def _method_sort(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if kwargs.get("key") is not None:
            _, kwargs = self._watch_key((), kwargs)
        else:
            self.consume_deeply(obj)
        return self._method_write(f, obj, rest, kwargs)

    def _method_set_write(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """set.add and set.discard."""
        for value in rest if id(obj) not in self.known else ():
            self.hashed(value)
        return self._method_write(f, obj, rest, kwargs)

    def _method_compare_write(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """A write that looks its place up by comparing: list.remove."""
        for value in (obj, *rest):
            self.consume_deeply(value)
        self.check_nans(obj, *rest)
        return self._method_write(f, obj, rest, kwargs)

    def _method_update_pairs(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self._method_write(f, obj, tuple(self._pairs(v) for v in rest), kwargs)

    def _method_write(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        for value in (*rest, *kwargs.values()):
            self._about_to_read(value)
        if issubclass(type(obj), set):
            if hashes_parts(f):
                rest = tuple(map(self._hashed_parts, rest))
            elif f.__name__ == "pop":  # which one is a matter of order
                self.consume(obj)
        if id(obj) in self.known:
            return self.write_known(f, obj, rest, kwargs)
        if id(obj) not in self.fresh and type(obj) not in BUILTIN_CONTAINERS:
            raise Void("unknown_value", f"{f.__name__}() of a {type(obj).__name__}")
        return (NATIVE, f, self._call_args(f, obj, rest), kwargs or None, self.checked, f.__name__)

    def _method_initialise(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self._method_write(f, obj, rest, kwargs)

    def _method_object_setattr(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if issubclass(type(obj), (torch.Tensor, types.ModuleType, type)):
            raise Void("class_or_module_store", str(rest[0]))
        if id(obj) in self.known:
            return self.raw_setattr(obj, rest[0], rest[1])
        if id(obj) in self.fresh or issubclass(type(obj), BaseException):
            return None
        raise Void("unknown_value", f"store to a {type(obj).__name__}")

    def _method_object_delattr(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self.delattr(obj, *rest)

    def _method_object_getattribute(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if id(obj) not in self.known and id(obj) not in self.fresh:
            raise Void("unknown_value", f"attribute of a {type(obj).__name__}")
        answer = self.generic_attr(obj, *rest)
        if answer is not None and len(answer) == 1:
            return answer
        post, token = (answer[4], answer[5]) if answer is not None else (None, None)
        return (NATIVE, f, self._call_args(f, obj, rest), None, post, token)

    def _method_reduce(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """object.__reduce_ex__ of a plain instance, as copy.copy and deepcopy use it: class
        and instance dict."""
        kind = type(obj)
        plain = (
            is_python_class(kind)
            and class_lookup(kind, "__reduce__") is object.__reduce__
            and class_lookup(kind, "__getstate__") in (None, _OBJECT_GETSTATE)
            and not issubclass(kind, (tuple, list, dict, set, frozenset, int, str, float, bytes))
        )
        if not plain:
            raise Void("opaque_call", f"{kind.__name__}.__reduce_ex__")
        for name in ("__reduce__", "__getstate__", "__reduce_ex__"):
            self.guards.add_class_attribute(kind, name, class_lookup(kind, name, self.missing))
        return (FOLD, f, self._call_args(f, obj, rest), None, self._after_reduce, obj)

    def _after_reduce(self, value: Any, obj: Any) -> Answer:
        state = value[2] if len(value) > 2 else None
        if type(state) is dict and state is object.__getattribute__(obj, "__dict__"):
            self._after_dict(state, obj)
        elif state is not None:
            raise Void("opaque_call", f"{type(obj).__name__}.__reduce_ex__ with slots")
        for part in value[:2]:
            if is_static(part):
                self.assume_static(part)
        for part in value[1]:
            self.check_value(part, "__reduce_ex__")
        return None

    def _method_text_write(self, f: Any, stream: Any, rest: Any, kwargs: Any) -> Answer:
        """What print does, by its own name."""
        if len(rest) != 1 or type(rest[0]) is not str or kwargs:
            raise Void("opaque_call", "write() of what is not one text")
        self.write_texts(stream, [rest[0]], False)
        return (FOLD, f, self._call_args(f, stream, rest), None, None, None)

    def _method_text_flush(self, f: Any, stream: Any, rest: Any, kwargs: Any) -> Answer:
        self.write_texts(stream, [], True)
        return (FOLD, f, self._call_args(f, stream, rest), None, None, None)

    def _method_object_eq(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        self._identity_counts(obj, *rest)
        return None
