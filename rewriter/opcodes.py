"""What becomes of each instruction in a capture twin: one row an opcode, one table a version.

In: an `Emitter` and an instruction's argument. Out: the twin's instructions, appended to it.
Invariant: a row leaves the stack as its instruction would have left it, except that a NULL
beside a callable has become the `call` trampoline: the depths in the exception table hold.

Rules for whoever adds a row:
1. Every opcode of a version has a row, `KEEP` included; an opcode without one is an error.
2. A row may put at most `EXTRA_STACK` more on the stack than its instruction found or left.
3. A trampoline is called in the method form `[trampoline, argument, ...] CALL n`: it takes the
   place of the NULL, so no row shifts the values below.
4. The instruction's own work is done once: by the trampoline, or by the instruction kept
   behind it, never by both.
5. What the interpreter requires to be adjacent (FOR_ITER's END_FOR, SEND and its RESUME,
   KW_NAMES and CALL) is kept.

Source: Python/bytecodes.c of CPython 3.12 and 3.13, Python/ceval.c of 3.11.
"""

from __future__ import annotations

import dis
from collections.abc import Callable

from accel.rewriter.layout import OPMAP, VERSION, RewriteError

# Constants that stand for trampolines until `bind_twin`; unmarshalled with the twin.
MARKER = "\0accel:"
EXTRA_STACK = 4

_LOAD_CONST = OPMAP["LOAD_CONST"]
_SWAP = OPMAP["SWAP"]
_CALL_OPS = [OPMAP[name] for name in ("PRECALL", "CALL") if name in OPMAP]
_CALL_COUNT = len(_CALL_OPS)


class Emitter:
    """Instructions of a twin under construction, and the names its rows need."""

    __slots__ = (
        "_indices", "added", "args", "cells", "consts", "free_start", "jump", "names", "ops",
        "previous", "previous_arg", "watches_cells",
    )  # fmt: skip

    def __init__(
        self,
        consts: tuple[object, ...],
        names: tuple[str, ...],
        cells: tuple[str, ...],
        free_start: int,
    ) -> None:
        self.ops: list[int] = []
        self.args: list[int] = []
        self.consts = consts  # the original's
        self.added: list[object] = []  # go behind them
        self.names = names
        self.cells = cells  # names of the free variables
        self.free_start = free_start  # index of the first of them among the fast locals
        # The instruction before; -1 if this one can be jumped to.
        self.previous = -1
        self.previous_arg = 0
        self.watches_cells = False  # the function's own cells are announced too
        self.jump = -1  # index of the emitted jump that goes where the original went
        self._indices: dict[tuple[type, object], int] = {}

    def constant(self, value: object) -> int:
        key = (type(value), value)
        index = self._indices.get(key)
        if index is None:
            index = self._indices[key] = len(self.consts) + len(self.added)
            self.added.append(value)
        return index

    def emit(self, op: int, arg: int = 0) -> None:
        self.ops.append(op)
        self.args.append(arg)

    def load(self, value: object) -> None:
        self.ops.append(_LOAD_CONST)
        self.args.append(self.constant(value))

    def trampoline(self, name: str) -> None:
        self.ops.append(_LOAD_CONST)
        self.args.append(self.constant(MARKER + name))

    def call(self, count: int) -> None:
        self.ops += _CALL_OPS
        self.args += [count] * _CALL_COUNT

    def wrap(self, name: str, *extra: object) -> None:
        """[a] -> [name(a, *extra)]"""
        self.trampoline(name)
        self.emit(_SWAP, 2)
        for value in extra:
            self.load(value)
        self.call(len(extra))

    def wrap_two(self, name: str, *extra: object) -> None:
        """[a, b] -> [name(a, b, *extra)]"""
        self.trampoline(name)
        self.ops += (_SWAP, _SWAP)
        self.args += (3, 2)
        for value in extra:
            self.load(value)
        self.call(1 + len(extra))

    def announce(self, name: str, operands: tuple[int, ...]) -> None:
        """[] -> []: name(*operands), at least one."""
        self.trampoline(name)
        for value in operands:
            self.load(value)
        self.call(len(operands) - 1)
        self.emit(OPMAP["POP_TOP"])

    def null_becomes_call(self) -> None:
        self.trampoline("call")

    def free_name(self, index: int) -> str | None:
        """Name of the free variable at this index of the fast locals; None: own cell."""
        return self.cells[index - self.free_start] if index >= self.free_start else None


