"""Differentiable graphs: both plans beside eager, what is saved, what is refused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_graph import _OUT_DIR, capture
from plan_runner import run_plan

from accel.codegen import CodegenOptions, CompileError, compile_graph
from accel.codegen.max_flow import INFINITE, Network
from accel.trace import Gradients, SegmentGraph


def differentiable(
    function: Callable[..., Any], inputs: list[torch.Tensor], tangents: list[int] | None = None
) -> tuple[SegmentGraph, list[torch.Tensor]]:
    """The graph of `function` with gradients for the inputs that require them."""
    graph, sources, _ = capture(function, [t.detach().clone() for t in inputs])
    eager = function(*inputs)
    outs = list(eager) if isinstance(eager, (tuple, list)) else [eager]
    names = [n for n, t in zip(graph.outputs, outs) if t.requires_grad]
    nodes = tuple(type(t.grad_fn).__name__ for t in outs if t.requires_grad)
    used = tuple(names if tangents is None else [names[k] for k in tangents])
    wanted = tuple(n for (n, _), t in zip(graph.inputs, inputs) if t.requires_grad)
    graph.gradients = Gradients(wanted, tuple(names), frozenset(), used, nodes)
    assert len(sources) == len(inputs)
    return SegmentGraph.from_json(graph.to_json()), outs


def check_each(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    tangents: list[int] | None = None,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """What each component's nodes have to know; forward and backwards give what eager gives."""
    graph, outs = differentiable(function, list(inputs), tangents)
    plan = compile_graph(graph, out_dir=_OUT_DIR, options=CodegenOptions(verify=True))
    library = _OUT_DIR / plan["library"] if plan["library"] else None
    mine = [t.detach().clone() for t in inputs]
    results = run_plan(plan, library, mine)
    assert results is not None
    for got, want in zip(results, outs):
        torch.testing.assert_close(got, want.detach(), equal_nan=True)
    for gradient in plan["gradients"]:
        carrying = [outs[k] for k in gradient["node_outputs"]]
        given = [carrying[k] for k in gradient["tangents"]]
        grads = [torch.randn_like(t) for t in given]
        leaves = [inputs[i] for i in gradient["grads"]]
        expected = torch.autograd.grad(given, leaves, grads, allow_unused=True, retain_graph=True)
        saved = [mine[i] if kind == "input" else results[i] for kind, i in gradient["saved"]]
        found = run_plan(gradient["plan"], library, saved + grads)
        assert found is not None
        for want, position in zip(expected, gradient["results"]):
            assert (want is None) == (position < 0)
            if want is not None:
                rtol, atol = (0, 0) if exact else (1e-4, 1e-5)
                torch.testing.assert_close(found[position], want, rtol=rtol, atol=atol)
                assert found[position].stride() == want.stride()
    return list(plan["gradients"])


