"""Prologues: the instructions in front of a function's body that ask native dispatch.

In: a function's code object and the index of its entry. Out: a code object that first does

    r = __accel_prologue__(index, argument, ...)      # __accel_module_prologue__(self, ...)
    if r is not __accel_run_body__: RESUME; return r

Invariant: the body, its positions, its stack depths, the signature and the cells stay what
they were. The original travels inside the rewritten code object, so every copy still has it.

The prologue lies between the making of the cells and RESUME. A frame that has not come to its
RESUME is incomplete to CPython: not traced, not in a traceback, not seen by `sys._getframe`,
`warnings` or `super`. So what the prologue calls (a recording, say) sees the stack that the
body would have seen, less this frame. Source: `_PyFrame_IsIncomplete`, pycore_frame.h.
A call that is served has a RESUME of its own: without it a profiler would be told of its return
only, and take that for its caller's.

The names are looked up among the builtins: torch.compile cannot trace through a callable
constant, but through a global.
"""

from __future__ import annotations

import inspect
import types
from typing import Literal

from accel.rewriter.layout import (
    OPMAP,
    SUPPORTED,
    VERSION,
    RewriteError,
    encode,
    insert_lines,
    read_exceptions,
    write_exceptions,
)

Kind = Literal["function", "module", "backward"]

_CALLEES = {
    "function": "__accel_prologue__",  # with the entry's index first
    "module": "__accel_module_prologue__",
    "backward": "__accel_backward_prologue__",
}
_SENTINEL = "__accel_run_body__"
# The last constant of a rewritten code object is a pair of a tag and the original.
_TAG = "\0accel original"  # of code with a prologue
_NESTED_TAG = "\0accel nested"  # of code whose nested functions have prologues

_REFUSED = (
    inspect.CO_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_ITERABLE_COROUTINE
)
_NEEDED = inspect.CO_OPTIMIZED | inspect.CO_NEWLOCALS
_PRECALL = OPMAP.get("PRECALL")
_JUMP_IF_TRUE = OPMAP.get("POP_JUMP_IF_TRUE", OPMAP.get("POP_JUMP_FORWARD_IF_TRUE", 0))
_RESUME = OPMAP["RESUME"]
_SET_UP = frozenset(OPMAP[name] for name in ("MAKE_CELL", "COPY_FREE_VARS", "EXTENDED_ARG"))


def is_eligible(code: types.CodeType, *, lambdas: bool = False) -> bool:
    """Whether this is a plain function's code: no generator, coroutine, class body, module,
    comprehension or type-parameter scope; lambdas only when asked."""
    if VERSION not in SUPPORTED or code.co_flags & _NEEDED != _NEEDED or code.co_flags & _REFUSED:
        return False
    return not code.co_name.startswith("<") or (lambdas and code.co_name == "<lambda>")


def argument_count(code: types.CodeType) -> int:
    """How many locals hold arguments, `*args` and `**kwargs` included."""
    flags = code.co_flags
    return (
        code.co_argcount
        + code.co_kwonlyargcount
        + bool(flags & inspect.CO_VARARGS)
        + bool(flags & inspect.CO_VARKEYWORDS)
    )


def _tagged(code: types.CodeType, tag: str) -> types.CodeType | None:
    if code.co_consts:
        last = code.co_consts[-1]
        if type(last) is tuple and len(last) == 2 and last[0] == tag:
            original: types.CodeType = last[1]
            return original
    return None


def has_prologue(code: types.CodeType) -> bool:
    """Whether `insert_prologue` made this code object, or it is a copy of one it made."""
    return _tagged(code, _TAG) is not None


def original_code(code: types.CodeType) -> types.CodeType:
    """The code object as the compiler made it, its nested functions too; code that was not
    rewritten is its own original."""
    code = _tagged(code, _TAG) or code
    return _tagged(code, _NESTED_TAG) or code


def insert_prologue(
    code: types.CodeType,
    index: int,
    kind: Kind = "function",
    body: types.CodeType | None = None,
) -> types.CodeType:
    """The code with a prologue for the entry `index` (of the kind "function"); with
    `body` (the same function with islands) behind it instead of its own, if given.

    Errors: RewriteError, when `code` is not eligible, has a prologue, or has a shape we do
    not know.
    """
    if not is_eligible(code, lambdas=True):
        raise RewriteError(f"{code.co_qualname} cannot have a prologue")
    if has_prologue(code):
        raise RewriteError(f"{code.co_qualname} has a prologue")
    return _spliced(code, body or code, index, kind)


