"""What kinds of Python values a recording meets, as tables of types.

In: a value's exact type. Out: which of the recorder's rules apply to it.
Invariant: classification looks at `type(value)` only and never runs user code.
"""

from __future__ import annotations

import cmath
import collections
import dataclasses
import enum
import functools
import itertools
import operator
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from accel import runtime
from accel.capture.numpy_rules import array_type, scalar_types

# Immutable; no native check compares them.
NUMPY_SCALARS: frozenset[type] = scalar_types()

SMALL_INTS = range(-5, 257)  # CPython keeps one object of each: `is` finds them equal
# Of equal constants of these types, some are one object and others are not.
VALUE_TYPES = (int, float, complex, str, bytes, tuple)
# Compared by value; carry no identity; may be baked into a graph.
CONSTANT_TYPES: frozenset[type] = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type(Ellipsis),
        type(NotImplemented),
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Size,
        range,
        *NUMPY_SCALARS,
    }
)

# Below which programs make classes whose instances are numbers or text.
CONSTANT_BASES = (int, float, complex, str, bytes)

# The only tensors whose operations are recorded.
PLAIN_TENSORS: frozenset[type] = frozenset({torch.Tensor, torch.nn.Parameter})

BOUND_C_METHOD: type = type(re.compile("").match)  # METH_METHOD: unlike other bound methods

# Whose `__self__` a guard can load.
BOUND_C_METHODS: frozenset[type] = frozenset({types.BuiltinFunctionType, BOUND_C_METHOD})

FUNCTION_TYPES: frozenset[type] = frozenset(
    {
        types.FunctionType,
        types.BuiltinFunctionType,
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
        types.ClassMethodDescriptorType,
        types.MethodWrapperType,
        BOUND_C_METHOD,
        type(torch.ops.aten.add),
        type(torch.ops.aten.add.Tensor),
    }
)

# Containers and iterators of CPython itself. One that no source leads to was made while
# recording: every way in from outside (attributes, items, cells, globals, calls) is watched.
BUILTIN_CONTAINERS: frozenset[type] = frozenset(
    {
        list,
        tuple,
        dict,
        set,
        frozenset,
        slice,
        collections.OrderedDict,
        collections.defaultdict,
        collections.deque,
        types.MappingProxyType,
        type({}.keys()),
        type({}.values()),
        type({}.items()),
        type(collections.OrderedDict().keys()),
        type(collections.OrderedDict().values()),
        type(collections.OrderedDict().items()),
    }
)

BUILTIN_ITERATORS: frozenset[type] = frozenset(
    {
        zip,
        enumerate,
        map,
        filter,
        reversed,
        type(iter([])),
        type(iter(())),
        type(iter({})),
        type(iter({}.values())),
        type(iter({}.items())),
        type(iter(set())),
        type(iter("")),
        type(iter("é")),
        type(iter(b"")),
        type(iter(range(0))),
        type(iter(range(1 << 70))),
        type(reversed([])),
        type(reversed({})),
        type(reversed({}.values())),
        type(reversed({}.items())),
        type(iter(collections.OrderedDict())),
        type(iter(collections.deque())),
        type(iter(lambda: 0, 0)),
        types.GeneratorType,
        *(v for v in vars(itertools).values() if isinstance(v, type)),
    }
)

# Objects that CPython makes on the way and that only hold what is known already.
TRANSIENT_TYPES: frozenset[type] = frozenset(
    {
        types.FunctionType,
        types.MethodType,
        types.CellType,
        types.CodeType,
        super,
        property,
        staticmethod,
        classmethod,
        functools.partial,
        types.TracebackType,
        object,
        operator.itemgetter,
        operator.attrgetter,
        operator.methodcaller,
    }
)

# What annotations are made of: immutable, and known by identity.
ANNOTATION_TYPES: frozenset[type] = frozenset({types.UnionType, types.GenericAlias})

# Immutable objects of libraries, known by identity: marks that stand for an absent value, and
# compiled patterns.
NAMED_TYPES: frozenset[type] = frozenset(
    {type(dataclasses.MISSING), re.Pattern}
    | {getattr(dataclasses, "_HAS_DEFAULT_FACTORY_CLASS", type(dataclasses.MISSING))}
)

# What folds of constants may give besides constants: objects that cannot change, and
# arrays, which nothing that has a rule changes.
FOLDED_RESULTS: frozenset[Any] = frozenset({re.Match, re.Pattern, array_type()} - {None})

# Callables of `operator` that hold names and keys: `capture/polyfills.py` says what they do.
GETTER_TYPES: frozenset[type] = frozenset(
    {operator.itemgetter, operator.attrgetter, operator.methodcaller}
)

HEAP_TYPE = 1 << 9
IMMUTABLE_TYPE = 1 << 8  # heap types of CPython's C modules
# Methods that Python's own C code looks for on classes.
SPECIAL_NAMES: tuple[str, ...] = tuple(
    f"__{name}__"
    for name in (
        "getattribute getattr setattr delattr get set delete new init init_subclass del call "
        "iter next len length_hint bool contains getitem setitem delitem missing reversed class "
        "enter exit eq ne lt le gt ge hash repr str format bytes index int float complex "
        "round trunc floor ceil neg pos abs invert instancecheck subclasscheck class_getitem "
        "copy deepcopy reduce reduce_ex getstate setstate match_args fspath torch_function array "
        + " ".join(
            f"{prefix}{operator}"
            for operator in "add sub mul matmul truediv floordiv mod divmod pow lshift rshift "
            "and xor or".split()
            for prefix in ("", "r", "i")
        )
    ).split()
)
_KNOWN_BASES: frozenset[type] = frozenset(
    {object, int, float, complex, str, bytes, type, *BUILTIN_CONTAINERS}
)


