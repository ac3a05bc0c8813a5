"""Binding: the arguments of a root's call, as locals, as (args, kwargs), by the user's names.

In: a code object and the values of its argument locals. Out: what a function of that code is
called with to bind to these. Invariant: no code of the user's runs here.
"""

from __future__ import annotations

import types
from typing import Any

from accel.capture.values import class_lookup
from accel.roots import Root


def argument_names(code: types.CodeType) -> list[str]:
    """The names of a function's argument locals, in co_varnames order."""
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return list(code.co_varnames[:count])


def starred_positions(code: types.CodeType) -> tuple[int, ...]:
    """Where *args and **kwargs are among the argument locals."""
    first = code.co_argcount + code.co_kwonlyargcount
    return tuple(range(first, first + bool(code.co_flags & 4) + bool(code.co_flags & 8)))


def call_arguments(
    code: types.CodeType, values: list[Any]
) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    """The (args, kwargs) that bind to these argument locals."""
    positional, kwonly = code.co_argcount, code.co_kwonlyargcount
    names = code.co_varnames
    args = tuple(values[:positional])
    kwargs = dict(zip(names[positional : positional + kwonly], values[positional:], strict=False))
    rest = positional + kwonly
    if code.co_flags & 4:
        args += values[rest]
        rest += 1
    if code.co_flags & 8:
        kwargs.update(values[rest])
    return args, kwargs or None


def module_arguments(values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    module, args, kwargs = values
    return (module, *args), kwargs


def parameter_names(root: Root) -> tuple[str, ...]:
    """What a module's `forward` calls its positional arguments."""
    forward = class_lookup(type(root.module()), "forward") if root.module is not None else None
    if not isinstance(forward, types.FunctionType):
        return ()
    code = forward.__code__
    return code.co_varnames[1 : code.co_argcount]
