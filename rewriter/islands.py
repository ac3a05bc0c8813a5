"""Islands: code that may be entered and left in the middle of a function.

In: a function's code and the instructions that can only run as Python (*exits*). Out:
`plan_islands` says where compiled stretches may begin (*nodes*) and where Python must go on
(*landings*); `accel.rewriter.resumable` makes code of it.
Invariant: whatever way control takes, between a node and the next landing there is no exit.

A loop or with block that contains an exit is entered, advanced and left by Python, so an
iterator or a context manager never has to be made again.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import NamedTuple

from accel.rewriter.flow import ALWAYS_JUMPS, ENDS, Flow, Stretch, own_cells
from accel.rewriter.layout import RewriteError

_MAX_LANDINGS = 64
_MAX_NODES = 64
# Instructions that only fetch what a call takes: they may run as Python with it.
_FETCHES = frozenset(
    """LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_LOAD_FAST LOAD_CONST LOAD_GLOBAL LOAD_DEREF PUSH_NULL
    LOAD_METHOD LOAD_ATTR LOAD_SUPER_ATTR PRECALL KW_NAMES""".split()
)
# Instructions between an exit and its node that do nothing worth compiling.
_TAIL = frozenset("POP_TOP STORE_FAST END_FOR NOP STORE_GLOBAL STORE_DEREF".split())
# Instructions that may stand for a torch operation, or lead to one.
_WORKS = frozenset(
    """CALL CALL_KW CALL_FUNCTION_EX BINARY_OP BINARY_SUBSCR BINARY_SLICE COMPARE_OP UNARY_NEGATIVE
    UNARY_INVERT UNARY_NOT STORE_SUBSCR STORE_SLICE DELETE_SUBSCR LOAD_ATTR STORE_ATTR
    CONTAINS_OP CALL_INTRINSIC_1""".split()
)
# Exits whose operands Python computes as well: what they give cannot be taken apart again.
_DEFINITIONS = frozenset(("MAKE_FUNCTION", "SET_FUNCTION_ATTRIBUTE"))
_BEGINNINGS = _DEFINITIONS | {"GET_ITER", "BEFORE_WITH"}
_RETURNS = frozenset(("RETURN_VALUE", "RETURN_CONST"))
# Names whose use means that a function looks at its own locals.
_LOOKS_AT_LOCALS = frozenset("locals vars eval exec dir".split())


class Node(NamedTuple):
    """Where a compiled stretch may begin."""

    at: int  # the instruction
    depth: int  # slots on the stack
    line: int
    context: tuple[int, ...]  # the exceptions that are being handled, by their origin
    stretch: Stretch
    reads: frozenset[int]  # locals that a recording has to know
    cells: frozenset[int]  # which of all locals are cells of the function's own


class Landing(NamedTuple):
    """Where Python goes on."""

    at: int
    depth: int
    line: int
    context: tuple[int, ...]
    nulls: tuple[int, ...]  # slots that hold no value, from the bottom
    loads: tuple[tuple[int, int, int], ...]  # slots of locals: slot, loading instruction, local
    returns: bool  # nothing but the return is left to do


class Islands(NamedTuple):
    """The plan of one function."""

    flow: Flow
    exits: frozenset[int]
    nodes: tuple[Node, ...]
    landings: tuple[Landing, ...]
    statements: tuple[int, ...]  # beginnings of lines with nothing half done: for discovery


def refusal(code: types.CodeType) -> str:
    """Why this function can have no islands; "" when it can."""
    if _LOOKS_AT_LOCALS & set(code.co_names):
        return "it looks at its own locals"
    return ""


def plan_islands(code: types.CodeType, exits: Iterable[int]) -> Islands:
    """Nodes and landings for these exits, indices of instructions.

    Errors: RewriteError, when the function can have none.
    """
    why = refusal(code)
    if why:
        raise RewriteError(f"{code.co_qualname}: {why}")
    return _Planner(Flow(code)).plan(exits)


class _Planner:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.lines = _lines_of(flow)
        # GET_ITER of an inlined comprehension that is an exit as a whole -> where it is left.
        self.comprehensions: dict[int, int] = {}

    def plan(self, exits: Iterable[int]) -> Islands:
        flow = self.flow
        self._check_iterators()
        all_exits = self._with_enclosing(map(self._outside, exits))
        landed = {i: self._landing_of(i) for i in all_exits}
        returns = {
            i
            for i, name in enumerate(flow.names)
            if name in _RETURNS and flow.stacks[i] is not None
        }
        landings = sorted({*landed.values(), *returns})
        starts = {self._body()}
        for i in all_exits:
            starts.update(self._behind(i))
        nodes = [self._node(i, landings) for i in sorted(starts - set(landings))]
        nodes = [node for node in nodes if self._is_worth_it(node)]
        if len(nodes) > _MAX_NODES or len(landings) > _MAX_LANDINGS:
            raise RewriteError(f"{flow.code.co_qualname}: too many exits")
        return Islands(
            flow,
            frozenset(all_exits),
            tuple(nodes),
            tuple(self._landing(i) for i in landings),
            tuple(self._statements(set(landings) | {node.at for node in nodes})),
        )

    def _check_iterators(self) -> None:
        """No stretch may advance an iterator that it has not made: each must be known for one.

        Errors: RewriteError.
        """
        for i, name in enumerate(self.flow.names):
            stack = self.flow.stacks[i]
            if name == "FOR_ITER" and stack and stack[-1].kind != "iterator":
                raise RewriteError(f"{self.flow.code.co_qualname}: an iterator of unknown origin")

    # ---------------------------------------------------------- exits

    def _outside(self, i: int) -> int:
        """The exit, or the comprehension around it (inlined since CPython 3.12): locals that
        wait on the stack, perhaps unbound, are Python's."""
        flow = self.flow
        saved = [slot.origin for slot in flow.stacks[i] or () if slot.kind == "saved"]
        if not saved:
            return i
        first = min(saved)
        iterator = flow.stack(first)[-1]
        inside = {
            k
            for k, stack in enumerate(flow.stacks)
            if k == first or any(s.kind == "saved" and s.origin == first for s in stack or ())
        }
        left = {after for k in inside for after in flow.next(k)} - inside
        left = {after for after in left if flow.names[after] != "RERAISE"}  # of its clean-up
        if iterator.kind != "iterator" or len(left) != 1:
            raise RewriteError(f"{flow.code.co_qualname}: an exit inside a comprehension")
        self.comprehensions[iterator.origin] = left.pop()
        return iterator.origin

    def _with_enclosing(self, exits: Iterable[int]) -> set[int]:
        """The exits, and what enters, advances and leaves the blocks around them."""
        found: set[int] = set()
        todo = list(exits)
        while todo:
            i = todo.pop()
            if i in found or self.flow.stacks[i] is None:
                continue
            found.add(i)
            # What a stretch finds on its stack it may pass on, but never use unseen.
            behind = [s for at in self._behind(i) for s in self.flow.stack(at)]
            for slot in {*self.flow.stack(i), *behind}:
                if slot.kind in ("iterator", "exit"):
                    todo.append(slot.origin)
                if slot.kind in ("iterator", "exit", "exception"):
                    todo += self._users(slot.origin, slot.kind)
            handler = self.flow.caught_by(i)
            if handler is not None and self.flow.names[handler.target] == "PUSH_EXC_INFO":
                todo += self._users(handler.target, "exception")
        return found

    def _users(self, origin: int, kind: str) -> list[int]:
        """The instructions that work on the slot that `origin` has put on the stack."""
        flow, users = self.flow, []
        for i, name in enumerate(flow.names):
            stack = flow.stacks[i]
            if not stack:
                continue
            if name == {"iterator": "FOR_ITER", "exception": "POP_EXCEPT"}.get(kind):
                slot = stack[-1]
            elif kind == "exit" and name == "WITH_EXCEPT_START":
                slot = stack[-4]
            elif kind == "exit" and (base := flow.call_base(i, len(stack))) is not None:
                slot = stack[base]
            else:
                continue
            if slot.kind == kind and slot.origin == origin:
                users.append(i)
        return users

    def _landing_of(self, i: int) -> int:
        """Where Python goes on for exit i: before what only fetches its operands."""
        flow = self.flow
        name = flow.names[i]
        if name in ("FOR_ITER", "POP_EXCEPT", "WITH_EXCEPT_START"):
            return i
        if name in _BEGINNINGS:
            wanted = len(flow.stack(i + 1 if name in _DEFINITIONS else i)) - 1
            start = i
            while self._is_straight(start) and len(flow.stack(start)) != wanted:
                start -= 1
            if len(flow.stack(start)) == wanted:
                return start
        start = i
        while self._is_straight(start) and flow.names[start - 1] in _FETCHES:
            start -= 1
        return self._before_what_is_made(start)

    def _before_what_is_made(self, start: int) -> int:
        """No function or iterator made for one call can be made again: before those."""
        flow = self.flow
        made = [
            slot.origin
            for slot in flow.stack(start)
            if slot.kind == "function"
            or (slot.kind == "iterator" and not self._users(slot.origin, "iterator"))
        ]
        if not made:
            return start
        wanted = min(k for k, slot in enumerate(flow.stack(start)) if slot.origin in made)
        at = min(made)
        while self._is_straight(at) and len(flow.stack(at)) > wanted:
            at -= 1
        if len(flow.stack(at)) != wanted:
            raise RewriteError(f"{flow.code.co_qualname}: an exit inside a comprehension")
        return at

    def _is_straight(self, i: int) -> bool:
        """Whether instruction i follows the one before it and nothing else."""
        if i == 0 or i in self.flow.entered or self.flow.stacks[i - 1] is None:
            return False
        before = self.flow.names[i - 1]
        return before not in ENDS and i - 1 not in self.flow.jumps and before != "RESUME"

    # ---------------------------------------------------------- nodes

    def _body(self) -> int:
        return self.flow.names.index("RESUME") + 1

    def _behind(self, i: int) -> list[int]:
        """Where compiled code may begin again behind exit i."""
        found = []
        left = self.comprehensions.get(i)
        for start in self.flow.next(i) if left is None else [left]:
            at = self._settled(start)
            if at is not None:
                found.append(at)
        return found

    def _settled(self, at: int) -> int | None:
        """The first place from `at` on with no call half made and nothing left to store."""
        flow = self.flow
        for _ in range(64):
            name = flow.names[at]
            if name in ENDS or flow.stacks[at] is None:
                return None
            if name in ALWAYS_JUMPS:
                at = flow.jumps[at]
            elif (
                (flow.is_pending(at) and at not in flow.jumps)
                or name in _TAIL
                or self._is_taken_together(at)
            ):
                at += 1
            else:
                return None if flow.is_pending(at) else at
        return None

    def _is_taken_together(self, at: int) -> bool:
        """Whether the interpreter takes this instruction with the one before it."""
        return at > 0 and self.flow.names[at - 1] in ("PRECALL", "KW_NAMES", "END_FOR")

    def _node(self, at: int, landings: list[int]) -> Node:
        flow = self.flow
        stretch = flow.stretch(at, frozenset(landings))
        reads = set(stretch.reads)
        if "super" in flow.code.co_names:
            reads.add(0)  # what super() without arguments takes
        reads |= flow.shared_cells(at)  # inner functions may read them unseen
        return Node(
            at,
            len(flow.stack(at)),
            self.lines[at],
            self._context(at),
            stretch,
            frozenset(reads),
            frozenset(own_cells(flow.code)),
        )

    def _is_worth_it(self, node: Node) -> bool:
        return any(self.flow.names[i] in _WORKS for i in node.stretch.instructions)

    def _landing(self, at: int) -> Landing:
        stack = self.flow.stack(at)
        if any(slot.kind == "saved" for slot in stack):
            raise RewriteError(f"{self.flow.code.co_qualname}: an exit inside a comprehension")
        nulls = tuple(k for k, slot in enumerate(stack) if slot.kind == "null")
        loads = tuple(
            (k, slot.origin, self.flow.args[slot.origin])
            for k, slot in enumerate(stack)
            if slot.kind == "local"
        )
        returns = self.flow.names[at] in _RETURNS
        return Landing(at, len(stack), self.lines[at], self._context(at), nulls, loads, returns)

    def _context(self, at: int) -> tuple[int, ...]:
        return tuple(s.origin for s in self.flow.stack(at) if s.kind == "exception")

    def _statements(self, taken: set[int]) -> list[int]:
        flow, found = self.flow, []
        body = self._body()
        for i in range(body, len(flow)):
            begins = self.lines[i] != self.lines[i - 1] or i in flow.entered
            plain = flow.names[i] not in ("PUSH_EXC_INFO", "END_FOR", "POP_EXCEPT", "RERAISE")
            together = self._is_taken_together(i) or flow.names[i] == "CALL"
            if begins and plain and not together and i not in taken and flow.stacks[i] is not None:
                if not flow.is_pending(i):
                    found.append(i)
        return found


def _lines_of(flow: Flow) -> list[int]:
    lines = [0] * len(flow)
    for start, end, line in flow.code.co_lines():
        for unit in range(start // 2, end // 2):
            i = flow.index_of.get(unit)
            if i is not None:
                lines[i] = line or 0
    return lines


__all__ = ["Islands", "Landing", "Node", "RewriteError", "plan_islands", "refusal"]
