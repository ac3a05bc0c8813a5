"""The first call of a root may change what it has read: then the second one is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import accel


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    yield
    accel.reset()


class Settling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind: str | None = None

    def forward(self, x: torch.Tensor, seen: list[Any] | None = None) -> torch.Tensor:
        if self.kind is None:
            self.kind = "single"
        if seen is not None:
            seen.append(self.kind)
        return x * 2 if self.kind == "single" else x


def call(function: Any, *args: Any) -> dict[str, int]:
    assert torch.equal(function(torch.ones(3), *args), torch.full((3,), 2.0))
    assert accel.wait()
    counted = accel.counters()
    return {name: counted[name] for name in ("recordings", "segments", "calls_compiled")}


def test_what_the_first_call_settles_is_not_compiled_for() -> None:
    model = accel.optimize(Settling())
    assert call(model) == {"recordings": 1, "segments": 0, "calls_compiled": 0}
    assert call(model) == {"recordings": 2, "segments": 1, "calls_compiled": 0}
    assert call(model) == {"recordings": 2, "segments": 1, "calls_compiled": 1}
    assert "its first call has changed self.kind" in str(accel.explain(model)(torch.ones(3)))


def test_what_is_settled_is_compiled_at_once() -> None:
    model = Settling()
    model(torch.ones(3))
    model = accel.optimize(model)
    assert call(model) == {"recordings": 1, "segments": 1, "calls_compiled": 0}
    assert call(model) == {"recordings": 1, "segments": 1, "calls_compiled": 1}


def test_an_argument_that_is_changed_is_another_the_next_time() -> None:
    model = Settling()
    model(torch.ones(3))
    model = accel.optimize(model)
    assert call(model, [])["segments"] == 1
    assert call(model, [])["calls_compiled"] == 1


def test_a_counter_is_compiled_once() -> None:
    state = {"calls": 0}

    def counted(x: torch.Tensor) -> torch.Tensor:
        state["calls"] += 1
        return x * 2 + state["calls"] * 0

    function = accel.optimize(counted)
    for _ in range(6):
        counts = call(function)
    assert counts["segments"] <= 2
    assert counts["calls_compiled"] >= 2
    assert state["calls"] == 6