Row = Callable[[Emitter, int, int], None]  # (emitter, opcode, argument)


def _keep(e: Emitter, op: int, arg: int) -> None:
    e.emit(op, arg)


KEEP: Row = _keep

# ------------------------------------------------------------------- names


def _load_global(e: Emitter, op: int, arg: int) -> None:
    if arg & 1:
        e.null_becomes_call()
    e.emit(op, arg & ~1)
    e.wrap("glob", e.names[arg >> 1])


def _store_global(e: Emitter, op: int, arg: int) -> None:
    e.wrap("store_global", e.names[arg])
    e.emit(op, arg)


def _delete_global(e: Emitter, op: int, arg: int) -> None:
    e.trampoline("delete_global")
    e.load(e.names[arg])
    e.call(0)
    e.emit(OPMAP["POP_TOP"])
    e.emit(op, arg)


# 3.13 keeps LOAD_CLOSURE for its compiler only: LOAD_FAST of a cell's slot loads the cell.
_LOAD_CELL = OPMAP.get("LOAD_CLOSURE", OPMAP["LOAD_FAST"])


def _load_deref(e: Emitter, op: int, arg: int) -> None:
    e.emit(op, arg)
    if e.free_name(arg) not in (None, "__class__"):
        e.trampoline("deref")
        e.emit(_SWAP, 2)
        e.emit(_LOAD_CELL, arg)
        e.call(1)


def _store_deref(e: Emitter, op: int, arg: int) -> None:
    if e.free_name(arg) is not None or e.watches_cells:
        e.trampoline("store_deref")
        e.emit(_SWAP, 2)
        e.emit(_LOAD_CELL, arg)
        e.call(1)
    e.emit(op, arg)


def _delete_deref(e: Emitter, op: int, arg: int) -> None:
    if e.free_name(arg) is not None or e.watches_cells:
        e.trampoline("delete_deref")
        e.emit(_LOAD_CELL, arg)
        e.call(0)
        e.emit(OPMAP["POP_TOP"])
    e.emit(op, arg)


def _imported(e: Emitter, op: int, arg: int) -> None:
    e.emit(op, arg)
    e.wrap("imported", e.names[arg])


# -------------------------------------------------------------- attributes, items


def _load_attr_311(e: Emitter, op: int, arg: int) -> None:
    e.wrap("attr", e.names[arg])


def _load_method_311(e: Emitter, op: int, arg: int) -> None:
    e.null_becomes_call()
    e.emit(_SWAP, 2)
    e.wrap("attr", e.names[arg])


def _load_attr_312(e: Emitter, op: int, arg: int) -> None:
    if arg & 1:
        _load_method_311(e, op, arg >> 1)
    else:
        e.wrap("attr", e.names[arg >> 1])


def _load_super_attr(e: Emitter, op: int, arg: int) -> None:
    # [super, class, self]: what it stands for, super(class, self).name, with an event for each.
    e.trampoline("call")
    for depth in (4, 3, 2):
        e.emit(_SWAP, depth)
    e.call(2)
    e.wrap("attr", e.names[arg >> 2])
    if arg & 1:
        e.null_becomes_call()
        e.emit(_SWAP, 2)


def _store_attr(e: Emitter, op: int, arg: int) -> None:
    e.trampoline("setattr")  # [value, object, T]
    e.emit(_SWAP, 3)  # [T, object, value]
    e.load(e.names[arg])
    e.call(2)
    e.emit(OPMAP["POP_TOP"])


def _delete_attr(e: Emitter, op: int, arg: int) -> None:
    e.wrap("delattr", e.names[arg])
    e.emit(OPMAP["POP_TOP"])


def _subscr(e: Emitter, op: int, arg: int) -> None:
    e.wrap_two("subscr")


