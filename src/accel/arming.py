"""Functions around an exit: what was inlined when Python had to take over gets its own turn.

In: the codes of the functions that a recording was in when it met what only Python can run. Out:
which of the program's functions become roots. Invariant: torch's own functions, the standard
library's and those that the user left to Python are never touched.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accel.capture import left_to_python
from accel.capture.twins import TwinFactory
from accel.rewriter import prologue

_NO_ROOT = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def may_be_root(code: types.CodeType) -> bool:
    """True for the code of a plain function: no generator, coroutine or class body."""
    return not code.co_flags & _NO_ROOT and bool(code.co_flags & inspect.CO_OPTIMIZED)


def functions_to_arm(
    twins: TwinFactory, codes: Iterable[types.CodeType], denied: Callable[[str], bool]
) -> Iterator[types.FunctionType]:
    """The functions whose twins have these codes and that may become roots."""
    for function in twins.running(set(codes)):
        code = prologue.original_code(function.__code__)
        if (
            may_be_root(code)
            and function not in left_to_python.functions
            and not _is_library(code.co_filename)
            and not denied(function.__module__ or "")
            and not _is_own_forward(function)
        ):
            yield function


def _is_own_forward(function: types.FunctionType) -> bool:
    """Whether this is what calls of a module run: the module is a root already, whose turn comes
    first. Of classes that cannot be found by name it is, too."""
    if function.__name__ != "forward":
        return False
    owner: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split(".")[:-1]:
        owner = vars(owner).get(name) if isinstance(owner, (type, types.ModuleType)) else None
    return not isinstance(owner, type) or vars(owner).get("forward") is function


@functools.lru_cache(4096)
def _is_library(filename: str) -> bool:
    """Whether a file belongs to torch, accel or the standard library."""
    paths = sysconfig.get_paths()
    inside = [os.path.join(paths[n], "") for n in ("purelib", "platlib")]
    own = [os.path.join(path, name, "") for path in inside for name in ("torch", "accel")]
    if filename.startswith((*own, os.path.join(os.path.dirname(__file__), ""), "<")):
        return True
    return filename.startswith(
        (os.path.join(paths["stdlib"], ""), os.path.join(paths["platstdlib"], ""))
    ) and not filename.startswith(tuple(inside))


__all__ = ["functions_to_arm", "may_be_root"]
