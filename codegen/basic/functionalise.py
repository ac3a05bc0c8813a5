"""First pass: a recorded graph becomes functional ATen over fake tensors.

In: a `SegmentGraph`. Out: an `fx.GraphModule` of ATen operators whose nodes carry fake values,
with `copy_` into placeholders at its end for what the graph writes; and the aliasing of
its outputs. Invariant: shapes are static, those that were recorded; nothing is executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from accel.errors import CompileError
from accel.trace import SegmentGraph

_aten = torch.ops.aten


@dataclass
class Functional:
    """The ATen graph. `output_inputs[k]` is the input that output k shares memory with."""

    gm: fx.GraphModule
    output_inputs: list[int | None]


def _decompositions() -> dict[Any, Any]:
    wanted = [_aten.addcmul, _aten.addcdiv, _aten.silu, _aten.hardtanh, _aten.rsub.Scalar]
    return dict(torch._decomp.get_decompositions(wanted))


def fake_inputs(graph: SegmentGraph, mode: FakeTensorMode) -> list[FakeTensor]:
    fakes = []
    for _, meta in graph.inputs:
        with mode:
            fakes.append(
                torch.empty_strided(
                    meta.sizes, meta.strides, dtype=meta.torch_dtype, device=meta.device
                )
            )
    return fakes


def functionalise(graph: SegmentGraph) -> Functional:
    """Errors: CompileError when the graph cannot be expressed with static shapes, or when
    outputs share memory in a way that a plan cannot reproduce."""
    gm = graph.to_fx()
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with torch.no_grad():
        aliases = _aliases(graph, gm, mode)
        inputs = fake_inputs(graph, mode)
        try:
            with mode:
                traced = make_fx(
                    torch.func.functionalize(lambda *args: gm(*args), remove="mutations"),
                    decomposition_table=_decompositions(),
                )(*inputs)
        except Exception as error:
            raise CompileError(f"not a static graph: {type(error).__name__}: {error}") from error
    traced.graph.eliminate_dead_code()
    return Functional(traced, aliases)


def _aliases(graph: SegmentGraph, gm: fx.GraphModule, mode: FakeTensorMode) -> list[int | None]:
    """Which input each output shares memory with."""
    inputs = fake_inputs(graph, mode)
    try:
        with mode:
            outputs = gm(*inputs)
    except Exception as error:
        raise CompileError(f"not a static graph: {type(error).__name__}: {error}") from error
    owners = {t.untyped_storage()._cdata: i for i, t in enumerate(inputs)}
    found: list[int | None] = [
        owners.get(value.untyped_storage()._cdata) for value in outputs[: len(graph.outputs)]
    ]
    return found
