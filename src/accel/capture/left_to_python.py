"""Functions that no recording looks into: Python runs them, between compiled code or at once.

In: functions that the user disabled, and `accel.graph_break`; those whose result the user says is
constant; those that he allows in graphs. Out: the answer to "may this call be recorded". Invariant: functions are held weakly.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import accel

functions: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
allowed: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
constant: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
functions.add(accel.graph_break)  # type: ignore[arg-type]


def is_left(function: Any) -> bool:
    """Whether Python shall run this function, by accel's word or torch.compiler.disable's."""
    return function in functions or "_torchdynamo_disable" in function.__dict__
