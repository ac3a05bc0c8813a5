"""What a recording does with numpy: scalars are constants, arrays made of constants are folded.

In: numpy, if the program has imported it. Out: rows for the call policy, and its scalar types.
Invariant: nothing here imports numpy; arrays from outside, and whatever draws random numbers,
have no row. No function or method named here writes to its operands.
"""

from __future__ import annotations

import sys
from typing import Any

_SCALARS = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool_"
# Functions of constants (ufuncs all are; these are not ufuncs).
_FUNCTIONS = (
    "prod sum mean std var min max amin amax any all cumsum cumprod argmax argmin argsort sort "
    "linspace arange logspace geomspace array asarray zeros ones full eye outer dot round clip "
    "concatenate stack flip reshape transpose diff where interp median isclose"
).split()
_METHODS = (
    "sum mean std var min max prod any all cumsum cumprod argmax argmin astype tolist item copy "
    "reshape flatten round clip dot transpose __len__"
).split()


def _numpy() -> Any:
    return sys.modules.get("numpy")


def scalar_types() -> frozenset[type]:
    numpy = _numpy()
    if numpy is None:
        return frozenset()
    return frozenset(getattr(numpy, name) for name in _SCALARS.split())


def array_type() -> type | None:
    numpy = _numpy()
    return None if numpy is None else numpy.ndarray


def callable_rows() -> dict[int, str]:
    """id -> rule of numpy's functions, which live as long as numpy."""
    numpy = _numpy()
    if numpy is None:
        return {}
    rows = {id(f): "fold_constants" for f in vars(numpy).values() if type(f) is numpy.ufunc}
    rows |= {id(kind): "fold_constants" for kind in scalar_types()}
    for name in _FUNCTIONS:
        f = getattr(numpy, name, None)
        if f is not None:
            rows[id(f)] = "fold_constants"
    return rows


def method_rows() -> dict[type, dict[str, str]]:
    kind = array_type()
    return {} if kind is None else {kind: dict.fromkeys(_METHODS, "fold_frozen_method")}
