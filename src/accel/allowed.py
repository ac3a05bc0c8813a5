"""Functions of the user's that graphs call as they are: operators of torch's dispatcher.

In: a function that `accel.allow_in_graph` was given, and what one recorded call of it took and
gave. Out: the dotted name of an operator for the graph; in the compiler, an operator of that name
which only knows the results' metadata. Invariant: an operator's results have the recorded
metadata, share no memory with its operands, and its operands are as before; where the function
does otherwise it raises, and the call runs as Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from accel.trace import TensorMeta

NAMESPACE = "accel_allowed"
# In program order, once for each call: nothing is known of what the function does.
_TAGS = (torch.Tag.nondeterministic_seeded,)
_metas: dict[str, tuple[TensorMeta, ...]] = {}  # by the operator's name


@functools.cache
def _library() -> Any:
    return torch.library.Library(NAMESPACE, "FRAGMENT")


def dotted_name(name: str) -> str:
    return f"torch.ops.{NAMESPACE}.{name}.default"


def name_in(target: str) -> str:
    """The operator's name in a graph's target; "" for other targets."""
    prefix = f"torch.ops.{NAMESPACE}."
    return target[len(prefix) :].partition(".")[0] if target.startswith(prefix) else ""


def metas_of(target: str) -> tuple[TensorMeta, ...]:
    """The results' metadata of the operator behind a graph's target."""
    return _metas[name_in(target)]


def define(name: str, metas: Sequence[TensorMeta]) -> None:
    """Makes the operator known to this process's dispatcher, for tracing only."""
    if name in _metas:
        if _metas[name] != tuple(metas):
            raise ValueError(f"the operator {name} has other results already")
        return
    _metas[name] = tuple(metas)
    results = ", ".join(["Tensor"] * len(metas))
    library = _library()
    library.define(f"{name}(Tensor[] operands) -> ({results})", tags=_TAGS)

    def fake(operands: list[torch.Tensor]) -> Any:
        made = tuple(
            torch.empty_strided(m.sizes, m.strides, dtype=m.torch_dtype, device="meta")
            for m in metas
        )
        return made[0] if len(made) == 1 else made

    library.impl(name, fake, "Meta")


def implement(function_name: str, metas: Sequence[TensorMeta], run: Callable[..., Any]) -> str:
    """Makes an operator that `run(operands)` carries out; answers its name."""
    name = f"{function_name}_{len(_metas)}"
    define(name, metas)
    _library().impl(name, run, "CompositeExplicitAutograd")
    return name
