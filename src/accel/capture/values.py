"""What kinds of Python values a recording meets, as tables of types.

In: a value's exact type. Out: which of the recorder's rules apply to it.
Invariant: classification looks at `type(value)` only and never runs user code.
"""

from __future__ import annotations

import collections
import enum
import functools
import itertools
import types
from typing import Any

import torch

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
    }
)

# The only tensors whose operations are recorded.
PLAIN_TENSORS: frozenset[type] = frozenset({torch.Tensor, torch.nn.Parameter})

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
    }
)

# What annotations are made of: immutable, and known by identity.
ANNOTATION_TYPES: frozenset[type] = frozenset({types.UnionType, types.GenericAlias})

_HEAP_TYPE = 1 << 9
_IMMUTABLE_TYPE = 1 << 8  # heap types of CPython's C modules
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


def is_static(value: object) -> bool:
    """True for what a program names rather than makes: functions, classes, modules, enums."""
    kind = type(value)
    return (
        kind in FUNCTION_TYPES
        or kind in ANNOTATION_TYPES
        or issubclass(kind, (type, types.ModuleType, enum.Enum))
    )


def is_python_class(cls: type) -> bool:
    """True for a class made by `class` statements, down to builtin types that are known here
    (not by C, Cython or pybind11, whose instances hold state that no frame shows)."""
    for base in cls.__mro__:
        if base in _KNOWN_BASES or issubclass(base, BaseException):
            continue
        flags = base.__flags__
        if not flags & _HEAP_TYPE or flags & _IMMUTABLE_TYPE:
            return False
        if type(base).__name__.startswith(("pybind11", "nb_type")):
            return False
    return True


def class_lookup(cls: type, name: str, default: object = None) -> object:
    """What `cls` has under `name` along its MRO, without descriptors or metaclass."""
    for base in cls.__mro__:
        found = base.__dict__.get(name, _MISSING)
        if found is not _MISSING:
            return found
    return default


_MISSING = object()
