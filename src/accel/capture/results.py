"""Results and effects: how a replay rebuilds what the recorded call returned and wrote.

In: the recorded return value and effects, as real objects. Out: a `Template`: plain specs
over graph outputs and guard slots, and `finish(outputs, slots)` that applies effects in
program order and builds the result. Invariant: identity among the parts is kept; what
existed before is returned as itself, what the call made is made anew.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.capture.numbers import NumberEvents
from accel.capture.state import Effect
from accel.capture.steps import Void
from accel.capture.values import (
    BUILTIN_CONTAINERS,
    PLAIN_TENSORS,
    SMALL_INTS,
    builtin_method,
    is_constant,
    is_python_class,
    is_static,
    mro_of,
)
from accel.sources import Source

Spec = tuple[Any, ...]
Builder = Callable[[list[Any], list[Any], dict[int, Any]], Any]

# How a fresh object of a builtin type is made from its parts.
_SEQUENCES: dict[type, Callable[[list[Any]], Any]] = {
    list: list,
    tuple: tuple,
    torch.Size: torch.Size,
    set: set,
    frozenset: frozenset,
    collections.deque: collections.deque,
}
_MAPPINGS: dict[type, Callable[[], Any]] = {
    dict: dict,
    collections.OrderedDict: collections.OrderedDict,
}

_LIFTED = -1  # where a replay remembers its lifted numbers: no object made has this number

# Methods bound to an object.
_METHODS = (types.MethodType, types.BuiltinFunctionType)

# Effects: how each is done again. (target, operands)
EFFECTS: dict[str, Callable[..., Any]] = {
    "setattr": object.__setattr__,
    "setitem": lambda target, *entry: builtin_method(type(target), "__setitem__")(target, *entry),
    "call": lambda target, method, *operands: method(target, *operands),
    "recall": lambda _target, f, args, kwargs: f(*args, **kwargs),
    "write_texts": lambda stream, texts: _write_texts(stream, texts),
}
# How many of their operands come first and are what they are, whatever their kind.
_CONSTANT_OPERANDS = {"write_texts": 1, "call": 1, "recall": 3}


def _write_texts(stream: Any, texts: list[str | None]) -> None:
    """None among them says that the stream is flushed."""
    write = stream.write
    for text in texts:
        if text is None:
            stream.flush()
        else:
            write(text)


def made_in_the_trace(kind: type) -> str:
    """What is said of an object that compiled code would have to make as the program does."""
    return f"a {kind.__name__} made in the trace"


@dataclass
class Template:
    """Specs of the result and of the effects; `slots` lists the sources they load."""

    result: Spec
    effects: list[tuple[str, Source | None, tuple[Any, ...]]] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)  # behind the tensors, as one list
    has_lifted: bool = False  # the last output is a list of numbers that Python computes
    sources: list[Source] = field(default_factory=list)

    def builder(self, slot_of: Callable[[Source], int]) -> Callable[[list[Any], list[Any]], Any]:
        """`finish(outputs, slots)`: commit the effects, return the result."""
        build = _compile(self.result, slot_of)
        has_lifted = self.has_lifted
        steps = [
            (
                EFFECTS[kind],
                slot_of(target) if target is not None else None,
                [_compile(spec, slot_of) for spec in operands],
            )
            for kind, target, operands in self.effects
        ]

        def finish(outputs: list[Any], slots: list[Any]) -> Any:
            memo: dict[int, Any] = {}
            if has_lifted:
                memo[_LIFTED] = outputs.pop()
            result = build(outputs, slots, memo)
            for apply, target, operands in steps:
                values = [operand(outputs, slots, memo) for operand in operands]
                apply(None if target is None else slots[target], *values)
            return result

        return finish


class Describer:
    """Turns real objects into specs, against one recording's knowledge."""

    def __init__(self, state: NumberEvents) -> None:
        self.state = state
        self.template = Template(("const", None))
        self._made: dict[int, int] = {}
        self._open: set[int] = set()
        self._keep: list[object] = []

    def describe(self, result: Any, effects: list[Effect]) -> Template:
        self.template.result = self.spec(result)
        for effect in effects:
            constants = _CONSTANT_OPERANDS.get(effect.kind, 0)
            operands = (
                *(("const", o) for o in effect.operands[:constants]),
                *(self.spec(o) for o in effect.operands[constants:]),
            )
            target = effect.target
            if target is not None and target not in self.template.sources:
                self.template.sources.append(target)
            self.template.effects.append((effect.kind, effect.target, operands))
        return self.template

    def describe_parts(self, parts: list[Any], effects: list[Effect]) -> Template:
        """As `describe` for a tuple of these parts; a `Source` is loaded as it is."""
        specs = [self._load(p) if type(p) is Source else self.spec(p) for p in parts]
        self.describe((), effects)
        number = len(self._made)
        self.template.result = ("make", number, ("sequence", tuple, specs))
        return self.template

    def spec(self, value: Any) -> Spec:
        kind = type(value)
        if kind in PLAIN_TENSORS:
            return self._tensor(value)
        if self.state.has_number(value):
            if kind is int or kind is float:
                return self._number(value)
            if kind is slice:
                self.state.settle(value)
                return ("const", value)
        elif is_constant(value):
            return self._constant(value)
        known = self.state.source_of(value)
        if known is not None:
            return self._load(known)
        if kind in _METHODS and not isinstance(
            value.__self__, (type, types.ModuleType, type(None))
        ):
            return self._method(value, kind)
        if is_static(value):
            raise Void("result", made_in_the_trace(kind))
        if id(value) in self._made:
            return ("again", self._made[id(value)])
        if id(value) in self._open:
            raise Void("result", "an object that contains itself")
        self._open.add(id(value))
        body = self._body(value, kind)
        self._open.discard(id(value))
        number = self._made[id(value)] = len(self._made)
        self._keep.append(value)
        return ("make", number, body)

    def _constant(self, value: Any) -> Spec:
        """A constant: the very object that lies where it was read, if it was."""
        found = self.state.read_at.get(id(value))
        if found is None or (type(value) is int and value in SMALL_INTS):
            return ("const", value)
        first, *others = found[1].values()
        for other in others:  # where it was read, too; the next time that may be an equal one
            self.state.guards.add(first, "SAME", other)
        return self._load(first)

    def _method(self, value: Any, kind: type) -> Spec:
        """A bound method, of a Python function or of a builtin container."""
        owner = value.__self__
        if kind is types.MethodType:
            return ("method", self.spec(value.__func__), self.spec(owner))
        if type(owner) not in BUILTIN_CONTAINERS:
            raise Void("result", f"a method of a {type(owner).__name__}")
        return ("builtin_method", value.__name__, self.spec(owner))

    def _load(self, source: Source) -> Spec:
        if source.kind == "constant":
            return ("const", source.key)
        if source not in self.template.sources:
            self.template.sources.append(source)
        return ("slot", source)

    def _tensor(self, tensor: torch.Tensor) -> Spec:
        source = self.state.source_of(tensor)
        if source is not None:
            return self._load(source)
        index = self.state.table.get(tensor)
        if index is None:
            raise Void("unknown_tensor", "in the result")
        if tensor.requires_grad and tensor.grad_fn is None:
            raise Void("requires_grad", "a view of a parameter, made without grad")
        name = self.state.names[index]
        if name not in self.template.outputs:
            self.template.outputs.append(name)
            self.state.output_tensors.append(tensor)
        return ("output", self.template.outputs.index(name))

    def _number(self, value: Any) -> Spec:
        source = self.state.lifted_source(value)
        if source is not None:
            return self._load(source)  # the very object
        lifted = self.state.lifted_output(value)
        if lifted is not None:
            return ("lifted", lifted)
        name = self.state.number_of(value)
        assert name is not None
        if name not in self.template.numbers:
            self.template.numbers.append(name)
        return ("number", self.template.numbers.index(name))

    def _body(self, value: Any, kind: type) -> Spec:
        if kind in _SEQUENCES:
            parts = [self.spec(v) for v in value]
            if kind is collections.deque and value.maxlen is not None:
                return ("bounded_deque", value.maxlen, parts)
            return ("sequence", kind, parts)
        if kind in _MAPPINGS:
            items = [(self._key(k), self.spec(v)) for k, v in value.items()]
            return ("mapping", kind, items)
        if issubclass(kind, tuple) and kind.__module__ == "torch.return_types":
            return ("structseq", kind, [self.spec(v) for v in value])
        if not is_python_class(kind) and kind is not types.SimpleNamespace:
            raise Void("result", f"a {kind.__name__}")
        if id(value) not in self.state.fresh and not (
            issubclass(kind, tuple) and not getattr(value, "__dict__", None)
        ):
            raise Void("result", f"a {kind.__name__} of unknown origin")
        return self._instance(value, kind)

    def _instance(self, value: Any, kind: type) -> Spec:
        """An object of a user's class: its builtin part and its instance dict."""
        slots = _slots(kind)
        if slots and issubclass(kind, (tuple, dict)):
            raise Void("result", f"a {kind.__name__} with __slots__")
        try:
            attributes = object.__getattribute__(value, "__dict__")
        except AttributeError:
            attributes = {}
        # Parts are described in the order in which they are built: shared ones once, first.
        if issubclass(kind, tuple):
            parts = [self.spec(v) for v in tuple.__iter__(value)]
            return ("tuple_instance", kind, parts, self._attributes(attributes))
        if issubclass(kind, dict):
            base = collections.OrderedDict if issubclass(kind, collections.OrderedDict) else dict
            items = [(self._key(k), self.spec(v)) for k, v in base.items(value)]
            return ("dict_instance", kind, base, items, self._attributes(attributes))
        if issubclass(kind, (list, set, frozenset, int, float, str, bytes, BaseException)):
            raise Void("result", f"a {kind.__name__}")
        held = [(slot, slot.__get__(value)) for slot in slots if _is_bound(slot, value)]
        parts = [(slot, self.spec(v)) for slot, v in held]
        return ("instance", kind, self._attributes(attributes), parts)

    def _attributes(self, attributes: dict[str, Any]) -> list[tuple[str, Spec]]:
        return [(name, self.spec(v)) for name, v in attributes.items()]

    def _key(self, key: Any) -> Any:
        self.state.settle(key)
        if not (is_constant(key) or is_static(key)):
            raise Void("result", f"a dict with a key of type {type(key).__name__}")
        self.state.pin_function(key)
        return key


