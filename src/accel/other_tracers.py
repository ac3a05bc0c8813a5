"""Other tracers: what they must know of our prologues to see through them.

In: nothing. Out: once torch._dynamo is imported, torch.compile traces a function that has a
prologue as if it had none. Invariant: torch._dynamo is never imported on our account.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

from accel import checkpoints, runtime

_DYNAMO = "torch._dynamo"
# The wrapper around a function that is not to be compiled.
_DISABLED = "DisableContext.__call__.<locals>._fn"
_CHECKPOINT = "torch.utils.checkpoint"
_EVAL_FRAME = "torch/_dynamo/eval_frame.py"


def _tell_dynamo() -> None:
    import torch

    sentinel = runtime.native.RUN_BODY
    substitute = torch.compiler.substitute_in_graph

    @substitute(runtime.native.prologue, skip_signature_check=True)  # type: ignore[untyped-decorator]
    def prologue(index: int, *arguments: Any) -> Any:
        return sentinel

    @substitute(runtime.native.module_prologue, skip_signature_check=True)  # type: ignore[untyped-decorator]
    def module_prologue(module: Any, args: Any, kwargs: Any) -> Any:
        return sentinel

    @substitute(runtime.native.node, skip_signature_check=True)  # type: ignore[untyped-decorator]
    def node(index: int) -> Any:
        return sentinel

    @substitute(runtime.native.backward_prologue, skip_signature_check=True)  # type: ignore[untyped-decorator]
    def backward_prologue(*arguments: Any) -> Any:
        return sentinel


class _Loader(importlib.abc.Loader):
    """torch._dynamo's own loader, and then us."""

    def __init__(self, spec: ModuleSpec, loader: Any) -> None:
        self._spec, self._loader = spec, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _tell_dynamo()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _DYNAMO:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec, spec.loader)
                return spec
        return None


def is_disabled_here() -> bool:
    """Whether this thread runs inside a function that `torch.compiler.disable` was given; not by
    torch.utils.checkpoint, which disables itself and with it what it is given to run."""
    if _DYNAMO not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_qualname == _DISABLED and code.co_filename.endswith(_EVAL_FRAME):
            module = getattr(frame.f_locals.get("fn"), "__module__", None)
            if not (checkpoints.installed and module == _CHECKPOINT):
                return True
        frame = frame.f_back
    return False


def is_wrapper(cls: type) -> bool:
    """Whether instances are Dynamo's own modules around those of the program."""
    return cls.__module__.startswith(_DYNAMO)


def install() -> None:
    """Tells Dynamo now if it is there, else as soon as it is imported."""
    if _DYNAMO in sys.modules:
        _tell_dynamo()
    else:
        sys.meta_path.insert(0, _Finder())
