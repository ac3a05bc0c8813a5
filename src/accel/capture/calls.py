"""Calls: graph operation, inlined twin, fold, effect, or opaque.

In: `call`, `redirect` and `fresh` events. Out: a step for the trampoline to carry out.
Invariant: what no rule covers is opaque, and opaque voids the recording.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from accel.capture import left_to_python
from accel.capture.allowed_calls import AllowedCalls
from accel.capture.autograd_functions import AutogradFunctions
from accel.capture.class_questions import ClassQuestions
from accel.capture.library_calls import short_name
from accel.capture.numpy_rules import array_type
from accel.capture.operators import _BINARY, BINARY_NAMES, _c_length, is_python_len
from accel.capture.policy import METHODS, callable_rules, is_dynamo_mark, method_rule
from accel.capture.polyfills import POLYFILLS
from accel.capture.state import user_location
from accel.capture.steps import CONSTRUCT, FOLD, INLINE, NATIVE, OPERATION, Answer, Void
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
    BUILTIN_CONTAINERS,
    BUILTIN_ITERATORS,
    CONSTANT_TYPES,
    GETTER_TYPES,
    PLAIN_TENSORS,
    class_lookup,
    is_constant,
    is_python_class,
    is_static,
)
from accel.sources import Source
from accel.trace import Ref

_C_CALLABLES = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    BOUND_C_METHOD,
)
_COMPARE_OPERATORS = {"lt": "<", "le": "<=", "eq": "==", "ne": "!=", "gt": ">", "ge": ">="}
_LRU = type(functools.lru_cache(lambda: None))
_CONTEXT_VAR = type(__import__("contextvars").ContextVar("accel"))
_TENSOR_FUNCTIONS = {
    id(f): name for name, f in vars(torch.Tensor).items() if type(f) is types.FunctionType
}
_OBJECT_GETSTATE = getattr(object, "__getstate__", None)  # since CPython 3.11
_MAX_LITERALS = 64  # of torch.tensor([...]): more would be data, not a constant


class CallEvents(ClassQuestions, AutogradFunctions, AllowedCalls):
    """Handlers of calls."""

    twin_of: Callable[[types.FunctionType], types.FunctionType | None]

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
            raise Void("disabled", f.__qualname__)
        twin = self.twin_of(f)
        if twin is None:
            raise Void("no_twin", f.__qualname__)
        self.prepare(f, args)
        return (INLINE, twin, args, kwargs, None, None)

    def prepare(self, f: types.FunctionType, args: tuple[Any, ...] = ()) -> None:
        """Guards of an inlined function: its code, its defaults; names for its cells."""
        if id(f) in self.prepared:
            return
        self.prepared[id(f)] = f
        source = self.source_of(f) or self._method_source(f, args)
        self._note_inner_codes(f.__code__)
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
                for base in cls.__mro__:
                    for name, raw in base.__dict__.items():
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
        source = self.source_of(f)
        if source is not None:
            self.track(f.__self__, source.child("bound_self"))
            self.track(f.__func__, source.child("bound_function"))
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
        """functools.lru_cache of constants: a memoised value is the same at every replay."""
        for value in (*args, *kwargs.values()):
            if not (is_constant(value) or is_static(value) or id(value) in self.known):
                raise Void(
                    "opaque_call", f"cached {short_name(f)} with arguments made in the trace"
                )
            if id(value) in self.known and not is_static(value):
                source = self.known[id(value)][1]
                self.guards.add(source, "IS", value)
        return (FOLD, f, args, kwargs or None, self.adopt_constant, None)

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
                self.get_iter(value) if _is_iterable(value) else self.check_value(value)
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
            elif is_static(receiver) and name in ("__get__", "__repr__", "__hash__", "__eq__"):
                rule = "passes"
            else:
                raise Void("opaque_call", f"{type(receiver).__name__}.{name}")
        return self._apply(rule, f, args, kwargs, receiver, rest)

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
        if name in REFUSED_METHODS or not is_graph_method(name):
            raise Void("tensor_method", name)
        return self.operation("call_method", name, f, args, kwargs)

    def _call_new(self, f: Any, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        made = args[0] if args else cls
        if not (issubclass(type(made), type) and is_python_class(made)):
            raise Void("opaque_call", f"{cls.__name__}.__new__")
        if issubclass(made, torch.Tensor):
            raise Void("tensor_subclass", made.__name__)
        for value in args[1:]:
            if _is_iterable(value):
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

    def _call_iterate(self, f: Any, args: Any, kwargs: Any) -> Answer:
        receiver = getattr(f, "__self__", args[0] if args else None)
        if id(receiver) in self.known:
            raise Void("container", f"a {type(receiver).__name__} from outside")
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_deep(self, f: Any, args: Any, kwargs: Any) -> Answer:
        receiver = getattr(f, "__self__", None)
        textual = f in (repr, ascii, format) or getattr(f, "__name__", "") == "__repr__"
        for value in (receiver, *args, *kwargs.values()):
            if type(value) in PLAIN_TENSORS:
                raise Void("value_from_tensor", short_name(f))
            if isinstance(value, types.ModuleType) or (callable(value) and is_static(value)):
                continue
            if textual:
                self._text_of(value)
            elif type(value) in BUILTIN_ITERATORS:
                self._about_to_read(value)
            else:
                self.consume_deeply(value)
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_pure(self, f: Any, args: Any, kwargs: Any) -> Answer:
        for value in (*args, *kwargs.values()):
            if type(value) in PLAIN_TENSORS:
                if f in (abs, pow, divmod, round):
                    name = f"builtins.{f.__name__}"
                    return self.operation("call_function", name, f, args, kwargs)
                raise Void("value_from_tensor", short_name(f))
            if type(value) in CONSTANT_TYPES or is_constant(value) or is_static(value):
                continue
            if type(value) in BUILTIN_CONTAINERS or type(value) in BUILTIN_ITERATORS:
                self._text_of(value) if f.__name__ in ("format", "join") and type(
                    value
                ) in BUILTIN_CONTAINERS else self._about_to_read(value)
                continue
            if f.__name__ in ("format", "__format__", "format_map"):
                self._text_of(value)
                continue
            if id(value) not in self.known and id(value) not in self.fresh:
                raise Void("unknown_value", f"argument of {short_name(f)}")
            self.check_own_code(value)
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_pure_sequence(self, f: Any, args: Any, kwargs: Any) -> Answer:
        for value in (*args, *kwargs.values()):
            self.consume_deeply(value) if type(value) in BUILTIN_CONTAINERS else None
        return (NATIVE, f, args, kwargs or None, self.checked, short_name(f))

    def _call_fold(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (FOLD, f, args, kwargs or None, self.adopt_constant, None)

    def _call_as_tensor(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """torch.as_tensor: `to` for a tensor, torch.tensor for numbers."""
        if args and type(args[0]) in PLAIN_TENSORS:
            if not kwargs and len(args) == 1:
                return (args[0],)
            return self.operation("call_method", "to", torch.Tensor.to, args, kwargs)
        return self._call_torch_tensor(f, args, kwargs)

    def _call_fold_frozen(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (FOLD, f, args, kwargs or None, self.adopt_frozen, None)

    def _call_passes(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return None

    def _call_opaque(self, f: Any, args: Any, kwargs: Any) -> Answer:
        raise Void("opaque_call", short_name(f))

    def _call_polyfill(self, f: Any, args: Any, kwargs: Any) -> Answer:
        polyfill: Any = POLYFILLS[id(f)]
        self.assume_static(polyfill)
        return self.call_python(polyfill, args, kwargs)

    def _call_construct(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (CONSTRUCT, f, args, kwargs or None, None, None)

    def _call_len(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 1 or kwargs:
            return None
        kind = type(args[0])
        if kind in PLAIN_TENSORS or kind in CONSTANT_TYPES:
            return None
        if issubclass(kind, (tuple, list, dict, set, frozenset)) and not is_python_len(kind):
            self.length(args[0])
            return (_c_length(args[0]),)
        if kind in BUILTIN_CONTAINERS:
            self.consume(args[0])
            return None
        return (NATIVE, f, args, None, None, None)

    def _call_getattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) < 2 or type(args[1]) is not str:
            return None
        answer = self.attr(args[0], args[1])
        if len(args) == 2 or (answer is not None and len(answer) == 1):
            return answer
        post = answer[4] if answer is not None else None
        token = answer[5] if answer is not None else None
        return (NATIVE, f, args, None, post if post is not None else self.checked, token)

    def _call_hasattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 2 or type(args[1]) is not str:
            return None
        if type(args[0]) in PLAIN_TENSORS:
            return self.has_tensor_attr(args[0], args[1])
        answer = self.attr(args[0], args[1])
        if answer is not None and len(answer) == 1:
            return (True,)
        return (NATIVE, f, args, None, None, None)

    def _call_setattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 3 or type(args[1]) is not str:
            return None
        return self.setattr(args[0], args[2], args[1])

    def _call_delattr(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return self.delattr(*args) if len(args) == 2 else None

    def _call_type(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 1 or kwargs:
            raise Void("opaque_call", "making a class")
        if type(args[0]) not in PLAIN_TENSORS:
            self.check_value(args[0], "type()")
        self.assume_static(type(args[0]))
        return (type(args[0]),)

    def _call_print(self, f: Any, args: Any, kwargs: Any) -> Answer:
        for value in (*args, *kwargs.values()):
            if not is_constant(value):
                raise Void("opaque_call", "print() of more than constants")
        self.print_effect(args, kwargs)
        return (FOLD, f, args, kwargs or None, None, None)

    def _call_globals(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (FOLD, f, args, None, self._after_globals, None)

    def _after_globals(self, value: Any, _token: Any) -> Answer:
        # `globals()` ran from a C trampoline: the running frame is the twin's.
        self.known.setdefault(id(value), (value, self.constant_source(value)))
        return None

    def _call_vars(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if len(args) != 1:
            return None
        return self.attr(args[0], "__dict__")

    def _call_scalar(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """int(), float(), bool(), str() of one value."""
        if not args:
            return None
        value = args[0]
        if type(value) in PLAIN_TENSORS:
            if f is bool:
                return (self.speculate(value),)
            raise Void("value_from_tensor", f"{f.__name__}(tensor)")
        if type(value) in CONSTANT_TYPES:
            return None
        if f is bool:
            answer = self.test(value)
            return (NATIVE, f, args, None, None, None) if answer is None else answer
        if f is str:
            self._text_of(value)
            return (NATIVE, f, args, kwargs or None, None, None)
        if id(value) not in self.known and id(value) not in self.fresh:
            raise Void("unknown_value", f"{f.__name__}() of a {type(value).__name__}")
        self.check_own_code(value)
        return (NATIVE, f, args, kwargs or None, None, None)

    def _call_operator(self, f: Any, args: Any, kwargs: Any) -> Answer:
        name = f.__name__
        if name in BINARY_NAMES and len(args) == 2:
            return self.binary(args[0], args[1], BINARY_NAMES.index(name)) or (
                NATIVE,
                _BINARY[BINARY_NAMES.index(name)],
                args,
                None,
                None,
                None,
            )
        if name in _COMPARE_OPERATORS and len(args) == 2:
            return self.compare(args[0], args[1], _COMPARE_OPERATORS[name])
        if name == "getitem":
            return self.subscr(*args)
        if name == "setitem":
            return self.setitem(*args)
        if name in ("neg", "pos", "invert", "inv"):
            return self.unary(args[0], {"neg": "-", "pos": "+"}.get(name, "~"))
        if name == "contains":
            return self.contains(args[1], args[0])
        if name == "is_" or name == "is_not":
            self.is_(*args)
            return None
        if name == "truth":
            return self.test(args[0])
        if name == "not_":
            return self.not_(args[0])
        if name == "abs":
            return self._call_pure(abs, args, kwargs)
        if name == "index" and type(args[0]) in CONSTANT_TYPES:
            return None
        raise Void("opaque_call", f"operator.{name}")

    def _call_id(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """Identities differ at each run; copy's memo only tells objects apart by them."""
        if user_location().startswith(copy.__file__ + ":"):
            return None
        raise Void("opaque_call", "id()")

    def _call_grad_mode(self, f: Any, args: Any, kwargs: Any) -> Answer:
        return (FOLD, f, args, kwargs or None, None, None)

    def _call_torch_tensor(self, f: Any, args: Any, kwargs: Any) -> Answer:
        """torch.tensor of scalars and lists of them: recorded as fulls, stacked."""
        if len(args) != 1 or not set(kwargs) <= {"dtype", "device"}:
            raise Void("opaque_call", "torch.tensor() with options")
        if id(args[0]) in self.frozen:
            is_array = type(args[0]) is array_type()
            leaves = _flatten(args[0].tolist()) if is_array else None
        else:
            self.consume_deeply(args[0])
            leaves = _flatten(args[0])
        if leaves is None or len(leaves) > _MAX_LITERALS:
            raise Void("opaque_call", "torch.tensor() of more than a few numbers")
        return (OPERATION, f, args, kwargs or None, self._after_torch_tensor, leaves)

    def _after_torch_tensor(self, tensor: Any, leaves: Any) -> Answer:
        dtype = {"dtype": tensor.dtype, "device": tensor.device}

        def add(target: str, *operands: Any, **options: Any) -> Ref:
            return self.add_operation(target, operands, options)

        if tensor.dim() == 0:
            made = add("torch.full", (), leaves[0], **dtype)
        elif not leaves:
            made = add("torch.full", tuple(tensor.shape), 0, **dtype)
        else:
            made = add("torch.stack", [add("torch.full", (), v, **dtype) for v in leaves])
            if tensor.dim() > 1:
                made = add("torch.reshape", made, tuple(tensor.shape))
        self.bind(tensor, made.name)
        return None

    # -------------------------------------------------- methods of builtins

    def _method_dict_get(self, f: Any, table: Any, rest: Any, kwargs: Any) -> Answer:
        source = self.source_of(table)
        if source is not None and rest:
            self._entry_known(table, rest[0], source)
        return (NATIVE, f, self._call_args(f, table, rest), None, self.checked, "dict.get()")

    def _method_subscr(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self.subscr(obj, *rest) and (
            NATIVE,
            f,
            self._call_args(f, obj, rest),
            None,
            self.checked,
            "__getitem__",
        )

    def _method_contains(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        self.contains(rest[0], obj)
        return (NATIVE, f, self._call_args(f, obj, rest), None, None, None)

    def _method_setitem(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if id(obj) in self.known:
            return self.raw_setitem(obj, *rest)
        return None

    def _method_setdefault(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        source = self.source_of(obj)
        if source is None:
            return (NATIVE, f, self._call_args(f, obj, rest), None, self.checked, "setdefault()")
        if dict.__contains__(obj, rest[0]):
            self._entry_known(obj, rest[0], source)
            return (NATIVE, f, self._call_args(f, obj, rest), None, self.checked, "setdefault()")
        raise Void("container_write", f"setdefault on {source}")

    def _method_append(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        source = self.source_of(obj)
        if source is None:
            return None
        self.effect("append", obj, *rest)
        return None

    def _method_extend(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        self._about_to_read(rest[0])
        if self.source_of(obj) is None:
            return None
        raise Void("container_write", f"extend on {self.source_of(obj)}")

    def _method_sort(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if kwargs.get("key") is not None:
            _, kwargs = self._watch_key((), kwargs)
        else:
            self.consume_deeply(obj)
        return self._method_write(f, obj, rest, kwargs)

    def _method_set_write(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """set.add and set.discard; on a set from outside only where they change nothing."""
        if id(obj) not in self.known:
            for value in rest:
                self.pin(value)
        elif len(rest) == 1 and is_constant(rest[0]):
            self.consume(obj)
            if (rest[0] in obj) == (f.__name__ == "add"):
                return (None,)
        return self._method_write(f, obj, rest, kwargs)

    def _method_compare_write(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """A write that looks its place up by comparing: list.remove."""
        for value in (obj, *rest):
            self.consume_deeply(value)
        return self._method_write(f, obj, rest, kwargs)

    def _method_update_pairs(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self._method_write(f, obj, tuple(self._pairs(v) for v in rest), kwargs)

    def _method_write(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        for value in (*rest, *kwargs.values()):
            self._about_to_read(value)
        if id(obj) in self.known:
            raise Void("container_write", f"{f.__name__}() on {self.source_of(obj)}")
        if id(obj) not in self.fresh and type(obj) not in BUILTIN_CONTAINERS:
            raise Void("unknown_value", f"{f.__name__}() of a {type(obj).__name__}")
        return (NATIVE, f, self._call_args(f, obj, rest), kwargs or None, self.checked, f.__name__)

    def _method_initialise(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self._method_write(f, obj, rest, kwargs)

    def _method_object_setattr(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if issubclass(type(obj), (torch.Tensor, types.ModuleType, type)):
            raise Void("class_or_module_store", str(rest[0]))
        if id(obj) in self.known:
            return self.raw_setattr(obj, rest[0], rest[1])
        if id(obj) in self.fresh or issubclass(type(obj), BaseException):
            return None
        raise Void("unknown_value", f"store to a {type(obj).__name__}")

    def _method_object_delattr(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        return self.delattr(obj, *rest)

    def _method_object_getattribute(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        if id(obj) not in self.known and id(obj) not in self.fresh:
            raise Void("unknown_value", f"attribute of a {type(obj).__name__}")
        answer = self.generic_attr(obj, *rest)
        if answer is not None and len(answer) == 1:
            return answer
        post, token = (answer[4], answer[5]) if answer is not None else (None, None)
        return (NATIVE, f, self._call_args(f, obj, rest), None, post, token)

    def _method_reduce(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        """object.__reduce_ex__ of a plain instance, as copy.copy and deepcopy use it: class
        and instance dict."""
        kind = type(obj)
        plain = (
            is_python_class(kind)
            and class_lookup(kind, "__reduce__") is object.__reduce__
            and class_lookup(kind, "__getstate__") in (None, _OBJECT_GETSTATE)
            and not issubclass(kind, (tuple, list, dict, set, frozenset, int, str, float, bytes))
        )
        if not plain:
            raise Void("opaque_call", f"{kind.__name__}.__reduce_ex__")
        for name in ("__reduce__", "__getstate__", "__reduce_ex__"):
            self.guards.add_class_attribute(kind, name, class_lookup(kind, name, self.missing))
        return (FOLD, f, self._call_args(f, obj, rest), None, self._after_reduce, obj)

    def _after_reduce(self, value: Any, obj: Any) -> Answer:
        state = value[2] if len(value) > 2 else None
        if type(state) is dict and state is object.__getattribute__(obj, "__dict__"):
            self._after_dict(state, obj)
        elif state is not None:
            raise Void("opaque_call", f"{type(obj).__name__}.__reduce_ex__ with slots")
        for part in value[:2]:
            if is_static(part):
                self.assume_static(part)
        for part in value[1]:
            self.check_value(part, "__reduce_ex__")
        return None

    def _method_object_eq(self, f: Any, obj: Any, rest: Any, kwargs: Any) -> Answer:
        self._identity_counts(obj, *rest)
        return None

    def _method_type_call(self, f: Any, cls: Any, rest: Any, kwargs: Any) -> Answer:
        rule = callable_rules().get(id(cls))
        if rule is not None:
            return self._apply(rule, cls, rest, kwargs)
        return self._construct(cls, rest, kwargs)

    prepared: dict[int, types.FunctionType]
    context_sets: dict[int, list[Any]]
    inner_codes: set[types.CodeType]


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


def _flatten(value: Any) -> list[Any] | None:
    """The numbers of a nest of lists and tuples, in order; None for anything else."""
    if type(value) in (bool, int, float):
        return [value] if type(value) is not int or abs(value) < 1 << 62 else None
    if type(value) not in (list, tuple):
        return None
    leaves: list[Any] = []
    for part in value:
        inner = _flatten(part)
        if inner is None:
            return None
        leaves += inner
    return leaves


def _implements(raw: Any, f: types.FunctionType) -> bool:
    """True when class attribute `raw` is `f`, or a property or wrapper around it."""
    if raw is f:
        return True
    if type(raw) is property:
        return f in (raw.fget, raw.fset, raw.fdel)
    return type(raw) in (staticmethod, classmethod) and raw.__func__ is f


def _is_iterable(value: Any) -> bool:
    kind = type(value)
    return kind in BUILTIN_CONTAINERS or kind in BUILTIN_ITERATORS


def _operator_name(f: Any) -> str | None:
    """The dotted name of a torch.ops operator object."""
    kind = type(f)
    if kind is torch._ops.OpOverload:
        namespace, _, rest = str(f).partition(".")
        return f"torch.ops.{namespace}.{rest}"
    if kind is torch._ops.OpOverloadPacket:
        return f"torch.ops.{f._qualified_op_name.replace('::', '.')}"
    return None
