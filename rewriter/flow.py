"""Where control and stack go in a code object, seen without running it.

In: a function's code. Out: per instruction its successors, its operand stack (what put each
slot there, as far as anybody asks), and, for a stretch between two points, which locals it may
read or write and how deep it reaches into the stack.
Invariant: "may" errs on the safe side; an instruction that control cannot reach has no stack.

Stacks are those of a capture twin: the trampoline that stands for a NULL lies below the
callable. CPython 3.13 has the NULL above it; `islands` knows.
"""

from __future__ import annotations

import dis
import itertools
import types
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from accel.rewriter.layout import (
    OPMAP,
    VERSION,
    RewriteError,
    decode,
    read_exceptions,
)


class Slot(NamedTuple):
    """A slot of the operand stack: what kind of thing, and the instruction that put it there."""

    # "value", "local" (just loaded), "null", "iterator", "exit" (of a with block), "exception",
    # "function" (just made), "saved" (a local, perhaps unbound, around a comprehension)
    kind: str
    origin: int


VALUE = Slot("value", -1)
Stack = tuple[Slot, ...]

OPNAME: dict[int, str] = {op: name for name, op in OPMAP.items()}
ENDS = frozenset("RETURN_VALUE RETURN_CONST RAISE_VARARGS RERAISE INTERPRETER_EXIT".split())
ALWAYS_JUMPS = frozenset("JUMP_FORWARD JUMP_BACKWARD JUMP_BACKWARD_NO_INTERRUPT".split())
# Instructions that leave nothing in the place of what they take.
_ONLY_TAKE = frozenset(
    """POP_TOP STORE_FAST STORE_DEREF STORE_GLOBAL STORE_ATTR STORE_SUBSCR STORE_SLICE STORE_NAME
    DELETE_ATTR DELETE_SUBSCR LIST_APPEND SET_ADD MAP_ADD LIST_EXTEND SET_UPDATE DICT_UPDATE
    DICT_MERGE POP_EXCEPT END_FOR RETURN_VALUE RAISE_VARARGS RERAISE STORE_FAST_STORE_FAST
    STORE_FAST_LOAD_FAST""".split()
)
# Instructions that touch no slot that was there.
_ONLY_GIVE = (
    frozenset(
        """LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_AND_CLEAR LOAD_FAST_LOAD_FAST LOAD_CONST LOAD_DEREF
    LOAD_CLOSURE LOAD_CLASSDEREF LOAD_NAME LOAD_BUILD_CLASS LOAD_ASSERTION_ERROR LOAD_LOCALS NOP
    RESUME MAKE_CELL COPY_FREE_VARS DELETE_FAST DELETE_DEREF DELETE_GLOBAL DELETE_NAME KW_NAMES
    PRECALL EXTENDED_ARG CACHE SETUP_ANNOTATIONS""".split()
    )
    | ALWAYS_JUMPS
)
# Slots below the top that an instruction looks at without taking them; {} is its argument.
_LOOKS_AT: dict[str, Callable[[int], int]] = {
    "LIST_APPEND": lambda arg: arg + 1, "SET_ADD": lambda arg: arg + 1,
    "MAP_ADD": lambda arg: arg + 2, "LIST_EXTEND": lambda arg: arg + 1,
    "SET_UPDATE": lambda arg: arg + 1, "DICT_UPDATE": lambda arg: arg + 1,
    "DICT_MERGE": lambda arg: arg + 4, "COPY": lambda arg: arg, "SWAP": lambda arg: arg,
    "MATCH_KEYS": lambda arg: 2, "MATCH_CLASS": lambda arg: 3, "CHECK_EXC_MATCH": lambda arg: 2,
    "CHECK_EG_MATCH": lambda arg: 2, "WITH_EXCEPT_START": lambda arg: 4, "FOR_ITER": lambda arg: 1,
    "RERAISE": lambda arg: arg + 1, "SEND": lambda arg: 2, "MATCH_MAPPING": lambda arg: 1,
    "MATCH_SEQUENCE": lambda arg: 1, "GET_LEN": lambda arg: 1, "IMPORT_FROM": lambda arg: 1,
}  # fmt: skip
_COPIED = frozenset(("iterator", "exit", "exception"))  # kinds that a copy keeps
_READS_LOCAL = frozenset(
    """LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_AND_CLEAR DELETE_FAST LOAD_CLOSURE LOAD_DEREF
    DELETE_DEREF LOAD_CLASSDEREF LOAD_FROM_DICT_OR_DEREF""".split()
)
_WRITES_LOCAL = frozenset(
    """STORE_FAST DELETE_FAST LOAD_FAST_AND_CLEAR MAKE_CELL STORE_DEREF DELETE_DEREF""".split()
)
# 3.13 keeps LOAD_CLOSURE for its compiler only.
_LOADS_CELL = frozenset(("LOAD_CLOSURE",) if "LOAD_CLOSURE" in OPMAP else ("LOAD_FAST",))
_LOADS_METHOD_BIT = VERSION >= (3, 12)  # LOAD_ATTR may load a method


