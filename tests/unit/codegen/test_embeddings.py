"""Gradients of embeddings: a kernel of the C++ target, whose bits are eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_training import check, leaf


def embedding_steps(weight: torch.Tensor, index: torch.Tensor, padding: int | None) -> list[str]:
    """The steps of the backward, whose gradient has eager's bits."""

    def function(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.embedding(index, weight, padding)

    gradient = check(function, weight, index, exact=True)
    return [step["op"] for step in gradient["plan"]["steps"]]


@pytest.mark.parametrize("padding", [None, 0, 3])
@pytest.mark.parametrize("size", [(), (0,), (9,), (4, 64), (2, 3, 5)])
def test_gradient_of_an_embedding(size: tuple[int, ...], padding: int | None) -> None:
    index = torch.randint(0, 20, size)
    for dtype in (torch.float32, torch.float64):
        assert embedding_steps(leaf(20, 33, dtype=dtype), index, padding) == ["kernel"]


def test_gradient_of_an_embedding_that_many_share() -> None:
    spread = torch.arange(10).expand(4, 10)
    assert embedding_steps(leaf(20, 7), spread, None) == ["kernel"]
    index = torch.randint(0, 5001, (300,))
    assert embedding_steps(leaf(5001, 65), index, None) == ["kernel"]
    assert "extern" in embedding_steps(leaf(20, 8, dtype=torch.bfloat16), spread, None)
