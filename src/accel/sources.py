"""Sources: how a value met while recording is reached again from a call's roots.

In: the recorder names each value it tracks by a `Source`. Out: guard instructions
that load it (`accel.guards`) and a name for people (`self.layers[3].weight`).
Invariant: a source is interned under its base, so equal paths are the same object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Load:
    """One row of LOADS: the native guard instruction of a step, and how people write it."""

    instruction: str
    has_operand: bool
    text: Callable[[str, Any], str]


def _item(base: str, key: Any) -> str:
    if base.endswith(".__dict__") and type(key) is str:
        return f"{base.removesuffix('.__dict__')}.{key}"
    return f"{base}[{key!r}]"


def _constant(_base: str, key: Any) -> str:
    name = getattr(key, "__qualname__", None) or getattr(key, "__name__", None)
    if type(key) is dict:
        name = f"globals of {key.get('__name__', '?')}"
    return f"<{name or type(key).__name__}>"


# Rules for whoever adds a row:
# 1. `instruction` must exist in native/guards.cpp, must not run user code, and must fail
#    softly (the guard does not hold) when the step is impossible.
# 2. The step must read the same thing that the program read when the source was made.
LOADS: dict[str, Load] = {
    "root": Load("", False, lambda _b, key: str(key[1])),
    "constant": Load("CONST_OBJECT", True, _constant),
    "dict": Load("INSTANCE_DICT", False, lambda b, _k: f"{b}.__dict__"),
    "dict_item": Load("DICT_ITEM", True, _item),
    "list_item": Load("LIST_ITEM", True, _item),
    "deque_item": Load("DEQUE_ITEM", True, _item),
    "tuple_item": Load("TUPLE_ITEM", True, _item),
    "cell": Load("CELL_CONTENTS", False, lambda b, _k: b),
    "member": Load("SLOT_MEMBER", True, lambda b, k: f"{b}.{k.__name__}"),
    "code": Load("FUNCTION_CODE", False, lambda b, _k: f"{b}.__code__"),
    "defaults": Load("FUNCTION_DEFAULTS", False, lambda b, _k: f"{b}.__defaults__"),
    "kwdefaults": Load("FUNCTION_KWDEFAULTS", False, lambda b, _k: f"{b}.__kwdefaults__"),
    "globals": Load("FUNCTION_GLOBALS", False, lambda b, _k: f"{b}.__globals__"),
    "closure": Load("FUNCTION_CLOSURE", True, lambda b, k: f"{b}.__closure__[{k}]"),
    "bound_self": Load("BOUND_SELF", False, lambda b, _k: f"{b}.__self__"),
    "bound_function": Load("BOUND_FUNC", False, lambda b, _k: f"{b}.__func__"),
    "attribute": Load("ATTR_GENERIC", True, lambda b, k: f"{b}.{k}"),
}


class Source:
    """One step from `base` (None for a root or a constant object)."""

    __slots__ = ("_children", "base", "key", "kind")

    def __init__(self, base: Source | None, kind: str, key: Any) -> None:
        self.base = base
        self.kind = kind
        self.key = key
        self._children: dict[tuple[str, Any], Source] = {}

    def child(self, kind: str, key: Hashable = None) -> Source:
        """The source one step further; the same object each time. `key` is compared by
        type and value, so the list positions 1 and True differ."""
        interned = (kind, (type(key), key))
        found = self._children.get(interned)
        if found is None:
            found = self._children[interned] = Source(self, kind, key)
        return found

    def __str__(self) -> str:
        base = str(self.base) if self.base is not None else ""
        return LOADS[self.kind].text(base, self.key)

    def __repr__(self) -> str:
        return f"Source({self})"


_CONTENTS = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")
_GLOBAL = re.compile(r"^<globals of ([^>]*)>\['([^']*)'\]")


def source_text(source: Source) -> str:
    """A source as the user would write it: `self.layers[3].weight`, `global N of module m`."""
    text = _CONTENTS.sub(lambda m: f"[{m[1]}]" if m[1].isdigit() else f".{m[1]}", str(source))
    named = _GLOBAL.match(text)
    if named is None:
        return text
    rest = text[named.end() :]
    if not rest:
        return f"global {named[2]} of module {named[1]}"
    return f"{named[2]}{rest} ({named[2]} is a global of module {named[1]})"


def root(index: int, name: str) -> Source:
    """The call's root number `index`, known to the user as `name`."""
    return Source(None, "root", (index, name))


def constant(value: object) -> Source:
    """An object that the guard program itself keeps: a globals dict, a type, a module."""
    return Source(None, "constant", value)
