"""Random numbers in kernels for GPUs beside a model of ATen's own kernels, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_draws
import numpy as np
import pytest
import torch
from plan_runner import _Runner
from test_training import differentiable
from triton_interpreter import interpreted

from accel.codegen import CodegenOptions, CompileError, compile_graph, gpu_random
from accel.codegen.fusion import Group
from accel.codegen.gpu_random import uniform_operator
from accel.codegen.interpreter import interpret
from accel.codegen.pipeline import run_passes
from accel.codegen.scalar_ops import _philox
from accel.codegen.targets import TARGETS
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

pytest.importorskip("triton")

SEED, OFFSET = 0x9123456789ABCDEF, (1 << 34) + 12  # both halves of both are used
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
RESIDENT = 16  # two multiprocessors of 2048 threads


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def meta_of(*sizes: int, dtype: torch.dtype = torch.float32, strides: Any = None) -> TensorMeta:
    strides = strides or torch.empty(sizes).stride()
    return TensorMeta(sizes, tuple(strides), name_of(dtype), "cuda:0")


def call(name: str, target: str, *args: Any, **kwargs: Any) -> Operation:
    return Operation(name, "call_function", target, args, kwargs)


def method(name: str, target: str, *args: Any) -> Operation:
    return Operation(name, "call_method", target, args)


def drawing(meta: TensorMeta, *operations: Operation, outputs: Any = None) -> SegmentGraph:
    """A graph of one input x, on a GPU, whose results are like it."""
    names = outputs or [operations[-1].name]
    by_rows = meta.strides == torch.empty(meta.sizes, device="meta").stride()
    layouts = {} if by_rows else {o.name: meta.strides for o in operations}
    metas = [meta] * len(names)
    return SegmentGraph(
        [("x", meta)], list(operations), names, metas, is_random=True, layouts=layouts
    )


class Drawing(_Runner):
    """Runs plans as the executor does, with a stream that begins at SEED and OFFSET."""

    def launch(self, step: dict[str, Any]) -> None:
        numbers = []
        for n in step["numbers"]:
            if n == "seed":
                n = SEED - (1 << 64)  # as a launch passes it: 64 bits
            elif isinstance(n, dict):
                assert 0 <= n["drawn"] < self.plan["draws"] // 4
                n = OFFSET // 4 + n["drawn"]
            numbers.append(n)
        super().launch({**step, "numbers": numbers})


def run(
    graph: SegmentGraph, x: torch.Tensor, out_dir: Path, monkeypatch: Any, blocks: int = RESIDENT
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    monkeypatch.setitem(TARGETS, "cuda", interpreted())
    options = CodegenOptions(verify=True, gpu="sm_90", gpu_blocks=blocks)
    plan = compile_graph(graph, out_dir=out_dir, options=options)
    library = out_dir / plan["library"] if plan["library"] else None
    results = Drawing(plan, library, [x], 1).run()
    assert results is not None
    return results, plan


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), (got, want)


def uniform(numel: int, dtype: torch.dtype, offset: int = OFFSET) -> tuple[torch.Tensor, int]:
    """What `uniform_kernel` writes for bounds 0 and 1."""
    numbers, advance = cuda_draws.nullary(
        SEED, offset, numel, RESIDENT, double=dtype == torch.float64
    )
    values = torch.from_numpy(numbers).to(dtype)
    return torch.where(values == 1, torch.zeros_like(values), values), advance


# Random123's known answers, kat_vectors: philox4x32 with 10 rounds.
ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), ANSWERS)
def test_known_answers(counter: Any, key: Any, words: Any) -> None:
    assert tuple(cuda_draws.philox(counter, key)) == words

    def wide(low: int, high: int) -> torch.Tensor:
        return torch.from_numpy(np.array(low | high << 32, np.uint64).view(np.int64))

    found = _philox(wide(*key), wide(*counter[:2]), wide(*counter[2:]))
    assert tuple(int(w) for w in found) == words


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("numel", [0, 1, 3, 4097, 20001])
def test_rand_is_aten_s(numel: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any) -> None:
    graph = drawing(meta_of(numel, dtype=dtype), call("v0", "torch.rand_like", Ref("x")))
    (got,), plan = run(graph, torch.zeros(numel, dtype=dtype), tmp_path, monkeypatch)
    want, advance = uniform(numel, dtype)
    same(got, want)
    assert plan.get("draws", 0) == advance
    assert not any(step["op"] == "extern" for step in plan["steps"])


def test_the_largest_number_is_zero(monkeypatch: Any) -> None:
    """Words that round to 1, which `rand` never gives: bounds are reversed."""
    from accel.codegen import scalar_ops

    def words(*_: Any) -> list[torch.Tensor]:
        return [torch.tensor([w]) for w in (2**32 - 1, 2**32 - 129, 0, 1)]

    monkeypatch.setattr(scalar_ops, "_philox", words)
    zero = torch.zeros(1, dtype=torch.int64)
    values = [scalar_ops._philox_uniform(zero, zero, zero, zero + k).item() for k in range(4)]
    assert values[0] == 1.0 and values[1] < 1.0 and 0 < values[2] < values[3]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=name_of)
def test_bernoulli_is_aten_s(dtype: torch.dtype, tmp_path: Path, monkeypatch: Any) -> None:
    graph = drawing(meta_of(5, 101, dtype=dtype), call("v0", "torch.bernoulli", Ref("x"), 0.3))
    (got,), plan = run(graph, torch.zeros(5, 101, dtype=dtype), tmp_path, monkeypatch)
    double = dtype == torch.float64
    numbers, advance = cuda_draws.nullary(SEED, OFFSET, 505, RESIDENT, double=double)
    kept = numbers < (0.3 if double else float(np.float32(0.3)))
    same(got, torch.from_numpy(kept).to(dtype).view(5, 101))
    assert plan["draws"] == advance == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("numel", [1, 4097, 20001, 2, 20002, 12, 20004, 16, 20008, 65544])
def test_dropout_is_aten_s(
    numel: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any
) -> None:
    vector = cuda_draws.vector_size(dtype.itemsize, numel)
    # With 0.04 it matters that the scale is of the rounded probability.
    dropped = call("v1", "torch.nn.functional.dropout", Ref("v0"), 0.04, True)
    graph = drawing(meta_of(numel, dtype=dtype), call("v0", "torch.neg", Ref("x")), dropped)
    x = torch.randn(numel, dtype=dtype, generator=torch.Generator().manual_seed(1))
    x[: numel // 4] = torch.inf
    (got,), plan = run(graph, x, tmp_path, monkeypatch)
    numbers, advance = cuda_draws.dropout(SEED, OFFSET, numel, RESIDENT, vector)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p = torch.tensor(1.0 - 0.04, dtype=torch.float64).to(wide).item()
    scale = torch.tensor(1.0 / p, dtype=torch.float64).to(wide)
    mask = torch.from_numpy(numbers < p).to(wide)
    torch.testing.assert_close(
        got, ((-x).to(wide) * mask * scale).to(dtype), rtol=0, atol=0, equal_nan=True
    )
    assert plan["draws"] == advance
    assert [step["op"] for step in plan["steps"]] == ["launch"]  # all of it fused


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("turned", [False, True])
def test_dropout_of_parts_and_by_channels(
    turned: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any
) -> None:
    """Neighbours are neighbours in memory, as many as the first address allows."""
    seen = call("v1", "torch.transpose", Ref("v0"), 0, 1)
    if not turned:
        seen = call("v1", "torch.narrow", Ref("v0"), 0, 1, 7)
    sizes, strides, first = ((66, 8), (1, 66), 0) if turned else ((7, 66), (66, 1), 66)
    meta = meta_of(8, 66, dtype=dtype)
    graph = drawing(
        meta,
        call("v0", "torch.neg", Ref("x")),
        seen,
        call("v2", "torch.nn.functional.dropout", Ref("v1"), 0.5, True),
    )
    out = meta_of(*sizes, dtype=dtype, strides=strides)
    graph = replace(graph, output_metas=[out])
    if turned:
        options = CodegenOptions(gpu="sm_90", gpu_blocks=RESIDENT)
        with pytest.raises(CompileError, match="lies otherwise than in eager"):
            compile_graph(graph, out_dir=tmp_path, options=options)
        graph = replace(graph, layouts={"v1": strides, "v2": strides})
    (got,), _ = run(graph, -torch.ones(8, 66, dtype=dtype), tmp_path, monkeypatch)
    numel = sizes[0] * sizes[1]
    vector = cuda_draws.vector_size(dtype.itemsize, numel, first * dtype.itemsize)
    assert vector > 1
    numbers, _ = cuda_draws.dropout(SEED, OFFSET, numel, RESIDENT, vector)
    kept = torch.from_numpy(numbers < 0.5).to(dtype) * 2
    assert got.stride() == strides
    same(got.as_strided((numel,), (1,)), kept)


def test_draws_follow_each_other(tmp_path: Path, monkeypatch: Any) -> None:
    """In the program's order, unread ones too; large ones advance by more."""
    meta = meta_of(20001)
    graph = drawing(
        meta,
        call("v0", "torch.rand_like", Ref("x")),
        call("unread", "torch.bernoulli", Ref("x"), 0.5),
        call("v2", "torch.rand", 7, 3, device="cuda:0"),
        call("v3", "torch.rand_like", Ref("x")),
        outputs=["v0", "v2", "v3"],
    )
    graph = replace(graph, output_metas=[meta, meta_of(7, 3), meta])
    results, plan = run(graph, torch.zeros(20001), tmp_path, monkeypatch)
    offset = OFFSET
    first, advance = uniform(20001, torch.float32)
    assert advance == 8
    offset += 2 * advance
    second, little = uniform(21, torch.float32, offset)
    third, _ = uniform(20001, torch.float32, offset + little)
    for got, want in zip(results, [first, second.view(7, 3), third], strict=True):
        same(got, want)
    assert plan["draws"] == 3 * advance + little


