"""isinstance() and issubclass().

In: calls of the two. Out: a step; guards on what the classes' metaclasses go by.
Invariant: an answer that a metaclass gives is guarded by all that the metaclass read.
"""

from __future__ import annotations

import abc
import types
import typing
from collections.abc import Iterator
from typing import Any

import torch

from accel.capture.library_calls import LibraryCalls
from accel.capture.steps import FOLD, Answer, Void
from accel.capture.values import CONSTANT_TYPES, PLAIN_TENSORS, class_lookup

_INSTANCE, _SUBCLASS = "__instancecheck__", "__subclasscheck__"
_QUESTIONS = (_INSTANCE, _SUBCLASS)


def _answered_by(*samples: Any) -> frozenset[int]:
    """The ids of the functions that answer for these classes."""
    return frozenset(id(class_lookup(type(c), name)) for c in samples for name in _QUESTIONS)


# They go by the registries of abstract classes, where registering can turn a no into a yes;
# CPython itself never takes a yes back. Protocols, which look at instances, are not among them.
_BY_REGISTRY = _answered_by(abc.ABC, typing.Any, list[int], typing.List[int], typing.List)  # noqa: UP006
# They go by an object's class and by marks that nobody takes off a tensor again.
_BY_MARKS = _answered_by(torch.nn.Parameter, torch.nn.Buffer)


class ClassQuestions(LibraryCalls):
    """`isinstance` and `issubclass`: by the classes' own answers."""

    guarded_registry: object = None  # the token of abc's registry that a guard looks at

    def _call_isinstance(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 2:
            return None
        value = args[0]
        if type(value) not in CONSTANT_TYPES and type(value) not in PLAIN_TENSORS:
            try:
                self.check_value(value, "isinstance()")
            except Void:
                if issubclass(type(value), torch.Tensor):
                    raise
        return self._asked(f, args, type(value), _INSTANCE)

    def _call_issubclass(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 2:
            return None
        return self._asked(f, args, None, _SUBCLASS)

    def _asked(self, f: Any, args: Any, kind: type | None, question: str) -> Answer:
        """`kind` is the class that answers yes for itself, without its metaclass."""
        classes = list(_each(args[1]))
        if question == _INSTANCE and all(type(c) is type for c in classes):
            return None
        by_registry = False
        for cls in classes:
            answers = class_lookup(type(cls), question)
            if type(answers) is not types.FunctionType or cls is kind:
                continue
            self.guards.add_class_attribute(type(cls), question, answers)
            if id(answers) in _BY_REGISTRY:
                by_registry = True
            elif id(answers) not in _BY_MARKS:
                return self._ask_metaclass(f, args, answers)
        return (FOLD, f, args, None, self._after_question, by_registry)

    def _ask_metaclass(self, f: Any, args: Any, answers: types.FunctionType) -> Answer:
        value, cls = args
        if type(cls) is tuple or isinstance(cls, types.UnionType):
            raise Void("opaque_call", f"{f.__name__}() of several classes, one with a metaclass")
        self.assume_static(_metaclass_says)
        self.assume_static(answers)
        return self.call_python(_metaclass_says, (answers, cls, value), {})

    def _after_question(self, answer: bool, by_registry: bool) -> Answer:
        if by_registry and not answer:
            source, token = self.assume_static(abc.ABCMeta), abc.get_cache_token()
            if token != self.guarded_registry:
                self.guarded_registry = token
                self.guards.add(source, "CALL", _SameRegistry(token))
        return None


def _each(classes: Any) -> Iterator[Any]:
    if type(classes) is tuple:
        for cls in classes:
            yield from _each(cls)
    elif isinstance(classes, types.UnionType) or typing.get_origin(classes) is typing.Union:
        yield from typing.get_args(classes)
    else:
        yield classes


def _metaclass_says(answers: Any, cls: Any, value: Any) -> bool:
    """What CPython does with a metaclass's answer; recorded through its twin."""
    return True if answers(cls, value) else False  # noqa: SIM210


class _SameRegistry:
    """Guard: nothing has been registered with an abstract class since."""

    def __init__(self, token: object) -> None:
        self.token = token

    def __call__(self, _: object) -> bool:
        return abc.get_cache_token() == self.token

    def __repr__(self) -> str:
        return "no class was registered with an abstract class"
