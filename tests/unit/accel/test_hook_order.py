"""Gradients reach the parameters of a compiled call in eager's order: hooks tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        weights = (self.query(x) @ self.key(x).T).softmax(-1)
        return x + weights @ self.value(x)


def layers(count: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(count) for part in (nn.Linear(8, 8), nn.Tanh())))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: layers(1),
    "two layers": lambda: layers(2),
    "seven layers": lambda: layers(7),
    "attention": lambda: nn.Sequential(Attention(), Attention(), nn.Linear(8, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)),
        nn.Conv1d(2, 3, 3),
        nn.BatchNorm1d(3),
        nn.Flatten(),
        nn.Linear(6, 1),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", ["data", "a leaf", "computed"])
@pytest.mark.parametrize("after", [True, False])
def test_hooks_on_parameters(name: str, given: str, after: bool) -> None:
    model = MODELS[name]()
    events: list[str] = []
    for label, parameter in model.named_parameters():

        def note(_: Any, label: str = label) -> None:
            events.append(label)

        if after:
            parameter.register_post_accumulate_grad_hook(note)
        else:
            parameter.register_hook(note)

    def step() -> list[str]:
        x = torch.randn(4, 8, requires_grad=given != "data")
        if given == "a leaf":
            x.register_hook(lambda _: events.append("x"))
        events.clear()
        model(x * 2 if given == "computed" else x).square().sum().backward()
        return list(events)

    want = step()
    accel.optimize(model)
    for _ in range(4):
        assert step() == want
        assert accel.wait(60)
    assert accel.counters()["backwards_compiled"] >= 2
