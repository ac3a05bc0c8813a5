"""Reads where other tensors say: as eager by C++, by Triton and by the loop IR, and never outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import capture_graph
import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, check, compile_it
from triton_interpreter import interpreted

import accel
from accel.codegen.fusion import Group
from accel.codegen.interpreter import interpret
from accel.codegen.targets import TARGETS

GATHERS: dict[str, Callable[..., Any]] = {
    "embedding": lambda i, t: F.embedding(i % 50, t),
    "embedding, then a norm": lambda i, t: F.layer_norm(F.embedding(i % 50, t) + t[7], (40,)),
    "rows": lambda i, t: t[i],
    "rows, narrow numbers": lambda i, t: t.bfloat16()[i] * 2,
    "rows that are only moved": lambda i, t: t.bfloat16()[i],
    "rows of truths": lambda i, t: (t > 0)[i],
    "rows of turned memory": lambda i, t: t.t()[i % 40],
    "rows of a part": lambda i, t: t[10:, 3::2][i % 40],
    "columns": lambda i, t: t[:, i % 40],
    "index_select of columns": lambda i, t: t.index_select(1, i[0] % 40) + 1,
    "index_select by one number": lambda i, t: t.index_select(0, i[0, 0] % 50),
    "gather along lines": lambda i, t: t.gather(1, i % 40),
    "gather along columns": lambda i, t: t.gather(0, i[:, :5].abs() % 50),
    "gather by what is repeated": lambda i, t: t.gather(0, (i[0, 0] % 50).expand(3, 40)),
    "take_along_dim": lambda i, t: t.take_along_dim(t.argsort(1)[:, :3], 1),
    "two neighbours": lambda i, t: t[i, i.flip(0) % 40],
    "two of which one is broadcast": lambda i, t: t[i[:, :1] % 50, i[0] % 40],
    "two apart": lambda i, t: t.view(5, 10, 40)[i % 5, :, i % 40],
    "the last two": lambda i, t: t.view(5, 10, 40)[:, i % 10, i % 40],
    "the middle one": lambda i, t: t.view(5, 10, 40)[:, i[0] % 10],
    "numbers of 32 bits": lambda i, t: t[(i % 50).int()],
    "whole numbers": lambda i, t: i.flatten()[i % 63],
    "by itself": lambda i, t: i.flatten()[i.flatten()[i % 63] % 63],
    "then sums": lambda i, t: t[i].sum(-1),
    "one tensor of indices twice": lambda i, t: t[i] + (t * 2)[i],
    "a table that is computed": lambda i, t: (t.exp() + t.sum(0))[i],
}

ADDITIONS: dict[str, Callable[..., Any]] = {
    "index_add to rows": lambda i, t: t.index_add(0, i[0] % 50, t[:9] * 2),
    "index_add to columns": lambda i, t: t.index_add(1, i[1] % 40, t[:, :9].exp()) + 1,
    "scatter_add along lines": lambda i, t: t.scatter_add(1, i % 40, t[:7, 5:20]),
    "scatter_add along columns": lambda i, t: t.scatter_add(0, i % 5, t.sin()),
    "scatter_add of what is repeated": lambda i, t: torch.zeros(50, 40).scatter_add(
        0, (i[0] % 50)[:, None].expand(9, 40), t[:9]
    ),
    "messages of a graph": lambda i, t: torch.zeros(50, 40).index_add(
        0, i[0] % 50, t.index_select(0, i[1] % 50) * t[:9, :1]
    ),
    "rows by position": lambda i, t: t.index_put((i,), t[:7, None], accumulate=True),
    "two positions": lambda i, t: t.index_put((i, i % 40), t[:7, :9], accumulate=True),
    "one value": lambda i, t: t.index_put((i % 9,), torch.ones(()), accumulate=True),
    "whole numbers": lambda i, t: i.index_add(1, i[0] % 9, i[:, :9] * 3),
    "in place": lambda i, t: (
        torch.ones(50, 40).index_add_(0, i[0] % 50, t[:9]).scatter_add_(0, i % 50, t)
    ),
    "float64": lambda i, t: t.double().index_put((i,), t[:7, None].double(), accumulate=True),
}


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randint(-50, 50, (7, 9)), torch.randn(50, 40)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", GATHERS)
def test_kernels_gather_as_eager(name: str, fuse: bool) -> None:
    externs = 1 if name == "take_along_dim" else 0  # argsort
    check(GATHERS[name], *_inputs(), native=True, fuse=fuse, externs=externs)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ADDITIONS)
def test_kernels_add_as_eager(name: str, fuse: bool) -> None:
    check(ADDITIONS[name], *_inputs(), native=True, fuse=fuse, externs=0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*GATHERS, *ADDITIONS])
def test_triton_s_kernels_gather_as_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(TARGETS, "cpu", interpreted())
    monkeypatch.setattr(capture_graph, "NATIVE", False)
    check((GATHERS | ADDITIONS)[name], *_inputs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(GATHERS.keys() - {"take_along_dim"} | ADDITIONS.keys()))
def test_the_loop_ir_gathers_and_adds_as_eager(name: str) -> None:
    graph, inputs, expected = capture((GATHERS | ADDITIONS)[name], list(_inputs()))
    c = compile_it(graph)
    memory = {b: t.contiguous().flatten() for b, t in zip(c.graph.inputs, inputs, strict=True)}
    for step in c.steps:
        assert isinstance(step, Group)
        scheduled = c.scheduled[id(step)]
        for b, param in zip(scheduled.buffers, scheduled.kernel.params, strict=True):
            dtype = getattr(torch, param.dtype)
            memory.setdefault(b, torch.zeros(c.graph.buffers[b].numel, dtype=dtype))
        interpret(scheduled.kernel, [memory[b] for b in scheduled.buffers])
    (out,) = c.graph.outputs
    got = memory[out.buffer].as_strided(out.sizes, out.strides, out.offset)
    torch.testing.assert_close(got, expected[0])


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_kernels_for_gpus_assert_that_indices_are_in_range(gpu: str) -> None:
    triton = pytest.importorskip("triton")
    assert triton is not None
    from accel.codegen.build_triton import compile_kernel, kernels_of, load_module, module_text

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TARGETS, "cpu", interpreted())
        c = compile_it(capture(GATHERS["embedding, then a norm"], list(_inputs()))[0])
    kernels = kernels_of(c.texts)
    module = load_module(module_text(kernels), Path(capture_graph._OUT_DIR) / f"gather_{gpu}.py")
    ptx = [compile_kernel(module, k, gpu).asm["ptx"] for k in kernels]
    assert sum("__assertfail" in text for text in ptx) == 1
    assert not c.graph.speculations


OUTSIDE: dict[str, tuple[Callable[..., Any], int]] = {
    "embedding": (lambda i, t: F.embedding(i, t) + 1, 50),
    "embedding, before the front": (lambda i, t: F.embedding(i, t) + 1, -1),
    "rows": (lambda i, t: t[i] * 2, 50),
    "rows, before the front": (lambda i, t: t[i] * 2, -51),
    "index_select": (lambda i, t: t.index_select(0, i[0]).exp(), 1 << 40),
    "gather": (lambda i, t: t.gather(0, i) + 1, -1),
    "nobody reads it": (lambda i, t: (t[i], t + 1)[1], 50),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_out_of_range_is_eager_s_error(name: str) -> None:
    function, bad = OUTSIDE[name]
    compiled = accel.optimize(lambda i, t, into: into.add_(function(i, t).sum()))
    i, t = _inputs()
    i = i.abs() % 50
    for _ in range(8):
        compiled(i, t, torch.zeros(()))
        accel.wait(60)
    before = accel.counters()["calls_compiled"]
    compiled(i, t, torch.zeros(()))
    assert accel.counters()["calls_compiled"] > before
    outside = i.clone()
    outside[0, -1] = bad
    with pytest.raises((IndexError, RuntimeError)) as expected:
        function(outside, t)
    written = torch.zeros(())
    with pytest.raises(type(expected.value)) as got:
        compiled(outside, t, written)
    assert str(got.value) == str(expected.value)
    assert written == 0  # nothing was committed
    torch.testing.assert_close(compiled(i, t, torch.zeros(())), function(i, t).sum())


def test_lengths_may_differ_between_calls() -> None:
    weight = torch.randn(50, 40)
    compiled = accel.optimize(lambda i: F.layer_norm(F.embedding(i, weight), (40,)), dynamic=True)
    for length in (5, 6, 9, 17, 33, 5, 12, 40):
        i = torch.randint(0, 50, (2, length))
        for _ in range(3):
            torch.testing.assert_close(compiled(i), F.layer_norm(F.embedding(i, weight), (40,)))
            accel.wait(60)
    before = accel.counters()["calls_compiled"]
    i = torch.randint(0, 50, (2, 21))
    torch.testing.assert_close(compiled(i), F.layer_norm(F.embedding(i, weight), (40,)))
    assert accel.counters()["calls_compiled"] > before


def test_gradients_of_what_is_gathered() -> None:
    def loss(i: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(i, t, padding_idx=3)
        return (F.gelu(rows) * t[i[0]].sum(0)).gather(-1, i[..., None] % 40).square().sum()

    i, t = _inputs()
    i, compiled = i.abs() % 50, accel.optimize(loss)
    for _ in range(6):
        mine, theirs = t.clone().requires_grad_(), t.clone().requires_grad_()
        compiled(i, mine).backward()
        with accel.disable():
            loss(i, theirs).backward()
        torch.testing.assert_close(mine.grad, theirs.grad)
        accel.wait(60)
    assert accel.counters()["backwards_compiled"]
    outside = i.clone()
    outside[0, 0] = 77
    with pytest.raises(IndexError, match="index out of range in self"):
        compiled(outside, t.clone().requires_grad_())
