"""Which inputs a graph writes to: what a backend's callable must be able to take back.

In: a segment graph and its FX form. Out: positions of inputs. Invariant: an input that is
not named is not written; when nothing certain can be said, every input is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from accel.errors import CompileError
from accel.trace import SegmentGraph


def written_inputs(graph: SegmentGraph, gm: torch.fx.GraphModule) -> list[int]:
    """Positions of the inputs that running `graph` writes to.

    Errors: CompileError when an input is resized; that could not be taken back.
    """
    if not any(operation.may_write for operation in graph.operations):
        return []
    with FakeTensorMode() as mode, torch.no_grad():
        inputs = [
            mode.from_tensor(torch.empty_strided(m.sizes, m.strides, dtype=m.torch_dtype))
            if m.device == "cpu"
            else torch.empty_strided(m.sizes, m.strides, dtype=m.torch_dtype, device=m.device)
            for _, m in graph.inputs
        ]
        before = [_facts(value) for value in inputs]
        try:
            gm.forward(*inputs)
        except Exception:  # no fake form: a size that depends on values, a custom operator
            return list(range(len(inputs)))
    after = [_facts(value) for value in inputs]
    written = [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    for i in written:
        if before[i][1:] != after[i][1:]:
            raise CompileError(f"input {graph.inputs[i][0]} is resized, which cannot be undone")
    return written


def _facts(value: torch.Tensor) -> tuple[Any, ...]:
    return value._version, tuple(value.size()), tuple(value.stride())
