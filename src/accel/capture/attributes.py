"""Attribute reads and writes: which steps of CPython's lookup read outside state.

In: `attr`, `setattr`, `delattr` events. Out: guards on instance dicts, slots and classes.
Invariant: follows `object.__getattribute__` (CPython 3.11-3.13, Objects/object.c
`_PyObject_GenericGetAttrWithDict`); wherever Python code would run, it does run, in a
frame that the shim redirects to a twin.
"""

from __future__ import annotations

import collections
import enum
import functools
import types
from typing import Any

import torch

from accel import runtime
from accel.capture.operations import OperationEvents
from accel.capture.steps import FOLD, NATIVE, Answer, Void
from accel.capture.torch_calls import (
    AUTOGRAD_ATTRIBUTES,
    METADATA_ATTRIBUTES,
    REFUSED_METHODS,
    VIEW_ATTRIBUTES,
)
from accel.capture.values import (
    ANNOTATION_TYPES,
    BUILTIN_CONTAINERS,
    BUILTIN_ITERATORS,
    CONSTANT_TYPES,
    FUNCTION_TYPES,
    HEAP_TYPE,
    PLAIN_TENSORS,
    TRANSIENT_TYPES,
    class_lookup,
    flags_of,
    has_receiver,
    is_constant,
    is_python_class,
    is_static,
    mro_of,
    own_of_class,
)

_ABSENT = object()
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")
_OBJECT_GETATTRIBUTE = object.__getattribute__
# Builtin types that name object's own attribute lookup again in their slots.
_GENERIC_GETATTRIBUTES = frozenset(
    c.__dict__["__getattribute__"]
    for c in (
        object,
        dict,
        list,
        tuple,
        set,
        frozenset,
        int,
        float,
        str,
        bytes,
        BaseException,
        collections.OrderedDict,
        collections.deque,
        types.SimpleNamespace,
    )
    if "__getattribute__" in c.__dict__
)
# Builtin types that name object's own attribute store again in their slots.
_GENERIC_SETATTRS = frozenset((object.__setattr__, types.SimpleNamespace.__dict__["__setattr__"]))
_TUPLE_GETTER = type(collections.namedtuple("_Pair", "first second").first)  # type: ignore[attr-defined]
# Descriptors of C that make a bound method and read nothing.
_BINDING = frozenset({functools._lru_cache_wrapper})
_MODULE_GETATTR = torch.nn.Module.__getattr__
# What may be assigned or hold anything, of functions, partial objects, properties and cells.
_FUNCTION_STATE = frozenset(
    "__defaults__ __kwdefaults__ __closure__ __dict__ __code__ __wrapped__ __annotations__ "
    "func args keywords fget fset fdel cell_contents".split()
)
# Dicts that a function has, and where a guard finds them.
_FUNCTION_DICTS = {"__dict__": ("dict",), "__annotations__": ("attribute", "__annotations__")}
# What may be assigned to any function or class, and is there from the beginning.
_NAMES = frozenset(("__name__", "__qualname__", "__doc__", "__module__"))
# Where torch itself defines the operators of tensors in Python.
_TENSOR_MODULES = frozenset({"torch._tensor", "torch.nn.parameter"})
_DESCRIPTORS_OF_C = FUNCTION_TYPES - {types.FunctionType, types.BuiltinFunctionType}


