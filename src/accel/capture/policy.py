"""The call policy: what a recording does with calls of C code it knows.

In: a C callable (or a builtin type's method). Out: the name of a rule.

Rules for whoever adds a row:
1. What has no row is opaque: the recording is void. Add a row only for code whose effects
   and reads you can state.
2. `read`   the arguments' contents are read once, shallowly; the result holds only them.
   `deep`   the arguments are compared, printed or hashed in depth.
   `read_pairs` the last argument is read as dict() reads it, the others shallowly;
   `ordered` the first argument's elements, or what a key makes of them, are compared.
   `pure`   the result depends on constant arguments alone.
   `fold`   the result is fixed by the ambient guards or by identity guards.
   `write`  the first argument is changed.
   Other names are methods of CallEvents (`_call_<rule>`).
3. A callback given to such code runs in frames that the shim redirects to twins; where it is
   no Python function, `capture/callbacks.py` puts one around it.
"""

from __future__ import annotations

import bisect
import builtins
import collections
import functools
import inspect
import io
import itertools
import json
import logging
import math
import operator
import re
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

import torch

from accel.capture.callbacks import hashed
from accel.capture.numpy_rules import callable_rows, method_rows
from accel.capture.torch_calls import METADATA_FUNCTIONS
from accel.capture.values import mro_of


def _names(rule: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), rule)


BUILTINS: dict[str, str] = {
    **_names("read", "zip enumerate map filter reversed list tuple set frozenset iter next"),
    **_names("deep", "repr ascii format"),
    "hash": "hash",
    **_names("ordered", "min max sorted"),
    "dict": "read_pairs",
    **_names("pure", "abs round divmod pow ord chr bin hex oct complex slice range bytes"),
    **_names("fold", "callable"),
    **_names("polyfill", "sum any all"),
    "isinstance": "isinstance",
    "issubclass": "issubclass",
    "len": "len",
    "id": "id",
    "getattr": "getattr",
    "hasattr": "hasattr",
    "setattr": "setattr",
    "delattr": "delattr",
    "type": "type",
    "super": "passes",
    "property": "passes",
    "staticmethod": "passes",
    "classmethod": "passes",
    "print": "print",
    "globals": "globals",
    "locals": "passes",
    "vars": "vars",
    "object": "construct",
    **_names("scalar", "int float bool str"),
}

