"""Calls of the standard library and of numpy: getters, logging, folds, and C code with callbacks.

In: a call that the policy has a row for. Out: a step, and the guards that the row's reads deserve.
Invariant: what C code does with a container's elements or a callback is watched too, by
`capture/callbacks.py`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import operator
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from accel.capture.callbacks import (
    CALLBACKS,
    INNER_CODES,
    TAKES_APART,
    each_compared,
    each_hashed,
    each_pair,
    each_read,
    hashes_parts,
    runs_in_a_frame,
    watched,
    watched_key,
    without_callback,
)
from accel.capture.container_writes import ContainerWrites
from accel.capture.polyfills import call_named, call_with_rows, get_attributes, get_items
from accel.capture.state import user_location
from accel.capture.steps import CONSTRUCT, FOLD, NATIVE, Answer, Void
from accel.capture.values import (
    BOUND_C_METHOD,
    BUILTIN_CONTAINERS,
    BUILTIN_ITERATORS,
    CONSTANT_TYPES,
    NAMED_TYPES,
    PLAIN_TENSORS,
    is_constant,
    is_static,
)

# What iterates over its arguments from which one on, as soon as it is called.
_ITERATES: dict[Any, int] = {
    zip: 0,
    enumerate: 0,
    iter: 0,
    list: 0,
    tuple: 0,
    map: 1,
    filter: 1,
    itertools.product: 0,
    itertools.pairwise: 0,
    itertools.zip_longest: 0,
}
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_OF_C = (type, types.ModuleType)


def short_name(f: Any) -> str:
    module = getattr(f, "__module__", None) or getattr(
        type(getattr(f, "__self__", None)), "__name__", ""
    )
    return f"{module}.{getattr(f, '__qualname__', type(f).__name__)}"


class LibraryCalls(ContainerWrites):
    """Rules of the policy for calls of library code."""

    twin_of: Callable[[types.FunctionType], types.FunctionType | None]
    inner_codes: set[types.CodeType]

    def call_python(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        """Goes on in the twin of a Python function."""
        raise NotImplementedError

    def _call_weakref(self, f: Any) -> Answer:
        """A weak reference from outside: it still refers to the same object, or to none."""
        target, source = f(), self.source_of(f)
        if source is None or (target is not None and id(target) not in self.known):
            raise Void("opaque_call", "a weak reference")
        self.guards.add(source, "CALL", _RefersTo(f))
        if target is not None:
            self.pin(target)
        return (target,)

    def _call_getter(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        """itemgetter, attrgetter, methodcaller: immutable, so their identity says everything."""
        source = self.source_of(f)
        if source is not None:
            self.guards.add(source, "IS", f)
        if len(args) != 1 or kwargs:
            return None  # an error, as CPython words it
        held = f.__reduce__()
        if type(f) is operator.methodcaller:
            cls, parts = held
            options: dict[str, Any] = {}
            if type(cls) is functools.partial:  # how it keeps keywords
                (name, options), parts = (cls.args[0], cls.keywords), (cls.args[0], *parts)
            name, *rest = parts
            for value in (*rest, *options.values()):
                self._adopt_held(value)
            self.assume_static(call_named)
            return self.call_python(call_named, (*args, name, tuple(rest), options), None)
        polyfill: Any = get_items if type(f) is operator.itemgetter else get_attributes
        for value in held[1]:
            self._adopt_held(value)
        self.assume_static(polyfill)
        return self.call_python(polyfill, (*args, *held[1]), None)

    def _adopt_held(self, value: Any) -> None:
        """What an immutable object from outside holds: constants only."""
        if not (is_constant(value) or is_static(value)):
            raise Void("operand", f"a getter that holds a {type(value).__name__}")

    def _call_getter_type(self, f: Any, args: Any, kwargs: Any) -> Answer:
        for value in (*args, *kwargs.values()):
            self._adopt_held(value)
        return None

    def _call_namespace(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """types.SimpleNamespace(...): holds what it is given."""
        for value in args:
            self._about_to_read(value)
        return (CONSTRUCT, f, args, kwargs or None, None, None)

    def _call_logging(self, f: Any, args: Any, kwargs: Any) -> Answer:
        logger, level = args[0], _LEVELS[f.__name__]
        if logging.Logger.isEnabledFor(logger, level):
            raise Void("opaque_call", f"logging at level {f.__name__}")
        source = self.source_of(logger) or self.assume_static(logger)
        self.guards.add(source, "CALL", _LevelDisabled(level))
        return (FOLD, f, args, kwargs or None, None, None)

    def _call_get_logger(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """logging.getLogger of a name that has a logger already."""
        loggers = logging.Logger.manager.loggerDict
        if len(args) != 1 or kwargs or type(loggers.get(args[0])) is not logging.Logger:
            raise Void("opaque_call", "logging.getLogger() that makes a logger")
        source = self.constant_source(loggers).child("dict_item", args[0])
        self.guards.add(source, "IS", loggers[args[0]])
        self.assume_static(loggers[args[0]])
        return (loggers[args[0]],)

    def _call_logging_at(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """Logger.log(level, ...)"""
        if len(args) < 2 or type(args[1]) is not int:
            raise Void("opaque_call", "logging")
        return self._call_logger_level(f, args[:2], {}) and (
            FOLD,
            f,
            args,
            kwargs or None,
            None,
            None,
        )

    def _call_logger_level(self, f: Any, args: Any, kwargs: Any) -> Answer:
        logger, level = args
        if logging.Logger.isEnabledFor(logger, level):
            raise Void("opaque_call", "logging")
        source = self.source_of(logger) or self.assume_static(logger)
        self.guards.add(source, "CALL", _LevelDisabled(level))
        return (FOLD, f, args, kwargs or None, None, None)

    def _method_first_use(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """A lock is taken where the standard library computes a value once and keeps it."""
        kind = "opaque_call"
        if user_location().startswith((functools.__file__ + ":", logging.__file__ + ":")):
            kind = "first_use"
        raise Void(kind, f"{type(obj).__name__}.{f.__name__}")

    def _call_exc_info(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """sys.exc_info() as contextlib uses it: to link exceptions, of which there is none."""
        if user_location().startswith(contextlib.__file__ + ":") and sys.exc_info()[1] is None:
            return ((None, None, None),)
        raise Void("opaque_call", "sys.exc_info()")

    def _call_fold_constants(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """A pure function, in C or in Python, of constants: its result is nobody else's."""
        for value in (*args, *kwargs.values()):
            self._only_constants(value, f)
        return (FOLD, f, args, kwargs or None, self.after_fold, f)

    def _only_constants(self, value: Any, f: Any, depth: int = 0) -> None:
        kind = type(value)
        if is_constant(value) or kind in NAMED_TYPES or id(value) in self.frozen:
            return
        if kind in (list, tuple, dict) and depth < 20:
            self.consume(value)
            for part in (*value.keys(), *value.values()) if kind is dict else value:
                self._only_constants(part, f, depth + 1)
            return
        raise Void("opaque_call", f"{short_name(f)} with a {kind.__name__}")

    def _method_fold_frozen_method(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """A method of an immutable object: a pattern, or what a fold made."""
        if id(obj) not in self.frozen and type(obj) not in NAMED_TYPES:
            raise Void("opaque_call", f"{type(obj).__name__}.{f.__name__}")
        for value in (*rest, *kwargs.values()):
            self._only_constants(value, f)
        args = self._call_args(f, obj, rest)
        return (FOLD, f, args, kwargs or None, self.after_fold, f)

    def _call_lookup(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """A function that finds a function by classes, in a table that may change."""
        if kwargs or not all(is_static(value) for value in args):
            raise Void("opaque_call", short_name(f))
        value = f(*args)
        if not is_static(value):
            raise Void("opaque_call", f"{short_name(f)} gave a {type(value).__name__}")
        self.guards.add(self.assume_static(f), "CALL", _StillGives(args, value))
        self.assume_static(value)
        return (value,)

    def _watch_callbacks(self, f: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """`args` and `kwargs` with every callback that C code would call unseen in Python."""
        if f is itertools.groupby:
            return self._watch_key(args[:1], {"key": (*args[1:2], None)[0], **kwargs})
        if f is itertools.compress and len(args) == 2:
            self._about_to_read(args[1])
            return (args[0], map(self._watched(bool), args[1])), kwargs
        if f is iter and len(args) == 2:
            return (self._watched(args[0]), args[1]), kwargs
        where = CALLBACKS.get(f) if _is_hashable(f) else None
        if where is None:
            return args, kwargs
        position, keyword = where
        callback = kwargs.get(keyword) if keyword is not None else None
        if len(args) > position:
            callback = args[position]
        callback = without_callback(f) if callback is None else callback
        if callback is None:
            return args, kwargs
        callback = self._watched(callback)
        if len(args) > position:
            return (*args[:position], callback, *args[position + 1 :]), kwargs
        return args, ({**kwargs, keyword: callback} if keyword is not None else kwargs)

    def _watched(self, callback: Any) -> Any:
        if runs_in_a_frame(callback) or not callable(callback):
            return callback
        self.inner_codes |= INNER_CODES
        return watched(callback)

    def _watch_key(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.inner_codes |= INNER_CODES
        return args, {**kwargs, "key": watched_key(kwargs.get("key"))}

    def _each(self, walk: Callable[[Any], Any], parts: Any) -> Any:
        """`walk(parts)`, a generator of our own, whose frame is a twin's."""
        twin = self.twin_of(walk)  # type: ignore[arg-type]
        if twin is None:
            raise Void("no_twin", walk.__name__)
        self.assume_static(walk)
        self.get_iter(parts)
        return twin(parts)

    def _pairs(self, value: Any) -> Any:
        """The same mapping or iterable of pairs, every pair watched."""
        kind = type(value)
        self._about_to_read(value)
        if kind in BUILTIN_ITERATORS and kind is not enumerate:
            return self._each(each_pair, value)
        if issubclass(kind, (list, tuple)):
            for pair in value:
                self._about_to_read(pair)
                for key in pair[:1] if issubclass(type(pair), (list, tuple)) else ():
                    self.hashed(key)
        return value

    def _hashed_parts(self, value: Any) -> Any:
        """The same iterable, of which C code makes members of a set or keys."""
        if type(value) in BUILTIN_ITERATORS:
            return self._each(each_hashed, value)
        if issubclass(type(value), (list, tuple, dict, set, frozenset)):
            for part in value:
                self.hashed(part)
        return value

    def _call_read_pairs(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """dict() and what takes what it takes: mappings, or iterables of pairs."""
        for value in args[:-1]:
            self._about_to_read(value)
        if args:
            args = (*args[:-1], self._pairs(args[-1]))
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_ordered(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """sorted(), min(), max(): elements, or what a key makes of them, are compared."""
        if kwargs.get("key") is not None:
            args, kwargs = self._watch_key(args, kwargs)
            for value in args if len(args) == 1 else ():
                self._about_to_read(value)
        elif len(args) == 1 and _is_set_of_words(args[0]):
            self.consume(args[0], in_order=False)  # the order is what the call makes
        elif len(args) == 1 and not issubclass(type(args[0]), (list, tuple)):
            self._about_to_read(args[0])
            if type(args[0]) in BUILTIN_ITERATORS or type(args[0]) in BUILTIN_CONTAINERS:
                args = (self._each(each_compared, args[0]),)
        else:
            for value in args:
                if type(value) in PLAIN_TENSORS:
                    raise Void("value_from_tensor", short_name(f))
                self.consume_deeply(value)
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _about_to_read(self, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN_TENSORS:
            if self.table.get(value) is None and id(value) not in self.known:
                raise Void("unknown_tensor", "argument of C code")
            return
        if issubclass(kind, torch.Tensor):
            raise Void("tensor_subclass", kind.__name__)
        if kind in CONSTANT_TYPES or is_static(value) or kind in BUILTIN_ITERATORS:
            if kind in BUILTIN_ITERATORS and id(value) in self.known:
                raise Void("container", f"a {kind.__name__} from outside")
            return
        if issubclass(kind, (list, tuple, dict, set, frozenset)) or kind in BUILTIN_CONTAINERS:
            self.consume(value)
        elif id(value) not in self.frozen:
            self.check_own_code(value)

    def _call_read(self, f: Any, args: Any, kwargs: Any) -> Answer:
        first = _ITERATES.get(f) if type(f) is type or f is iter else None
        if first is not None and any(type(a) in PLAIN_TENSORS for a in args[first:]):
            for tensor in args[first:]:
                if type(tensor) in PLAIN_TENSORS:
                    self.check_has_rows(tensor)
            self.assume_static(call_with_rows)
            return self.call_python(call_with_rows, (f, first, *args), kwargs)
        receiver = getattr(f, "__self__", None)
        args, kwargs = self._watch_callbacks(f, args, kwargs)
        position = TAKES_APART.get(f)
        for i, value in enumerate((receiver, *args, *kwargs.values())):
            if position is None or i != position + 1:
                self._about_to_read(value)
        if hashes_parts(f):
            args = tuple(map(self._hashed_parts, args))
        if position is not None and len(args) > position:
            args = (*args[:position], self._each(each_read, args[position]), *args[position + 1 :])
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_args(self, f: Any, receiver: Any, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments that `f` itself takes: with the receiver if it is not bound."""
        bound = type(f) in (types.BuiltinFunctionType, types.MethodWrapperType, BOUND_C_METHOD)
        return rest if bound else (receiver, *rest)


class _RefersTo:
    """A deep guard: another weak reference to what this one refers to."""

    def __init__(self, reference: Any) -> None:
        self.target = None if reference() is None else weakref.ref(reference())

    def __call__(self, reference: Any) -> bool:
        if self.target is None:
            return reference() is None
        target = self.target()
        return target is not None and reference() is target


class _StillGives:
    """A deep guard on a function that looks something up: the same object comes out."""

    def __init__(self, args: tuple[Any, ...], value: object) -> None:
        self.args = args
        self.value = value

    def __call__(self, f: Any) -> bool:
        return f(*self.args) is self.value


class _LevelDisabled:
    """A deep guard: the logger still drops records of this level."""

    def __init__(self, level: int) -> None:
        self.level = level

    def __call__(self, logger: Any) -> bool:
        return not logger.isEnabledFor(self.level)


def _is_set_of_words(value: Any) -> bool:
    """True for sets of strings, or of ints: in order, they are the same list whatever theirs was."""
    if type(value) not in (set, frozenset):
        return False
    return {type(member) for member in value} in ({str}, {int})


def _is_hashable(f: Any) -> bool:
    """True for C functions and types; bound methods hash their receivers."""
    return isinstance(f, type) or not hasattr(f, "__self__") or isinstance(f.__self__, _OF_C)
