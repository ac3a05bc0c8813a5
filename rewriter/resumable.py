"""Resumable code: a function's own code that compiled stretches can enter and leave.

In: the plan of a function's islands. Out: `resumable` gives the function's own code with a
question at each node,

    r = __accel_node__(index)
    if r is not __accel_run_body__: drop the stack, jump to the pad that r names

and, at its end, one pad a landing, which pushes the stack that r brings and jumps there. The
locals have been written into the frame by then. One frame runs everything: tracebacks, handlers,
cells and `sys._getframe` are those of the plain function. `metered` gives the same code without
questions, which tells when it comes to a node or a landing.
Invariant: a frame that is only ever answered "run the body" does what the original does; a pad
raises nothing, and what is jumped to runs under its own handlers.
"""

from __future__ import annotations

import types
from collections.abc import Callable

from accel.rewriter.islands import Islands, Landing
from accel.rewriter.layout import (
    OPMAP,
    VERSION,
    append_lines,
    assemble,
    move_exceptions,
    move_lines,
)

NODE_CALLEE = "__accel_node__"
_SENTINEL = "__accel_run_body__"
_JUMP_IF_FALSE = OPMAP.get("POP_JUMP_IF_FALSE", OPMAP.get("POP_JUMP_FORWARD_IF_FALSE", 0))
_JUMP_IF_TRUE = OPMAP.get("POP_JUMP_IF_TRUE", OPMAP.get("POP_JUMP_FORWARD_IF_TRUE", 0))
_CALL_OPS = [OPMAP[name] for name in ("PRECALL", "CALL") if name in OPMAP]


