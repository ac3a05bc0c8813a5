"""Masks of `fast_dropout`: kernels beside the same drawing by torch's operations, its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from capture_graph import _OUT_DIR
from plan_runner import run_plan
from test_training import differentiable, leaf

from accel.codegen import CodegenOptions, compile_graph
from accel.codegen.random_masks import Redrawing, bits_at
from accel.codegen.scalar_ops import SCALAR_OPS

Function = Callable[..., torch.Tensor]

FUNCTIONS: dict[str, Function] = {
    "dropout": lambda x: F.dropout(x * 2, 0.3),
    "in place": lambda x: F.dropout(x * 2, 0.3, inplace=True),
    "between rows and columns": lambda x: F.dropout(x.t() * 2, 0.9).softmax(0) * 3,
    "two in a row": lambda x: F.dropout(F.dropout(x.exp(), 0.1), 0.7).sum(0),
    "of planes": lambda x: F.dropout1d(x[None] + 1, 0.5) * x,
    "alpha": lambda x: F.alpha_dropout(x * 1, 0.2, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(
        x[None, None], x[None, None], x[None, None], dropout_p=0.2
    ),
    "all and none": lambda x: x * torch.empty(x.shape).bernoulli_(1.0) + torch.empty(
        x.shape
    ).bernoulli_(0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_draw_what_torch_s_operations_draw(name: str) -> None:
    for rows, columns, dtype in itertools.product(
        (1, 5), (1, 16, 37), (torch.float32, torch.float64, torch.bfloat16)
    ):
        x = leaf(rows, columns, dtype=dtype)
        torch.manual_seed(3)
        with Redrawing():
            graph, (want,) = differentiable(FUNCTIONS[name], [x])
        graph.is_random = True
        options = CodegenOptions(verify=True, fast_dropout=True, measure=False)
        plan = compile_graph(graph, out_dir=_OUT_DIR, options=options)
        library = _OUT_DIR / plan["library"] if plan["library"] else None
        with Redrawing():
            state = torch.get_rng_state()
            want = FUNCTIONS[name](x)
            after = torch.get_rng_state()
        torch.set_rng_state(state)
        mine = x.detach().clone()
        results = run_plan(plan, library, [mine])
        assert results is not None
        assert torch.equal(torch.get_rng_state(), after)
        close(results[0], want.detach())
        (gradient,) = plan["gradients"]
        assert gradient["redraws"]
        arriving = torch.randn_like(want)
        (expected,) = torch.autograd.grad(want, x, arriving)
        saved = [mine if kind == "input" else results[i] for kind, i in gradient["saved"]]
        found = run_plan(gradient["plan"], library, [*saved, arriving])
        assert found is not None
        close(found[gradient["results"][0]], expected)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    wide = want.dtype != torch.bfloat16
    torch.testing.assert_close(got, want, rtol=1e-4 if wide else 3e-2, atol=1e-5 if wide else 3e-2)


def test_a_mask_is_drawn_again_rather_than_saved() -> None:
    graph, _ = differentiable(lambda x: F.dropout(x.view(64, 64) * 2, 0.3), [leaf(4096)])
    graph.is_random = True
    options = CodegenOptions(verify=True, fast_dropout=True, measure=False)
    plan = compile_graph(graph, out_dir=_OUT_DIR, options=options)
    (gradient,) = plan["gradients"]
    results = run_plan(plan, _OUT_DIR / plan["library"], [torch.ones(4096)])
    assert results is not None
    ((kind, place),) = gradient["saved"]
    assert kind == "output"
    assert (results[place].shape, results[place].dtype) == ((2,), torch.int32)


def test_graphs_without_gradients_draw_as_eager_does() -> None:
    from capture_graph import capture

    x = torch.randn(9, 9)
    graph, _, _ = capture(lambda x: F.dropout(x * 2, 0.3), [x])
    graph.is_random = True
    options = CodegenOptions(verify=True, fast_dropout=True, measure=False)
    plan = compile_graph(graph, out_dir=_OUT_DIR, options=options)
    torch.manual_seed(1)
    want = F.dropout(x * 2, 0.3)
    torch.manual_seed(1)
    results = run_plan(plan, _OUT_DIR / plan["library"], [x])
    assert results is not None
    assert torch.equal(results[0], want)


def bits_of(seeds: tuple[int, int], count: int = 1 << 18) -> torch.Tensor:
    first, second = torch.tensor(seeds, dtype=torch.int32)
    places = torch.arange(count, dtype=torch.int32)
    return bits_at(places, first, second, SCALAR_OPS["random_bits"].torch)


SEEDS = [(0, 0), (1, 0), (0, 1), (-(1 << 31), 5), (123456789, -987654321), (-1, -1)]


def planes(bits: torch.Tensor) -> torch.Tensor:
    """Of 32 bits each: -1 or 1."""
    return torch.stack([(bits >> k & 1) * 2 - 1 for k in range(32)]).float()


@pytest.mark.parametrize("seeds", SEEDS)
def test_bits_are_even_and_independent(seeds: tuple[int, int]) -> None:
    bits = bits_of(seeds)
    assert len(bits.unique()) == len(bits)  # a bijection
    each = planes(bits)
    deviation = each.shape[1] ** -0.5
    assert (each.mean(1).abs() < 5 * deviation).all()
    among = each @ each.T / each.shape[1] - torch.eye(32)
    assert (among.abs() < 5.5 * deviation).all()
    for distance in (1, 2, 3, 8, 16, 64, 768, 1024, 4096, 65536):
        shifted = each[:, distance:] @ each[:, :-distance].T / each.shape[1]
        assert (shifted.abs() < 5.5 * deviation).all(), distance


def test_masks_of_other_seeds_are_independent() -> None:
    each = [planes(bits_of(seeds))[-1] for seeds in SEEDS]
    each += [planes(bits_of((k, 7)))[-1] for k in range(2, 34)]
    each += [planes(bits_of((7, 1 << k)))[-1] for k in range(31)]
    all_ = torch.stack(each)
    among = all_ @ all_.T / all_.shape[1] - torch.eye(len(all_))
    assert (among.abs() < 5.5 * all_.shape[1] ** -0.5).all()


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.77, 0.999])
def test_how_many_are_ones(p: float) -> None:
    x = torch.ones(1 << 20)
    with Redrawing():
        torch.manual_seed(0)
        counts = torch.stack([torch.empty_like(x).bernoulli_(p).sum() for _ in range(8)])
    expected, deviation = p * x.numel(), (p * (1 - p) * x.numel()) ** 0.5
    assert ((counts - expected).abs() < 5 * deviation).all()
    spread = counts.std() / deviation
    assert 0.3 < spread < 2.0
