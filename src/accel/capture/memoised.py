"""What functools.lru_cache holds: whether a value that a recording took is memoised still.

In: the wrapper of a memoised function, a call's arguments. Out: the cache's value for them; a deep
guard. Invariant: the function that is memoised never runs here, and the cache's order and counts
stay as they are; a commit asks a bounded cache again, as the program does.
"""

from __future__ import annotations

import gc
from typing import Any

from accel import runtime

ABSENT = object()


def memoised(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the cache holds for a call, or ABSENT.

    Source: CPython 3.11 to 3.13, Modules/_functoolsmodule.c, lru_cache_make_key and
    lru_cache_tp_traverse, which tells of the table behind what a bounded cache keeps. That has links
    in its table, which it uses again for other values.
    """
    own, parameters = f.__dict__, f.cache_parameters()
    parts = gc.get_referents(f)
    key: Any = args
    if kwargs:
        mark = next((part for part in reversed(parts) if type(part) is object), ABSENT)
        key = (*key, mark, *(part for item in kwargs.items() for part in item))
    if parameters["typed"]:
        key = (*key, *map(type, args), *map(type, kwargs.values()))
    elif len(key) == 1 and type(key[0]) in (int, str):
        key = key[0]
    for part in reversed(parts):
        if type(part) is dict and part is not own:
            entry = part.get(key, ABSENT)
            bounded = parameters["maxsize"] is not None and entry is not ABSENT
            return runtime.native.memo_result(entry) if bounded else entry
    return ABSENT


class StillMemoised:
    """A deep guard on a memoised function: it still has this very value for these arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.value = value

    def __call__(self, f: Any) -> bool:
        return memoised(f, self.args, self.kwargs) is self.value