@pytest.mark.parametrize("strides", [(1, 5, 35), (35, 1, 5), (7, 35, 1)])
def test_permuted_tensors_are_drawn_in_the_order_of_memory(
    strides: tuple[int, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    sizes = {(1, 5, 35): (5, 7, 3), (35, 1, 5): (3, 5, 7), (7, 35, 1): (5, 3, 7)}[strides]
    graph = drawing(meta_of(*sizes, strides=strides), call("v0", "torch.rand_like", Ref("x")))
    (got,), _ = run(graph, torch.zeros(105).as_strided(sizes, strides), tmp_path, monkeypatch)
    want, _ = uniform(105, torch.float32)
    assert got.stride() == strides
    same(got.as_strided((105,), (1,)), want)


def test_numbers_are_fused_with_what_is_around(tmp_path: Path, monkeypatch: Any) -> None:
    graph = drawing(
        meta_of(9, 33),
        call("a", "torch.exp", Ref("x")),
        call("u", "torch.rand_like", Ref("a")),
        call("m", "torch.mul", Ref("a"), Ref("u")),
        call("v0", "torch.softmax", Ref("m"), -1),
    )
    x = torch.randn(9, 33)
    (got,), plan = run(graph, x, tmp_path, monkeypatch)
    want = (x.exp() * uniform(297, torch.float32)[0].view(9, 33)).softmax(-1)
    torch.testing.assert_close(got, want)
    assert [step["op"] for step in plan["steps"]] == ["launch"]


def test_the_loop_ir_says_the_same(tmp_path: Path) -> None:
    graph = drawing(meta_of(4097), call("v0", "torch.rand_like", Ref("x")))
    options = CodegenOptions(verify=True, gpu="sm_90", gpu_blocks=RESIDENT)
    c = run_passes(graph, tmp_path, options)
    (step,) = (s for s in c.steps if isinstance(s, Group))
    memory = [torch.zeros(4097)]
    interpret(c.scheduled[id(step)].kernel, memory, (SEED - (1 << 64), OFFSET // 4))
    same(memory[0], uniform(4097, torch.float32)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_the_processor_computes_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    """What stands for the numbers in C++, and outside of kernels."""
    state = [torch.tensor(SEED - (1 << 64)), torch.tensor(OFFSET // 4)]
    args = ((4097,), (1,), *state, 256 * RESIDENT, 1, dtype)
    want, _ = cuda_draws.nullary(SEED, OFFSET, 4097, RESIDENT, double=dtype == torch.float64)
    expected = torch.from_numpy(want).to(dtype)
    same(uniform_operator()(*args), expected)
    scalar = TensorMeta((), (), "int64")
    refs = [Ref("seed"), Ref("counter")]
    made = Operation(
        "v0", "call_function", "torch.ops.accel.philox_uniform.default",
        ((4097,), (1,), *refs, 256 * RESIDENT, 1, dtype),
    )  # fmt: skip
    out = TensorMeta((4097,), (1,), name_of(dtype))
    graph = SegmentGraph([("seed", scalar), ("counter", scalar)], [made], ["v0"], [out])
    plan = compile_graph(graph, out_dir=tmp_path, options=CodegenOptions(verify=True))
    assert [step["op"] for step in plan["steps"]] == ["kernel"]
    results = _Runner(plan, tmp_path / plan["library"], state, 1).run()
    assert results is not None
    same(results[0], expected)


REFUSED: dict[str, tuple[TensorMeta, list[Operation]]] = {
    "normal": (meta_of(64), [call("v0", "torch.randn_like", Ref("x"))]),
    "dropout of eights": (
        meta_of(64), [call("v0", "torch.nn.functional.dropout", Ref("x"), 0.3, True)]
    ),
    "dropout of twos": (
        meta_of(6), [call("v0", "torch.nn.functional.dropout", Ref("x"), 0.3, True)]
    ),
    "dropout of fours that may not be aligned": (
        meta_of(12), [call("v0", "torch.nn.functional.dropout", Ref("x"), 0.3, True)]
    ),
    "dropout of a permuted tensor": (
        meta_of(3, 5, strides=(1, 3)),
        [call("v0", "torch.nn.functional.dropout", Ref("x"), 0.3, True)],
    ),
    "bernoulli of a permuted tensor": (
        meta_of(3, 5, strides=(1, 3)), [call("v0", "torch.bernoulli", Ref("x"), 0.3)]
    ),
    "attention": (
        meta_of(1, 1, 5, 5),
        [call("v0", "torch.nn.functional.scaled_dot_product_attention", Ref("x"), Ref("x"),
              Ref("x"), dropout_p=0.3)],
    ),
    "probabilities": (meta_of(5), [call("v0", "torch.bernoulli", Ref("x"))]),
    "beside ATen's own": (
        meta_of(5),
        [call("a", "torch.rand_like", Ref("x")), call("b", "torch.randn_like", Ref("x")),
         call("v0", "torch.add", Ref("a"), Ref("b"))],
    ),
    "positions of more than 32 bits": (
        meta_of(1 << 29), [call("v0", "torch.rand_like", Ref("x"))]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused(name: str, tmp_path: Path) -> None:
    meta, operations = REFUSED[name]
    options = CodegenOptions(gpu="sm_90", gpu_blocks=RESIDENT)
    why = "kernels do not draw as it does on a GPU|draws for a tensor that lies otherwise"
    with pytest.raises(CompileError, match=why):
        compile_graph(drawing(meta, *operations), out_dir=tmp_path, options=options)


def test_without_the_gpu_s_size_nothing_is_drawn(tmp_path: Path) -> None:
    graph = drawing(meta_of(5), call("v0", "torch.rand_like", Ref("x")))
    with pytest.raises(CompileError, match="kernels do not draw"):
        compile_graph(graph, out_dir=tmp_path, options=CodegenOptions(gpu="sm_90"))


COMPILED: dict[str, Callable[[], SegmentGraph]] = {
    "rand": lambda: drawing(meta_of(20001), call("v0", "torch.rand_like", Ref("x"))),
    "float64": lambda: drawing(
        meta_of(20001, dtype=torch.float64), call("v0", "torch.rand_like", Ref("x"))
    ),
    "dropout in rows": lambda: drawing(
        meta_of(5, 101),
        call("a", "torch.nn.functional.dropout", Ref("x"), 0.3, True),
        call("v0", "torch.softmax", Ref("a"), -1),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_kernels_compile(name: str, gpu: str, tmp_path: Path) -> None:
    options = CodegenOptions(verify=True, gpu=gpu, gpu_blocks=RESIDENT)
    plan = compile_graph(COMPILED[name](), out_dir=tmp_path, options=options)
    assert len(plan["kernels"]) == 1 and plan["draws"] % 4 == 0
    (step,) = plan["steps"]
    assert "seed" in step["numbers"] and {"drawn": 0} in step["numbers"]


TRAINED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "native dropout": lambda x: torch.native_dropout(x.exp(), 0.3, True)[0],
    "dropout": lambda x: torch.nn.functional.dropout(x.exp(), 0.3, True),
    "bernoulli": lambda x: x.exp() * torch.bernoulli(x.detach(), 0.7) * 2,
    "rand": lambda x: (x.exp() * torch.rand_like(x)).sin(),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_backward_draws_the_same_numbers_from_seed_and_place(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Traced as if this processor were a GPU: autograd wants one for tensors that lie there."""
    monkeypatch.setattr(gpu_random, "_DEVICE", "cpu")
    monkeypatch.setitem(TARGETS, "cpu", interpreted())
    x = torch.randn(4097, generator=torch.Generator().manual_seed(2)).requires_grad_()
    graph, _ = differentiable(TRAINED[name], [x])
    graph.is_random = True
    options = CodegenOptions(verify=True, gpu_blocks=RESIDENT)
    plan = compile_graph(graph, out_dir=tmp_path, options=options)
    library = tmp_path / plan["library"]
    (gradient,) = plan["gradients"]
    assert plan["draws"] == 4 and "draws" not in gradient["plan"]
    results = Drawing(plan, library, [x.detach()], 1).run()
    assert results is not None
    # Eager's, with the numbers of the model in place of what it would draw.
    numbers = torch.from_numpy(cuda_draws.nullary(SEED, OFFSET, 4097, RESIDENT)[0]).float()
    kept = (numbers < np.float32(0.7)).float()
    eager: dict[str, Callable[[], torch.Tensor]] = {
        "native dropout": lambda: x.exp() * kept / 0.7,
        "dropout": lambda: x.exp() * kept / 0.7,
        "bernoulli": lambda: x.exp() * kept * 2,
        "rand": lambda: (x.exp() * numbers).sin(),
    }
    want = eager[name]()
    torch.testing.assert_close(results[0], want.detach())
    saved = [x.detach() if kind == "input" else results[i] for kind, i in gradient["saved"]]
    stream = [t for t in saved if t.dtype == torch.int64]
    assert [t.tolist() for t in stream] == [SEED - (1 << 64), OFFSET // 4]
    assert sum(t.numel() > 1 for t in saved) <= 1  # no mask: x, or what was computed of it
    arriving = torch.randn(4097)
    found = Drawing(gradient["plan"], library, [*saved, arriving], 1).run()
    assert found is not None
    (expected,) = torch.autograd.grad(want, x, arriving)
    torch.testing.assert_close(found[gradient["results"][0]], expected, rtol=1e-4, atol=1e-5)


BOUNDS = [(0.0, 0.3), (-1.0, 1.0), (0.25, 0.75), (0.3, 0.3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_bounds_are_the_tensor_s(
    low: float, high: float, dtype: torch.dtype, tmp_path: Path, monkeypatch: Any
) -> None:
    """`uniform_`, which cannot be traced for a GPU by a torch without one."""
    monkeypatch.setattr(gpu_random, "_DEVICE", "cpu")
    monkeypatch.setitem(TARGETS, "cpu", interpreted())
    meta = replace(meta_of(513, dtype=dtype), device="cpu")
    graph = drawing(
        meta, call("a", "torch.neg", Ref("x")), method("v0", "uniform_", Ref("a"), low, high)
    )
    options = CodegenOptions(verify=True, gpu_blocks=RESIDENT)
    plan = compile_graph(graph, out_dir=tmp_path, options=options)
    results = Drawing(plan, tmp_path / plan["library"], [torch.zeros(513, dtype=dtype)], 1).run()
    assert results is not None
    double = dtype == torch.float64
    drawn, _ = cuda_draws.nullary(SEED, OFFSET, 513, RESIDENT, double=double)
    begin, end = (torch.tensor(v, dtype=torch.float64).to(dtype) for v in (low, high))
    wide = torch.float64 if double else torch.float32
    values = (torch.from_numpy(drawn).to(wide) * (end - begin).to(wide) + begin.to(wide)).to(dtype)
    same(results[0], torch.where(values == end, begin, values))


@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Several draws of any size one after the other, on GPUs of several sizes."""
    random = np.random.default_rng(seed)
    resident = int(random.choice([1, 2, 3, 8]))
    monkeypatch.setitem(TARGETS, "cuda", interpreted())
    operations, metas, wants, offset = [], [], [], OFFSET
    for k in range(int(random.integers(2, 5))):
        numel = int(random.choice([1, 2, 255, 257, 1024, 1025, 3073]))
        dtype = DTYPES[int(random.integers(4))]
        double = dtype == torch.float64
        drawn, advance = cuda_draws.nullary(SEED, offset, numel, resident, double=double)
        offset += advance
        values = torch.from_numpy(drawn).to(dtype)
        wants.append(torch.where(values == 1, torch.zeros_like(values), values))
        kwargs = {"dtype": dtype, "device": torch.device("cuda:0")}
        operations.append(call(f"v{k}", "torch.rand", numel, **kwargs))
        metas.append(meta_of(numel, dtype=dtype))
    names = [o.name for o in operations]
    graph = SegmentGraph([("x", meta_of(1))], operations, names, metas, is_random=True)
    results, plan = run(graph, torch.zeros(1), tmp_path, monkeypatch, blocks=resident)
    assert plan["draws"] == offset - OFFSET
    for got, want in zip(results, wants, strict=True):
        same(got, want)
