"""Writes to tensors whose elements overlap one another: values and warnings are eager's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import accel
from accel.codegen.tensor_graph import View


def _rows(w: torch.Tensor, i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w[i] = v
    return w * 2


def _added(w: torch.Tensor, i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w.index_put_((i,), v, accumulate=True)
    return w * 2


def _chosen(w: torch.Tensor, i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    w.masked_fill_(torch.arange(10)[:, None] == i[0], 3.0)
    return w * 2


def _inside(w: torch.Tensor, i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    made = (w[:1] + 1).expand(10, 8)
    made[i] = v
    return made * 2


LAYOUTS: dict[str, Callable[[], torch.Tensor]] = {
    "expanded": lambda: torch.zeros(1, 8).expand(10, 8),
    "windows": lambda: torch.zeros(40).as_strided((10, 8), (2, 1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f", [_rows, _added, _chosen, _inside])
def test_writes_to_what_overlaps_itself(f: Callable[..., Any], layout: str) -> None:
    compiled = accel.optimize(f)
    for seed in range(5):
        torch.manual_seed(seed)
        i, v = torch.randperm(10)[:5], torch.randn(5, 8)
        runs = []
        for call in (f, compiled):
            w = LAYOUTS[layout]()
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                with accel.disable() if call is f else warnings.catch_warnings():
                    result = call(w, i, v)
            runs.append((result, w.clone(), [str(g.message) for g in given]))
            accel.wait(60)
        (theirs, w_theirs, warned_theirs), (mine, w_mine, warned_mine) = runs
        assert torch.equal(mine, theirs)
        assert torch.equal(w_mine, w_theirs)
        assert warned_mine == warned_theirs


@pytest.mark.parametrize(
    ("sizes", "strides", "overlaps"),
    [
        ((10, 8), (8, 1), False),
        ((8, 10), (1, 8), False),
        ((5, 4), (16, 2), False),
        ((1, 8), (0, 1), False),
        ((), (), False),
        ((0, 8), (0, 1), False),
        ((10, 8), (0, 1), True),
        ((10, 8), (2, 1), True),
        ((2, 2, 2), (1, 1, 5), True),  # spans as many elements as it has
    ],
)
def test_which_views_overlap(sizes: Any, strides: Any, overlaps: bool) -> None:
    assert View(0, sizes, strides, 0, "float32").may_overlap_itself is overlaps


def test_every_other_column_of_open_sizes_stays_compiled() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x[:, ::2] += 1
        return x.exp()

    compiled = accel.optimize(f)
    for sizes in ((4, 6), (5, 8), (7, 9), (3, 11)):
        for _ in range(3):
            x = torch.randn(sizes)
            _check(compiled, x)
            accel.wait(60)
    before = accel.counters()["calls_compiled"]
    x = torch.randn(6, 13)
    _check(compiled, x)
    assert accel.counters()["calls_compiled"] == before + 1


def _check(f: Callable[..., Any], x: torch.Tensor) -> None:
    with accel.disable():
        expected = f(x)
    torch.testing.assert_close(f(x), expected)