# Methods of builtin types, by the type that defines them.
METHODS: dict[type, dict[str, str]] = {
    dict: {
        **_names("read", "items keys values copy __iter__ __len__ __reversed__ __or__ __ror__"),
        **_names("deep", "__eq__ __ne__ __repr__"),
        **_names("write", "pop popitem clear __delitem__"),
        **_names("update_pairs", "update __ior__ __init__"),
        "get": "dict_get",
        "setdefault": "setdefault",
        "__getitem__": "subscr",
        "__contains__": "contains",
        "__setitem__": "setitem",
        "fromkeys": "read",
    },
    list: {
        **_names("read", "copy __iter__ __len__ __reversed__ __add__ __mul__ __rmul__"),
        **_names(
            "deep", "index count __eq__ __ne__ __lt__ __gt__ __le__ __ge__ __contains__ __repr__"
        ),
        **_names("write", "insert pop clear reverse __delitem__ __iadd__ __imul__"),
        "sort": "sort",
        "remove": "compare_write",
        "append": "append",
        "extend": "extend",
        "__getitem__": "subscr",
        "__setitem__": "setitem",
        "__init__": "initialise",
    },
    tuple: {
        **_names("read", "__iter__ __len__ __add__ __mul__ __rmul__"),
        **_names(
            "deep",
            "index count __eq__ __ne__ __lt__ __gt__ __le__ __ge__ __contains__ __repr__",
        ),
        "__hash__": "hash",
        "__getitem__": "subscr",
    },
    set: {
        **_names(
            "read",
            "copy union intersection difference symmetric_difference issubset issuperset isdisjoint "
            "__iter__ __len__ __contains__ __and__ __or__ __sub__ __xor__",
        ),
        **_names(
            "write",
            "remove pop clear update intersection_update difference_update "
            "symmetric_difference_update __ior__ __iand__ __isub__ __ixor__",
        ),
        **_names("set_write", "add discard"),
        "__init__": "initialise",
    },
    frozenset: _names(
        "read",
        "copy union intersection difference symmetric_difference issubset issuperset isdisjoint "
        "__iter__ __len__ __contains__ __and__ __or__ __sub__ __xor__",
    ),
    collections.OrderedDict: {
        **_names("read", "items keys values copy __iter__ __reversed__"),
        **_names("deep", "__eq__ __ne__"),
        **_names("write", "pop popitem clear move_to_end __delitem__"),
        **_names("update_pairs", "update __init__"),
        "setdefault": "setdefault",
        "__setitem__": "setitem",
        "__ior__": "update_pairs",
    },
    collections.deque: {
        **_names("read", "copy __iter__ __len__ __reversed__"),
        **_names(
            "write",
            "append appendleft pop popleft extend extendleft clear rotate insert reverse "
            "__iadd__ __delitem__",
        ),
        "remove": "compare_write",
        **_names("deep", "index count"),
        "__init__": "initialise",
    },
    collections.defaultdict: {"__missing__": "write", "__init__": "update_pairs", "copy": "read"},
    type({}.keys()): _names("read", "isdisjoint"),
    type({}.items()): _names("deep", "isdisjoint"),
    itertools.chain: {"from_iterable": "read"},
    types.MappingProxyType: _names("read", "items keys values get copy __iter__ __len__"),
    object: {
        "__setattr__": "object_setattr",
        "__delattr__": "object_delattr",
        "__getattribute__": "object_getattribute",
        "__init__": "passes",
        "__reduce_ex__": "reduce",
        "__eq__": "object_eq",
        "__ne__": "object_eq",
        "__hash__": "hash",
        "__init_subclass__": "passes",
        "__subclasshook__": "passes",
    },
    type: {
        "__call__": "type_call",
        "mro": "fold",
        "__instancecheck__": "fold",
        "__subclasscheck__": "fold",
        "__getattribute__": "getattr",
        "__subclasses__": "opaque",
    },
    re.Pattern: _names(
        "fold_frozen_method", "match search fullmatch findall split sub subn finditer"
    ),
    re.Match: _names(
        "fold_frozen_method", "group groups groupdict start end span expand __getitem__"
    ),
    torch.Size: _names("pure", "numel __getitem__ __len__ __iter__ __eq__ __ne__ count index"),
    type(threading.RLock()): _names("first_use", "__enter__ acquire"),
    **method_rows(),
    io.TextIOWrapper: {"write": "text_write", "flush": "text_flush"},
    io.StringIO: {"write": "text_write"},
    io.StringIO.flush.__objclass__: {"flush": "text_flush"},  # type: ignore[attr-defined]
    torch._C._FunctionBase: {"apply": "autograd_apply"},
    types.GeneratorType: _names("iterate", "send throw close __next__ __iter__"),
}

# Types whose every method depends on its constant receiver and arguments alone.
PURE_TYPES: frozenset[type] = frozenset(
    {int, float, bool, complex, str, bytes, range, slice, torch.dtype, torch.device}
)

# Constructors of C types.
CONSTRUCTORS: dict[type, str] = {
    collections.OrderedDict: "read_pairs",
    collections.deque: "read",
    collections.defaultdict: "read_pairs",
    types.MappingProxyType: "passes",
    functools.partial: "passes",
    types.MethodType: "passes",
    types.SimpleNamespace: "namespace",
    operator.itemgetter: "getter_type",
    operator.attrgetter: "getter_type",
    operator.methodcaller: "getter_type",
    torch.Size: "pure_sequence",
    torch.device: "pure",
    torch.finfo: "fold_frozen",
    torch.iinfo: "fold_frozen",
    **{v: "read" for v in vars(itertools).values() if isinstance(v, type)},
}

# torch's C functions that read or set ambient state.
AMBIENT_NAMES = METADATA_FUNCTIONS | {
    "is_autocast_available",
    "_functorch_is_enabled",
    "_get_default_device",
    "_is_autocast_available",
    "get_num_threads",
    "_get_cudnn_enabled",
    "_get_mkldnn_enabled",
    "_get_flash_sdp_enabled",
    "_get_mem_efficient_sdp_enabled",
    "_get_math_sdp_enabled",
    "_is_view_replay_enabled",
    "_len_torch_dispatch_stack",
    "is_flash_attention_available",
    "_cuda_isCurrentStreamCapturing",
    "_get_privateuse1_backend_name",
    "_is_torch_function_mode_enabled",
}

# What entering and leaving `torch.autocast` consists of.
AUTOCAST_FUNCTIONS = (
    "set_autocast_enabled",
    "set_autocast_dtype",
    "set_autocast_cache_enabled",
    "autocast_increment_nesting",
    "autocast_decrement_nesting",
    "clear_autocast_cache",
)