def with_nested(code: types.CodeType, nested: dict[int, types.CodeType]) -> types.CodeType:
    """`code` with other nested code objects, by their index among the constants."""
    consts = list(code.co_consts)
    for i, inner in nested.items():
        consts[i] = inner
    if code.co_flags & inspect.CO_OPTIMIZED:  # a function; classes and modules run once
        consts.append((_NESTED_TAG, code))
    return code.replace(co_consts=tuple(consts))


def under_prologue(code: types.CodeType) -> types.CodeType:
    """The code without its own prologue; its nested functions keep theirs."""
    return _tagged(code, _TAG) or code


def entry_index(code: types.CodeType) -> int | None:
    """The entry that a function's prologue calls; None without one (or with one of another kind)."""
    if _tagged(code, _TAG) is None:
        return None
    index = code.co_consts[-2] if len(code.co_consts) > 1 else None
    return index if type(index) is int else None


def _spliced(
    original: types.CodeType, code: types.CodeType, index: int, kind: Kind
) -> types.CodeType:
    raw = code.co_code
    at = _before_resume(raw)
    indexed = kind == "function"
    consts = (*code.co_consts, index) if indexed else code.co_consts
    names = code.co_names
    added = tuple(name for name in (_CALLEES[kind], _SENTINEL) if name not in names)
    names += added
    prologue = _instructions(code, names, len(consts) - 1 if indexed else None, _CALLEES[kind])
    units = len(prologue) // 2
    count = argument_count(code) + 2
    return code.replace(
        co_code=raw[:at] + prologue + raw[at:],
        co_consts=(*consts, (_TAG, original)),
        co_names=names,
        co_linetable=insert_lines(code.co_linetable, at // 2, units, at_first_line=2),
        co_exceptiontable=_shifted(code.co_exceptiontable, at // 2, units),
        co_stacksize=max(code.co_stacksize, count + 2),
    )


def _before_resume(raw: bytes) -> int:
    """The byte of the RESUME that begins the body."""
    at = 0
    while raw[at] in _SET_UP:
        at += 2
    if raw[at] != _RESUME:
        raise RewriteError("no RESUME at the start")
    return at


def _instructions(
    code: types.CodeType, names: tuple[str, ...], index_const: int | None, callee: str
) -> bytes:
    ops: list[int] = []
    args: list[int] = []

    def emit(name: str, arg: int = 0) -> None:
        ops.append(OPMAP[name])
        args.append(arg)

    emit("LOAD_GLOBAL", names.index(callee) << 1 | 1)  # with a NULL
    if index_const is not None:
        emit("LOAD_CONST", index_const)
    cells = frozenset(code.co_cellvars)
    for i in range(argument_count(code)):
        # An argument that is a cell has the same index as its plain local.
        emit("LOAD_DEREF" if code.co_varnames[i] in cells else "LOAD_FAST", i)
    passed = argument_count(code) + (index_const is not None)
    if _PRECALL is not None:
        emit("PRECALL", passed)
    emit("CALL", passed)
    emit("COPY", 1)
    emit("LOAD_GLOBAL", names.index(_SENTINEL) << 1)
    emit("IS_OP", 0)
    ops.append(_JUMP_IF_TRUE)
    args.append(2)  # over the next two
    emit("RESUME")
    emit("RETURN_VALUE")
    emit("POP_TOP")
    return encode(ops, args)


def _shifted(table: bytes, at: int, units: int) -> bytes:
    if not table:
        return table
    entries = read_exceptions(table)
    if any(start < at or target < at for start, _, target, _ in entries):
        raise RewriteError("the start of the body lies in a try block")
    return write_exceptions(
        [(start + units, end + units, target + units, d) for start, end, target, d in entries]
    )


def remove_prologue(function: types.FunctionType) -> bool:
    """Gives a function the code back that the compiler made; False when it had it already."""
    original = original_code(function.__code__)
    if original is function.__code__:
        return False
    function.__code__ = original
    return True


__all__ = [
    "RewriteError",
    "argument_count",
    "entry_index",
    "has_prologue",
    "insert_prologue",
    "is_eligible",
    "original_code",
    "remove_prologue",
    "under_prologue",
    "with_nested",
]
