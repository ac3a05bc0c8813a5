"""A stand-in for `torch._dynamo` in the worker process.

torch's fake tensors want `torch._dynamo.config` and `torch._dynamo.disable`; importing the
package for these two costs a second of the first compilation. In: nothing. Out: a module that
serves both without the package's own `__init__`, and makes way for the real package when
anything else is asked of it. Invariant: only processes that never run torch.compile install
it, for there `disable(f)` is `f`.
"""

from __future__ import annotations

import importlib
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


def _disable(f: Any = None, recursive: bool = True, **_: Any) -> Any:
    return f if f is not None else _disable


def _load_real() -> types.ModuleType:
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
        # A submodule whose import has brought us here: the package will want all of it.
        for name, module in list(sys.modules.items()):
            if name.startswith(f"{_NAME}.") and _is_being_imported(module):
                del sys.modules[name]
    real = importlib.import_module(_NAME)
    sys.modules["torch"].__dict__["_dynamo"] = real
    return real


def _is_being_imported(module: types.ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


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