class AttributeEvents(OperationEvents):
    """Handlers of attribute access."""

    def attr(self, obj: Any, name: str) -> Answer:
        kind = type(obj)
        if kind in PLAIN_TENSORS:
            return self._tensor_attr(obj, name)
        if kind in CONSTANT_TYPES or kind in BUILTIN_ITERATORS:
            return None
        if issubclass(kind, types.ModuleType):
            return self._module_attr(obj, name)
        if issubclass(kind, type):
            return self._class_attr(obj, name)
        if kind in BUILTIN_CONTAINERS or kind is super:
            if kind is super:
                self._guard_super(obj, name)
                return (NATIVE, getattr, (obj, name), None, self._after_super, name)
            if name == "__class__":
                self.assume_static(kind)
                return (kind,)
            self._check_c_data(obj, name)
            return None
        if kind in FUNCTION_TYPES or kind in TRANSIENT_TYPES:
            return self._function_attr(obj, name)
        if issubclass(kind, BaseException) and id(obj) not in self.known:
            return None
        if kind.__module__ == "torch.return_types":
            return None
        if id(obj) in self.frozen or (kind in ANNOTATION_TYPES and id(obj) in self.known):
            return (FOLD, getattr, (obj, name), None, self.adopt_frozen, None)
        if issubclass(kind, enum.Enum) and name in ("value", "name"):
            if class_lookup(kind, name) is enum.Enum.__dict__[name]:
                return self._enum_field(obj, f"_{name}_")
        known = id(obj) in self.known
        if not known and id(obj) not in self.fresh:
            raise Void("unknown_value", f"attribute {name!r} of a {kind.__name__}")
        lookup = class_lookup(kind, "__getattribute__")
        if lookup not in _GENERIC_GETATTRIBUTES:
            if type(lookup) is not types.FunctionType:
                return self._c_attr(obj, name)
            self.guards.add_class_attribute(kind, "__getattribute__", lookup)
            return (NATIVE, getattr, (obj, name), None, self.checked, f"attribute {name!r}")
        return self.generic_attr(obj, name)

    def _check_c_data(self, obj: Any, name: str) -> None:
        """Data of a C object from outside (a deque's maxlen) can be guarded by nothing."""
        found = class_lookup(type(obj), name)
        data = (types.MemberDescriptorType, types.GetSetDescriptorType)
        if id(obj) in self.known and type(found) in data:
            raise Void("opaque_attribute", f"{type(obj).__name__}.{name}")

    def _c_attr(self, obj: Any, name: str) -> Answer:
        """An object whose C code looks attributes up: only its class's methods are known to be
        what they seem (threading.local answers each thread differently)."""
        found = class_lookup(type(obj), name)
        if type(found) is not types.MethodDescriptorType:
            raise Void("opaque_attribute", f"{type(obj).__name__}.{name}")
        return (NATIVE, getattr, (obj, name), None, self._after_c_method, obj)

    def _after_c_method(self, value: Any, obj: Any) -> Answer:
        if type(value) is not types.BuiltinFunctionType or value.__self__ is not obj:
            raise Void("opaque_attribute", f"a method of a {type(obj).__name__}")
        return None

    def _enum_field(self, member: Any, name: str) -> Answer:
        """The value or name of an enum member, which lies in its instance dict."""
        value = _OBJECT_GETATTRIBUTE(member, "__dict__")[name]
        self.assume_static(member)
        self.track(value, self.constant_source(member).child("dict").child("dict_item", name))
        return (value,)

    def _guard_super(self, found_by: Any, name: str) -> None:
        """`super().name`: what lies under the name in each class behind the starting one."""
        kind, start = found_by.__self_class__, found_by.__thisclass__
        if kind is None:
            raise Void("opaque_attribute", f"{name!r} of an unbound super()")
        self.note_class(kind)
        mro = mro_of(kind)
        for base in mro[mro.index(start) + 1 :]:
            found = class_lookup(base, name, runtime.native.MISSING)
            self.guards.add_class_attribute(base, name, found)
            if name in own_of_class(base):
                break

    def _after_super(self, value: Any, name: Any) -> Answer:
        if type(value) not in (types.MethodType, *FUNCTION_TYPES):
            self.check_value(value, f"super().{name}")
        return None

    def generic_attr(self, obj: Any, name: str) -> Answer:
        """object.__getattribute__ (and __getattr__ after it) on a Python instance."""
        kind = type(obj)
        source = self.source_of(obj)
        found = class_lookup(kind, name, _ABSENT)
        self.guards.add_class_attribute(
            kind, name, runtime.native.MISSING if found is _ABSENT else found
        )
        plain = (NATIVE, getattr, (obj, name), None, self.checked, f"attribute {name!r}")
        if found is not _ABSENT:
            descriptor = type(found)
            if is_python_class(descriptor) and flags_of(descriptor) & HEAP_TYPE:
                # Whether it is a descriptor, and of which kind, its class says.
                self.note_class(descriptor)
                self.guards.add(self.constant_source(found), "TYPE_IS", descriptor)
            if _has(descriptor, "__set__") or _has(descriptor, "__delete__"):
                return self._data_descriptor(obj, name, found, source, plain)
        native = runtime.native
        # Asking for `__dict__` would make one, and every later access to this object slower.
        value = native.own_attribute(obj, name)
        if value is native.MISSING:
            if source is not None and not self.is_written(obj, name, value):
                self.guards.add(source.child("dict"), "DICT_ABSENT", name)
        elif value is not native.UNBOUND:
            if source is None:
                self.check_value(value, f"attribute {name!r}")
            elif not self.is_written(obj, name, value):
                self.track(value, source.child("dict").child("dict_item", name))
            return (value,)
        if found is not _ABSENT:
            return self._class_value(kind, name, found, plain)
        return self._missing(obj, name, source, plain)

    def _data_descriptor(
        self, obj: Any, name: str, found: Any, source: Any, plain: Answer
    ) -> Answer:
        descriptor = type(found)
        if descriptor is types.MemberDescriptorType:
            if source is None:
                return plain
            try:
                value = found.__get__(obj)
            except AttributeError:
                raise Void("unbound_slot", name) from None
            if self.is_written(obj, name, value):
                return plain
            self.track(value, source.child("member", found))
            return (value,)
        if descriptor is types.GetSetDescriptorType:
            if name == "__dict__":
                return (NATIVE, getattr, (obj, name), None, self._after_dict, obj)
            if name in ("__class__", "__doc__", "__module__"):
                return (FOLD, getattr, (obj, name), None, self.adopt_constant, None)
            raise Void("opaque_attribute", f"{type(obj).__name__}.{name}")
        if descriptor is _TUPLE_GETTER and isinstance(obj, tuple):
            return self._tuple_field(obj, found, source)
        self._check_getter(type(obj), name, found)
        return plain

    def _tuple_field(self, obj: Any, getter: Any, source: Any) -> Answer:
        """A field of a named tuple."""
        index = getter.__reduce__()[1][0]
        value = tuple.__getitem__(obj, index)
        if source is not None:
            self.guards.add(source, "LEN", tuple.__len__(obj))
            self.track(value, source.child("tuple_item", index))
        else:
            self.check_value(value, "a field of a named tuple")
        return (value,)

    @staticmethod
    def _check_getter(kind: type, name: str, descriptor: Any) -> None:
        """Only Python code may compute an attribute: its frames are watched, C code is not."""
        if type(descriptor) in _BINDING:
            return
        if type(descriptor) is property:
            getter: Any = descriptor.fget
        else:
            getter = class_lookup(type(descriptor), "__get__")
        if type(getter) is not types.FunctionType:
            raise Void("opaque_attribute", f"{kind.__name__}.{name}")

    def _after_dict(self, value: Any, obj: Any) -> Answer:
        source = self.source_of(obj)
        if source is not None and id(value) not in self.known:
            self.known[id(value)] = (value, source.child("dict"))
        return None

    def _class_value(self, kind: type, name: str, found: Any, plain: Answer) -> Answer:
        """A value found on the class: a method, another descriptor, or data."""
        descriptor = type(found)
        if descriptor is types.FunctionType:
            self.assume_static(found)
            return None
        if descriptor in (staticmethod, classmethod):
            self.assume_static(found.__func__)
            return None
        if descriptor in _DESCRIPTORS_OF_C or descriptor is types.BuiltinFunctionType:
            if has_receiver(found):
                self._adopt(found, self.constant_source(kind).child("attribute", name))
            return None
        if _has(descriptor, "__get__"):
            self._check_getter(kind, name, found)
            self.assume_static(found)
            return plain
        if type(found) not in CONSTANT_TYPES:
            self._adopt(found, self.constant_source(kind).child("attribute", name))
        return (found,)

    def _adopt(self, value: Any, source: Any) -> None:
        """A class-level object: its identity is guarded with its class."""
        if type(value) in PLAIN_TENSORS:
            self.track(value, source)
        elif id(value) in self.known:  # where it was read before, another may lie the next time
            self.pin(value)
        elif is_static(value):
            self.assume_static(value)
            self.track_receiver(value, source)
        else:
            self.known[id(value)] = (value, source)

    def _missing(self, obj: Any, name: str, source: Any, plain: Answer) -> Answer:
        fallback = class_lookup(type(obj), "__getattr__", _ABSENT)
        self.guards.add_class_attribute(
            type(obj),
            "__getattr__",
            runtime.native.MISSING if fallback is _ABSENT else fallback,
        )
        if fallback is dict.__getitem__ or fallback is dict.get:
            return self._dict_entry(obj, name, source, plain)
        if fallback is not _ABSENT and type(fallback) is not types.FunctionType:
            raise Void("opaque_attribute", f"{type(obj).__name__}.__getattr__")
        if fallback is _MODULE_GETATTR:
            attributes = _OBJECT_GETATTRIBUTE(obj, "__dict__")
            answer = self._module_entry(obj, name, source, attributes)
            if answer is not None:
                return answer
        return plain if fallback is not _ABSENT else None

    def _dict_entry(self, obj: Any, name: str, source: Any, plain: Answer) -> Answer:
        """A dict whose entries are its attributes: `__getattr__ = dict.__getitem__`."""
        value = dict.get(obj, name, _ABSENT)
        if source is not None and not self.is_written(obj, name, value):
            self.reads(obj)
            if value is not _ABSENT:
                self.track(value, source.child("dict_item", name))
            else:
                self.guards.add(source, "DICT_ABSENT", name)
        return plain

    def _module_entry(self, obj: Any, name: str, source: Any, attributes: Any) -> Answer:
        """nn.Module.__getattr__: the three dicts, in its order."""
        for table in _MODULE_DICTS:
            entries = attributes.get(table)
            if entries is None:
                continue
            value = entries.get(name, _ABSENT)
            if source is not None:
                path = source.child("dict").child("dict_item", table)
                self.track(entries, path)
                if self.is_written(entries, name, value):
                    continue
                if value is _ABSENT:
                    self.guards.add(path, "DICT_ABSENT", name)
                else:
                    self.track(value, path.child("dict_item", name))
            if value is not _ABSENT:
                if source is None:
                    self.check_value(value, f"attribute {name!r}")
                return (value,)
        return None

    def tensor_class(self, tensor: Any, *names: str) -> None:
        """The trace relies on what these names mean on the class of a tensor."""
        kind = type(tensor)
        for name in names:
            found = class_lookup(kind, name, _ABSENT)
            if type(found) is types.FunctionType and found.__module__ not in _TENSOR_MODULES:
                raise Void("tensor_method", f"{name}, which {found.__module__} has replaced")
            self.guards.add_class_attribute(
                kind, name, runtime.native.MISSING if found is _ABSENT else found
            )

    def _tensor_attr(self, tensor: Any, name: str) -> Answer:
        found = class_lookup(type(tensor), name, _ABSENT)
        self.guards.add_class_attribute(
            type(tensor), name, runtime.native.MISSING if found is _ABSENT else found
        )
        if name in METADATA_ATTRIBUTES:
            if name in AUTOGRAD_ATTRIBUTES and tensor.requires_grad:
                raise Void("tensor_attribute", name)
            if name == "__dict__":
                raise Void("tensor_attribute", name)
            return None
        if name in VIEW_ATTRIBUTES:
            self.tensor_class(tensor, name)
            return self.operation("call_function", "builtins.getattr", getattr, (tensor, name), {})
        if type(found) in FUNCTION_TYPES and type(found) is not types.GetSetDescriptorType:
            if name in REFUSED_METHODS:
                raise Void("tensor_method", name)
            return None
        if found is _ABSENT:
            return self._tensor_instance_attr(tensor, name)
        raise Void("tensor_attribute", name)

    def _tensor_instance_attr(self, tensor: Any, name: str) -> Answer:
        """Names that users hang on tensors: only their absence can be guarded cheaply."""
        source = self.source_of(tensor)
        if source is None:
            return None
        try:
            attributes = _OBJECT_GETATTRIBUTE(tensor, "__dict__")
        except AttributeError:
            return None
        if name in attributes:
            self.track(attributes[name], source.child("attribute", name))
            return (attributes[name],)
        self.guards.add(source, "CALL", _LacksAttribute(name))
        return None

    def has_tensor_attr(self, tensor: Any, name: str) -> Answer:
        """hasattr() of a tensor, which users hang attributes on."""
        self.tensor_class(tensor, name)
        if class_lookup(type(tensor), name, _ABSENT) is not _ABSENT:
            return None
        answer = self._tensor_instance_attr(tensor, name)
        return answer if answer is None else (True,)

    def _module_attr(self, module: Any, name: str) -> Answer:
        attributes = types.ModuleType.__getattribute__(module, "__dict__")
        value = attributes.get(name, _ABSENT)
        kind = type(module)
        self.guards.add(self.assume_static(module), "TYPE_IS", kind)
        if kind is not types.ModuleType:
            for of_class in (name, "__getattribute__"):
                found = class_lookup(kind, of_class)
                if found is not class_lookup(types.ModuleType, of_class):
                    raise Void("opaque_attribute", f"{name!r} of a {kind.__name__}")
        source = self.constant_source(attributes)
        if value is not _ABSENT:
            if not self.is_written(attributes, name, value):
                self.track(value, source.child("dict_item", name))
            return (value,)
        self.guards.add(source, "DICT_ABSENT", name)
        if "__getattr__" not in attributes:
            self.guards.add(source, "DICT_ABSENT", "__getattr__")
        return (FOLD, getattr, (module, name), None, self.adopt_constant, None)

    def _class_attr(self, cls: Any, name: str) -> Answer:
        """An attribute of a class object; the metaclass's own come first."""
        found = class_lookup(cls, name, _ABSENT)
        meta = class_lookup(type(cls), name, _ABSENT)
        for kind, value in ((type(cls), meta), (cls, found)):
            if flags_of(kind) & HEAP_TYPE:
                value = runtime.native.MISSING if value is _ABSENT else value
                self.guards.add_class_attribute(kind, name, value)
        if name in ("__name__", "__qualname__") and meta is type.__dict__[name]:
            self.assume_static(cls)
            return self._assigned_name(cls, name)
        if meta is not _ABSENT and found is _ABSENT:
            if type(meta) is types.FunctionType:
                self.assume_static(meta)
                return None
            return (NATIVE, getattr, (cls, name), None, self._after_class_attr, (cls, name))
        if type(found) in (types.FunctionType, staticmethod, classmethod):
            self.assume_static(getattr(found, "__func__", found))
            return None
        return (NATIVE, getattr, (cls, name), None, self._after_class_attr, (cls, name))

    def _after_class_attr(self, value: Any, token: Any) -> Answer:
        cls, name = token
        if type(value) in CONSTANT_TYPES or type(value) in TRANSIENT_TYPES:
            return None
        if self.table.get(value) is not None if type(value) in PLAIN_TENSORS else False:
            return None
        if id(value) not in self.fresh:
            if name in ("__dict__", "__subclasses__"):
                raise Void("opaque_attribute", f"{cls.__name__}.{name}")
            self._adopt(value, self.constant_source(cls).child("attribute", name))
        return None

    def _function_attr(self, f: Any, name: str) -> Answer:
        """Attributes of functions and methods: names and docs fold, dict entries are guarded."""
        if type(f) is types.FunctionType and id(f) in self.known:
            source = self.known[id(f)][1]
            attributes = f.__dict__
            if name in attributes:
                self.track(attributes[name], source.child("dict").child("dict_item", name))
                return (attributes[name],)
            if class_lookup(types.FunctionType, name, _ABSENT) is _ABSENT:
                self.guards.add(source, "CALL", _LacksAttribute(name))
                return None
            if name in _FUNCTION_DICTS:
                value = getattr(f, name)
                self.track(value, source.child(*_FUNCTION_DICTS[name]))
                return (value,)
        if type(f) is types.FunctionType and id(f) not in self.known and name == "__dict__":
            self.fresh[id(f.__dict__)] = f.__dict__  # of a function that the trace has made
            return (f.__dict__,)
        if type(f) is types.MethodType and name == "__func__":
            return None
        if type(f) is types.FunctionType and id(f) in self.known and name == "__code__":
            self.guards.add(self.known[id(f)][1].child("code"), "IS", f.__code__)
            return (f.__code__,)
        function: Any = f
        if type(f) is types.MethodType:
            self.read_method(f)
            function = f.__func__
        if name in _NAMES and type(function) is types.FunctionType:
            return self._assigned_name(function, name)
        is_unread = name == "__self__" and type(f) is not types.MethodType and has_receiver(f)
        if id(f) in self.known and (
            name in _FUNCTION_STATE or (is_unread and id(f.__self__) not in self.known)
        ):
            raise Void("opaque_attribute", f"{type(f).__name__}.{name}")
        return (FOLD, getattr, (f, name), None, self._after_function_attr, name)

    def _assigned_name(self, owner: Any, name: str) -> Answer:
        """The name or documentation of a function or class."""
        value, source = getattr(owner, name), self.source_of(owner)
        if not is_constant(value):
            raise Void("opaque_attribute", f"{type(owner).__name__}.{name}")
        if source is not None:
            self.track(value, source.child("attribute", name))
        return (value,)

    def _after_function_attr(self, value: Any, name: Any) -> Answer:
        if name in ("__self__", "__func__"):
            self.check_value(value, name)
            return None
        return self.adopt_constant(value, None)

    # -------------------------------------------------------------- writes

    def setattr(self, obj: Any, value: Any, name: str) -> Answer:
        kind = type(obj)
        if issubclass(kind, torch.Tensor):
            raise Void("tensor_attribute_store", name)
        if issubclass(kind, (types.ModuleType, type)):
            raise Void("class_or_module_store", f"{obj.__name__}.{name}")
        if kind in FUNCTION_TYPES or kind in TRANSIENT_TYPES:
            if id(obj) in self.known:
                raise Void("class_or_module_store", f"{name} of a function")
            return None
        known = id(obj) in self.known
        if not known and id(obj) not in self.fresh and not issubclass(kind, BaseException):
            raise Void("unknown_value", f"store to attribute {name!r} of a {kind.__name__}")
        setter = class_lookup(kind, "__setattr__")
        self.guards.add_class_attribute(kind, "__setattr__", setter)
        if not known or type(setter) is types.FunctionType:
            return None  # an object of our own; or Python code, watched
        if setter not in _GENERIC_SETATTRS:
            raise Void("opaque_attribute", f"store to {name!r} of a {kind.__name__}")
        return self.raw_setattr(obj, name, value)

    def raw_setattr(self, obj: Any, name: str, value: Any) -> Answer:
        """object.__setattr__ on a known object."""
        source = self.source_of(obj)
        assert source is not None
        found = class_lookup(type(obj), name, _ABSENT)
        self.guards.add_class_attribute(
            type(obj), name, runtime.native.MISSING if found is _ABSENT else found
        )
        if found is not _ABSENT and _has(type(found), "__set__"):
            if type(found) is not types.MemberDescriptorType:
                if type(found) in FUNCTION_TYPES:
                    raise Void("opaque_attribute", f"store to {name!r}")
                return None  # a property or Python descriptor: its setter is watched
            old, path = getattr(obj, name, _ABSENT), source.child("member", found)
        else:
            old = runtime.native.own_attribute(obj, name)
            path = source.child("dict").child("dict_item", name)
        if old is not _ABSENT and old is not runtime.native.MISSING:
            self.check_replaced(old, None if (id(obj), name) in self.written else path)
        self.effect("setattr", obj, name, value)
        self.written[id(obj), name] = id(value)
        return (NATIVE, object.__setattr__, (obj, name, value), None, None, None)

    def delattr(self, obj: Any, name: str) -> Answer:
        if id(obj) in self.fresh:
            return None
        raise Void("delete", f"attribute {name!r}")


class _LacksAttribute:
    """A deep guard: the object has no attribute of this name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: object) -> bool:
        return not hasattr(value, self.name)


def _has(cls: type, name: str) -> bool:
    return class_lookup(cls, name, _ABSENT) is not _ABSENT
