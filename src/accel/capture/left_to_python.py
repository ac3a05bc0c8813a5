"""Functions that no recording looks into: Python runs them, between compiled code or at once.

In: functions and packages that the user disabled, and `accel.graph_break`; functions whose result
the user says is constant; those that he allows in graphs. Out: the answer to "may this call be
recorded". Invariant: functions are held weakly.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import accel
from accel.selection import inside

functions: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
allowed: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
constant: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
packages: set[str] = set()  # the driver's own, once there is one
_modules: dict[int, weakref.ref[Any]] = {}
functions.add(accel.graph_break)  # type: ignore[arg-type]


def is_left(function: Any) -> bool:
    """Whether Python shall run this function, by accel's word or torch.compiler.disable's."""
    return (
        function in functions
        or "_torchdynamo_disable" in function.__dict__
        or inside(function.__module__ or "", packages)
    )


def add_module(module: Any) -> None:
    """Python runs this very nn.Module, which may have an `__eq__` of its own."""
    key = id(module)
    _modules[key] = weakref.ref(module, lambda _: _modules.pop(key, None))


def discard_module(module: Any) -> None:
    _modules.pop(id(module), None)


def is_left_module(module: Any) -> bool:
    found = _modules.get(id(module))
    return found is not None and found() is module