def is_plain_tensor(value: object) -> bool:
    return type(value) in PLAIN_TENSORS


def is_constant(value: object) -> bool:
    """True for scalars, and tuples and slices of them: equality says everything."""
    kind = type(value)
    if kind in CONSTANT_TYPES:
        return True
    if kind is tuple:
        return all(is_constant(v) for v in value)  # type: ignore[attr-defined]
    if kind is slice:
        s: Any = value
        return is_constant(s.start) and is_constant(s.stop) and is_constant(s.step)
    return False


def holds_numpy(value: object) -> bool:
    """True for numpy scalars and tuples and slices with one in them."""
    kind = type(value)
    if kind is tuple:
        return any(holds_numpy(v) for v in value)  # type: ignore[attr-defined]
    if kind is slice:
        s: Any = value
        return any(holds_numpy(v) for v in (s.start, s.stop, s.step))
    return kind in NUMPY_SCALARS


def has_nan(value: object, depth: int = 0) -> bool:
    """Whether a constant, or a builtin container of them, holds a number that only equals itself as
    an object."""
    if isinstance(value, (tuple, frozenset, list, set, collections.deque, dict)) and depth < 20:
        parts = (*dict.keys(value), *dict.values(value)) if isinstance(value, dict) else value
        return any(has_nan(part, depth + 1) for part in parts)
    return isinstance(value, (float, complex)) and cmath.isnan(value)


def is_static(value: object) -> bool:
    """True for what a program names rather than makes: functions, classes, modules, enums."""
    kind = type(value)
    return (
        kind in FUNCTION_TYPES
        or kind in ANNOTATION_TYPES
        or kind in NAMED_TYPES
        or issubclass(kind, (type, types.ModuleType, enum.Enum))
    )


def is_made_anew(value: object) -> bool:
    """True for functions that a call makes, perhaps each call: what counts is their code, and what
    they close over and default to. Which object one is, guards only know where that is asked."""
    if type(value) is not types.FunctionType:
        return False
    return is_closure(value) or "<locals>" in value.__code__.co_qualname


def is_fixed(value: object) -> bool:
    """True for what guards know as the one object that it is."""
    if not is_static(value) or is_made_anew(value):
        return False
    return type(value) not in BOUND_C_METHODS or not has_receiver(value)


def is_closure(function: types.FunctionType) -> bool:
    """True for lambdas as well: whoever makes one makes many."""
    return bool(function.__closure__) or function.__code__.co_name == "<lambda>"


def has_receiver(function: Any) -> bool:
    """Whether a function of C code is bound to an object, not to a module, a class or nothing."""
    receiver = getattr(function, "__self__", None)
    return receiver is not None and not isinstance(receiver, (types.ModuleType, type))


def is_python_class(cls: type) -> bool:
    """True for a class made by `class` statements, down to builtin types that are known here
    (not by C, Cython or pybind11, whose instances hold state that no frame shows)."""
    for base in mro_of(cls):
        if base in _KNOWN_BASES or issubclass(base, BaseException):
            continue
        flags = flags_of(base)
        if not flags & HEAP_TYPE or flags & IMMUTABLE_TYPE:
            return False
        if type(base).__name__.startswith(("pybind11", "nb_type")):
            return False
    return True


def has_finaliser(value: Any, depth: int = 1) -> bool:
    """Whether the death of this value would run code: recording keeps it alive for too long."""
    kind = type(value)
    if kind in (list, tuple, set) and depth:
        return any(has_finaliser(v, depth - 1) for v in value)
    if kind is dict and depth:
        return any(has_finaliser(v, depth - 1) for v in value.values())
    # C code's own (of generators, of files) is noticed by nobody.
    own = type(class_lookup(kind, "__del__"))
    if own is not types.NoneType and own is not types.WrapperDescriptorType:
        return True
    return any(not _forgets(r.__callback__) for r in weakref.getweakrefs(value))


def _forgets(callback: Any) -> bool:
    """Whether a weak reference tells nobody, or a library that forgets the object."""
    if type(callback) is types.FunctionType:
        return (callback.__module__ or "").startswith(_LIBRARIES)
    if type(callback) is types.BuiltinFunctionType:  # native code's own, or a list's `append`
        return not is_iterable(callback.__self__)
    return callback is None


_LIBRARIES = ("weakref", "_weakrefset", "torch.", "accel.")


# The MRO, the flags and the own attributes of a class, whatever its metaclass says.
mro_of: Callable[[type], tuple[type, ...]] = vars(type)["__mro__"].__get__
flags_of: Callable[[type], int] = vars(type)["__flags__"].__get__
own_of_class: Callable[[type], Any] = vars(type)["__dict__"].__get__


def _class_lookup(cls: type, name: str, default: object = None) -> object:
    """What `cls` has under `name` along its MRO, without descriptors or metaclass."""
    for base in mro_of(cls):
        found = own_of_class(base).get(name, _MISSING)
        if found is not _MISSING:
            return found
    return default


_MISSING = object()
# The same in C, where there is a native module.
class_lookup: Callable[..., Any] = getattr(runtime.native, "class_lookup", _class_lookup)


def builtin_method(kind: type, name: str) -> Callable[..., Any]:
    """The C code that a class of a builtin family has under `name`, below what Python overrides:
    an OrderedDict's items are in an order of their own, which dict.__setitem__ would not know."""
    for base in mro_of(kind):
        found = own_of_class(base).get(name)
        if type(found) is types.WrapperDescriptorType:
            return found
    raise TypeError(f"{kind.__name__} has no {name} in C")


def is_iterable(value: Any) -> bool:
    """Whether it is a builtin container or iterator, of which C code takes the elements."""
    kind = type(value)
    return kind in BUILTIN_CONTAINERS or kind in BUILTIN_ITERATORS
