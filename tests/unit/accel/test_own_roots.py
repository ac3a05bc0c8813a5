"""Functions of equal code: each that was asked for has a root, and variants, of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import accel
from accel import driver
from accel.rewriter import prologue
from accel.roots import Owners


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    accel.reset()


def scaled(k: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * k + x

    return f


def serves(f: Any, k: float) -> bool:
    """True when the last of some calls was served; each is compared."""
    x = torch.arange(5.0)
    for _ in range(4):
        assert torch.allclose(f(x), torch.tanh(x) * k + x)
        accel.wait(60)
    before = accel.counters()["calls_compiled"]
    f(x)
    return accel.counters()["calls_compiled"] == before + 1


def test_more_closures_than_variants_are_allowed() -> None:
    functions = [accel.optimize(scaled(float(k))) for k in range(12)]
    assert all([serves(f, float(k)) for k, f in enumerate(functions)])
    assert all([serves(f, float(k)) for k, f in enumerate(functions)])


def test_asking_twice_is_asking_once() -> None:
    f = accel.optimize(scaled(2.0))
    code = f.__code__
    assert serves(f, 2.0)
    assert accel.optimize(f) is f and f.__code__ is code
    assert driver.current.roots.of_function(f) is driver.current.roots.own_of_function(f)


def test_the_next_function_takes_over_what_a_collected_one_had() -> None:
    serves(accel.optimize(scaled(0.5)), 0.5)  # the first for this code
    roots = len(driver.current.roots)
    for k in range(20):  # more than variants are allowed
        f = accel.optimize(scaled(float(k)))
        assert serves(f, float(k)), k
        del f
        gc.collect()
    assert len(driver.current.roots) <= roots + 2


def test_a_shared_root_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Owners, "most", 2)

    def of(k: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.tanh(x) * k + x

    functions = [accel.optimize(of(float(k))) for k in range(4)]
    indices = [prologue.entry_index(f.__code__) for f in functions]
    assert indices[0] == indices[2] == indices[3] != indices[1]
    assert all([serves(f, float(k)) for k, f in enumerate(functions)])


def test_defaults_and_globals_are_still_guarded() -> None:
    f = accel.optimize(lambda x, k=3.0: torch.tanh(x) * k + x)
    g = accel.optimize(lambda x, k=3.0: torch.tanh(x) * k + x)
    assert serves(f, 3.0) and serves(g, 3.0)
    f.__defaults__ = (4.0,)
    assert serves(f, 4.0) and serves(g, 3.0)


def test_a_root_tells_itself_in_a_line() -> None:
    root = driver.current.roots.of_function(accel.optimize(scaled(1.0)))
    assert repr(root).startswith("<Root scaled.<locals>.f at ") and len(repr(root)) < 200
