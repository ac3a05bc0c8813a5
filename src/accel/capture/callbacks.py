"""What C code is given in place of the program's callbacks and iterables, so that nothing it
does with them goes unseen.

In: a callback that C code would call without a frame (another C function, a partial object),
or an iterable whose elements C code would take apart or compare. Out: the same, in Python.
Invariant: same results, same order of calls. The functions run as twins: their `call`,
`iter` and `compare` events make the guards that the C code's reads deserve.
"""

from __future__ import annotations

import functools
import itertools
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# Builtin containers that C code reads without running a frame.
_READ_BY_C = (list, tuple, dict, set, frozenset)
_HASHED_BY_C = (dict, set, frozenset)

# Where C functions take a callback: position and keyword (None: has none).
CALLBACKS: dict[Any, tuple[int, str | None]] = {
    map: (0, None),
    filter: (0, None),
    functools.reduce: (0, None),
    itertools.accumulate: (1, "func"),
    itertools.dropwhile: (0, None),
    itertools.filterfalse: (0, None),
    itertools.starmap: (0, None),
    itertools.takewhile: (0, None),
}
# What they do for a callback of None.
_WITHOUT: dict[Any, Callable[..., Any]] = {
    filter: bool,
    itertools.filterfalse: bool,
    itertools.accumulate: operator.add,
}
# Read not only what they are given, but each of its elements too: the position of the iterable.
TAKES_APART: dict[Any, int] = {itertools.starmap: 1, itertools.chain.from_iterable: 0}


# Functions that hash the elements of what they are given.
HASH_PARTS: frozenset[Any] = frozenset({set, frozenset})
# Of classes and sets, those of their methods that do so.
HASHING_METHODS = frozenset(
    "fromkeys update union intersection difference symmetric_difference issubset issuperset "
    "isdisjoint intersection_update difference_update symmetric_difference_update".split()
)


def hashes_parts(f: Any) -> bool:
    """Whether a function of C makes keys or members of the elements of its arguments."""
    if type(f) is type:
        return f in HASH_PARTS
    owner = f.__objclass__ if hasattr(f, "__objclass__") else getattr(f, "__self__", None)
    kind = owner if isinstance(owner, type) else type(owner)
    return f.__name__ in HASHING_METHODS and issubclass(kind, _HASHED_BY_C)


def watched(callback: Callable[..., Any]) -> Callable[..., Any]:
    def call_back(*args: Any) -> Any:
        return callback(*args)

    return call_back


def watched_key(callback: Callable[..., Any] | None) -> Callable[..., Any]:
    """A sort key, or none: what it gives is compared by C code."""

    def key_of(value: Any) -> Any:
        if callback is not None:
            value = callback(value)
        if isinstance(value, _READ_BY_C):
            operator.eq(value, value)  # the event reads it deeply
        return value

    return key_of


def each_read(parts: Iterable[Any]) -> Iterator[Any]:
    """Every element is about to be read by C code as a whole."""
    for part in parts:
        if isinstance(part, _READ_BY_C):
            iter(part)
        yield part


def hashed(value: Any) -> None:
    """C code is about to hash `value`."""


def each_hashed(parts: Iterable[Any]) -> Iterator[Any]:
    """Every element is about to become a member of a set, or a key."""
    for part in parts:
        hashed(part)
        yield part


def each_pair(parts: Iterable[Any]) -> Iterator[Any]:
    """Every element is a key and what belongs to it."""
    for part in parts:
        if isinstance(part, _READ_BY_C):
            iter(part)
            for key in part:
                hashed(key)
                break
        yield part


def each_compared(parts: Iterable[Any]) -> Iterator[Any]:
    """Every element is about to be compared by C code."""
    for part in parts:
        if isinstance(part, _READ_BY_C):
            operator.eq(part, part)  # the event reads it deeply
        yield part


def runs_in_a_frame(callback: Any) -> bool:
    """True for Python functions and methods: the shim sees their frames."""
    function = callback.__func__ if type(callback) is types.MethodType else callback
    return type(function) is types.FunctionType


def without_callback(f: Any) -> Callable[..., Any] | None:
    return _WITHOUT.get(f)


INNER_CODES = frozenset(make(len).__code__ for make in (watched, watched_key))
