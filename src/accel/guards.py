"""Guards: checks on sources, collected while recording, lowered to a native program.

In: `(source, check, operands)` in the order the program's reads happened. Out: the
instruction list of `_native.GuardProgram` and the slots at which inputs will lie.
Invariant: a source is loaded once, after its base, and before anything checked on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from accel.sources import LOADS, Source

# Rules for whoever adds a row:
# 1. The name is an instruction of native/guards.cpp with that many operands.
# 2. The text says in the user's words what changed, given the operand.
# 3. tests/unit/accel/test_guards.py needs a change that fails it and one that passes.
CHECKS: dict[str, str] = {
    "IS": "is another object than {0!r}",
    "TYPE_IS": "is no longer a {0.__name__}",
    "EQUALS": "is no longer {0!r}",
    "DICT_ABSENT": "now has an entry {0!r}",
    "DICT_KEYS": "has other keys",
    "LEN": "no longer has length {0}",
    "SET_EQUALS": "holds other members",
    "SAME": "is no longer the same object as {0}",
    "NOT_SAME": "is now the same object as {0}",
    "TYPE_ATTRS": "had a class attribute changed",
    "UNBOUND": "is now bound",
    "TENSOR": "is a tensor of another kind (size, stride, dtype, device, grad or type)",
    "TENSOR_KIND": "is a tensor of another kind (dtype, device, dimensions, grad or type)",
    "NO_OVERLAP": "now shares memory with {0}",
    "CALL": "changed",
}


# Whose operand is an example, needed until the guards are native.
EXAMPLES = frozenset({"TENSOR", "TENSOR_KIND"})


@dataclass(frozen=True)
class Guard:
    """One check on one source; `location` is the user's line that read it."""

    source: Source
    check: str
    operands: tuple[Any, ...]
    location: str = ""

    def __str__(self) -> str:
        shown = [str(o) if isinstance(o, Source) else o for o in self.operands]
        try:
            text = CHECKS[self.check].format(*shown)
        except (AttributeError, IndexError, KeyError):
            text = CHECKS[self.check]
        return f"{self.source} {text}"


@dataclass(frozen=True)
class Lowered:
    """A guard program's instructions; `guard_of[i]` is the guard behind instruction i."""

    instructions: list[tuple[Any, ...]]
    slots: dict[int, int]  # id(source) -> slot
    guard_of: list[Guard | Source]
    stable: list[int]


class GuardSet:
    """The guards of one recording, without duplicates, in program order."""

    def __init__(self, locate: Callable[[], str] = lambda: "") -> None:
        """`locate` says which line of the user's is reading."""
        self.guards: list[Guard] = []
        self._locate = locate
        self._seen: set[tuple[Any, ...]] = set()
        self._type_attrs: dict[type, dict[str, object]] = {}
        self._type_sources: dict[type, Source] = {}

    def add(self, source: Source, check: str, *operands: Any) -> None:
        """Adds a check once. Operands that are not hashable by value count by identity."""
        key = (id(source), check, *(id(o) for o in operands))
        if key in self._seen:
            return
        self._seen.add(key)
        self.guards.append(Guard(source, check, operands, self._locate()))

    def add_class_attribute(self, cls: type, name: str, value: object) -> None:
        """Class `cls` finds `value` (or `MISSING`) under `name` along its MRO."""
        self._type_attrs.setdefault(cls, {}).setdefault(name, value)

    def all(self) -> list[Guard]:
        """Every guard, those on classes first."""
        classes = []
        for cls, names in self._type_attrs.items():
            source = self._type_sources.get(cls)
            if source is None:
                source = self._type_sources[cls] = Source(None, "constant", cls)
            classes.append(Guard(source, "TYPE_ATTRS", (cls, list(names.items()))))
        return classes + self.guards

    def release(self) -> None:
        """Forgets the example tensors, which nothing needs once the guards are native."""
        self.guards = [
            Guard(g.source, g.check, (), g.location) if g.check in EXAMPLES else g
            for g in self.guards
        ]
        self._seen.clear()

    def lower(self, root_count: int, wanted: Iterable[Source]) -> Lowered:
        """Instructions for all guards, and loads for the `wanted` sources."""
        lowering = _Lowering(root_count)
        for guard in self.all():
            lowering.check(guard)
        for source in wanted:
            lowering.load(source)
        return Lowered(
            lowering.instructions, lowering.slots, lowering.guard_of, sorted(lowering.stable)
        )


class _Lowering:
    def __init__(self, root_count: int) -> None:
        self.instructions: list[tuple[Any, ...]] = []
        self.slots: dict[int, int] = {}
        self.guard_of: list[Guard | Source] = []
        self.next_slot = root_count
        self.stable: set[int] = set()

    def load(self, source: Source) -> int:
        slot = self.slots.get(id(source))
        if slot is not None:
            return slot
        if source.kind == "root":
            slot = int(source.key[0])
            self.slots[id(source)] = slot
            return slot
        row = LOADS[source.kind]
        base = self.load(source.base) if source.base is not None else 0
        slot = self.next_slot
        self.next_slot += 1
        operands = (source.key,) if row.has_operand else ()
        self.instructions.append((row.instruction, slot, base, *operands))
        self.guard_of.append(source)
        self.slots[id(source)] = slot
        if source.kind == "constant":
            self.stable.add(slot)
        return slot

    def check(self, guard: Guard) -> None:
        if guard.check == "TYPE_ATTRS":  # about the class itself: needs no slot
            self.instructions.append(("TYPE_ATTRS", -1, 0, *guard.operands))
            self.guard_of.append(guard)
            return
        slot = self.load(guard.source)
        operands = tuple(self.load(o) if isinstance(o, Source) else o for o in guard.operands)
        self.instructions.append((guard.check, -1, slot, *operands))
        self.guard_of.append(guard)
