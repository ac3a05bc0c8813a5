"""Third parties' backends: what they are given."""

from __future__ import annotations

import resource
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import accel
from accel.compile.backends import _MAPPED_ELEMENTS, _zeros
from accel.trace import TensorMeta


def test_examples_are_of_the_recorded_kind_and_take_no_memory() -> None:
    rows = 4 * _MAPPED_ELEMENTS
    for dtype in ("float32", "bfloat16", "bool", "int64", "complex64"):
        example = _zeros(TensorMeta((rows, 3), (5, 1), dtype))
        assert example.shape == (rows, 3) and example.stride() == (5, 1)
        assert str(example.dtype) == f"torch.{dtype}" and not example._is_view()
        assert not example[-1].any()
        example[-1] = 1  # may be written
        assert example.sum() == 3 or dtype == "bool"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [_zeros(TensorMeta((1 << 28,), (1,), "float32")) for _ in range(32)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10_000
    assert float(held[-1][-1]) == 0


def test_a_backend_may_run_its_examples() -> None:
    seen = []

    def backend(gm, examples):  # type: ignore[no-untyped-def]
        seen.append([tuple(e.shape) for e in examples])
        gm(*examples)
        return gm.forward

    layer = torch.nn.Linear(1024, 512)
    f = accel.optimize(lambda x: layer(x).relu(), backend=backend)
    x = torch.randn(3, 1024)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(f(x), layer(x).relu())
    assert seen and (512, 1024) in seen[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "native"])
def test_a_speculation_that_fails_draws_no_random_numbers(backend: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        c = torch.rand(3) * 0.1 + x
        if bool((c < 10).all()):
            return c * 2
        return c + 1

    def drawn(function: Callable[..., Any], x: torch.Tensor) -> tuple[Any, Any]:
        torch.manual_seed(int(x[0]))
        return function(x), torch.rand(1)

    plain = types.FunctionType(f.__code__, f.__globals__, "plain")
    optimized = accel.optimize(f, backend=backend)
    before = accel.counters()
    for value in (1, 2, 3, 4, 100, 5, 101, 6):
        x = torch.full((3,), float(value))
        torch.testing.assert_close(drawn(optimized, x), drawn(plain, x))
        accel.wait(60)
    after = accel.counters()
    assert after["calls_compiled"] - before["calls_compiled"] >= 4
    assert after["speculations_failed"] > before["speculations_failed"]
