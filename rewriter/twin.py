"""Capture twins: a code object with trampolines where the recorder wants to watch.

In: a function's original code. Out: `build_twin` gives the same code with markers (strings)
where trampolines go, so it can be marshalled; `bind_twin` puts the trampolines in.
Invariant: with trampolines that do what their instruction does, a twin does what the original
does, with the same positions, the same cells and the same signature.
"""

from __future__ import annotations

import bisect
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from accel.rewriter.layout import (
    SUPPORTED,
    VERSION,
    RewriteError,
    assemble,
    decode,
    move_exceptions,
    move_lines,
    read_exceptions,
)
from accel.rewriter.opcodes import EXTRA_STACK, KEEP, MARKER, ROWS, Emitter

# Code that is called where it is made, so its twin goes with the function's twin. Every other
# nested function may live on after the recording and stays ordinary.
CALLED_AT_ONCE = frozenset({"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"})

_REFUSED = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


def is_twinnable(code: types.CodeType) -> bool:
    """Whether `build_twin` takes this code: functions and generators, not coroutines,
    class bodies or modules."""
    return (
        VERSION in SUPPORTED
        and bool(code.co_flags & inspect.CO_OPTIMIZED)
        and not code.co_flags & _REFUSED
    )


class TwinParts(NamedTuple):
    """What a twin does not share with its original; plain data, made of marshal's types."""

    code: bytes
    consts: tuple[object, ...]  # behind the original's: markers, names and numbers
    linetable: bytes
    exceptiontable: bytes
    nested: dict[int, TwinParts]  # index among the constants -> a comprehension's twin


def build_twin(code: types.CodeType) -> types.CodeType:
    """The twin of `code`, markers in place of trampolines.

    Errors: RewriteError, when the code has an instruction or a table we do not know.
    """
    return assemble_twin(code, twin_parts(code))


def assemble_twin(code: types.CodeType, parts: TwinParts) -> types.CodeType:
    """The twin of `code` made of its parts."""
    consts = list(code.co_consts)
    for i, nested in parts.nested.items():
        inner = consts[i]
        assert isinstance(inner, types.CodeType)
        consts[i] = assemble_twin(inner, nested)
    return code.replace(
        co_code=parts.code,
        co_consts=(*consts, *parts.consts),
        co_linetable=parts.linetable,
        co_exceptiontable=parts.exceptiontable,
        co_stacksize=code.co_stacksize + EXTRA_STACK,
    )


def twin_parts(code: types.CodeType) -> TwinParts:
    """Instruments `code`. Errors: as `build_twin`."""
    return _instrument(code, {})[0]


# Index of an instruction -> trampolines that are called before it: name and arguments.
Points = Mapping[int, Sequence[tuple[str, tuple[int, ...]]]]


def build_twin_with(code: types.CodeType, points: Points) -> types.CodeType:
    """A twin that also calls a trampoline at each of `points`, and announces what is stored in
    the function's own cells. Errors: as `build_twin`."""
    return assemble_twin(code, _instrument(code, points)[0])


def instruction_of(code: types.CodeType, points: Points, offset: int) -> int:
    """Which instruction of `code` lies at byte `offset` of its twin."""
    starts = _instrument(code, points)[1]
    return bisect.bisect_right(starts, offset // 2) - 1


def _instrument(code: types.CodeType, points: Points) -> tuple[TwinParts, list[int]]:
    """The twin's parts, and the unit at which each instruction's part begins."""
    if not is_twinnable(code):
        raise RewriteError(f"{code.co_qualname} has no twin")
    original = decode(code.co_code)
    ops, args, starts = original.ops, original.args, original.starts
    targets = original.jump_targets()
    landings = set(targets.values())
    if code.co_exceptiontable:
        index_of = {unit: i for i, unit in enumerate(starts)}
        landings.update(
            index_of[handler] for _, _, handler, _ in read_exceptions(code.co_exceptiontable)
        )
    free_start = len(set(code.co_varnames) | set(code.co_cellvars))
    e = Emitter(code.co_consts, code.co_names, code.co_freevars, free_start)
    e.watches_cells = bool(points)
    groups: list[int] = []
    jumps: dict[int, int] = {}
    new_ops, new_args, rows, keep = e.ops, e.args, ROWS, KEEP
    for i, op in enumerate(ops):
        groups.append(len(new_ops))
        for name, operands in points.get(i, ()):
            e.announce(name, operands)
        row = rows[op]
        if row is keep:
            new_ops.append(op)
            new_args.append(args[i])
        elif row is None:
            raise RewriteError(f"unknown instruction {op} in {code.co_qualname}")
        else:
            e.previous = -1 if i in landings else ops[i - 1]
            e.previous_arg = args[i - 1]
            row(e, op, args[i])
            if i in targets:
                jumps[e.jump] = targets[i]
    groups.append(len(new_ops))
    new_code, new_starts = assemble(new_ops, new_args, jumps, groups)
    unit_of = _unit_map(starts, new_starts)
    parts = TwinParts(
        new_code,
        tuple(e.added),
        move_lines(code.co_linetable, unit_of),
        move_exceptions(code.co_exceptiontable, unit_of),
        _nested_parts(code.co_consts),
    )
    return parts, new_starts


def _nested_parts(consts: tuple[object, ...]) -> dict[int, TwinParts]:
    nested = {}
    for i, value in enumerate(consts):
        if isinstance(value, types.CodeType):
            if value.co_name in CALLED_AT_ONCE and is_twinnable(value):
                nested[i] = twin_parts(value)
        elif isinstance(value, str) and value.startswith(MARKER):
            raise RewriteError("a constant of the program looks like a marker")
    return nested


def _unit_map(starts: list[int], new_starts: list[int]) -> list[int]:
    """Old unit -> new unit. Units inside an instruction go to its end."""
    unit_of = [0] * (starts[-1] + 1)
    before = 0
    for start, new in zip(starts, new_starts, strict=True):
        for unit in range(before, start):
            unit_of[unit] = new
        unit_of[start] = new
        before = start + 1
    return unit_of


def bind_twin(code: types.CodeType, trampolines: Mapping[str, object]) -> types.CodeType:
    """The twin with `trampolines[name]` in place of each marker, nested twins included.

    Errors: RewriteError, when a trampoline is missing.
    """
    return code.replace(co_consts=tuple([_bound(value, trampolines) for value in code.co_consts]))


def _bound(value: object, trampolines: Mapping[str, object]) -> object:
    if isinstance(value, str):
        if not value.startswith(MARKER):
            return value
        name = value[len(MARKER) :]
        if name not in trampolines:
            raise RewriteError(f"no trampoline {name!r}")
        return trampolines[name]
    if isinstance(value, types.CodeType) and value.co_name in CALLED_AT_ONCE:
        return bind_twin(value, trampolines)
    return value


__all__ = [
    "RewriteError",
    "TwinParts",
    "assemble_twin",
    "bind_twin",
    "build_twin",
    "build_twin_with",
    "instruction_of",
    "is_twinnable",
    "twin_parts",
]