class Handler(NamedTuple):
    """A range of instructions, the handler of its exceptions, and what it is entered with."""

    start: int
    end: int
    target: int
    depth: int
    has_lasti: bool


class Stretch(NamedTuple):
    """What lies between a point and the stops, on any path."""

    instructions: frozenset[int]
    reads: frozenset[int]  # locals that may be read, or handed on, before they are written
    writes: frozenset[int]
    untouched: int  # so many slots at the bottom of the stack are neither read nor replaced
    carried: frozenset[int]  # loads of locals that only wait on the stack for what comes later


def own_cells(code: types.CodeType) -> tuple[int, ...]:
    """Indices, among the fast locals, of the variables that inner functions share."""
    names = code.co_varnames
    added = [name for name in code.co_cellvars if name not in names]
    return tuple(
        names.index(name) if name in names else len(names) + added.index(name)
        for name in code.co_cellvars
    )


def local_names(code: types.CodeType) -> tuple[str, ...]:
    """The names of all fast locals: locals, own cells, free variables."""
    added = [name for name in code.co_cellvars if name not in code.co_varnames]
    return (*code.co_varnames, *added, *code.co_freevars)


def reads_of(name: str, arg: int) -> tuple[int, ...]:
    """Indices of the fast locals that the instruction reads."""
    if name in _READS_LOCAL:
        return (arg,)
    if name == "LOAD_FAST_LOAD_FAST":
        return (arg >> 4, arg & 15)
    return (arg & 15,) if name == "STORE_FAST_LOAD_FAST" else ()


def writes_of(name: str, arg: int) -> tuple[int, ...]:
    """Indices of the fast locals that the instruction binds or unbinds."""
    if name in _WRITES_LOCAL:
        return (arg,)
    if name == "STORE_FAST_STORE_FAST":
        return (arg >> 4, arg & 15)
    return (arg >> 4,) if name == "STORE_FAST_LOAD_FAST" else ()