def check(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    tangents: list[int] | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """The same for a function with one component."""
    (gradient,) = check_each(function, *inputs, tangents=tangents, exact=exact)
    return gradient


def leaf(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*sizes, dtype=dtype).requires_grad_()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "linear": lambda x, w, b: F.linear(x, w, b).relu(),
    "two layers": lambda x, w, b: F.linear(F.gelu(F.linear(x, w, b)), w.T[:6] @ w),
    "softmax": lambda x, w, b: (x @ w.T).softmax(-1) * b,
    "layer norm": lambda x, w, b: F.layer_norm(x @ w.T, (6,), b, b),
    "views": lambda x, w, b: (x.view(2, 2, 6).transpose(0, 1) @ w.T).reshape(-1, 6)[1:] + b,
    "in place": lambda x, w, b: (x @ w.T).add_(b).mul_(2).sigmoid_(),
    "several outputs": lambda x, w, b: (x.exp(), (w * b).sum(0), x @ w),
    "not differentiable": lambda x, w, b: (x * 2, (x > 0).sum(), x.argmax(1), w.detach() + b),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_plans_give_what_eager_gives(name: str, dtype: torch.dtype) -> None:
    check_each(
        FUNCTIONS[name], leaf(4, 6, dtype=dtype), leaf(6, 6, dtype=dtype), leaf(6, dtype=dtype)
    )


@pytest.mark.parametrize("pattern", [[0], [1], [2], [0, 2], [1, 2]])
def test_gradients_at_some_outputs(pattern: list[int]) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        h = x @ w
        return h.exp(), (h * b).sum(0), h @ w

    gradient = check(function, leaf(4, 6), leaf(6, 6), leaf(6), tangents=pattern)
    assert gradient["tangents"] == pattern
    assert sorted(gradient["grads"]) == [0, 1, 2]  # wherever gradients arrive


def test_outputs_that_have_nothing_in_common_have_plans_of_their_own() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        h = x + 1  # holds nothing, so that nothing is freed with it
        return h * w, b.exp(), h * b, w.sum(), (b.detach() * w).sin()

    found = check_each(function, leaf(4, 6), leaf(6), leaf(6))
    assert [g["node_outputs"] for g in found] == [[0, 2], [1], [3], [4]]
    assert [g["freed_with"] for g in found] == [[[0], [1]], [[0]], [[]], [[0]]]
    assert [sorted(g["grads"]) for g in found] == [[0, 1, 2], [2], [1], [1]]


def test_a_trunk_that_holds_something_is_freed_with_each_head() -> None:
    def heads(x: torch.Tensor, w: torch.Tensor) -> Any:
        h = x @ w
        return h.sum(), h * 3

    gradient = check(heads, leaf(4, 6), leaf(6, 6))
    assert gradient["freed_with"] == [[0, 1], [0, 1]]


def test_cheap_chains_are_computed_again() -> None:
    gradient = check(lambda x, w: (x * w + 1).sin().cos() * x, leaf(8, 6), leaf(6))
    assert sorted(gradient["saved"]) == [["input", 0], ["input", 1]]


def test_products_are_saved() -> None:
    gradient = check(lambda x, w: (x @ w).sin().sum(0), leaf(8, 6), leaf(6, 6))
    assert ["output", 1] in gradient["saved"]  # after the one output of the program


def test_a_visible_tensor_that_eager_does_not_save_is_not_saved() -> None:
    """Whoever overwrites it before backward must not get an error."""
    found = check_each(lambda x, w: ((x * 2).sin() * w, x @ w.T), torch.randn(6, 6), leaf(6, 6))
    places = [place[:2] for gradient in found for place in gradient["watched"]]
    assert ["output", 0] not in places and ["output", 1] not in places
    assert all(["input", 1] not in gradient["saved"] for gradient in found)


def test_batch_norm_saves_the_statistics_as_it_leaves_them() -> None:
    """As themselves, as eager does: no copies, and writing them before the backward is an error."""

    def f(x: torch.Tensor, w: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, mean, var, w, training=True)

    gradient = check(f, leaf(5, 3), leaf(3), torch.zeros(3), torch.ones(3))
    assert gradient["written"] == [2, 3]
    saved = {tuple(p) for p in gradient["saved"]}
    assert {("input", 2), ("input", 3)} <= saved
    assert {p for p in saved if p[0] == "output"} == {("output", 1), ("output", 2)}  # of the batch
    assert {tuple(p[:2]) for p in gradient["watched"]} >= {("input", 2), ("input", 3)}


def test_an_overwritten_value_that_backward_needs_is_refused() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = w * x
        x.add_(1)
        return y

    with pytest.raises((CompileError, RuntimeError), match=r"overwrites|inplace"):
        check(f, torch.randn(3), leaf(3))


def test_outputs_that_share_memory_are_refused() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        return y, y[0]

    graph, _ = differentiable(f, [leaf(2, 3)])
    with pytest.raises(CompileError, match="share memory"):
        compile_graph(graph, out_dir=_OUT_DIR)


def test_both_halves_share_one_library() -> None:
    gradient = check(FUNCTIONS["two layers"], leaf(4, 6), leaf(6, 6), leaf(6))
    assert gradient["plan"]["library"] is not None


def test_key_tells_gradients_apart() -> None:
    x = leaf(3)
    with_gradients, _ = differentiable(lambda t: t * 2, [x])
    without = SegmentGraph.from_json(with_gradients.to_json())
    without.gradients = None
    assert with_gradients.key() != without.key()


def test_fx_form_switches_grad_mode() -> None:
    graph, _ = differentiable(lambda x: (x * 2).sin(), [leaf(3)])
    assert graph.gradients is not None
    first = graph.operations[0].name
    graph.gradients = Gradients(("x0",), (), frozenset({first}))
    (y,) = graph.to_fx()(leaf(3))
    assert not y.requires_grad and torch.is_grad_enabled()


def _brute_force(edges: list[tuple[int, int, float]], count: int) -> float:
    best = INFINITE
    for inside in itertools.product([False, True], repeat=count):
        if inside[0] and not inside[-1]:
            cut = sum(c for a, b, c in edges if inside[a] and not inside[b])
            best = min(best, cut)
    return best


@pytest.mark.parametrize("seed", range(30))
def test_minimum_cut(seed: int) -> None:
    generator = random.Random(seed)
    count = generator.randint(3, 7)
    edges = [
        (a, b, float(generator.choice([1, 2, 3, 5, INFINITE])))
        for a in range(count)
        for b in range(count)
        if a != b and generator.random() < 0.5
    ]
    network = Network()
    for a, b, capacity in edges:
        network.add(a, b, capacity)
    value, inside = network.minimum_cut(0, count - 1)
    expected = _brute_force(edges, count)
    if expected >= INFINITE:
        assert value >= INFINITE
        return
    assert value == expected
    assert sum(c for a, b, c in edges if a in inside and b not in inside) == expected
