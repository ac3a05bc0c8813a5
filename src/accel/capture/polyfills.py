"""Python versions of C functions that would run torch operations or truth tests unseen.

In: the C function's arguments. Out: its result. Recorded through twins of their own.
Invariant: same results, same order of calls on the arguments as CPython's C code.
"""

from __future__ import annotations

import builtins
import collections
from collections.abc import Callable, Iterable
from typing import Any

import torch


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


def get_items(obj: Any, key: Any, *keys: Any) -> Any:
    """operator.itemgetter(key, *keys)(obj)"""
    return (obj[key], *(obj[k] for k in keys)) if keys else obj[key]


def get_attributes(obj: Any, path: str, *paths: str) -> Any:
    """operator.attrgetter(path, *paths)(obj)"""
    found = []
    for dotted in (path, *paths):
        value = obj
        for name in dotted.split("."):
            value = getattr(value, name)
        found.append(value)
    return tuple(found) if paths else found[0]


def call_named(obj: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """operator.methodcaller(name, *args, **kwargs)(obj)"""
    return getattr(obj, name)(*args, **kwargs)


def call_with_rows(function: Any, first: int, /, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), which iterates over its arguments from number `first` on."""
    iterables = [
        value.unbind() if isinstance(value, torch.Tensor) else value for value in args[first:]
    ]
    return function(*args[:first], *iterables, **kwargs)


def count_elements(mapping: Any, iterable: Iterable[Any]) -> None:
    """collections._count_elements, which Counter calls."""
    for element in iterable:
        mapping[element] = mapping.get(element, 0) + 1


POLYFILLS: dict[int, Callable[..., Any]] = {
    id(builtins.sum): sum_,
    id(builtins.any): any_,
    id(builtins.all): all_,
    id(collections._count_elements): count_elements,  # type: ignore[attr-defined]
}
