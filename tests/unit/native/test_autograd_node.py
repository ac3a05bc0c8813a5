"""Autograd nodes over backward plans, made by hand."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_builder import Builder, build_library, layout

from accel import runtime

native = runtime.native


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_library(Path(tmp_path_factory.mktemp("kernels")))


class Doubler:
    """y = 2 * x, z = x + 1 over eight floats; saves 2 * x though nobody needs it."""

    def __init__(self, library: str, **changes: Any) -> None:
        like = torch.zeros(8)
        forward = Builder()
        x = forward.input(like)
        y, z, kept = forward.output(like), forward.output(like), forward.output(like)
        forward.kernel("twice", x, y)
        forward.kernel("add_one", x, z)
        forward.kernel("twice", x, kept)
        backward = Builder()
        backward.input(like)  # saved
        gy, gz = backward.input(like), backward.input(like)
        doubled, grad = backward.arena(like), backward.output(like)
        backward.kernel("twice", gy, doubled)
        backward.kernel("add", doubled, gz, grad)
        self.spec: dict[str, Any] = {
            "outputs": 2,
            "node_outputs": [0, 1],
            "tangents": [0, 1],
            "names": ["MulBackward0", "AddBackward0"],
            "detached": [],
            "grads": [0],
            "results": [0],
            "saved": [["output", 2]],
            "watched": [],
            "written": [],
            "needs": [[0, 1]],
            "kept": [0],
            "stale": [],
            "reach": [[0, 1]],
            "freed_with": [[0, 1], [0, 1]],
            "needed_for": [[0, 1]],
            "inner": [[], []],
            **changes,
        }
        self.recomputed: list[Any] = []
        self.forward = native.Executor(forward.plan(y, z, kept), library)
        self.backward = native.Executor(backward.plan(grad), library)
        self.gradient = native.Gradient(self.spec, self.forward, self.backward, self.recompute)
        guards = native.GuardProgram([("TENSOR", -1, 0, torch.zeros(8, requires_grad=True))], 2)
        self.variant = self.variant_with(self.gradient, guards)

    def variant_with(self, gradient: Any, guards: Any = None) -> Any:
        return native.Variant(
            guards or self.variant.guards,
            native.Ambient(),
            self.forward,
            [0],
            ("parts", [("output", 0), ("output", 1)]),
            (gradient,),
        )

    def recompute(self, inputs: Any, grads: Any, create_graph: Any, *_: Any) -> Any:
        self.recomputed.append((inputs, grads, create_graph))
        if inputs is None:
            return None
        with torch.enable_grad():
            x = inputs[0] * 1
            outs = [x * 2, x + 1]
            pairs = [(o, g) for o, g in zip(outs, grads) if g is not None]
            return list(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    [inputs[0]],
                    [g for _, g in pairs],
                    create_graph=bool(create_graph),
                )
            )

    def __call__(self, x: torch.Tensor) -> Any:
        entry = native.Entry("doubler", lambda *_: None)
        entry.variants, entry.state = (self.variant,), "armed"
        # The root, and behind it the function that calls.
        return native.prologue(entry.index, x)


@pytest.fixture
def doubler(library: str) -> Doubler:
    return Doubler(library)


def leaf() -> torch.Tensor:
    return torch.arange(8.0).requires_grad_()


def test_first_derivatives_run_the_plan(doubler: Doubler) -> None:
    x = leaf()
    y, z = doubler(x)
    assert y.requires_grad and not y.is_leaf and torch.equal(y, x.detach() * 2)
    (y.sum() + 3 * z.sum()).backward()
    assert torch.equal(x.grad, torch.full((8,), 5.0))
    assert (doubler.gradient.runs, doubler.gradient.recomputed) == (1, 0)


def test_names_are_those_of_eager(doubler: Doubler) -> None:
    y, z = doubler(leaf())
    assert "MulBackward0" in repr(y) and "AddBackward0" in repr(z)


def test_gradients_of_any_layout_are_arranged(doubler: Doubler) -> None:
    x = leaf()
    y, z = doubler(x)
    torch.autograd.backward([y, z], [torch.ones(1).expand(8), torch.ones(16)[::2]])
    assert torch.equal(x.grad, torch.full((8,), 3.0))


def test_zeros_stand_for_missing_gradients(doubler: Doubler) -> None:
    x = leaf()
    y, _z = doubler(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((8,), 2.0))
    ((inputs, grads, create_graph),) = doubler.recomputed
    assert inputs is None and grads[1] is None and create_graph is False
    assert (doubler.gradient.runs, doubler.gradient.recomputed) == (1, 0)


def test_what_is_not_finite_is_recomputed(doubler: Doubler) -> None:
    """Zeros might have met infinities."""
    x = leaf()
    y, _z = doubler(x)
    y.backward(torch.full((8,), float("inf")))
    assert torch.equal(x.grad, torch.full((8,), float("inf")))
    _told, (inputs, grads, create_graph) = doubler.recomputed
    assert len(inputs) == 1 and grads[1] is None and create_graph is False
    assert doubler.gradient.recomputed == 1


def test_second_derivatives_are_recomputed(doubler: Doubler) -> None:
    x = leaf()
    y, z = doubler(x)
    (g,) = torch.autograd.grad(y.sum() + z.sum(), [x], create_graph=True)
    assert g.requires_grad or g.grad_fn is None
    assert doubler.recomputed[0][2] is True


def test_graph_is_freed_and_says_so(doubler: Doubler) -> None:
    x = leaf()
    y, z = doubler(x)
    loss = y.sum() + z.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(x.grad, torch.full((8,), 6.0))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_what_shares_nothing_is_not_freed(library: str) -> None:
    """As where eager's nodes on the way of one output hold nothing that the other needs."""
    doubler = Doubler(library, freed_with=[[0], []])
    x = leaf()
    y, z = doubler(x)
    y.sum().backward()
    z.sum().backward()
    z.sum().backward()
    assert torch.equal(x.grad, torch.full((8,), 4.0))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_only_some_inputs_are_asked_for(doubler: Doubler) -> None:
    x = leaf()
    y, z = doubler(x)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(y.sum() + z.sum(), [leaf()])
    y, z = doubler(x * 1)
    assert torch.equal(torch.autograd.grad(y.sum() + z.sum(), [x])[0], torch.full((8,), 3.0))


