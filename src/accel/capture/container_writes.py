"""Changes of containers from outside: `history.append`, `cache.pop(key)`, `metrics.update`, `del`.

In: calls of C methods, and instructions, that change a known list, deque, dict or set. Out: an
effect, which every commit carries out again, and what the container holds now: `origins` of lists
and deques, `written` of dicts. Invariant: what decides how a change turns out (a length, whether
a key is there, the members of a set) is guarded as it was when the call began.
"""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Callable
from typing import Any

from accel.capture.operators import OperatorEvents
from accel.capture.state import ABSENT, c_length
from accel.capture.steps import NATIVE, Answer, Void
from accel.capture.values import class_lookup, has_nan, is_constant, is_static


class ContainerWrites(OperatorEvents):
    """Rules for methods that change what they are called on."""

    def write_known(self, f: Any, obj: Any, rest: Any, kwargs: Any = None) -> Answer:
        """C method `f` of a container from outside, which it changes.

        Errors: Void when no rule says how.
        """
        kind = type(obj)
        method = c_method(kind, f.__name__)
        rule = next(
            (rules.get(f.__name__) for base, rules in _RULES if issubclass(kind, base)), None
        )
        if rule is None or method is None or f not in (method, method.__get__(obj)):
            raise Void("container_write", f"{f.__name__}() on {self.source_of(obj)}")
        function, counts = rule
        own = issubclass(kind, collections.OrderedDict) and kind is not collections.OrderedDict
        if (kwargs and function is not _update) or (own and _has_own_items(kind)):
            raise Void("container_write", f"{f.__name__}() on {self.source_of(obj)}")
        if len(rest) in counts:
            function(self, obj, method, *rest, **kwargs or {})
        # Otherwise it raises, and so does the call.
        return (NATIVE, method, (obj, *rest), kwargs or None, self.checked, f.__name__)

    def delete_item(self, obj: Any, key: Any) -> Answer:
        """`del container[key]`"""
        method = c_method(type(obj), "__delitem__")
        if method is None:
            raise Void("delete", f"item of a {type(obj).__name__}")
        return self.write_known(method, obj, (key,))

    def write_in_place(self, obj: Any, other: Any, name: str) -> Answer:
        """`container += other` and its like, `name` for short: the container itself comes out."""
        method = c_method(type(obj), f"__{name}__")
        if method is None:
            raise Void("container_write", f"in-place {name} on {self.source_of(obj)}")
        return self.write_known(method, obj, (other,))

    def grown(self, container: Any, value: Any, name: str) -> Answer:
        """A list, set or dict that is being built on the stack gets `value`. Where the first part of
        it was built before this recording began, it is from outside.

        Errors: Void when no rule says how, so that Python does it.
        """
        if id(container) in self.known:
            method = c_method(type(container), name)
            if method is None or name == "__setitem__":
                raise Void("container_write", f"{name} on {self.source_of(container)}")
            self.write_known(method, container, (value,))
        return None

    def put(self, obj: Any, index: int, value: Any) -> None:
        """The trace is about to put `value` at a position of a known list or deque."""
        self.origins[id(obj)].insert(index, ~id(value))

    def change(self, obj: Any, method: Any, *operands: Any) -> None:
        """`method` changes `obj` now, and at each commit."""
        self.effect("call", obj, method, *operands)


def _has_own_items(kind: type) -> bool:
    """Whether an OrderedDict's C code would call methods of the program's for items."""
    names = ("__setitem__", "__getitem__", "__delitem__", "__contains__", "__missing__", "__iter__")
    return any(type(class_lookup(kind, name)) is types.FunctionType for name in names)


def c_method(kind: type, name: str) -> Any:
    """The method of C that a container's class has under `name`; None where Python has its own."""
    found = class_lookup(kind, name)
    of_c = type(found) in (types.MethodDescriptorType, types.WrapperDescriptorType)
    return found if of_c else None


# --------------------------------------------------------------- lists and deques


def _append(state: ContainerWrites, obj: Any, method: Any, value: Any) -> None:
    if getattr(obj, "maxlen", None) is not None:
        source = state.source_of(obj)
        assert source is not None
        state.track(obj.maxlen, source.child("attribute", "maxlen"))
        state.length_before(obj, source)
        if c_length(obj) >= obj.maxlen:  # one falls out at the other end
            raise Void("container_write", f"a full deque at {source}")
    state.change(obj, method, value)
    state.put(obj, 0 if method.__name__ == "appendleft" else len(state.origins[id(obj)]), value)


def _extend(state: ContainerWrites, obj: Any, method: Any, values: Any) -> None:
    if type(values) not in (list, tuple) or values is obj:
        raise Void("container_write", f"{method.__name__}() with a {type(values).__name__}")
    state.consume(values)
    one_more = list.append if issubclass(type(obj), list) else collections.deque.append
    for value in values:
        _append(state, obj, one_more, value)


def _insert(state: ContainerWrites, obj: Any, method: Any, index: Any, value: Any) -> None:
    source = state.source_of(obj)
    if type(index) is not int or source is None:
        raise Void("container_write", f"insert() at a {type(index).__name__}")
    if getattr(obj, "maxlen", None) is not None:
        raise Void("container_write", "insert() into a bounded deque")
    if abs(index) > sys.maxsize:
        return  # it raises
    state.length_before(obj, source)  # the position counts from there, or ends there
    state.change(obj, method, index, value)
    state.put(obj, index, value)


