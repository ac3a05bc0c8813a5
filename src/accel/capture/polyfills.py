"""Python versions of C functions that would run torch operations or truth tests unseen.

In: the C function's arguments. Out: its result. Recorded through twins of their own.
Invariant: same results, same order of calls on the arguments as CPython's C code.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable
from typing import Any


def sum_(iterable: Iterable[Any], /, start: Any = 0) -> Any:
    if isinstance(start, (str, bytes, bytearray)):
        raise TypeError(f"sum() can't sum {type(start).__name__}s")
    for value in iterable:
        start = start + value
    return start


def any_(iterable: Iterable[Any], /) -> bool:
    for value in iterable:  # noqa: SIM110  (`any` is what this is)
        if value:
            return True
    return False


def all_(iterable: Iterable[Any], /) -> bool:
    for value in iterable:  # noqa: SIM110
        if not value:
            return False
    return True


POLYFILLS: dict[int, Callable[..., Any]] = {
    id(builtins.sum): sum_,
    id(builtins.any): any_,
    id(builtins.all): all_,
}
