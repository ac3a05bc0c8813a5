"""Functions that no recording looks into: Python runs them, between compiled code.

In: functions that the user disabled, and `accel.graph_break`. Out: the answer to "may this call
be recorded". Invariant: functions are held weakly.
"""

from __future__ import annotations

import types
import weakref

import accel

functions: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
functions.add(accel.graph_break)  # type: ignore[arg-type]
