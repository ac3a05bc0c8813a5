"""Guards that Python code answers: what no native check compares.

In: a value as it was recorded. Out: callables that say of another one whether it is the same.
Invariant: they run nothing of the program's, and say no where they are in doubt.
"""

from __future__ import annotations

import collections
from typing import Any

from accel.capture.values import CONSTANT_BASES, NUMPY_SCALARS, is_constant


def base_value(value: Any) -> Any:
    """The int, float, str, bytes or complex that an instance of a class below one of them is."""
    base: Any = next(base for base in CONSTANT_BASES if issubclass(type(value), base))
    return complex.__add__(value, 0) if base is complex else base.__getnewargs__(value)[0]


class SameBase:
    """A deep guard: an instance of a class below int, float, str, bytes or complex is the same as
    such a value."""

    def __init__(self, value: Any) -> None:
        self.exact = exact(base_value(value))

    def __call__(self, value: Any) -> bool:
        return bool(exact(base_value(value)) == self.exact)


class KeyOrder:
    """A deep guard: an OrderedDict still has its keys in this order."""

    def __init__(self, keys: tuple[Any, ...]) -> None:
        self.keys = keys

    def __call__(self, value: Any) -> bool:
        return tuple(collections.OrderedDict.keys(value)) == self.keys


def exact(value: Any) -> Any:
    """A constant in a form that is equal only for one of its type and bits."""
    if type(value) is tuple:
        return tuple(exact(v) for v in value)
    if type(value) is slice:
        return slice, exact(value.start), exact(value.stop), exact(value.step)
    return type(value), value.tobytes() if type(value) in NUMPY_SCALARS else repr(value)


class SameConstant:
    """A deep guard: the same constant, which holds numpy scalars."""

    def __init__(self, value: Any) -> None:
        self.exact = exact(value)

    def __call__(self, value: Any) -> bool:
        return bool(is_constant(value) and exact(value) == self.exact)


class SameMembers:
    """A deep guard: a set holds the same constants and static objects in the same order. Equal
    sets have orders of their own: they hang on what was in them before."""

    def __init__(self, members: tuple[Any, ...]) -> None:
        self.members = members
        self.exact = tuple(map(exact, members))

    def __call__(self, value: Any) -> bool:
        now = tuple(value)
        return len(now) == len(self.members) and all(
            one is other or (is_constant(one) and exact(one) == exact)
            for one, other, exact in zip(now, self.members, self.exact, strict=True)
        )
