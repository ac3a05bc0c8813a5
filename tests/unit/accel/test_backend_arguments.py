"""What `accel.optimize` takes for a backend when it is the only argument."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import accel

used: list[str] = []


def plain(gm: Any, example_inputs: Any, tag: str = "plain") -> Any:
    used.append(tag)
    return gm.forward


def annotated(g: torch.fx.GraphModule, e: list[torch.Tensor]) -> Any:
    used.append("annotated")
    return g.forward


class Callable:
    def __call__(self, gm: torch.fx.GraphModule, ex: Any) -> Any:
        used.append("object")
        return gm.forward


BACKENDS = {
    "plain": plain,
    "annotated": annotated,
    "object": Callable(),
    "partial": functools.partial(plain, tag="partial"),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_alone(name: str) -> None:
    scope: dict[str, Any] = {}
    exec("def f(x): return x * 2 + 1", scope)
    f = accel.optimize(BACKENDS[name])(scope["f"])
    used.clear()
    for _ in range(4):
        assert torch.equal(f(torch.ones(3)), torch.full((3,), 3.0))
        accel.wait()
    assert used == [name]


class LooksLikeABackend(torch.nn.Module):
    def forward(self, gm: Any, example_inputs: Any) -> Any:
        return gm + example_inputs


def test_a_module_is_none() -> None:
    module = LooksLikeABackend()
    assert accel.optimize(module) is module


def test_reset_sets_the_counts_of_disabled_roots_back() -> None:
    f = accel.optimize(lambda x: x + 1)
    for _ in range(4):
        f(torch.ones(3))
        accel.wait()
    accel.disable(f)
    assert accel.counters()["calls_compiled"] > 0
    accel.reset()
    assert accel.counters()["calls_compiled"] == 0
    assert accel.counters()["ops_compiled"] == 0


def test_another_backend_for_what_is_compiled() -> None:
    f = accel.optimize(lambda x: x * 2 + 1, backend=plain)
    used.clear()
    for backend in (plain, annotated, annotated, plain):
        f = accel.optimize(f, backend=backend)
        for _ in range(4):
            assert torch.equal(f(torch.ones(3)), torch.full((3,), 3.0))
            accel.wait()
    assert used == ["plain", "annotated", "plain"]
