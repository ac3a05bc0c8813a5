"""The end of the interpreter: functions with prologues must run until the last `__del__`.

In: the names that prologues look up in `builtins`. Out: the same names, there to the end.
Invariant: CPython empties `builtins` while it finalises, and fills it again from a copy that it
took at its start (`finalize_restore_builtins_dict` in Python/pylifecycle.c, 3.11 and 3.12); what
is published here is in that copy too.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import gc
from typing import Any

_published: dict[str, Any] = {}


@functools.cache
def first_copy() -> dict[str, Any] | None:
    """The interpreter's own copy of `builtins`. The fewer objects are alive, the cheaper: one
    millisecond before torch is imported, some thirty after that."""
    for found in gc.get_referrers(builtins.__build_class__):
        if type(found) is not dict or found is vars(builtins):
            continue
        if "__import__" in found and "ValueError" in found:  # else it is the module's own copy
            return found
    return None


def publish(**names: Any) -> None:
    """Adds names to `builtins`, to stay there until the interpreter ends."""
    if not _published:
        atexit.register(_extend_copy)
    _published.update(names)
    vars(builtins).update(names)


def _extend_copy() -> None:
    copy = first_copy()
    if copy is not None:
        copy.update(_published)
