"""Describes Python values deeply, so that two runs of a program can be compared.

In: any values. Out: nested dicts and lists (a *snapshot*) that hold everything a program could
observe: types, contents, dtypes, strides, which tensors share storage, which objects are the
same object. Invariant: a snapshot shares no memory with what it describes.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from typing import Any

import torch

_PLAIN = (type(None), bool, int, str, bytes)
_BY_REPR = (complex, range, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
_BY_NAME = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far floating-point values may be apart; other dtypes are always compared exactly."""

    relative: float = 1e-5
    absolute: float = 1e-6


DEFAULT = Tolerance()
EXACT = Tolerance(0.0, 0.0)


@dataclasses.dataclass
class Values:
    """A private copy of a tensor's values."""

    tensor: torch.Tensor


class Describer:
    """Describes several values with one numbering of objects and storages."""

    def __init__(self) -> None:
        self._objects: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._kept_alive: list[Any] = []

    def describe(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return (kind.__name__, value)
        if kind is float:
            return ("float", "nan" if math.isnan(value) else value.hex())
        if kind in _BY_REPR or issubclass(kind, enum.Enum):
            return (kind.__name__, repr(value))
        if issubclass(kind, _BY_NAME):
            return (kind.__name__, getattr(value, "__qualname__", value.__name__))
        if issubclass(kind, tuple):
            return {"type": kind.__qualname__, "items": [self.describe(v) for v in value]}
        number = self._objects.get(id(value))
        if number is not None:
            return f"the same object as #{number}"
        number = self._objects[id(value)] = len(self._objects)
        self._kept_alive.append(value)
        described = {"object": number, "type": kind.__qualname__}
        if issubclass(kind, torch.Tensor):
            return described | self._describe_tensor(value)
        return described | self._describe_contents(value, kind)

    def _describe_contents(self, value: Any, kind: type) -> dict[str, Any]:
        contents: dict[str, Any] = {}
        if issubclass(kind, BaseException):
            contents["args"] = self.describe(value.args)
        if issubclass(kind, list):
            contents["items"] = [self.describe(v) for v in list.__iter__(value)]
        elif issubclass(kind, (set, frozenset)):
            contents["items"] = [self.describe(v) for v in sorted(value, key=repr)]
        elif issubclass(kind, dict):
            contents["items"] = [[self.describe(k), self.describe(v)] for k, v in dict.items(value)]
        elif kind.__name__ == "deque":
            contents["items"] = [self.describe(v) for v in value]
        elif isinstance(value, types.MethodType):
            contents["method"] = [self.describe(value.__func__), self.describe(value.__self__)]
        attributes = getattr(value, "__dict__", None)
        if attributes is not None:
            contents["attributes"] = {
                name: self.describe(attribute) for name, attribute in attributes.items()
            }
        for base in kind.__mro__:
            for slot in base.__dict__.get("__slots__", ()):
                if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                    contents.setdefault("slots", {})[slot] = self.describe(getattr(value, slot))
        return contents

    def _describe_tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        described: dict[str, Any] = {
            "sizes": list(tensor.size()),
            "dtype": str(tensor.dtype),
            "device": str(tensor.device),
            "layout": str(tensor.layout),
            "requires_grad": tensor.requires_grad,
            "is_leaf": tensor.is_leaf,
            "is_inference": tensor.is_inference(),
            "is_conj": tensor.is_conj(),
            "grad_fn": _history(tensor),
        }
        if tensor.is_leaf and tensor.grad is not None:
            described["grad"] = self.describe(tensor.grad)
        own = {k: self.describe(v) for k, v in tensor.__dict__.items()} if tensor.__dict__ else {}
        if own:
            described["attributes"] = own
        if tensor.layout == torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            self._kept_alive.append(storage)
            described["strides"] = list(tensor.stride())
            described["storage_offset"] = tensor.storage_offset()
            described["storage"] = self._storages.setdefault(storage._cdata, len(self._storages))
            described["storage_bytes"] = storage.nbytes()
            described["storage_resizable"] = storage.resizable()
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                described["values"] = Values(tensor.as_subclass(torch.Tensor).detach().clone())
        return described


def _history(tensor: torch.Tensor) -> str:
    """The name of the node that made a tensor, as printing the tensor shows it."""
    kind = type(tensor.grad_fn).__name__
    if kind != "CppFunction":
        return kind
    name: str = tensor.grad_fn.name()
    return name.rsplit("::", maxsplit=1)[-1]


def differences(
    expected: Any, got: Any, tolerance: Tolerance = DEFAULT, path: str = ""
) -> list[str]:
    """Where two snapshots differ: one line each, with the path to the place."""
    if type(expected) is Values and type(got) is Values:
        return _value_differences(expected.tensor, got.tensor, tolerance, path)
    if type(expected) is dict and type(got) is dict:
        found = []
        for key in [*expected, *(key for key in got if key not in expected)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in got:
                found.append(f"{where}: missing; expected {_short(expected[key])}")
            elif key not in expected:
                found.append(f"{where}: unexpected {_short(got[key])}")
            else:
                found += differences(expected[key], got[key], tolerance, where)
        return found
    if type(expected) is list and type(got) is list and len(expected) == len(got):
        return [
            line
            for index, (left, right) in enumerate(zip(expected, got, strict=True))
            for line in differences(left, right, tolerance, f"{path}[{index}]")
        ]
    if _is_float(expected) and _is_float(got):
        left, right = (
            float("nan") if v[1] == "nan" else float.fromhex(v[1]) for v in (expected, got)
        )
        return _value_differences(
            torch.tensor(left, dtype=torch.float64),
            torch.tensor(right, dtype=torch.float64),
            tolerance,
            path,
        )
    if type(expected) is type(got) and expected == got:
        return []
    return [f"{path}: expected {_short(expected)}, got {_short(got)}"]


def _is_float(value: Any) -> bool:
    return type(value) is tuple and value[0] == "float"


def _value_differences(
    expected: torch.Tensor, got: torch.Tensor, tolerance: Tolerance, path: str
) -> list[str]:
    if expected.dtype != got.dtype or expected.size() != got.size():
        return []  # reported by the fields beside the values
    if torch.equal(expected, got):
        return []
    if expected.dtype.is_floating_point or expected.dtype.is_complex:
        relative = max(tolerance.relative, 4 * torch.finfo(expected.dtype).eps)
        if tolerance is EXACT:
            relative = 0.0
        close = torch.isclose(expected, got, relative, tolerance.absolute, equal_nan=True)
    else:
        close = expected == got
    if bool(close.all()):
        return []
    wrong = int((~close).sum())
    first = tuple((~close).nonzero()[0].tolist())
    return [
        f"{path}: {wrong} of {close.numel()} values differ, first at {first}: "
        f"expected {expected[first].item()!r}, got {got[first].item()!r}"
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 300 else text[:300] + "..."
