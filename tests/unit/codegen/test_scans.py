"""Scans: as eager by C++, by Triton and by the loop IR; in which order, and where they are ATen's."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import capture_graph
import pytest
import test_training
import torch
from capture_graph import capture, check, compile_it, library_of
from plan_runner import run_plan
from triton_blocks import BLOCKS
from triton_interpreter import interpreted

import accel
from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine
from accel.codegen.fusion import Group
from accel.codegen.interpreter import interpret
from accel.codegen.options import CompileError
from accel.codegen.targets import TARGETS
from accel.codegen.verifier import verify

Function = Callable[..., Any]


def _normalised(x: torch.Tensor) -> torch.Tensor:
    running = (x.abs() + 1).cumsum(1)
    return running / running.sum(1, keepdim=True)


def _seen_and_used(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    running = x.cumsum(1)
    return running, running + 1, running.sum(1)


# name: (function of a tensor of 20 x 37, how many kernels are made of it)
SCANS: dict[str, tuple[Function, int]] = {
    "rows": (lambda x: x.cumsum(1), 1),
    "columns": (lambda x: x.cumsum(0), 1),
    "the last dimension": (lambda x: x.cumsum(-1) * 2, 1),
    "products": (lambda x: (x * 0.1 + 1).cumprod(1), 1),
    "products of columns": (lambda x: (x * 0.1 + 1).cumprod(-2), 1),
    "all": (lambda x: x.flatten().cumsum(0), 1),
    "middle": (lambda x: x.view(4, 5, 37).cumsum(1) + 1, 1),
    "between others": (lambda x: (x * 2).tanh().cumsum(1).mul(0.25) + x, 1),
    "between others, columns": (lambda x: (x * 2).tanh().cumsum(0).mul(0.25) + x, 1),
    "behind reductions": (lambda x: x.softmax(1).cumsum(1) < 0.9, 1),
    "behind reductions of columns": (lambda x: x.softmax(0).cumsum(0) * 3, 1),
    "before reductions": (_normalised, 1),
    "seen and used": (_seen_and_used, 1),
    "twice": (lambda x: x.cumsum(1).mul(0.1).cumsum(1), 1),
    "both ways": (lambda x: x.cumsum(1).cumsum(0), 2),
    "two of one": (lambda x: x.cumsum(1) * (x * 0.1 + 1).cumprod(1), 1),
    "rows, then what is longer": (lambda x: x.cumsum(1).flatten().cumsum(0), 2),
    "other orders": (
        lambda x: x.flatten().cumsum(0).view(20, 37).t().contiguous().view(-1).mul(0.01).cumsum(0),
        2,
    ),
    "an order other than memory's": (
        lambda x: (x.t() * 2).contiguous().view(-1).mul(0.1).cumsum(0),
        1,
    ),
    "backwards": (lambda x: x.flip(1).cumsum(1).flip(1), 2),
    "masks": (lambda x: (x > 0).cumsum(1) * (x > 0), 1),
    "positions of what is not padding": (
        lambda x: ((x > 0).int().cumsum(1).type_as(x > 0) * 1 + 1).long(),
        1,
    ),
    "numbers that are rounded": (lambda x: x.bfloat16().cumsum(1) * 2, 1),
    "half precision": (lambda x: x.half().exp().cumsum(0), 1),
    "broadcast": (lambda x: x[:1].expand(20, 37).cumsum(0), 1),
    "transposed": (lambda x: x.t().cumsum(0), 1),
    "a part": (lambda x: x[3:, 2::3].cumsum(1), 1),
    "as another dtype": (lambda x: (x * 9).cumsum(1, dtype=torch.int64), 1),
    "as a narrow dtype": (lambda x: (x * 99).int().cumsum(0, dtype=torch.int8), 1),
    "in place": (lambda x: x.clone().cumsum_(1), 1),
    "one number": (lambda x: x[0, 0].cumsum(0) + x[:, :1].cumsum(1), 1),
    "nothing": (lambda x: x[:0].cumsum(0), 0),
    "in a write": (lambda x: torch.cat([x[:, :1], x.cumsum(1)], 1), 2),
    "with numbers of its place": (lambda x: x.cumsum(1) / torch.arange(1, 38), 1),
}


def _input() -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(20, 37)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", SCANS)
def test_kernels_scan_as_eager(name: str, fuse: bool) -> None:
    function, kernels = SCANS[name]
    check(function, _input(), native=True, externs=0, fuse=fuse, kernels=kernels if fuse else None)


@pytest.mark.parametrize("blocks", ["as chosen", "long rows"])
@pytest.mark.parametrize("name", SCANS)
def test_triton_s_kernels_scan_as_eager(
    name: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(TARGETS, "cpu", interpreted())
    monkeypatch.setattr(capture_graph, "NATIVE", False)
    BLOCKS[blocks](monkeypatch)
    check(SCANS[name][0], _input(), externs=0)


@pytest.mark.parametrize("name", SCANS)
def test_the_loop_ir_scans_as_eager(name: str) -> None:
    graph, inputs, expected = capture(SCANS[name][0], [_input()])
    c = compile_it(graph)
    memory = {b: t.contiguous().flatten() for b, t in zip(c.graph.inputs, inputs, strict=True)}
    for step in c.steps:
        assert isinstance(step, Group)
        scheduled = c.scheduled[id(step)]
        for b, param in zip(scheduled.buffers, scheduled.kernel.params, strict=True):
            dtype = getattr(torch, param.dtype)
            memory.setdefault(b, torch.zeros(c.graph.buffers[b].numel, dtype=dtype))
        interpret(scheduled.kernel, [memory[b] for b in scheduled.buffers])
    for out, want in zip(c.graph.outputs, expected, strict=True):
        empty = torch.zeros(0, dtype=want.dtype)
        got = memory.get(out.buffer, empty).as_strided(out.sizes, out.strides, out.offset)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_kernels_for_gpus_compile(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from accel.codegen.build_triton import build_cubins, kernels_of

    texts: dict[str, str] = {}

    def note(found: dict[str, str], *_: Any) -> dict[str, Any]:
        texts.update({text: f"k{i}" for i, text in enumerate([*texts, *found])})
        return {"library": None}

    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cuda"], build=note))
    for name in ("between others, columns", "before reductions", "masks", "products"):
        compile_it(capture(SCANS[name][0], [_input()])[0])
    BLOCKS["long rows"](monkeypatch)
    for name in ("between others", "before reductions", "numbers that are rounded"):
        compile_it(capture(SCANS[name][0], [_input()])[0])
    assert any("for first" in text for text in texts)
    _, rows = build_cubins(kernels_of(texts), tmp_path, gpu)
    assert len(rows) == len(texts)


DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_bits(dtype: torch.dtype) -> None:
    """On the processor what is combined in a wider type, or around its end, is eager's to the bit."""
    torch.manual_seed(4)
    for sizes in ((), (1,), (9, 1), (1, 7), (3, 16), (5, 33), (2, 3, 4, 5), (2, 0, 3), (17, 9)):
        x = torch.randn(sizes) * 3
        x = x > 0 if dtype == torch.bool else x.to(dtype)
        x = x * (torch.iinfo(dtype).max // 5) if "int" in str(dtype) else x

        def both(x: torch.Tensor) -> list[torch.Tensor]:
            dims = range(-x.dim(), x.dim()) if x.dim() else (0, -1)
            sums = [x.cumsum(d) for d in dims]
            return [*sums, *(x.cumprod(d) for d in dims)]

        check(both, x, rtol=0, atol=0, externs=0)


def test_zeros_infinities_and_nans_reach_what_stands_behind_them() -> None:
    x = torch.randn(6, 50)
    x[0], x[1, 13], x[2, 13], x[3, ::7], x[4, 40:] = -0.0, torch.inf, torch.nan, 0.0, -torch.inf

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        scans = [x.cumsum(1), x.cumprod(1), x[:, :1].cumsum(1), x[:1].cumsum(0)]
        return [*scans, *(1 / s for s in scans)]

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(function, x.to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_part_of_a_row_overflows_on_its_own(dtype: torch.dtype) -> None:
    big = 0.9 * torch.finfo(dtype).max
    x = torch.zeros(8, 64, dtype=dtype)
    x[:, 0], x[:, 1], x[:, 2] = -big, big, big
    check(lambda x: x.cumsum(1), x, rtol=0, atol=0, externs=0)
    small = torch.full((8, 64), 1.0, dtype=dtype)
    small[:, 0], small[:, 1], small[:, 2] = 1 / big, big, big
    check(lambda x: x.cumprod(1), small, rtol=0, atol=0, externs=0)
    single = torch.full((8, 64), 3e38)
    single[:, ::9] = 1e-38
    check(lambda x: (x.cumsum(1), x.cumprod(1)), single, rtol=1e-6, atol=0, externs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_errors_of_long_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x = (torch.rand(8, 40_003, dtype=torch.float64) - 0.3).to(dtype)
    for function in (lambda x: x.cumsum(1), lambda x: (x * 1e-4 + 1).cumprod(1)):
        graph, sources, (eager,) = capture(function, [x])
        c = compile_it(graph)
        (ours,) = run_plan(c.plan, library_of(c), sources) or []
        exact = function(x.double()) if dtype != torch.float64 else eager
        assert (ours - exact).abs().max() <= 1.5 * (eager - exact).abs().max() + 1e-7


def test_columns_of_bytes_build() -> None:
    """Eight bytes, read and widened in one instruction, are more than g++ 12 can compile."""
    x = torch.randint(0, 3, (33, 33)).to(torch.uint8).t()

    def function(x: torch.Tensor) -> torch.Tensor:
        double = x * 2
        return torch.where(double.cumsum(-1) > 1, double, double + double)

    check(function, x)


def test_what_is_moved_and_scanned() -> None:
    x = torch.randn(20, 37).bfloat16()

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        moved = x.clone()
        return moved, moved.cumsum(1)

    check(function, x, kernels=1, externs=0)


def test_random_scans() -> None:
    """Dimensions, layouts and neighbours at random; the lengths are those around vectors."""
    generator = random.Random(8)
    for seed in range(16):
        torch.manual_seed(seed)
        sizes = [generator.choice([1, 2, 3, 5, 8, 15, 16, 17, 33]) for _ in range(3)]
        x = torch.randn(sizes).permute(*generator.sample(range(3), 3))
        steps = [generator.randrange(6) for _ in range(4)]
        dims = [generator.randrange(3) for _ in range(4)]

        def function(x: torch.Tensor, steps: Any = steps, dims: Any = dims) -> torch.Tensor:
            first = x
            for step, d in zip(steps, dims, strict=True):
                x = [
                    lambda: x.cumsum(d) * 0.1,
                    lambda: (x * 0.01 + 1).cumprod(d),
                    lambda: x.tanh() + first,
                    lambda: x - x.amax(d, keepdim=True),
                    lambda: x.flip(d),
                    lambda: x.contiguous().view(-1).mul(0.1).cumsum(0).view(x.shape),
                ][step]()
            return x

        check(function, x, rtol=1e-4, atol=1e-4)


ATENS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "few columns": (lambda x: x.cumsum(0), (900, 3)),
    "short wide rows": (lambda x: x.double().cumsum(1), (900, 3)),
    "one row that is walked in order": (lambda x: x.bfloat16().cumsum(0), (5000,)),
    "turned": (lambda x: x.t().cumsum(0), (50, 60)),
}


@pytest.mark.parametrize("name", ATENS)
def test_where_aten_is_as_fast_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, sizes = ATENS[name]
    check(function, torch.randn(sizes), externs=1)
    check(function, torch.randn(sizes)[:4], externs=0)
    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cpu"], lanes=False))  # not so on a GPU
    check(function, torch.randn(sizes), externs=0)


def test_lengths_may_differ_between_calls() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.exp().cumsum(0) + 1, x.softmax(1).cumsum(1)

    compiled = accel.optimize(
        lambda x: (x.exp().cumsum(0) + 1, x.softmax(1).cumsum(1)), dynamic=True
    )
    for length in (5, 6, 9, 17, 33, 5, 12, 40):
        x = torch.randn(length, length + 3)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), function(x))
            accel.wait(60)
    before = accel.counters()["calls_compiled"]
    for length in (21, 64, 100):
        x = torch.randn(length, length + 3)
        torch.testing.assert_close(compiled(x), function(x))
    assert accel.counters()["calls_compiled"] == before + 3


def test_gradients() -> None:
    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((x * y).cumsum(1).tanh() + y.cumsum(0)) * x

    inputs = [test_training.leaf(20, 37) for _ in range(2)]
    test_training.check_each(loss, *inputs)


X = ir.Load(0, Affine.var("i"), "float32")
BROKEN: dict[str, list[Any]] = {
    "never begun": [ir.Scan("s", "a", "sum", X, False)],
    "unknown scan": [ir.Begin("a", "max", "f32"), ir.Scan("s", "a", "max", X, False)],
    "scanned as f32": [ir.Begin("a", "sum", "f64"), ir.Scan("s", "a", "sum", X, False)],
    "outside of a loop": [ir.Begin("a", "sum", "f32"), ir.Scan("s", "a", "sum", X, False)],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_verifier_finds(fault: str) -> None:
    kernel = ir.Kernel("k", [ir.Param("float32", False)], [("i", 4)], BROKEN[fault])
    with pytest.raises(CompileError, match=fault):
        verify(kernel)