def _store_subscr(e: Emitter, op: int, arg: int) -> None:
    e.trampoline("setitem")  # [value, object, key, T]
    e.emit(_SWAP, 4)  # [T, object, key, value]
    e.call(2)
    e.emit(OPMAP["POP_TOP"])


def _delete_subscr(e: Emitter, op: int, arg: int) -> None:
    e.wrap_two("delitem")
    e.emit(OPMAP["POP_TOP"])


def _binary_slice(e: Emitter, op: int, arg: int) -> None:
    e.emit(OPMAP["BUILD_SLICE"], 2)
    e.wrap_two("subscr")


def _store_slice(e: Emitter, op: int, arg: int) -> None:
    e.emit(OPMAP["BUILD_SLICE"], 2)
    _store_subscr(e, op, arg)


# --------------------------------------------------------------------- operators


def _binary_op(e: Emitter, op: int, arg: int) -> None:
    e.wrap_two("binary", arg)


def _unary(symbol: str) -> Row:
    def row(e: Emitter, op: int, arg: int) -> None:
        e.wrap("unary", symbol)

    return row


def _unary_not(e: Emitter, op: int, arg: int) -> None:
    e.wrap("not_")


def _compare(shift: int, bool_bit: int) -> Row:
    def row(e: Emitter, op: int, arg: int) -> None:
        e.wrap_two("compare", dis.cmp_op[arg >> shift])
        if arg & bool_bit:  # 3.13: the comparison makes its answer a bool itself
            e.wrap("test")
            e.emit(OPMAP["TO_BOOL"])

    return row


def _contains(e: Emitter, op: int, arg: int) -> None:
    e.wrap_two("contains")
    if arg:
        e.emit(OPMAP["UNARY_NOT"])


_SINGLETONS = (None, True, False, Ellipsis)


def _is(e: Emitter, op: int, arg: int) -> None:
    if e.previous == _LOAD_CONST and any(e.consts[e.previous_arg] is s for s in _SINGLETONS):
        e.emit(op, arg)
        return
    e.wrap_two("is_")
    if arg:
        e.emit(OPMAP["UNARY_NOT"])


# ------------------------------------------------------------------------- jumps

# What pushes an exact bool (or, for the matches, goes to a jump as one).
_MAKES_BOOL = frozenset(
    OPMAP[name]
    for name in (
        "UNARY_NOT", "IS_OP", "CONTAINS_OP", "CHECK_EXC_MATCH", "CHECK_EG_MATCH",
        "MATCH_MAPPING", "MATCH_SEQUENCE",
    )
)  # fmt: skip


def _jump(e: Emitter, op: int, arg: int) -> None:
    e.jump = len(e.ops)
    e.emit(op, arg)


def _jump_if(e: Emitter, op: int, arg: int) -> None:
    if e.previous not in _MAKES_BOOL:
        e.wrap("test")
    _jump(e, op, arg)


def _jump_if_or_pop(jump: str) -> Row:
    """The value itself stays where the jump goes; it is tested once, as a copy."""

    def row(e: Emitter, op: int, arg: int) -> None:
        e.emit(OPMAP["COPY"], 1)
        if e.previous not in _MAKES_BOOL:
            e.wrap("test")
        _jump(e, OPMAP[jump], arg)
        e.emit(OPMAP["POP_TOP"])

    return row


def _to_bool(e: Emitter, op: int, arg: int) -> None:
    e.wrap("test")
    e.emit(op, arg)


# ------------------------------------------------------- iteration and unpacking


def _before(name: str) -> Row:
    """The trampoline sees the value on top first; the instruction is kept."""

    def row(e: Emitter, op: int, arg: int) -> None:
        e.wrap(name)
        e.emit(op, arg)

    return row


def _grows(method: str, hashed: int = 0, consumes: bool = False) -> Row:
    """The container that lies `arg` below the top of the stack gets what lies on it; `hashed` is the
    depth of what becomes a key or member."""

    def row(e: Emitter, op: int, arg: int) -> None:
        if hashed:
            _announce_hashed(e, hashed)
        if consumes:
            e.wrap("consume")
        e.trampoline("grown")
        e.emit(OPMAP["COPY"], arg + 1 + max(hashed, 1))  # [..., value, T, container]
        e.emit(OPMAP["COPY"], 3)
        e.load(method)
        e.call(2)
        e.emit(OPMAP["POP_TOP"])
        e.emit(op, arg)

    return row


