"""A stand-in for `torch._dynamo` in the worker process.

torch's fake tensors want `torch._dynamo.config` and `torch._dynamo.disable`; importing the
package for these two costs a second of the first compilation. In: nothing. Out: a module that
serves both without the package's own `__init__`, and makes way for the real package when
anything else is asked of it. Invariant: only processes that never run torch.compile install
it, for there `disable(f)` is `f`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

_NAME = "torch._dynamo"


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_load_real(), name)


class _Finder(importlib.abc.MetaPathFinder):
    """Parts of the package import each other in circles that only its own `__init__` enters
    right: whoever wants one besides `config` gets it from the real package."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        wanted = fullname.startswith(f"{_NAME}.") and fullname != f"{_NAME}.config"
        if not wanted or not isinstance(sys.modules.get(_NAME), _StandIn):
            return None
        _load_real()
        return importlib.machinery.ModuleSpec(fullname, _Loaded(importlib.import_module(fullname)))


class _Loaded(importlib.abc.Loader):
    """Hands out a module that was imported meanwhile."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: Any) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put ours there


def _disable(f: Any = None, recursive: bool = True, **_: Any) -> Any:
    return f if f is not None else _disable


def _load_real() -> types.ModuleType:
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
    real = importlib.import_module(_NAME)
    sys.modules["torch"].__dict__["_dynamo"] = real
    return real


def install() -> None:
    """Puts the stand-in in place, unless the real package is there already."""
    spec = importlib.util.find_spec(_NAME)
    if _NAME in sys.modules or spec is None:
        return
    module = _StandIn(_NAME, "Stands in for torch._dynamo until more of it is needed.")
    module.__path__ = list(spec.submodule_search_locations or ())
    module.__spec__ = spec
    module.__file__ = spec.origin
    module.disable = _disable  # type: ignore[attr-defined]
    sys.modules[_NAME] = module
    sys.meta_path.insert(0, _Finder())
