"""What functools.lru_cache holds: whether a value that a recording took is memoised still.

In: the wrapper of a memoised function, a call's arguments. Out: the cache's entry for them; a deep
guard. Invariant: the function that is memoised never runs here, and the cache's order and counts
stay as they are.
"""

from __future__ import annotations

import gc
from typing import Any

ABSENT = object()


def memoised(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache's entry for a call: a value or its link; ABSENT when there is none.

    Source: CPython 3.11 to 3.13, Modules/_functoolsmodule.c, lru_cache_make_key and lru_cache_tp_traverse.
    """
    parts = [part for part in gc.get_referents(f) if part is not f.__dict__]
    is_typed = f.cache_parameters()["typed"]
    key: Any = args
    if kwargs:
        mark = next((part for part in parts if type(part) is object), ABSENT)
        key = (*key, mark, *(part for item in kwargs.items() for part in item))
    if is_typed:
        key = (*key, *map(type, args), *map(type, kwargs.values()))
    elif len(key) == 1 and type(key[0]) in (int, str):
        key = key[0]
    table = next((part for part in parts if type(part) is dict), {})
    return table.get(key, ABSENT)


class StillMemoised:
    """A deep guard on a memoised function: the same entry, made anew after a clear(), is there."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.entry = entry

    def __call__(self, f: Any) -> bool:
        return memoised(f, self.args, self.kwargs) is self.entry