def _builds_hashed(stride: int) -> Row:
    """A set or dict is built of what lies on the stack: every `stride`-th value is hashed."""

    def row(e: Emitter, op: int, arg: int) -> None:
        for depth in range(arg * stride, 0, -stride):
            _announce_hashed(e, depth)
        e.emit(op, arg)

    return row


def _announce_hashed(e: Emitter, depth: int) -> None:
    e.emit(OPMAP["COPY"], depth)
    e.wrap("hashed")
    e.emit(OPMAP["POP_TOP"])


def _unpack_sequence(e: Emitter, op: int, arg: int) -> None:
    e.wrap("unpack", arg)
    e.emit(op, arg)


def _unpack_ex(e: Emitter, op: int, arg: int) -> None:
    e.wrap("unpack", ~((arg & 255) + (arg >> 8)))  # ~n: n values or more
    e.emit(op, arg)


def _match(depth: int) -> Row:
    """The subject is `depth` below the top."""

    def row(e: Emitter, op: int, arg: int) -> None:
        name = dis.opname[op]
        if depth:
            e.emit(_SWAP, depth + 1)
            e.wrap("match", name)
            e.emit(_SWAP, depth + 1)
        else:
            e.wrap("match", name)
        e.emit(op, arg)

    return row


def _match_class(e: Emitter, op: int, arg: int) -> None:
    """[subject, class, names]: tells of the class, then of the subject and what is read of it."""
    names = e.consts[e.previous_arg] if e.previous == _LOAD_CONST else None
    if type(names) is not tuple:
        raise RewriteError("MATCH_CLASS without a constant of names before it")
    e.emit(_SWAP, 2)
    e.wrap("match", "class")
    e.emit(_SWAP, 2)
    e.emit(_SWAP, 3)
    e.wrap("match", (arg, names))
    e.emit(_SWAP, 3)
    e.emit(op, arg)


# ---------------------------------------------------------- calls, with, format


def _push_null(e: Emitter, op: int, arg: int) -> None:
    e.null_becomes_call()


def _push_null_313(e: Emitter, op: int, arg: int) -> None:
    e.null_becomes_call()  # the NULL lies above the callable
    e.emit(_SWAP, 2)


def _call_function_ex(e: Emitter, op: int, arg: int) -> None:
    e.trampoline("exkw" if arg & 1 else "ex")
    e.call(3 if arg & 1 else 2)


def _before_with(e: Emitter, op: int, arg: int) -> None:
    e.wrap("with_")  # (result of __enter__, exit)
    e.emit(OPMAP["UNPACK_SEQUENCE"], 2)  # [exit, result]


def _format_value(e: Emitter, op: int, arg: int) -> None:
    if arg & 4:
        _format(e, arg & 3)
    else:
        e.wrap("format_", arg & 3, None)


def _format(e: Emitter, conversion: int) -> None:
    """[value, spec] -> [format_(value, conversion, spec)]"""
    e.trampoline("format_")
    e.emit(_SWAP, 3)
    e.emit(_SWAP, 2)
    e.load(conversion)
    e.emit(_SWAP, 2)
    e.call(2)


def _format_simple(e: Emitter, op: int, arg: int) -> None:
    e.wrap("format_", 0, None)


def _format_with_spec(e: Emitter, op: int, arg: int) -> None:
    _format(e, 0)


def _convert_value(e: Emitter, op: int, arg: int) -> None:
    e.wrap("format_", arg, None)


_INTRINSIC_UNARY_POSITIVE = 5
_INTRINSIC_LIST_TO_TUPLE = 6


def _call_intrinsic_1(e: Emitter, op: int, arg: int) -> None:
    if arg == _INTRINSIC_UNARY_POSITIVE:
        e.wrap("unary", "+")
        return
    if arg == _INTRINSIC_LIST_TO_TUPLE:
        e.wrap("consume")
    e.emit(op, arg)