def _pop(state: ContainerWrites, obj: Any, method: Any, index: Any = None) -> None:
    source = state.source_of(obj)
    assert source is not None
    given = () if index is None else (index,)
    place = (0 if method.__name__ == "popleft" else -1) if index is None else index
    state.length_before(obj, source)
    if type(place) is not int:
        raise Void("container_write", f"{method.__name__}() of a {type(place).__name__}")
    length = c_length(obj)
    if not -length <= place < length:
        return  # it raises
    place %= length
    state.sequence_item(obj, place, source)  # it is what comes out
    state.check_replaced(state.item_of(obj, place))
    state.change(obj, method, *given)
    del state.origins[id(obj)][place]


def _clear_sequence(state: ContainerWrites, obj: Any, method: Any) -> None:
    source = state.source_of(obj)
    assert source is not None
    state.length_before(obj, source)
    for index in range(c_length(obj)):
        state.check_replaced_item(obj, index, source)
    state.change(obj, method)
    state.origins[id(obj)].clear()


def _reverse(state: ContainerWrites, obj: Any, method: Any) -> None:
    source = state.source_of(obj)
    assert source is not None
    state.length_before(obj, source)
    state.change(obj, method)
    state.origins[id(obj)].reverse()


# -------------------------------------------------------------------------- dicts


def _remove_key(state: ContainerWrites, obj: Any, method: Any, key: Any, *default: Any) -> None:
    source = state.source_of(obj)
    if not is_constant(key) or has_nan(key) or source is None:
        raise Void("container_write", f"{method.__name__}() of a key that is no constant")
    if not state.entry_known(obj, key, source):
        raise Void("container_write", f"{method.__name__}() of a key that no guard may look up")
    if not dict.__contains__(obj, key):
        return  # it raises, or gives the default
    state.check_replaced(dict.__getitem__(obj, key))
    state.change(obj, method, key)
    state.written[id(obj), key] = id(ABSENT)


def _clear_dict(state: ContainerWrites, obj: Any, method: Any) -> None:
    keys = tuple(dict.keys(obj))
    if not all(is_constant(key) or is_static(key) for key in keys):
        raise Void("container_write", "clear() of a dict with objects as keys")
    state.consume(obj)
    for key in keys:
        state.check_replaced(dict.__getitem__(obj, key))
    state.change(obj, method)
    for key in keys:
        state.written[id(obj), key] = id(ABSENT)


def _update(state: ContainerWrites, obj: Any, method: Any, /, *others: Any, **more: Any) -> None:
    for other in (*others, more):
        if type(other) is not dict or other is obj:
            raise Void("container_write", f"{method.__name__}() with a {type(other).__name__}")
        state.consume(other)
        for key, value in other.items():
            state.raw_setitem(obj, key, value)


def _set_default(
    state: ContainerWrites, obj: Any, method: Any, key: Any, value: Any = None
) -> None:
    if not dict.__contains__(obj, key):
        state.raw_setitem(obj, key, value)
        return
    source = state.source_of(obj)
    assert source is not None
    state.entry_known(obj, key, source)


# --------------------------------------------------------------------------- sets


def _change_member(state: ContainerWrites, obj: Any, method: Any, value: Any) -> None:
    if type(value) is slice:
        return  # it raises
    if not is_constant(value) or has_nan(value):
        raise Void("container_write", f"{method.__name__}() of a {type(value).__name__}")
    state.consume(obj, in_order=False)
    if set.__contains__(obj, value) == (method.__name__ == "add"):
        return  # it changes nothing, or raises
    state.change(obj, method, value)


def _add_members(state: ContainerWrites, obj: Any, method: Any, *others: Any) -> None:
    add = c_method(type(obj), "add")
    kinds = (set, frozenset) if method.__name__ == "__ior__" else (list, tuple, set, frozenset)
    for other in others:
        if type(other) not in kinds or other is obj:
            raise Void("container_write", f"{method.__name__}() with a {type(other).__name__}")
        state.consume(other)
        for value in other:
            _change_member(state, obj, add, value)


def _clear_set(state: ContainerWrites, obj: Any, method: Any) -> None:
    state.consume(obj, in_order=False)
    state.change(obj, method)


# By the family of containers: what a method does, and with how many arguments.
_Rule = tuple[Callable[..., None], tuple[int, ...]]
_ENDS: dict[str, _Rule] = {
    "append": (_append, (1,)),
    "extend": (_extend, (1,)),
    "__iadd__": (_extend, (1,)),
    "insert": (_insert, (2,)),
    "clear": (_clear_sequence, (0,)),
    "reverse": (_reverse, (0,)),
}
_ANY = tuple(range(20))
_RULES: tuple[tuple[type, dict[str, _Rule]], ...] = (
    (list, {**_ENDS, "pop": (_pop, (0, 1)), "__delitem__": (_pop, (1,))}),
    (
        collections.deque,
        {**_ENDS, "appendleft": (_append, (1,)), "pop": (_pop, (0,)), "popleft": (_pop, (0,))},
    ),
    (
        dict,
        {
            "pop": (_remove_key, (1, 2)),
            "__delitem__": (_remove_key, (1,)),
            "clear": (_clear_dict, (0,)),
            "update": (_update, _ANY),
            "__ior__": (_update, (1,)),
            "setdefault": (_set_default, (1, 2)),
        },
    ),
    (
        set,
        {
            "add": (_change_member, (1,)),
            "discard": (_change_member, (1,)),
            "remove": (_change_member, (1,)),
            "update": (_add_members, _ANY),
            "__ior__": (_add_members, (1,)),
            "clear": (_clear_set, (0,)),
        },
    ),
)