# ------------------------------------------------------------------ specs -> builders


def _compile(spec: Spec, slot_of: Callable[[Source], int]) -> Builder:
    return _COMPILERS[spec[0]](spec, slot_of)


def _const(spec: Spec, _slot_of: Any) -> Builder:
    value = spec[1]
    return lambda outputs, slots, memo: value


def _slot(spec: Spec, slot_of: Any) -> Builder:
    index = slot_of(spec[1])
    return lambda outputs, slots, memo: slots[index]


def _output(spec: Spec, _slot_of: Any) -> Builder:
    index = spec[1]
    return lambda outputs, slots, memo: outputs[index]


def _number(spec: Spec, _slot_of: Any) -> Builder:
    index = spec[1]
    return lambda outputs, slots, memo: outputs[-1][index]


def _lifted(spec: Spec, _slot_of: Any) -> Builder:
    index = spec[1]
    return lambda outputs, slots, memo: memo[_LIFTED][index]


def _again(spec: Spec, _slot_of: Any) -> Builder:
    number = spec[1]
    return lambda outputs, slots, memo: memo[number]


def _make(spec: Spec, slot_of: Any) -> Builder:
    number, build = spec[1], _compile(spec[2], slot_of)

    def made(outputs: Any, slots: Any, memo: Any) -> Any:
        value = memo[number] = build(outputs, slots, memo)
        return value

    return made


