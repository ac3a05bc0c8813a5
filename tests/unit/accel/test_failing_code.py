"""Compiled code that fails: the program runs on eagerly, and the root is not compiled for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import accel
from accel import driver


def failing(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    def run(*_: Any) -> Any:
        raise RuntimeError("this code never works")

    return run


def test_code_that_always_fails_is_given_up() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1

    accel.optimize(f, backend=failing)
    x = torch.linspace(-1, 1, 7)
    before = accel.counters()["recordings"]
    for _ in range(20):
        assert torch.equal(f(x), torch.relu(x) + 1)
        assert accel.wait(60)
    assert accel.counters()["recordings"] == before + 1
    assert driver.current is not None
    root = next(r for r in driver.current.roots if r.code is not None and r.name == f.__qualname__)
    assert root.state == "blacklisted" and "this code never works" in root.reason