class _Builder:
    """Instructions of resumable code under construction."""

    def __init__(self, islands: Islands, code: types.CodeType, index_of: Callable[[int], int]):
        self.islands = islands
        self.code = code
        self.index_of = index_of
        self.ops: list[int] = []
        self.args: list[int] = []
        self.jumps: dict[int, int] = {}
        self.groups: list[int] = []
        self.consts = list(code.co_consts)
        self.names = list(code.co_names)

    def emit(self, name: str, arg: int = 0) -> None:
        self.ops.append(OPMAP[name])
        self.args.append(arg)

    def jump(self, op: int, group: int) -> None:
        self.jumps[len(self.ops)] = group
        self.ops.append(op)
        self.args.append(0)

    def group(self) -> int:
        self.groups.append(len(self.ops))
        return len(self.groups) - 1

    def constant(self, value: object) -> None:
        self.consts.append(value)
        self.emit("LOAD_CONST", len(self.consts) - 1)

    def name(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def original(self, i: int) -> None:
        """Instruction i of the function's own."""
        flow = self.islands.flow
        if i in flow.jumps:
            self.jump(flow.ops[i], flow.jumps[i])
        else:
            self.ops.append(flow.ops[i])
            self.args.append(flow.args[i])

    def call(self, callee: object, argument: int) -> None:
        """callee(argument), whose result is dropped."""
        if VERSION >= (3, 13):  # the NULL lies above its callable
            self.constant(callee)
            self.emit("PUSH_NULL")
        else:
            self.emit("PUSH_NULL")
            self.constant(callee)
        self.constant(argument)
        for op in _CALL_OPS:
            self.ops.append(op)
            self.args.append(1)
        self.emit("POP_TOP")

    def ask(self, number: int, tail: int) -> None:
        """The question at a node. The stack behind it is the one before it."""
        self.emit("LOAD_GLOBAL", self.name(NODE_CALLEE) << 1 | 1)
        self.constant(self.index_of(number))
        for op in _CALL_OPS:
            self.ops.append(op)
            self.args.append(1)
        self.emit("COPY", 1)
        self.emit("LOAD_GLOBAL", self.name(_SENTINEL) << 1)
        self.emit("IS_OP", 0)
        self.jump(_JUMP_IF_FALSE, tail)
        self.emit("POP_TOP")

    def pad(self, landing: Landing) -> None:
        """[values as nested pairs] -> the landing's stack, and there."""
        slots = _real_slots(landing)
        left = slots.count(True)
        if not left:
            self.emit("POP_TOP")
            for _ in slots:
                self.emit("PUSH_NULL")
        for is_value in slots if left or not slots else ():
            if is_value and left > 1:
                self.emit("UNPACK_SEQUENCE", 2)  # [value, the rest]
                left -= 1
            elif is_value:
                left = 0
            else:
                self.emit("PUSH_NULL")
                if left:
                    self.emit("SWAP", 2)
        self.jump(OPMAP["JUMP_BACKWARD_NO_INTERRUPT"], landing.at)
        self.emit("RAISE_VARARGS")  # never reached; torch._dynamo takes that jump for a test


def _real_slots(landing: Landing) -> list[bool]:
    """For each slot from the bottom, as the interpreter has them: whether it holds a value."""
    slots = [k not in landing.nulls for k in range(landing.depth)]
    if VERSION >= (3, 13):  # the NULL lies above its callable
        for k in landing.nulls:
            slots[k], slots[k + 1] = slots[k + 1], slots[k]
    return slots


def resumable(
    islands: Islands, code: types.CodeType, index_of: Callable[[int], int]
) -> types.CodeType:
    """`code` (the planned one, or the same with other constants) with its nodes and pads;
    `index_of(k)` is the dispatch index of node number k.

    Errors: RewriteError.
    """
    b = _Builder(islands, code, index_of)
    numbers = {node.at: k for k, node in enumerate(islands.nodes)}
    for i in range(len(islands.flow)):
        b.group()
        if i in numbers:
            b.ask(numbers[i], len(islands.flow) + numbers[i])
        b.original(i)
    _emit_tails(b, islands)
    return _assembled(b)


def metered(
    islands: Islands, code: types.CodeType, mark: Callable[[int], object]
) -> types.CodeType:
    """`code` that calls `mark(k)` before node number k, and `mark(-1)` before each landing.

    Errors: RewriteError.
    """
    b = _Builder(islands, code, lambda k: k)
    marks = {landing.at: -1 for landing in islands.landings}
    marks.update({node.at: k for k, node in enumerate(islands.nodes)})
    for i in range(len(islands.flow)):
        b.group()
        if i in marks:
            b.call(mark, marks[i])
        b.original(i)
    return _assembled(b)


def _assembled(b: _Builder) -> types.CodeType:
    flow, code = b.islands.flow, b.code
    b.groups.append(len(b.ops))
    new_code, starts = assemble(b.ops, b.args, b.jumps, b.groups)
    unit_of = _unit_map(flow.instructions.starts, starts)
    body_units = unit_of[-1]
    deepest = max((len(s) for s in flow.stacks if s is not None), default=0)
    return code.replace(
        co_code=new_code,
        co_consts=tuple(b.consts),
        co_names=tuple(b.names),
        co_linetable=append_lines(
            move_lines(code.co_linetable, unit_of), len(new_code) // 2 - body_units
        ),
        co_exceptiontable=move_exceptions(code.co_exceptiontable, unit_of),
        co_stacksize=max(code.co_stacksize, deepest) + 6,
    )


def _emit_tails(b: _Builder, islands: Islands) -> None:
    """Behind the body: what drops each node's stack, the choice of a pad, the pads."""
    count, nodes = len(islands.flow), islands.nodes
    choice = count + len(nodes)
    first_pad = choice + 1
    for node in nodes:  # [stack of the node, (pad, values)]
        b.group()
        for _ in range(node.depth):
            b.emit("SWAP", 2)
            b.emit("POP_TOP")
        b.jump(OPMAP["JUMP_FORWARD"], choice)
    b.group()
    b.emit("UNPACK_SEQUENCE", 2)  # [values, number of the pad]
    for k in range(1, len(islands.landings)):  # the first pad follows
        b.emit("COPY", 1)
        b.constant(k)
        b.emit("IS_OP", 0)
        b.jump(_JUMP_IF_TRUE, first_pad + k)
    for landing in islands.landings:
        b.group()
        b.emit("POP_TOP")
        b.pad(landing)


def _unit_map(old: list[int], new: list[int]) -> list[int]:
    """Old unit -> new unit, for the body; units inside an instruction go to its end."""
    unit_of = [0] * (old[-1] + 1)
    before = 0
    for k, start in enumerate(old):
        for unit in range(before, start):
            unit_of[unit] = new[k]
        unit_of[start] = new[k]
        before = start + 1
    return unit_of


__all__ = ["NODE_CALLEE", "metered", "resumable"]
