"""Small graphs, one for each kind of kernel, and whether a plan does with them what eager does.

In: a kind, a device. Out: its graph; after a run, what is wrong with it. Used by the doctor, and before the first
graph is compiled for a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from accel import runtime
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

_F = "torch.nn.functional."
_X = TensorMeta((4, 8), (8, 1), "float32")
_W = TensorMeta((8, 8), (8, 1), "float32")
_IMAGE = TensorMeta((1, 3, 8, 8), (192, 64, 8, 1), "float32")
_FILTER = TensorMeta((4, 3, 3, 3), (27, 9, 3, 1), "float32")
_INDEX = TensorMeta((5,), (1,), "int64")
_LONG = TensorMeta((3, 70_001), (70_001, 1), "float32")
_WIDE = TensorMeta((600, 257), (257, 1), "float32")
_PLANE = TensorMeta((64, 64), (64, 1), "float32")
_HALF = TensorMeta((64, 64), (64, 1), "float16")
_PLACES = TensorMeta((8, 8), (8, 1), "int64")

Row = tuple[list[TensorMeta], list[tuple[str, tuple[Any, ...], dict[str, Any]]]]
_A, _B, _T = Ref("a0"), Ref("a1"), Ref("t0")

# One small graph for each kind of kernel: inputs, and calls that see each other as t0, t1, ...
KERNELS: dict[str, Row] = {
    "pointwise": ([_X, _X], [("torch.mul", (_A, _B), {}), ("torch.tanh", (_T,), {})]),
    "reduction": ([_X], [("torch.sum", (_A, -1), {})]),
    "softmax": ([_X], [(_F + "softmax", (_A,), {"dim": -1})]),
    "normalisation": ([_X], [(_F + "layer_norm", (_A, (8,)), {})]),
    "product": ([_X, _W], [(_F + "linear", (_A, _B), {}), (_F + "relu", (_T,), {})]),
    "attention": ([_IMAGE], [(_F + "scaled_dot_product_attention", (_A, _A, _A), {})]),
    "convolution": ([_IMAGE, _FILTER], [(_F + "conv2d", (_A, _B), {})]),
    "gather": ([_INDEX, _W], [(_F + "embedding", (_A, _B), {})]),
    "views": ([_X], [("torch.transpose", (_A, 0, 1), {}), ("torch.cat", ([_T, _T],), {})]),
    "scan": ([_W], [("torch.cumsum", (_A, 0), {})]),
    "ATen": ([_W], [("torch.logcumsumexp", (_A, 0), {})]),
}
_DROPPED: list[Any] = [("torch.neg", (_A,), {}), (_F + "dropout", (_T, 0.3, True), {})]
# Kinds that draw: numbers, and by how many neighbours a thread of ATen's takes.
RANDOM: dict[str, Row] = {
    "random numbers": ([_LONG], [("torch.rand_like", (_A,), {})]),
    "dropout": ([_PLANE], _DROPPED),
    "dropout of 16 bits": ([_HALF], _DROPPED),
    "dropout of 64 bits": ([replace(_PLANE, dtype="float64")], _DROPPED),
}
REPLAYED = "several kernels"
_REPLAYS = 8
# On a GPU, besides: several programs to a row, several rows to a program, other types, additions in any order.
GPU_KERNELS: dict[str, Row] = {
    "long rows": ([_LONG], [("torch.sum", (_A, -1), {}), ("torch.exp", (_T,), {})]),
    "many rows": ([_WIDE], [(_F + "softmax", (_A,), {"dim": -1})]),
    "16 bits": ([_HALF, _HALF], [("torch.matmul", (_A, _B), {}), (_F + "gelu", (_T,), {})]),
    "scatter": ([_W, _PLACES], [("torch.scatter_add", (_A, 0, _B, _A), {})]),
    REPLAYED: (
        [_WIDE],
        [("torch.cumsum", (Ref(f"t{i - 1}" if i else "a0"), i % 2), {}) for i in range(6)],
    ),
    **RANDOM,
}


def graph_of(kind: str, device: str = "cpu") -> SegmentGraph:
    """The graph of a row of the tables."""
    metas, calls = (KERNELS | GPU_KERNELS)[kind]
    inputs = [(f"a{i}", replace(meta, device=device)) for i, meta in enumerate(metas)]
    operations = [
        Operation(f"t{i}", "call_function", target, args, kwargs)
        for i, (target, args, kwargs) in enumerate(calls)
    ]
    graph = SegmentGraph(inputs, operations, [operations[-1].name], [], is_random=kind in RANDOM)
    with FakeTensorMode():
        metas = [meta for _, meta in inputs]
        fakes = [torch.empty_strided(m.sizes, m.strides, dtype=m.torch_dtype) for m in metas]
        (out,) = graph.to_fx()(*fakes)
    name = str(out.dtype).removeprefix("torch.")
    meta = TensorMeta(tuple(out.shape), tuple(out.stride()), name, device)
    return replace(graph, output_metas=[meta])


def inputs_of(graph: SegmentGraph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 8, meta.sizes, generator=generator).to(meta.device)
        if meta.dtype == "int64"
        else torch.randn(meta.sizes, generator=generator).to(meta.device, meta.torch_dtype)
        for _, meta in graph.inputs
    ]


def agrees(graph: SegmentGraph, plan: dict[str, Any], library: str | None) -> bool:
    """Whether the plan's result is eager's. Errors: whatever running it raises."""
    executor = runtime.native.Executor(plan, library)
    inputs = inputs_of(graph)
    with torch.no_grad():
        if graph.is_random:
            return _draws_as_eager(executor, graph, *inputs)
        (got,), (wanted,) = executor.run(inputs), graph.to_fx()(*inputs)
    error = 1e-5 if got.dtype == torch.float32 else 1e-2
    return bool(torch.allclose(got, wanted, rtol=error, atol=error))


def replay_fault(graph: SegmentGraph, plan: dict[str, Any], library: str | None) -> str:
    """What is wrong with runs whose launches are a CUDA graph, on inputs that change, while all results are held;
    empty where nothing is. Errors: whatever running it raises.
    """
    executor = runtime.native.Executor(plan, library)
    launched = runtime.native.cuda_graphs()["launched"]
    # Not by the module's own call: called often, that would be compiled.
    eager = torch.fx.Interpreter(graph.to_fx()).run
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for turn in range(_REPLAYS):
            inputs = [x * (turn + 1) for x in inputs_of(graph)]
            held += zip(executor.run(inputs), eager(*inputs), strict=True)
    if runtime.native.cuda_graphs()["launched"] == launched:
        return "the driver has launched no graph"
    if all(torch.allclose(got, wanted, rtol=1e-3, atol=1e-2) for got, wanted in held):
        return ""
    return "a graph's result is not eager's"


def _draws_as_eager(executor: Any, graph: SegmentGraph, x: torch.Tensor) -> bool:
    """Whether it draws ATen's numbers, all of them, and moves the stream as far; which stays where it was."""
    index = x.device.index

    def stream() -> int:
        ((_, offset),) = runtime.native.gpu_offsets(index + 1)[index:]
        return int(offset)

    before = stream()
    try:
        (got,), after = executor.run([x]), stream()
        runtime.native.move_gpu_offset(index, before)
        (wanted,) = graph.to_fx()(x)
        return bool(torch.equal(got, wanted)) and after == stream() != before
    finally:
        runtime.native.move_gpu_offset(index, before)