def test_versions_of_watched_tensors(library: str) -> None:
    doubler = Doubler(library, watched=[["output", 0, 1, -1], ["input", 0, 2, -1]])
    x = leaf()
    y, z = doubler(x)
    z.mul_(2)  # nobody watches it
    (y.sum() + z.sum()).backward()
    assert torch.equal(x.grad, torch.full((8,), 4.0))
    y, z = doubler(x)
    both = y.sum() + z.sum()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both.backward()
    y, z = doubler(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_watched_only_where_gradients_arrive(library: str) -> None:
    doubler = Doubler(library, watched=[["output", 0, 1, -1]])
    y, z = doubler(leaf())
    with torch.no_grad():
        y.add_(1)
    z.sum().backward()


def test_zeros_stand_for_gradients_that_did_not_arrive(library: str) -> None:
    """Where the forward cannot run again: its input is gone, or has changed."""
    doubler = Doubler(library, kept=[])
    x = leaf()
    y, _z = doubler(x * torch.ones(8))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((8,), 2.0))
    inputs, gradients, create_graph = doubler.recomputed[0]
    assert inputs is None and gradients[1] is None and not create_graph

    doubler = Doubler(library)
    x = leaf()
    h = x * 1
    _y, z = doubler(h)
    h.add_(1)
    z.sum().backward()
    assert torch.equal(x.grad, torch.ones(8))
    assert len(doubler.recomputed) == 1


def test_an_input_that_no_gradient_reaches_gets_none(library: str) -> None:
    doubler = Doubler(library, kept=[], reach=[[1]])
    x = leaf()
    h = x * 1
    y, _z = doubler(h)
    del h
    y.sum().backward()
    assert x.grad is None or not x.grad.any()
    assert doubler.recomputed[0][0] is None


def test_inputs_that_are_gone_are_a_clear_error(library: str) -> None:
    doubler = Doubler(library, kept=[])
    y, _z = doubler(leaf() * torch.ones(8))
    with pytest.raises(RuntimeError, match="does not exist any more"):
        y.sum().backward(create_graph=True)
    assert doubler.recomputed[0][0] is None and "input 0" in doubler.recomputed[0][2]


def test_changed_inputs_are_a_clear_error(doubler: Doubler) -> None:
    """Unless zeros can stand for the gradients that are missing: times infinity they cannot."""
    h = leaf() * 1
    y, _z = doubler(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.full((8,), float("inf")))


def test_errors_of_recomputing_are_the_programs(library: str) -> None:
    doubler = Doubler(library)

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("mine")

    gradient = native.Gradient(doubler.spec, doubler.forward, doubler.backward, fail)
    doubler.variant = doubler.variant_with(gradient)
    y, _z = doubler(leaf())
    with pytest.raises(ZeroDivisionError, match="mine"):
        y.sum().backward()


def test_hooks_and_retained_gradients(doubler: Doubler) -> None:
    x = leaf()
    seen: list[str] = []
    y, z = doubler(x)
    x.register_hook(lambda g: seen.append("x"))
    y.register_hook(lambda g: seen.append("y"))
    z.retain_grad()
    (y.sum() + z.sum()).backward()
    assert sorted(seen) == ["x", "y"] and torch.equal(z.grad, torch.ones(8))


def test_backward_in_other_threads(doubler: Doubler) -> None:
    results = []

    def work() -> None:
        for _ in range(50):
            x = leaf()
            y, z = doubler(x)
            (y.sum() + z.sum()).backward()
            results.append(float(x.grad[0]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [3.0] * 200


class _Never:
    def __call__(self, *_: Any) -> Any:
        raise AssertionError


def test_a_node_keeps_what_it_needs_and_no_longer(library: str) -> None:
    doubler, never = Doubler(library), _Never()
    alive = weakref.ref(never)
    gradient = native.Gradient(doubler.spec, doubler.forward, doubler.backward, never)
    doubler.variant = doubler.variant_with(gradient)
    x = leaf()
    y, z = doubler(x)
    doubler.variant = None
    del gradient, never
    assert alive() is not None
    (y.sum() + z.sum()).backward()
    assert torch.equal(x.grad, torch.full((8,), 3.0))
    del y, z
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": 9},
        {"names": []},
        {"names": ["A"]},
        {"results": [1]},
        {"results": []},
        {"grads": [1]},
        {"saved": []},
        {"saved": [["output", 5]]},
        {"saved": [["input"]]},
        {"watched": [["output", 2, 1, -1]]},
        {"watched": [["output", 0, 1, 4]]},
        {"tangents": [2, 0]},
        {"detached": [7]},
        {"freed_with": [[0]]},
        {"freed_with": [[0], [2]]},
        {"needed_for": []},
        {"inner": []},
        {"inner": [[1], [0]]},
        {"inner": [[], [2]]},
        {"reach": [[2]]},
        {"needs": []},
    ],
)
def test_a_wrong_description_is_refused(library: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gradient"):
        Doubler(library, **changes)


def test_layout_helper_matches() -> None:
    assert layout(torch.zeros(8))["sizes"] == [8]