def _sequence(spec: Spec, slot_of: Any) -> Builder:
    make = _SEQUENCES[spec[1]]
    parts = [_compile(p, slot_of) for p in spec[2]]
    return lambda outputs, slots, memo: make([p(outputs, slots, memo) for p in parts])


def _bounded_deque(spec: Spec, slot_of: Any) -> Builder:
    limit = spec[1]
    parts = [_compile(p, slot_of) for p in spec[2]]
    return lambda *where: collections.deque([p(*where) for p in parts], limit)


def _mapping(spec: Spec, slot_of: Any) -> Builder:
    make = _MAPPINGS[spec[1]]
    items = [(k, _compile(v, slot_of)) for k, v in spec[2]]

    def mapping(outputs: Any, slots: Any, memo: Any) -> Any:
        value = make()
        for key, part in items:
            value[key] = part(outputs, slots, memo)
        return value

    return mapping


def _structseq(spec: Spec, slot_of: Any) -> Builder:
    kind, parts = spec[1], [_compile(p, slot_of) for p in spec[2]]
    return lambda outputs, slots, memo: kind([p(outputs, slots, memo) for p in parts])


def _fill(value: Any, attrs: list[tuple[str, Builder]], where: Any) -> Any:
    if attrs:
        target = object.__getattribute__(value, "__dict__")
        for name, part in attrs:
            target[name] = part(*where)
    return value


