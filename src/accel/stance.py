"""Stances: what accel may do with the calls of this process, set by the user for a while.

In: a row of `STANCES`. Out: the driver's stance, back to what it was at the end of a `with` block
or of a decorated call. Invariant: a stance decides which calls are recorded and whether compiled
code serves; it never changes what a call computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

# What each stance means for calls.
STANCES: dict[str, str] = {
    "default": "calls are recorded when they are due; compiled code serves the calls it fits",
    "force_eager": "every call runs eagerly, nothing is recorded",
    "eager_on_recompile": "compiled code serves the calls it fits, others run eagerly; nothing is "
    "recorded",
    "fail_on_recompile": "as eager_on_recompile, but a call of a compiled function that no "
    "compiled code fits raises accel.RecompileError",
}


def check_stance(name: object) -> str:
    """Errors: ValueError for what is no row of STANCES."""
    if not isinstance(name, str) or name not in STANCES:
        raise ValueError(f"{name!r} is no stance; there are {', '.join(STANCES)}")
    return name


class Stance:
    """A stance that has been set: goes back at the end of a `with` block, or makes of a function
    one that runs under it."""

    def __init__(self, name: str, set_stance: Callable[[str], str]) -> None:
        self._name, self._set = check_stance(name), set_stance
        self._before = set_stance(name)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._set(self._before)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self._set(self._before)  # it holds in the function's calls only
        name, set_stance = self._name, self._set

        @functools.wraps(function)
        def under_stance(*args: Any, **kwargs: Any) -> Any:
            before = set_stance(name)
            try:
                return function(*args, **kwargs)
            finally:
                set_stance(before)

        return under_stance
