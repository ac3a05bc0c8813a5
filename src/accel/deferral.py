"""Deferral: which of two roots, one inside the other, is recorded first.

In: a root whose call is due, and the roots whose bodies are running around it. Out: whether it
waits for one of those. Invariant: nobody waits for ever: a root waits for others a bounded number
of times, and for the first call of a module a bounded time.
"""

from __future__ import annotations

import time
import types
from collections.abc import Iterable

from accel.capture.values import class_lookup
from accel.rewriter import prologue
from accel.roots import Limits, Root
from accel.selection import inside


def defers(root: Root, enclosing_roots: Iterable[Root], limits: Limits) -> bool:
    """True when an enclosing candidate should be judged before this inner root."""
    counts = False
    for enclosing in enclosing_roots:
        if (
            enclosing.kind == "module"
            and enclosing.state != "blacklisted"
            and _is_forward_of(root, enclosing)
        ):
            return True  # the module itself is the better root of the two
        if enclosing.state == "compiled":
            counts = True  # it misses this one call only, unless it goes on missing
        elif enclosing.state == "compiling" or enclosing.is_recording:
            return True
        elif not enclosing.judged and not enclosing.recordings:
            if enclosing.entry.calls > 1:
                return True  # it is due itself
            # In its first call: a module is likely to be called again, a main() is not.
            if enclosing.kind == "module" and _is_young(enclosing, limits):
                return True
            counts = True
    if not counts or root.deferrals >= limits.max_deferrals:
        return False
    root.deferrals += 1
    return True


def _is_young(root: Root, limits: Limits) -> bool:
    """Whether its first call has not been running for long."""
    now = time.monotonic()
    if not root.first_seen_s:
        root.first_seen_s = now
    return now - root.first_seen_s < limits.first_call_s


def own_forward(root: Root) -> types.FunctionType | None:
    """The `forward` of a root's module, which may be split in its place; None if it is torch's."""
    module = root.module() if root.module is not None else None
    forward = class_lookup(type(module), "forward")
    if isinstance(forward, types.FunctionType) and not inside(forward.__module__ or "", {"torch"}):
        return forward
    return None


def _is_forward_of(root: Root, enclosing: Root) -> bool:
    """True when a function root is the `forward` of the module that is being called."""
    module = enclosing.module() if enclosing.module is not None else None
    forward = class_lookup(type(module), "forward")
    return (
        isinstance(forward, types.FunctionType)
        and root.code is not None
        and (prologue.original_code(forward.__code__) == root.code)
    )


__all__ = ["defers", "own_forward"]