# ------------------------------------------------------------------------ tables

# The same in every version.
_EVERYWHERE: dict[str, Row] = {
    "BINARY_OP": _binary_op,
    "BUILD_MAP": _builds_hashed(2),
    "BUILD_SET": _builds_hashed(1),
    "BINARY_SUBSCR": _subscr,
    "BEFORE_WITH": _before_with,
    "CALL_FUNCTION_EX": _call_function_ex,
    "CONTAINS_OP": _contains,
    "DELETE_ATTR": _delete_attr,
    "DELETE_DEREF": _delete_deref,
    "DELETE_GLOBAL": _delete_global,
    "DELETE_SUBSCR": _delete_subscr,
    "DICT_MERGE": _grows("merge", consumes=True),
    "DICT_UPDATE": _grows("update", consumes=True),
    "FOR_ITER": _jump,
    "GET_ITER": _before("get_iter"),
    "GET_LEN": _match(0),
    "IMPORT_FROM": _imported,
    "IMPORT_NAME": _imported,
    "IS_OP": _is,
    "JUMP_BACKWARD": _jump,
    "JUMP_BACKWARD_NO_INTERRUPT": _jump,
    "JUMP_FORWARD": _jump,
    "LIST_APPEND": _grows("append"),
    "LIST_EXTEND": _grows("extend", consumes=True),
    "LOAD_DEREF": _load_deref,
    "LOAD_GLOBAL": _load_global,
    "MAP_ADD": _grows("__setitem__", hashed=2),
    "MATCH_CLASS": _match_class,
    "MATCH_KEYS": _match(1),
    "MATCH_MAPPING": _match(0),
    "MATCH_SEQUENCE": _match(0),
    "PUSH_EXC_INFO": _before("caught"),
    "SEND": _jump,
    "SET_ADD": _grows("add", hashed=1),
    "SET_UPDATE": _grows("update", consumes=True),
    "STORE_ATTR": _store_attr,
    "STORE_DEREF": _store_deref,
    "STORE_GLOBAL": _store_global,
    "STORE_SUBSCR": _store_subscr,
    "UNARY_INVERT": _unary("~"),
    "UNARY_NEGATIVE": _unary("-"),
    "UNPACK_EX": _unpack_ex,
    "UNPACK_SEQUENCE": _unpack_sequence,
}

# Kept as they are in every version, by reason.
_KEPT_EVERYWHERE = """
    POP_TOP COPY SWAP NOP LOAD_CONST LOAD_FAST STORE_FAST DELETE_FAST MAKE_CELL COPY_FREE_VARS
    BUILD_TUPLE BUILD_LIST BUILD_SLICE BUILD_STRING BUILD_CONST_KEY_MAP
    MAKE_FUNCTION LOAD_BUILD_CLASS LOAD_ASSERTION_ERROR
    CALL RAISE_VARARGS RERAISE POP_EXCEPT CHECK_EXC_MATCH CHECK_EG_MATCH
    WITH_EXCEPT_START RESUME RETURN_VALUE RETURN_GENERATOR YIELD_VALUE
    GET_YIELD_FROM_ITER GET_AWAITABLE GET_AITER GET_ANEXT BEFORE_ASYNC_WITH END_ASYNC_FOR
    LOAD_NAME STORE_NAME DELETE_NAME SETUP_ANNOTATIONS
    CACHE EXTENDED_ARG
"""

_KEPT_311 = """
    KW_NAMES PRECALL LOAD_CLOSURE LOAD_CLASSDEREF ASYNC_GEN_WRAP
    PREP_RERAISE_STAR PRINT_EXPR IMPORT_STAR
"""
_KEPT_312 = """
    CLEANUP_THROW END_FOR END_SEND CALL_INTRINSIC_2 LOAD_FAST_AND_CLEAR LOAD_FAST_CHECK
    LOAD_FROM_DICT_OR_DEREF LOAD_FROM_DICT_OR_GLOBALS LOAD_LOCALS RETURN_CONST
    INTERPRETER_EXIT RESERVED
"""
_NONE_JUMPS_312 = {"POP_JUMP_IF_NONE": _jump, "POP_JUMP_IF_NOT_NONE": _jump}

