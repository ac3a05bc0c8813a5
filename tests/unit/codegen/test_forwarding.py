"""Reads of what was written in parts: the same values, without the copies."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from capture_graph import check

randn = torch.randn


def writes(compilation: Any) -> int:
    return sum(node.target == "write" for node in compilation.graph.nodes)


def test_gates_that_are_changed_in_place() -> None:
    def cell(g: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g = g * 2
        i, f, u, o = g.chunk(4, 1)
        i.sigmoid_(), f.sigmoid_(), u.tanh_(), o.sigmoid_()
        c = f * c + i * u
        return o * torch.tanh(c), c

    found = check(cell, randn(8, 256), randn(8, 64), rtol=1e-5, atol=1e-6)
    assert writes(found) == 0
    assert len(found.plan["steps"]) == 2


def test_lstm_cells_are_one_kernel_beside_their_products() -> None:
    cell = torch.nn.LSTMCell(64, 64)

    def loop(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            h, c = cell(x, (h, c))
        return h

    found = check(loop, randn(8, 64), randn(8, 64), randn(8, 64), rtol=1e-4, atol=1e-5)
    assert writes(found) == 0


def test_a_column_of_a_transposed_view_and_values_that_are_broadcast() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = x * 1
        a.t()[2].copy_(y)
        a[1:3, 3:5] = 7.0
        a[:, 0] += 1
        return a[:, 2] * 2, a[1:3, 3:4] + a[1:3, 4:5], a[0, 3:5] * 3, a[:, :1].exp()

    assert writes(check(model, randn(4, 6), randn(4))) == 0


def test_reads_of_both_sides_keep_the_copy() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = x * 1
        a[:, 2:4] = 0.0
        return a[:, 3:5] * 2, a

    assert writes(check(model, randn(4, 6))) == 1


def test_steps_and_other_dtypes() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = x * 1
        a[:, ::2] = 3.0
        a[1] = torch.arange(6)
        b = a[2:].view(torch.int32) + 1
        return a[:, 1::2] + 1, a[1, 2:4] * 2, b

    check(model, randn(4, 6))


@pytest.mark.parametrize("seed", range(40))
def test_random_writes_and_reads(seed: int) -> None:
    choice = random.Random(seed)
    shape = choice.choice([(6,), (4, 6), (3, 4, 5), (2, 1, 6, 3), (5, 1)])

    def place() -> tuple[Any, ...]:
        index: list[Any] = []
        for n in shape[: choice.randint(1, len(shape))]:
            start = choice.randrange(n)
            kinds = [start, slice(start, choice.randint(start + 1, n)), slice(None), slice(0, n, 2)]
            index.append(choice.choice(kinds))
        return tuple(index)

    actions = [(choice.choice(["fill", "scale", "copy", "read"]), place()) for _ in range(9)]
    turned = choice.random() < 0.3 and len(shape) > 1

    def model(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        a, out = x * 1, []
        other = y.transpose(0, 1).contiguous().transpose(0, 1) if turned else y
        for k, (action, where) in enumerate(actions):
            if action == "fill":
                a[where] = float(k)
            elif action == "scale":
                a[where] *= 2
            elif action == "copy":
                a[where] = other[where] + k
            else:
                out.append(a[where] * 3)
        out.append(a.sum())
        if choice_of_whole:
            out.append(a)
        return out

    choice_of_whole = choice.random() < 0.5
    torch.manual_seed(seed)
    check(model, randn(*shape), randn(*shape), rtol=1e-5, atol=1e-5)