# Python functions run as they are: their result is fixed by what is guarded already.
FOLDED_PYTHON: dict[Callable[..., Any], str] = {
    torch.jit.is_scripting: "fold",
    torch.jit.is_tracing: "fold",
    torch._jit_internal.is_scripting: "fold",
    torch.compiler.is_compiling: "fold",
    torch.compiler.is_exporting: "fold",
    torch.compiler.is_dynamo_compiling: "fold",
    typing.cast: "passes",
    torch.distributions.kl._dispatch_kl: "lookup",
    **dict.fromkeys(
        (
            re.compile,
            re.match,
            re.search,
            re.fullmatch,
            re.findall,
            re.split,
            re.sub,
            re.subn,
            re.escape,
            json.dumps,
            json.loads,
        ),
        "fold_constants",
    ),
    sys.exc_info: "exc_info",
    collections._count_elements: "polyfill",  # type: ignore[attr-defined]
    **dict.fromkeys((bisect.bisect_left, bisect.bisect_right), "deep"),
    inspect.signature: "fold_frozen",
    torch.is_tensor: "fold",
    torch.overrides.is_tensor_like: "fold",
    torch.is_storage: "fold",
    torch.distributed.is_available: "fold",
    torch.is_autocast_enabled: "fold",
    torch.cuda.is_bf16_supported: "fold",
    torch.cuda.amp.common.amp_definitely_not_available: "fold",
    torch.get_default_dtype: "fold",
    torch.get_default_device: "fold",
    torch.nn.Module.train: "opaque",
    torch.nn.Module.requires_grad_: "opaque",
    torch.nn.Module._apply: "opaque",
    torch.manual_seed: "opaque",
    torch.compile: "opaque",
    warnings.warn: "opaque",
    logging.Logger.debug: "logging",
    logging.Logger.info: "logging",
    logging.Logger.warning: "logging",
    logging.Logger.error: "logging",
    logging.Logger.critical: "logging",
    logging.Logger.log: "logging_at",
    logging.getLogger: "get_logger",
    logging.Logger.isEnabledFor: "logger_level",
}

# What only Dynamo reads: hints to it, and how old it takes a module for (it patches
# `Module.__init__`). Named, because torch._dynamo is not imported on our account.
DYNAMO_MARKS = frozenset(
    {
        *(
            ("torch._dynamo.decorators", name)
            for name in (
                "mark_static",
                "mark_static_address",
                "mark_dynamic",
                "maybe_mark_dynamic",
                "mark_unbacked",
            )
        ),
        ("torch._dynamo.mutation_guard", "GenerationTracker.tag"),
    }
)


def is_dynamo_mark(f: Any) -> bool:
    return (f.__module__, f.__qualname__) in DYNAMO_MARKS


@functools.cache
def callable_rules() -> dict[int, str]:
    """id -> rule of every C callable of the tables above (all live for good)."""
    rules = callable_rows()
    for name, rule in BUILTINS.items():
        rules[id(getattr(builtins, name))] = rule
    for f, rule in FOLDED_PYTHON.items():
        rules[id(f)] = rule
    for name, calculation in vars(math).items():
        if callable(calculation):
            rules[id(calculation)] = "pure_sequence" if name in ("prod", "fsum", "dist") else "pure"
    for operation in vars(operator).values():
        if isinstance(operation, types.BuiltinFunctionType):
            rules[id(operation)] = "operator"
    rules[id(functools.reduce)] = "read"
    rules[id(hashed)] = "hashed"
    for cls, rule in CONSTRUCTORS.items():
        rules[id(cls)] = rule
    for module in (torch, torch._C):
        for name in AMBIENT_NAMES:
            ambient = getattr(module, name, None)
            if ambient is not None:
                rules.setdefault(id(ambient), "fold")
    rules[id(torch._C._set_grad_enabled)] = "grad_mode"
    for name in AUTOCAST_FUNCTIONS:
        rules[id(getattr(torch, name))] = "autocast"
    rules[id(torch._C._functorch.unwrap_if_dead)] = "unwrap_if_dead"
    rules[id(torch.tensor)] = "torch_tensor"
    rules[id(torch.as_tensor)] = "as_tensor"
    return rules


def method_rule(kind: type, name: str) -> str | None:
    """The rule of builtin type `kind`'s method `name`; None when it has none."""
    for base in mro_of(kind):
        rows = METHODS.get(base)
        if rows is not None and name in rows:
            return rows[name]
        if base in PURE_TYPES:
            return "pure"
    return None