def _bound_method(spec: Spec, slot_of: Any) -> Builder:
    function, owner = _compile(spec[1], slot_of), _compile(spec[2], slot_of)
    return lambda *where: types.MethodType(function(*where), owner(*where))


def _builtin_method(spec: Spec, slot_of: Any) -> Builder:
    name, owner = spec[1], _compile(spec[2], slot_of)
    return lambda *where: getattr(owner(*where), name)


def _tuple_instance(spec: Spec, slot_of: Any) -> Builder:
    kind, parts = spec[1], [_compile(p, slot_of) for p in spec[2]]
    attrs = [(n, _compile(p, slot_of)) for n, p in spec[3]]
    return lambda *where: _fill(tuple.__new__(kind, [p(*where) for p in parts]), attrs, where)


def _dict_instance(spec: Spec, slot_of: Any) -> Builder:
    kind, base = spec[1], spec[2]
    items = [(k, _compile(v, slot_of)) for k, v in spec[3]]
    attrs = [(n, _compile(p, slot_of)) for n, p in spec[4]]

    def instance(*where: Any) -> Any:
        value = base.__new__(kind)
        for key, part in items:
            base.__setitem__(value, key, part(*where))
        return _fill(value, attrs, where)

    return instance


def _instance(spec: Spec, slot_of: Any) -> Builder:
    kind = spec[1]
    attrs = [(n, _compile(p, slot_of)) for n, p in spec[2]]
    members = [(slot, _compile(p, slot_of)) for slot, p in spec[3]]

    def instance(*where: Any) -> Any:
        # Parts are built in the order in which they were described.
        value = _fill(object.__new__(kind), attrs, where)
        for slot, part in members:
            slot.__set__(value, part(*where))
        return value

    return instance


def _slots(kind: type) -> list[Any]:
    """The descriptors of all `__slots__` of a class written in Python."""
    return [
        member
        for base in mro_of(kind)
        if "__slots__" in base.__dict__
        for member in base.__dict__.values()
        if type(member) is types.MemberDescriptorType
    ]


def _is_bound(slot: Any, value: Any) -> bool:
    try:
        slot.__get__(value)
    except AttributeError:
        return False
    return True


_COMPILERS: dict[str, Callable[[Spec, Any], Builder]] = {
    "const": _const,
    "slot": _slot,
    "output": _output,
    "number": _number,
    "lifted": _lifted,
    "again": _again,
    "make": _make,
    "sequence": _sequence,
    "bounded_deque": _bounded_deque,
    "mapping": _mapping,
    "structseq": _structseq,
    "tuple_instance": _tuple_instance,
    "dict_instance": _dict_instance,
    "instance": _instance,
    "method": _bound_method,
    "builtin_method": _builtin_method,
}
