"""accel: a tracing JIT for unmodified PyTorch programs.

`accel.optimize(model)`, `accel.enable("package")`, or `python -m accel run script.py`.
The functions are loaded at first use, so that `accel.rewriter` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_API = (
    "allow_in_graph",
    "assume_constant_result",
    "counters",
    "disable",
    "enable",
    "explain",
    "is_available",
    "mark_dynamic",
    "mark_static",
    "optimize",
    "reset",
    "set_stance",
    "wait",
)
_ERRORS = (
    "AccelError",
    "CompileError",
    "ConfigError",
    "GraphBreakError",
    "RecompileError",
    "UnknownBackendError",
)

if TYPE_CHECKING:
    from accel.api import (
        allow_in_graph,
        assume_constant_result,
        counters,
        disable,
        enable,
        explain,
        is_available,
        mark_dynamic,
        mark_static,
        optimize,
        reset,
        set_stance,
        wait,
    )
    from accel.errors import (
        AccelError,
        CompileError,
        ConfigError,
        GraphBreakError,
        RecompileError,
        UnknownBackendError,
    )


def graph_break() -> None:
    """Does nothing; compiled code ends before it and begins anew behind it."""


def __getattr__(name: str) -> Any:
    if name in _API:
        from accel import api

        value = getattr(api, name)
    elif name in _ERRORS:
        from accel import errors

        value = getattr(errors, name)
    else:
        raise AttributeError(f"module 'accel' has no attribute {name!r}")
    globals()[name] = value
    return value


__all__ = [
    "AccelError",
    "CompileError",
    "ConfigError",
    "GraphBreakError",
    "RecompileError",
    "UnknownBackendError",
    "allow_in_graph",
    "assume_constant_result",
    "counters",
    "disable",
    "enable",
    "explain",
    "graph_break",
    "is_available",
    "mark_dynamic",
    "mark_static",
    "optimize",
    "reset",
    "set_stance",
    "wait",
]


def _prepare_worker() -> None:
    from accel.compile import prefork

    prefork.arm()


_prepare_worker()
