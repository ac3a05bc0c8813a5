"""The verifier: is a rewritten code object one that CPython can run safely?

In: a code object. Out: nothing, or a RewriteError that says what is wrong and where.
Invariant checked: jumps and handlers land on instructions, every instruction is reached with
one stack depth, no depth exceeds `co_stacksize`, no handler unwinds to more than is there, and
the line table covers the code exactly. The `bytecode` library, which shares no code with
`layout`, must read the same instructions.

For tests and verification mode; it costs about a millisecond a code object.
"""

from __future__ import annotations

import dis
import types

import bytecode

from accel.rewriter.layout import (
    OPMAP,
    Instructions,
    RewriteError,
    decode,
    line_entries,
    read_exceptions,
)

_ENDS = frozenset(
    OPMAP[name]
    for name in (
        "RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "JUMP_FORWARD",
        "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "INTERPRETER_EXIT",
    )
    if name in OPMAP
)  # fmt: skip

_RETURN_GENERATOR = OPMAP["RETURN_GENERATOR"]


def check_code(code: types.CodeType) -> int:
    """Checks one code object; returns the deepest stack it needs.

    Errors: RewriteError.
    """
    instructions = decode(code.co_code)
    _check_reading(code, instructions)
    covered = sum(units for _, _, units in line_entries(code.co_linetable))
    if covered != instructions.starts[-1]:
        raise RewriteError(f"{code.co_qualname}: the line table covers {covered} units")
    deepest = max(_depths(code, instructions).values())
    if deepest > code.co_stacksize:
        raise RewriteError(f"{code.co_qualname}: needs {deepest}, has {code.co_stacksize}")
    return deepest


def _check_reading(code: types.CodeType, instructions: Instructions) -> None:
    theirs = [
        (read.opcode, read.arg if type(read.arg) is int else 0)
        for read in bytecode.ConcreteBytecode.from_code(code)
        if read.name != "CACHE"
    ]
    if theirs != list(zip(instructions.ops, instructions.args, strict=True)):
        raise RewriteError(f"{code.co_qualname}: `bytecode` reads other instructions")


def _depths(code: types.CodeType, instructions: Instructions) -> dict[int, int]:
    """Index of each reachable instruction -> the stack depth it is reached with."""
    starts, ops, args = instructions.starts, instructions.ops, instructions.args
    index_of = {unit: i for i, unit in enumerate(starts)}
    targets = instructions.jump_targets()
    depths: dict[int, int] = {}
    todo = [(0, 0)]
    for start, end, handler, packed in read_exceptions(code.co_exceptiontable):
        if start not in index_of or end not in index_of or handler not in index_of:
            raise RewriteError(f"{code.co_qualname}: exception table off the instructions")
        todo.append((index_of[handler], (packed >> 1) + (packed & 1) + 1))
    while todo:
        i, depth = todo.pop()
        while True:
            known = depths.setdefault(i, depth)
            if known != depth:
                raise RewriteError(f"{code.co_qualname}: depths {known}, {depth} at {starts[i]}")
            op = ops[i]
            arg = args[i] if op >= dis.HAVE_ARGUMENT else None
            if i in targets:
                todo.append((targets[i], depth + dis.stack_effect(op, arg, jump=True)))
            depth += dis.stack_effect(op, arg, jump=False)
            if op == _RETURN_GENERATOR and depth == known:
                depth += 1  # pushed when the generator first runs; 3.13 counts it itself
            if depth < 0:
                raise RewriteError(f"{code.co_qualname}: the stack runs out at {starts[i]}")
            if op in _ENDS or depths.get(i + 1) == depth:
                break
            i += 1
            if i == len(ops):
                raise RewriteError(f"{code.co_qualname}: runs past its end")
    _check_handlers(code, depths, index_of)
    return depths


def _check_handlers(code: types.CodeType, depths: dict[int, int], index_of: dict[int, int]) -> None:
    for start, end, _, packed in read_exceptions(code.co_exceptiontable):
        for i in range(index_of[start], index_of[end]):
            if i in depths and depths[i] < packed >> 1:
                raise RewriteError(f"{code.co_qualname}: handler unwinds to {packed >> 1}")


__all__ = ["check_code"]