class Flow:
    """One code object's instructions, edges and stacks. Errors: RewriteError."""

    def __init__(self, code: types.CodeType) -> None:
        self.code = code
        instructions = decode(code.co_code)
        self.instructions = instructions
        self.args = instructions.args
        self.names = [OPNAME.get(op, "") for op in instructions.ops]
        self.ops = instructions.ops
        self.jumps = instructions.jump_targets()
        index_of = {unit: i for i, unit in enumerate(instructions.starts)}
        self.index_of = index_of
        self.handlers = [
            Handler(index_of[s], index_of[e], index_of[t], packed >> 1, bool(packed & 1))
            for s, e, t, packed in read_exceptions(code.co_exceptiontable)
        ]
        self.entered = set(self.jumps.values()) | {h.target for h in self.handlers}
        self.stacks: list[Stack | None] = [None] * len(self.names)
        self._live_everywhere: dict[int, frozenset[int]] | None = None
        self._fill_stacks()

    def __len__(self) -> int:
        return len(self.names)

    def location(self, i: int) -> str:
        """`file:line` of instruction i."""
        unit = self.instructions.starts[i]
        line = next(itertools.islice(self.code.co_positions(), unit, None), (None,))[0]
        return f"{self.code.co_filename}:{line or self.code.co_firstlineno}"

    # --------------------------------------------------------------- edges

    def next(self, i: int) -> list[int]:
        """Where control may go from instruction i, exceptions apart."""
        name = self.names[i]
        if name in ENDS:
            return []
        after = [] if name in ALWAYS_JUMPS else [i + 1]
        return after + ([self.jumps[i]] if i in self.jumps else [])

    def caught_by(self, i: int) -> Handler | None:
        """The innermost handler of exceptions at instruction i (later entries are inner)."""
        found = None
        for handler in self.handlers:
            if handler.start <= i < handler.end:
                found = handler
        return found

    def edges(self, i: int) -> list[int]:
        handler = self.caught_by(i)
        return self.next(i) + ([handler.target] if handler is not None else [])

    # --------------------------------------------------------------- stacks

    def stack(self, i: int) -> Stack:
        """The stack before instruction i. Errors: RewriteError where control never comes."""
        stack = self.stacks[i]
        if stack is None:
            raise RewriteError(f"{self.code.co_qualname}: instruction {i} is never reached")
        return stack

    def is_pending(self, i: int) -> bool:
        """Whether some call's callable lies on the stack, waiting for its arguments."""
        return any(slot.kind == "null" for slot in self.stack(i))

    def _fill_stacks(self) -> None:
        todo: list[tuple[int, Stack]] = [(0, ())]
        while todo:
            i, stack = todo.pop()
            known = self.stacks[i]
            if known is not None:
                if len(known) != len(stack):
                    raise RewriteError(f"{self.code.co_qualname}: two stack depths at {i}")
                if known == stack:
                    continue
                merged = tuple(a if a == b else VALUE for a, b in zip(known, stack, strict=True))
                if merged == known:
                    continue
                stack = merged
            self.stacks[i] = stack
            for target, after in self._after(i, stack):
                todo.append((target, after))
            handler = self.caught_by(i)
            if handler is not None:
                entered = stack[: handler.depth] + (VALUE,) * (1 + handler.has_lasti)
                todo.append((handler.target, entered))

    def _after(self, i: int, stack: Stack) -> Iterator[tuple[int, Stack]]:
        for target in self.next(i):
            jumps = i in self.jumps and target == self.jumps[i]
            yield target, self._pushed(i, stack, jumps)

    def _pushed(self, i: int, stack: Stack, jumps: bool) -> Stack:
        """The stack behind instruction i."""
        name, arg = self.names[i], self.args[i]
        special = self._special(i, name, arg, stack)
        if special is not None:
            return special
        counted = arg if self.ops[i] >= dis.HAVE_ARGUMENT else None
        effect = dis.stack_effect(self.ops[i], counted, jump=jumps)
        depth = len(stack) + effect
        if depth < 0:
            raise RewriteError(f"{self.code.co_qualname}: the stack runs out at {i}")
        new = list(stack[:depth]) + [VALUE] * max(effect, 0)
        replaced = len(stack) - 1 if effect >= 0 else depth - 1
        takes = name not in _ONLY_GIVE and name not in _ONLY_TAKE and name != "FOR_ITER"
        if takes and replaced >= 0 and not name.startswith(("POP_JUMP", "JUMP_IF")):
            new[replaced] = VALUE
        return tuple(new)

    def _special(self, i: int, name: str, arg: int, stack: Stack) -> Stack | None:
        null = Slot("null", i)
        if name in ("PRECALL", "KW_NAMES"):
            return stack
        if name == "PUSH_NULL":
            return (*stack[:-1], null, stack[-1]) if VERSION >= (3, 13) else (*stack, null)
        if name in ("LOAD_FAST", "LOAD_FAST_CHECK"):
            return (*stack, Slot("local", i))
        if name == "LOAD_FAST_AND_CLEAR":
            return (*stack, Slot("saved", i))
        if name == "LOAD_GLOBAL":
            return (*stack, null, VALUE) if arg & 1 else (*stack, VALUE)
        if name == "LOAD_METHOD" or (name == "LOAD_ATTR" and _LOADS_METHOD_BIT and arg & 1):
            return (*stack[:-1], null, VALUE)
        if name == "LOAD_SUPER_ATTR":
            return (*stack[:-3], null, VALUE) if arg & 1 else (*stack[:-3], VALUE)
        base = self.call_base(i, len(stack))
        if base is not None:
            return (*stack[:base], VALUE)
        if name == "SWAP":
            swapped = list(stack)
            swapped[-1], swapped[-arg] = swapped[-arg], swapped[-1]
            return tuple(swapped)
        if name == "COPY":
            return (*stack, stack[-arg] if stack[-arg].kind in _COPIED else VALUE)
        if name.startswith("BUILD_") and arg == 0:
            return (*stack, VALUE)
        if name == "GET_ITER":
            return (*stack[:-1], Slot("iterator", i))
        if name == "BEFORE_WITH":
            return (*stack[:-1], Slot("exit", i), VALUE)
        if name == "PUSH_EXC_INFO":
            return (*stack[:-1], Slot("exception", i), stack[-1])
        if name == "MAKE_FUNCTION":
            depth = len(stack) + dis.stack_effect(self.ops[i], arg)
            return (*stack[: depth - 1], Slot("function", i))
        if name == "SET_FUNCTION_ATTRIBUTE":
            return (*stack[:-2], stack[-1])
        return None

    def call_base(self, i: int, depth: int) -> int | None:
        """Where the slots of a call instruction begin; None for other instructions."""
        name, arg = self.names[i], self.args[i]
        if name == "CALL":
            return depth - arg - 2
        if name == "CALL_KW":
            return depth - arg - 3
        if name == "CALL_FUNCTION_EX":
            return depth - 3 - (arg & 1)
        return None

    # --------------------------------------------------------------- cells

    def shared_cells(self, start: int) -> frozenset[int]:
        """The function's own cells that some inner function may hold at instruction `start`."""
        own = set(own_cells(self.code))
        holders = [i for i, name in enumerate(self.names) if name in _LOADS_CELL]
        found = set()
        for i in holders:
            if self.args[i] in own and self.args[i] not in found and self._reaches(i, start):
                found.add(self.args[i])
        return frozenset(found)

    def _reaches(self, i: int, goal: int) -> bool:
        seen: set[int] = set()
        todo = self.edges(i)
        while todo:
            at = todo.pop()
            if at == goal:
                return True
            if at not in seen:
                seen.add(at)
                todo += self.edges(at)
        return False

    # ------------------------------------------------------------- stretches

    def stretch(self, start: int, stops: Collection[int]) -> Stretch:
        """What may run from instruction `start` until control comes to one of `stops`."""
        seen: set[int] = set()
        todo = [start]
        while todo:
            i = todo.pop()
            if i in seen or i in stops:
                continue
            seen.add(i)
            todo += self.edges(i)
        writes = {w for i in seen for w in writes_of(self.names[i], self.args[i])}
        lowest = [len(self.stack(start)), *(self._touched(i) for i in seen)]
        reached = {t for i in seen for t in self.edges(i)}
        lowest += [len(self.stack(t)) for t in reached]
        lowest += [h.depth for h in self.handlers if any(h.start <= i < h.end for i in seen)]
        carried = self._carried(seen, writes)
        return Stretch(
            frozenset(seen),
            self._live(seen, carried, writes).get(start, frozenset()),
            frozenset(writes),
            max(min(lowest), 0),
            carried,
        )

    def users(self, start: int, index: int, stretch: Stretch) -> frozenset[int]:
        """The instructions of a stretch from `start` that take the value which local number
        `index` has there, or, below zero, slot number `index` from the top of the stack."""
        if index < 0:
            return self._takers(start, len(self.stack(start)) + index, stretch)
        found: frozenset[int] = frozenset()
        for i in self._before_writes(start, index, stretch) - stretch.carried:
            for k, local in enumerate(reads_of(self.names[i], self.args[i])):
                if local == index and self.names[i].startswith("LOAD_FAST"):
                    found |= self._takers(i + 1, len(self.stack(i)) + k, stretch)
        return found

    def definitions(self, stretch: Stretch) -> frozenset[int]:
        """The last instructions of definitions of functions that a stretch stores."""
        found: set[int] = set()
        for i in stretch.instructions:
            if self.names[i] == "MAKE_FUNCTION":
                while self.names[i + 1] == "SET_FUNCTION_ATTRIBUTE":
                    i += 1
                if self.names[i + 1].startswith("STORE_"):
                    found.add(i)
        return frozenset(found)

    def _before_writes(self, start: int, local: int, stretch: Stretch) -> set[int]:
        """The instructions of a stretch that find in a local what it held at `start`."""
        seen: set[int] = set()
        todo = [start]
        while todo:
            i = todo.pop()
            if i not in seen and i in stretch.instructions:
                seen.add(i)
                if local not in writes_of(self.names[i], self.args[i]):
                    todo += self.edges(i)
        return seen

    def _takers(self, start: int, slot: int, stretch: Stretch) -> frozenset[int]:
        """The first instructions from `start` on that look at a slot of the stack."""
        found, seen, todo = set(), set(), [start]
        while todo:
            i = todo.pop()
            if i in seen or i not in stretch.instructions:
                continue
            seen.add(i)
            if self._touched(i) <= slot:
                found.add(i)
            else:
                todo += self.next(i)
        return frozenset(found)

    def _carried(self, region: set[int], writes: set[int]) -> frozenset[int]:
        """Loads in `region`, of locals that it does not write, whose value nothing in it uses."""
        loads = {
            i
            for i in region
            if self.names[i] in ("LOAD_FAST", "LOAD_FAST_CHECK")
            and self.args[i] not in writes
            and self.args[i] not in own_cells(self.code)
        }
        for i in region:
            touched = self._touched(i)
            for slot in self.stack(i)[max(touched, 0) :]:
                loads.discard(slot.origin)
            # Where stacks meet, a slot may have lost its name.
            for target in self.next(i):
                mine = self._pushed(i, self.stack(i), target == self.jumps.get(i))
                for slot, there in zip(mine, self.stack(target), strict=True):
                    if slot != there:
                        loads.discard(slot.origin)
        return frozenset(loads)

    def _touched(self, i: int) -> int:
        """The lowest slot that instruction i reads or replaces."""
        name, arg, depth = self.names[i], self.args[i], len(self.stack(i))
        if name in _LOOKS_AT:
            return depth - _LOOKS_AT[name](arg)
        if name in _ONLY_GIVE or name in ENDS or (name == "LOAD_GLOBAL"):
            return depth
        base = self.call_base(i, depth)
        if base is not None:
            return base
        after = min((len(s) for _, s in self._after(i, self.stack(i))), default=depth)
        takes_only = name in _ONLY_TAKE or name.startswith("POP_JUMP")
        return min(depth, after) - (0 if takes_only else 1)

    def _live(
        self, region: set[int], unread: Collection[int], written: Collection[int]
    ) -> dict[int, frozenset[int]]:
        """For each instruction of the region, the locals that may be read before being written, from
        it on, other than by the instructions `unread`; and those of `written` that somebody behind
        the region reads, where they may come out of it as they are."""
        live: dict[int, frozenset[int]] = dict.fromkeys(region, frozenset())
        before: dict[int, list[int]] = {}
        for i in region:
            for target in self.edges(i):
                if target in region:
                    before.setdefault(target, []).append(i)

        def behind(i: int) -> frozenset[int]:
            return live[i] if i in region else self._handed_on(i, written)

        todo = set(region)
        while todo:
            i = todo.pop()
            name, arg = self.names[i], self.args[i]
            handler = self.caught_by(i)
            caught = behind(handler.target) if handler is not None else frozenset()
            flowing = frozenset().union(*map(behind, self.next(i)))
            reads = () if i in unread else reads_of(name, arg)
            now = (flowing - set(writes_of(name, arg))) | caught | set(reads)
            if now != live[i]:
                live[i] = now
                todo.update(before.get(i, ()))
        return live

    def _handed_on(self, stop: int, written: Collection[int]) -> frozenset[int]:
        """Of these locals, those whose values count at an instruction where a stretch ends."""
        if not written or self.names[stop].startswith("RETURN"):
            return frozenset()
        if self._live_everywhere is None:
            self._live_everywhere = self._live(set(range(len(self))), (), ())
        return frozenset(written) & (self._live_everywhere[stop] | set(own_cells(self.code)))


__all__ = ["VALUE", "Flow", "Handler", "Slot", "Stack", "Stretch", "local_names", "own_cells"]
