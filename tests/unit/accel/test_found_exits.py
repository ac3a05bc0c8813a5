"""Exits that a run finds behind others: what is no exit is not taken for one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import accel


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    accel.reset()


class Shared(nn.Module):
    """Two exits, and behind them variables that an inner function shares: `self`, `scale`, `late`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.factor = 3
        self.flag = True

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        y = self.layer(x)
        zlib.crc32(b"first")
        y = y * 2
        zlib.crc32(b"second")
        y = y + self.factor * scale
        if self.flag:
            y = self.layer(y)
        late = torch.tanh(y)

        def inner(t: torch.Tensor) -> torch.Tensor:
            return self.layer(t) * scale + late

        return y + inner(y) + inner(late)


def test_variables_that_inner_functions_share_are_known_behind_exits() -> None:
    model = Shared().requires_grad_(False)
    x = torch.ones(2, 4)
    with accel.disable():
        expected = model(x, 0.5)
    compiled = accel.optimize(model)
    for _ in range(8):
        torch.testing.assert_close(compiled(x, 0.5), expected)
        accel.wait(60)
    reasons = str(accel.explain(model)(x, 0.5))
    assert "unknown origin" not in reasons, reasons
    before = accel.counters()["segments_served"]
    compiled(x, 0.5)
    assert accel.counters()["segments_served"] >= before + 3, reasons
