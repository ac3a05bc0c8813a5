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