_BY_VERSION: dict[tuple[int, int], tuple[dict[str, Row], str]] = {
    (3, 11): (
        {
            "COMPARE_OP": _compare(0, 0),
            "FORMAT_VALUE": _format_value,
            "JUMP_IF_FALSE_OR_POP": _jump_if_or_pop("POP_JUMP_FORWARD_IF_FALSE"),
            "JUMP_IF_TRUE_OR_POP": _jump_if_or_pop("POP_JUMP_FORWARD_IF_TRUE"),
            "LIST_TO_TUPLE": _before("consume"),
            "LOAD_ATTR": _load_attr_311,
            "LOAD_METHOD": _load_method_311,
            "POP_JUMP_BACKWARD_IF_FALSE": _jump_if,
            "POP_JUMP_BACKWARD_IF_NONE": _jump,
            "POP_JUMP_BACKWARD_IF_NOT_NONE": _jump,
            "POP_JUMP_BACKWARD_IF_TRUE": _jump_if,
            "POP_JUMP_FORWARD_IF_FALSE": _jump_if,
            "POP_JUMP_FORWARD_IF_NONE": _jump,
            "POP_JUMP_FORWARD_IF_NOT_NONE": _jump,
            "POP_JUMP_FORWARD_IF_TRUE": _jump_if,
            "PUSH_NULL": _push_null,
            "UNARY_NOT": _unary_not,
            "UNARY_POSITIVE": _unary("+"),
        },
        _KEPT_311,
    ),
    (3, 12): (
        {
            "BINARY_SLICE": _binary_slice,
            "CALL_INTRINSIC_1": _call_intrinsic_1,
            "COMPARE_OP": _compare(4, 0),
            "FORMAT_VALUE": _format_value,
            "LOAD_ATTR": _load_attr_312,
            "LOAD_SUPER_ATTR": _load_super_attr,
            "POP_JUMP_IF_FALSE": _jump_if,
            "POP_JUMP_IF_TRUE": _jump_if,
            "PUSH_NULL": _push_null,
            "STORE_SLICE": _store_slice,
            "UNARY_NOT": _unary_not,
            **_NONE_JUMPS_312,
        },
        _KEPT_312 + "KW_NAMES LOAD_CLOSURE",
    ),
    (3, 13): (
        {
            "BINARY_SLICE": _binary_slice,
            "CALL_INTRINSIC_1": _call_intrinsic_1,
            "COMPARE_OP": _compare(5, 16),
            "CONVERT_VALUE": _convert_value,
            "FORMAT_SIMPLE": _format_simple,
            "FORMAT_WITH_SPEC": _format_with_spec,
            "LOAD_ATTR": _load_attr_312,
            "LOAD_SUPER_ATTR": _load_super_attr,
            "POP_JUMP_IF_FALSE": _jump,  # TO_BOOL has tested the value
            "POP_JUMP_IF_TRUE": _jump,
            "PUSH_NULL": _push_null_313,
            "STORE_SLICE": _store_slice,
            "TO_BOOL": _to_bool,
            "UNARY_NOT": KEEP,  # of what TO_BOOL made
            **_NONE_JUMPS_312,
        },
        _KEPT_312
        + """CALL_KW LOAD_FAST_LOAD_FAST STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST
             SET_FUNCTION_ATTRIBUTE EXIT_INIT_CHECK ENTER_EXECUTOR""",
    ),
}


def rows_of(version: tuple[int, int]) -> dict[str, Row]:
    """Opcode name -> row, for one version of CPython; empty for an unknown version."""
    if version not in _BY_VERSION:
        return {}
    own, kept = _BY_VERSION[version]
    rows = dict.fromkeys((_KEPT_EVERYWHERE + kept).split(), KEEP)
    return {**rows, **_EVERYWHERE, **own}


def _by_opcode() -> tuple[Row | None, ...]:
    table: list[Row | None] = [None] * 256
    for name, row in rows_of(VERSION).items():
        table[OPMAP[name]] = row
    return tuple(table)


ROWS = _by_opcode()
