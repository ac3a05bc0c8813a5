"""Calls: graph operation, inlined twin, fold, effect, or opaque.

In: `call`, `redirect` and `fresh` events. Out: a step for the trampoline to carry out.
Invariant: what no rule covers is opaque, and opaque voids the recording.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from accel import checkpoints
from accel.capture import left_to_python
from accel.capture.builtin_methods import BuiltinMethods
from accel.capture.library_calls import short_name
from accel.capture.memoised import StillMemoised, memoised
from accel.capture.policy import METHODS, callable_rules, is_dynamo_mark, method_rule
from accel.capture.state import Effect
from accel.capture.steps import CONSTRUCT, FOLD, INLINE, NATIVE, Answer, Void
from accel.capture.torch_calls import (
    DATA_FUNCTIONS,
    DATA_METHODS,
    METADATA_METHODS,
    REFUSED_METHODS,
    TRUTH_METHODS,
    graph_functions,
    is_graph_method,
)
from accel.capture.values import (
    BOUND_C_METHOD,
    BUILTIN_ITERATORS,
    CONSTANT_TYPES,
    GETTER_TYPES,
    PLAIN_TENSORS,
    class_lookup,
    has_receiver,
    is_constant,
    is_fixed,
    is_iterable,
    is_made_anew,
    is_python_class,
    is_static,
    mro_of,
    own_of_class,
)
from accel.selection import inside
from accel.sources import Source

_C_CALLABLES = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    BOUND_C_METHOD,
)
# Methods of functions, classes and modules.
_METHODS_OF_STATIC = {"__get__": "passes", "__repr__": "deep", "__hash__": "hash", "__eq__": "deep"}
_LRU = type(functools.lru_cache(lambda: None))
_CONTEXT_VAR = type(__import__("contextvars").ContextVar("accel"))
_TENSOR_FUNCTIONS = {
    id(f): name for name, f in vars(torch.Tensor).items() if type(f) is types.FunctionType
}


class CallEvents(BuiltinMethods):
    """Handlers of calls."""

    twin_of: Callable[[types.FunctionType], types.FunctionType | None]
    prepared: dict[int, types.FunctionType]
    context_sets: dict[int, list[Any]]
    inner_codes: set[types.CodeType]
    callee_codes: tuple[types.CodeType, ...]

    def call(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        kind = type(f)
        if kind is types.FunctionType:
            return self.call_python(f, args, kwargs)
        if kind is types.MethodType:
            return self._call_method(f, args, kwargs)
        rule = callable_rules().get(id(f))
        if rule is not None:
            return self._apply(rule, f, args, kwargs or {})
        if kind in _C_CALLABLES:
            return self._call_c(f, args, kwargs or {})
        if issubclass(kind, type):
            return self._call_class(f, args, kwargs or {})
        return self._call_object(f, args, kwargs)

    # --------------------------------------------------------------- Python

    def redirect(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        """A frame without a twin is about to run; C code called it."""
        if f.__code__.co_filename.startswith("<frozen importlib"):
            return (FOLD, f, args, kwargs, None, None)
        self.admit_context(args)
        for value in args:
            self.check_value(value, f"argument of {f.__qualname__}")
        for value in (kwargs or {}).values():
            self.check_value(value, f"argument of {f.__qualname__}")
        return self.call_python(f, args, kwargs)

    def call_python(
        self, f: types.FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Answer:
        rule = callable_rules().get(id(f))
        if rule is not None:
            return self._apply(rule, f, args, kwargs or {})
        target = graph_functions().get(id(f))
        if target is not None:
            return self.operation("call_function", target, f, args, kwargs or {})
        if is_dynamo_mark(f):
            return self._call_fold(f, args, kwargs)
        name = _TENSOR_FUNCTIONS.get(id(f))
        if name is not None and args and type(args[0]) in PLAIN_TENSORS:
            return self._tensor_method(name, f, args, kwargs or {})
        if f in left_to_python.allowed:
            return self.call_allowed(f, args, kwargs)
        if f in left_to_python.constant:
            return (FOLD, f, args, kwargs, self.adopt_constant, None)
        if left_to_python.is_left(f):
            self._note_callees(f, args)
            raise Void("disabled", f.__qualname__)
        twin = self.twin_of(f)
        if twin is None:
            raise Void("no_twin", f.__qualname__)
        self.prepare(f, args, twin)
        return (INLINE, twin, args, kwargs, None, None)

    def _note_callees(self, f: types.FunctionType, args: tuple[Any, ...]) -> None:
        """What torch's own code, which only Python runs, is given to call (torch.utils.checkpoint)."""
        if not (checkpoints.installed and inside(f.__module__ or "", {"torch"})):
            return
        for value in args:
            while isinstance(value, (functools.partial, types.MethodType)):
                value = value.func if isinstance(value, functools.partial) else value.__func__
            if isinstance(value, types.FunctionType) and (twin := self.twin_of(value)) is not None:
                self.callee_codes += (twin.__code__,)

    def prepare(
        self,
        f: types.FunctionType,
        args: tuple[Any, ...] = (),
        twin: types.FunctionType | None = None,
    ) -> None:
        """Guards of an inlined function: its code, its defaults; names for its cells."""
        if id(f) in self.prepared:
            return
        self.prepared[id(f)] = f
        source = self.source_of(f) or self._method_source(f, args)
        self._note_inner_codes(f.__code__)
        # The twin defines functions without the prologues that an import hook gave them.
        if (twin := twin or self.twin_of(f)) is not None:
            self._note_inner_codes(twin.__code__)
        if source is None:
            return
        if source.kind != "root":
            self.guards.add(source.child("code"), "IS", f.__code__)
        if source.kind != "constant":  # one code object may run in several namespaces
            self.guards.add(source.child("globals"), "IS", f.__globals__)
        if f.__closure__:
            for i, cell in enumerate(f.__closure__):
                self.note_cell(cell, source.child("closure", i))
        if f.__defaults__:
            defaults = source.child("defaults")
            if is_made_anew(f):  # and perhaps the tuple with it
                self.track(f.__defaults__, defaults)
                self.consume(f.__defaults__)
            else:
                self.guards.add(defaults, "IS", f.__defaults__)
            for i, value in enumerate(f.__defaults__):
                if type(value) not in CONSTANT_TYPES:
                    self._adopt(value, defaults.child("tuple_item", i))
        if f.__kwdefaults__:
            defaults = source.child("kwdefaults")
            for name, value in f.__kwdefaults__.items():
                self.track(value, defaults.child("dict_item", name))

    def note_cell(self, cell: Any, source: Source) -> None:
        """A cell that an inlined function closes over is found at `source`."""
        found = self.cells.get(id(cell))
        if found is None:
            self.cells[id(cell)] = (cell, source.child("cell"))
        elif found[1].base is not source:  # shared, which a later call's need not be
            assert found[1].base is not None
            self.guards.add(source, "SAME", found[1].base)

    def _note_inner_codes(self, code: types.CodeType) -> None:
        """Functions with these codes may be made while recording."""
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType) and inner not in self.inner_codes:
                self.inner_codes.add(inner)
                self._note_inner_codes(inner)

    def _method_source(self, f: types.FunctionType, args: tuple[Any, ...]) -> Any:
        """The source of a function that C code found on a class; None for one made just now.

        Errors: Void when neither explains where it comes from: its closure would be unguarded.
        """
        for value in args[:1]:
            for cls in {type(value), value} if isinstance(value, type) else {type(value)}:
                for base in mro_of(cls):
                    for name, raw in own_of_class(base).items():
                        if _implements(raw, f):
                            found = class_lookup(cls, name)
                            self.guards.add_class_attribute(cls, name, found)
                            return self.assume_static(f)
        if f.__code__ in self.inner_codes or not (f.__closure__ or f.__defaults__):
            return None
        raise Void("unknown_function", f.__qualname__)

    def _call_method(
        self, f: types.MethodType, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> Answer:
        self.read_method(f)
        function: Any = f.__func__
        if type(function) is types.FunctionType:
            return self.call_python(function, (f.__self__, *args), kwargs)
        return self.call(function, (f.__self__, *args), kwargs)

    def _call_object(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        kind = type(f)
        if left_to_python.is_left_module(f):
            raise Void("disabled", kind.__qualname__)
        if kind is functools.partial:
            return self._call_partial(f, args, kwargs)
        if kind is _LRU:
            return self._call_cached(f, args, kwargs or {})
        if kind is weakref.ref:
            return self._call_weakref(f)
        if kind in GETTER_TYPES:
            return self._call_getter(f, args, kwargs or {})
        target = _operator_name(f)
        if target is not None:
            return self.operation("call_function", target, f, args, kwargs or {})
        method = class_lookup(kind, "__call__")
        if type(method) is types.FunctionType and is_python_class(kind):
            if id(f) not in self.known and id(f) not in self.fresh:
                raise Void("unknown_value", f"call of a {kind.__name__}")
            self.guards.add_class_attribute(kind, "__call__", method)
            self.assume_static(method)
            return self.call_python(method, (f, *args), kwargs)
        raise Void("opaque_call", short_name(f))

    def _call_partial(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Answer:
        source = self.source_of(f)
        if source is not None:
            self.track(f.func, source.child("attribute", "func"))
            self.track(f.args, source.child("attribute", "args"))
            self.track(f.keywords, source.child("attribute", "keywords"))
            self.consume(f.args)
            self.consume(f.keywords)
        return self.call(f.func, (*f.args, *args), {**f.keywords, **(kwargs or {})} or None)

    def _call_cached(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        """functools.lru_cache of constants: the same value for as long as it is memoised."""
        for value in (*args, *kwargs.values()):
            if not (is_constant(value) or is_static(value) or id(value) in self.known):
                raise Void(
                    "opaque_call", f"cached {short_name(f)} with arguments made in the trace"
                )
            if id(value) in self.known and not is_fixed(value):
                self.pin(value)
        return (FOLD, f, args, kwargs or None, self._after_cached, (f, args, kwargs))

    def _after_cached(self, value: Any, token: Any) -> Answer:
        f, args, kwargs = token
        if memoised(f, args, kwargs) is not value:
            raise Void("opaque_call", f"cached {short_name(f)}, which keeps nothing")
        source = self.source_of(f) or self.assume_static(f)
        self.guards.add(source, "CALL", StillMemoised(args, kwargs, value))
        if f.cache_parameters()["maxsize"] is not None:
            # A call that finds its value also says what is forgotten last.
            self.effects.append(Effect("recall", None, (f, args, kwargs)))
        return self.adopt_constant(value, None)

    # -------------------------------------------------------------- classes

    def _call_class(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        meta = class_lookup(type(cls), "__call__")
        if type(meta) is types.FunctionType:
            if getattr(type(cls), "__module__", "").startswith("enum"):
                return (FOLD, cls, args, kwargs or None, self.adopt_constant, None)
            self.assume_static(meta)
            return self.call_python(meta, (cls, *args), kwargs or None)
        return self._construct(cls, args, kwargs)

    def _construct(self, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        if issubclass(cls, torch.Tensor):
            raise Void("tensor_subclass", f"making a {cls.__name__}")
        if issubclass(cls, BaseException) and not is_python_class(cls):
            return None  # holds its arguments, reads nothing
        if not is_python_class(cls):
            raise Void("opaque_call", f"making a {cls.__module__}.{cls.__qualname__}")
        if not issubclass(cls, BaseException):
            for name in ("__new__", "__init__"):
                found = class_lookup(cls, name)
                self.guards.add_class_attribute(cls, name, found)
        if issubclass(cls, (dict, list, tuple, set, frozenset)):
            for value in args:
                self.get_iter(value) if is_iterable(value) else self.check_value(value)
        return (CONSTRUCT, cls, args, kwargs or None, None, None)

    def fresh_event(self, obj: Any) -> Answer:
        kind = type(obj)
        if class_lookup(kind, "__del__") is not None:
            raise Void("finaliser", kind.__name__)
        if id(obj) not in self.known:
            self.fresh[id(obj)] = obj
        return None

    # --------------------------------------------------------------------- C

    def _call_c(self, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        target = graph_functions().get(id(f))
        if target is not None:
            return self.operation("call_function", target, f, args, kwargs)
        receiver = getattr(f, "__self__", None)
        name = f.__name__
        if type(f) in (types.MethodDescriptorType, types.WrapperDescriptorType):
            owner = f.__objclass__
            if not args:
                raise Void("opaque_call", short_name(f))
            receiver, rest = args[0], args[1:]
        else:
            owner, rest = type(receiver), args
            self._check_receiver(f)
        if type(receiver) in PLAIN_TENSORS:
            return self._tensor_method(name, getattr(torch.Tensor, name), (receiver, *rest), kwargs)
        if owner is _CONTEXT_VAR:
            return self._context_variable(name, f, receiver, args, rest)
        if name == "__new__" and issubclass(type(receiver), type):
            return self._call_new(f, receiver, args, kwargs)
        if issubclass(type(receiver), types.ModuleType) or receiver is None:
            if name in DATA_FUNCTIONS:
                raise Void("value_from_tensor", f"torch.{name}()")
            raise Void("opaque_call", short_name(f))
        if type(receiver) in CONSTANT_TYPES:
            return self._apply("pure", f, args, kwargs)
        if issubclass(type(receiver), type) and type(f) is types.BuiltinFunctionType:
            rule = method_rule(receiver, name) or method_rule(type(receiver), name)
        else:
            rule = method_rule(owner if owner in METHODS else type(receiver), name)
        if rule is None:
            if type(receiver) in BUILTIN_ITERATORS:
                rule = "iterate"
            elif is_static(receiver) and name in _METHODS_OF_STATIC:
                rule = _METHODS_OF_STATIC[name]
            else:
                raise Void("opaque_call", f"{type(receiver).__name__}.{name}")
        return self._apply(rule, f, args, kwargs, receiver, rest)

    def _check_receiver(self, f: Any) -> None:
        """A bound method from outside is bound to an object from outside."""
        if id(f) in self.known and has_receiver(f):
            receiver = f.__self__
            is_seen = id(receiver) in self.known or id(receiver) in self.frozen
            if not (is_seen or is_constant(receiver) or is_static(receiver)):
                raise Void("opaque_call", f"{short_name(f)}, bound outside")

    def _tensor_method(
        self, name: str, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Answer:
        if name == "view":
            for dtype in (*args[1:], *kwargs.values()):
                # Eager refuses it where the tensor begins at an odd place, which no guard sees.
                if type(dtype) is torch.dtype and dtype.itemsize > args[0].element_size():
                    raise Void("tensor_method", "view(dtype) of wider elements")
        if name in METADATA_METHODS or (name == "type" and len(args) == 1 and not kwargs):
            return None
        if name in TRUTH_METHODS or (name == "item" and args[0].dtype is torch.bool):
            return (self.speculate(args[0]),)
        if name in DATA_METHODS:
            raise Void("value_from_tensor", f"tensor.{name}()")
        if name == "cuda":
            return self._to_gpu(*args, **kwargs)
        if name in REFUSED_METHODS or not is_graph_method(name):
            raise Void("tensor_method", name)
        return self.operation("call_method", name, f, args, kwargs)

    def _to_gpu(self, tensor: Any, device: Any = None, *rest: Any, **kwargs: Any) -> Answer:
        """Tensor.cuda is `to` with the current GPU where none is named."""
        named = torch.device("cuda" if device is None else device)
        if rest or not set(kwargs) <= {"non_blocking", "memory_format"} or named.type != "cuda":
            raise Void("tensor_method", "cuda() with options")
        return self.operation("call_method", "to", torch.Tensor.to, (tensor, named), kwargs)

    def _call_new(self, f: Any, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        made = args[0] if args else cls
        if not (issubclass(type(made), type) and is_python_class(made)):
            raise Void("opaque_call", f"{cls.__name__}.__new__")
        if issubclass(made, torch.Tensor):
            raise Void("tensor_subclass", made.__name__)
        for value in args[1:]:
            if is_iterable(value):
                self.get_iter(value)
        return (NATIVE, f, args, kwargs or None, self._after_new, None)

    def _after_new(self, obj: Any, _token: Any) -> Answer:
        return self.fresh_event(obj)

    def _context_variable(
        self, name: str, f: Any, variable: Any, args: tuple[Any, ...], rest: tuple[Any, ...]
    ) -> Answer:
        """ContextVar: reads are guarded; a set must be reset before the trace ends."""
        if name == "set":
            self.assume_static(variable)
            return (FOLD, f, args, None, self._after_context_set, variable)
        if name == "reset":
            if id(variable) not in self.context_sets:
                raise Void("opaque_call", "ContextVar.reset() of an outside token")
            tokens = self.context_sets[id(variable)]
            if tokens.pop() is not rest[0]:
                raise Void("opaque_call", "ContextVar.reset() out of order")
            if not tokens:
                del self.context_sets[id(variable)]
            return (FOLD, f, args, None, None, None)
        if name != "get":
            raise Void("opaque_call", f"ContextVar.{name}")
        if id(variable) in self.context_sets:
            return (FOLD, f, args, None, self.checked, "ContextVar.get()")
        try:
            value = variable.get(*rest)
        except LookupError:
            raise Void("opaque_call", "ContextVar.get() without a value") from None
        source = self.assume_static(variable)
        self.guards.add(source, "CALL", _StillHolds(value, rest))
        if type(value) not in CONSTANT_TYPES:
            self.assume_static(value)
        return (value,)

    def _after_context_set(self, token: Any, variable: Any) -> Answer:
        self.context_sets.setdefault(id(variable), []).append(token)
        self.fresh[id(token)] = token
        return None

    # ---------------------------------------------------------------- rules

    def _apply(
        self,
        rule: str,
        f: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        receiver: Any = None,
        rest: tuple[Any, ...] = (),
    ) -> Answer:
        """Carries out one row of the policy; `receiver` and `rest` for methods."""
        if rule in _METHOD_RULES:
            method = getattr(self, f"_method_{rule}")
            return method(f, receiver, rest, kwargs)  # type: ignore[no-any-return]
        return getattr(self, f"_call_{rule}")(f, args, kwargs)  # type: ignore[no-any-return]

    def _method_type_call(self, f: Any, cls: Any, rest: Any, kwargs: Any) -> Answer:
        rule = callable_rules().get(id(cls))
        if rule is not None:
            return self._apply(rule, cls, rest, kwargs)
        return self._construct(cls, rest, kwargs)


_METHOD_RULES = frozenset(
    name.removeprefix("_method_") for name in dir(CallEvents) if name.startswith("_method_")
)


class _StillHolds:
    """A deep guard on a ContextVar: `get(*default)` gives the same object or constant."""

    def __init__(self, value: object, default: tuple[Any, ...]) -> None:
        self.value = value
        self.default = default

    def __call__(self, variable: Any) -> bool:
        now = variable.get(*self.default)
        if now is self.value:
            return True
        return type(now) is type(self.value) and is_constant(now) and bool(now == self.value)


def _operator_name(f: Any) -> str | None:
    """The dotted name of a torch.ops operator object."""
    kind = type(f)
    if kind is torch._ops.OpOverload:
        namespace, _, rest = str(f).partition(".")
        return f"torch.ops.{namespace}.{rest}"
    if kind is torch._ops.OpOverloadPacket:
        return f"torch.ops.{f._qualified_op_name.replace('::', '.')}"
    return None


def _implements(raw: Any, f: types.FunctionType) -> bool:
    """True when class attribute `raw` is `f`, or a property or wrapper around it."""
    if raw is f:
        return True
    if type(raw) is property:
        return f in (raw.fget, raw.fset, raw.fdel)
    return type(raw) in (staticmethod, classmethod) and raw.__func__ is f
