"""Misses: why a variant did not serve a call, in the user's words.

In: the guard that did not hold, and what native code says it met. Out: a `Miss`: what changed, its
old and new value, the user's line that read it. Invariant: no code of the user's runs here.
"""

from __future__ import annotations

import re
import types
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accel.guards import EXAMPLES, Guard
from accel.report import short_place
from accel.sources import Source, source_text

_TENSOR_TEXT = re.compile(r"; (\w+) (?:is|are) (.*), (?:was|were) (.*)$", re.S)
_FOUND_TEXT = re.compile(r"; found a (\S+)(?: (.*))?$", re.S)
_PROPERTIES = {
    "sizes": "{0}.shape", "strides": "{0}.stride()", "dtype": "{0}.dtype", "type": "type({0})",
}  # fmt: skip
# What the user can do when a value of this kind keeps changing.
_FIXES = (
    (re.compile(r"\.shape"), "mark the dimension with accel.mark_dynamic(), or pad to few sizes"),
    (re.compile(r"\.(stride\(\)|dtype)$|requires_grad"), "pass tensors of one kind"),
)
# Checks whose operands are the user's objects; native code holds them weakly.
_OF_OBJECTS = EXAMPLES | {"IS", "CALL", "DICT_KEYS", "SET_EQUALS", "TYPE_ATTRS"}
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)
_ANY_FIX = "keep it the same, or make it a tensor"


@dataclass(frozen=True)
class Miss:
    """`what` was `old` when recorded and is `new` in this call; `location` is the user's line."""

    what: str
    old: str = ""
    new: str = ""
    location: str = ""

    def __str__(self) -> str:
        text = f"{self.what} was {self.old}, is {self.new}" if self.old else self.what
        return f"{text} ({short_place(self.location)})" if self.location else text

    @property
    def fix(self) -> str:
        """What the user can do about it."""
        return next((fix for pattern, fix in _FIXES if pattern.search(self.what)), _ANY_FIX)


@dataclass(frozen=True)
class _Described:
    """Stands for an object of the user's, which is not kept alive for a message."""

    text: str

    def __repr__(self) -> str:
        return self.text


def remembered(checked: Guard | Source) -> Guard | Source:
    """What is kept of an instruction of a guard program: no example tensor, no object."""
    if not isinstance(checked, Guard) or checked.check not in _OF_OBJECTS:
        return checked
    operands = tuple(map(_described, checked.operands)) if checked.check == "IS" else ()
    return Guard(checked.source, checked.check, operands, checked.location)


def _described(value: Any) -> _Described:
    name = getattr(value, "__qualname__", None) if isinstance(value, _NAMED) else None
    return _Described(name or _with_article(type(value).__name__))


def name_of(checked: Guard | Source) -> str:
    """What it looks at, as the user would write it."""
    return source_text(checked if isinstance(checked, Source) else checked.source)


def miss_of(checked: Guard | Source, found: str) -> Miss:
    """The miss of the instruction behind `checked`; `found` is what native code says of it."""
    if isinstance(checked, Source):
        return Miss(f"{source_text(checked)} cannot be reached any more")
    name, place = source_text(checked.source), checked.location
    if checked.check in EXAMPLES:
        return _tensor_miss(name, found, place)
    actual = _FOUND_TEXT.search(found)
    if checked.check in ("EQUALS", "TYPE_IS") and actual is not None:
        kind, value = actual.groups()
        if checked.check == "TYPE_IS":
            return Miss(
                name, _with_article(checked.operands[0].__name__), _shown(kind, value), place
            )
        expected = checked.operands[0]
        is_same_type = type(expected).__name__ == kind.rsplit(".", maxsplit=1)[-1]
        new = value if is_same_type and value else _shown(kind, value)
        return Miss(name, repr(expected), new, place)
    if checked.check == "LEN" and actual is not None:
        length = actual.group(2)
        return Miss(f"len({name})", str(checked.operands[0]), length or "another", place)
    return Miss(str(checked).replace(str(checked.source), name, 1), location=place)


def _shown(kind: str, value: str | None) -> str:
    article = _with_article(kind)
    return value if value == "None" else f"{value} ({article})" if value else article


def _with_article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _tensor_miss(name: str, found: str, place: str) -> Miss:
    text = _TENSOR_TEXT.search(found)
    if text is None:
        reason = found.partition("; ")[2] or "its kind"
        return Miss(f"{name}: {reason} is not as it was", location=place)
    what, new, old = text.groups()
    if what == "sizes":
        before, now = _numbers(old), _numbers(new)
        changed = [d for d, (a, b) in enumerate(zip(before, now, strict=False)) if a != b]
        if len(before) == len(now) and len(changed) == 1:
            (d,) = changed
            return Miss(f"{name}.shape[{d}]", before[d], now[d], place)
    return Miss(_PROPERTIES.get(what, f"{what} of {{0}}").format(name), old, new, place)


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def why_missed(
    variants: list[Any], roots: tuple[Any, ...], parameters: tuple[str, ...] = ()
) -> list[Miss]:
    """For each variant that was tried, what kept it from serving a call with these roots;
    `parameters` are what the user calls the items of `args`."""
    misses = _misses(variants, roots)
    if not parameters:
        return misses
    return [replace(m, what=_KEYWORD.sub(r"\1", _positional(m.what, parameters))) for m in misses]


_SIZE = re.compile(r"\binput(\d+)\.size\((\d+)\)")


def _size_text(inputs: list[Source], found: re.Match[str]) -> str:
    return f"{source_text(inputs[int(found[1])])}.shape[{found[2]}]"


_POSITIONAL = re.compile(r"\bargs\[(\d+)\]")
_KEYWORD = re.compile(r"\bkwargs\['(\w+)'\]")


def _positional(text: str, parameters: tuple[str, ...]) -> str:
    def name(found: re.Match[str]) -> str:
        position = int(found[1])
        return parameters[position] if position < len(parameters) else found[0]

    return _POSITIONAL.sub(name, text)


def _misses(variants: list[Any], roots: tuple[Any, ...]) -> list[Miss]:
    misses = []
    for installed in variants:
        index = installed.program.check(roots)
        if index >= 0:
            found = installed.program.explain(index, roots)
            misses.append(miss_of(installed.recording.checked[index], found))
            continue
        numbers = installed.recording.numbers
        why = getattr(installed.native.executor, "why", "")  # of a family: sizes
        why = _SIZE.sub(partial(_size_text, installed.recording.inputs), why)
        why = why or (numbers.why if numbers is not None else "")
        misses.append(Miss(why or installed.recording.ambient.difference() or "a speculation"))
    return misses
