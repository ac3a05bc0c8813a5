"""Chains of small products: what lies by columns between them, and what must not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_graph import check

from accel.codegen.build import vector_bytes

pytestmark = pytest.mark.skipif(vector_bytes() != 64, reason="needs vectors of 64 bytes")
randn = torch.randn


def layers(*sizes: int, bias: bool = True) -> list[torch.nn.Linear]:
    return [torch.nn.Linear(k, n, bias=bias) for k, n in itertools.pairwise(sizes)]


def by_columns(compilation: Any) -> list[str]:
    """The products' ends: "in" and "out" where rows are turned."""
    found = []
    for text in compilation.texts:
        if "columns_gemm<" in text:
            *_, turned_in, turned_out = text.split("columns_gemm<")[1].split(">")[0].split(", ")
            found.append("in" * (turned_in == "true") + "out" * (turned_out == "true"))
    return found


def lying_by_columns(compilation: Any) -> list[tuple[int, ...]]:
    graph = compilation.graph
    made = {r for n in graph.nodes for r in n.results if r is not None}
    buffers = [b for b in graph.buffers if b.id in made and len(b.sizes) >= 2]
    return [b.sizes for b in buffers if b.strides[-1] != 1]


def run(f: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    return check(f, *inputs, rtol=1e-4, atol=1e-5, externs=0)


@pytest.mark.parametrize("rows", [16, 32, 48])
@pytest.mark.parametrize("bias", [False, True])
def test_a_chain_turns_rows_at_its_ends_only(rows: int, bias: bool) -> None:
    a, b, c = layers(64, 96, 48, 80, bias=bias)
    found = run(lambda x: c(torch.relu(b(F.gelu(a(x))))), randn(rows, 64))
    assert sorted(by_columns(found)) == ["", "in", "out"]
    assert sorted(lying_by_columns(found)) == sorted([(rows, 96)] * 2 + [(rows, 48)] * 2)


def test_products_that_follow_at_once() -> None:
    a, b = layers(64, 80, 64)
    assert sorted(by_columns(run(lambda x: b(a(x)), randn(32, 64)))) == ["in", "out"]


def test_rows_in_several_dimensions() -> None:
    a, b = layers(64, 80, 64)
    found = run(lambda x: b(torch.tanh(a(x))), randn(2, 1, 16, 64))
    assert sorted(by_columns(found)) == ["in", "out"]


def test_sums_and_scales_on_the_way() -> None:
    a, b, c = layers(64, 64, 64, 64)
    scale = randn(64)

    def model(x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(a(x))
        return c(h * scale + torch.sigmoid(b(h)) * 0.5 - h.new_tensor(2.0)) + x

    found = run(model, randn(32, 64))
    assert len(lying_by_columns(found)) >= 3


@pytest.mark.parametrize("rows", [8, 20, 64])
def test_other_numbers_of_rows(rows: int) -> None:
    a, b = layers(64, 64, 64)
    assert not lying_by_columns(run(lambda x: b(torch.relu(a(x))), randn(rows, 64)))


def test_what_others_see_lies_by_rows() -> None:
    a, b = layers(64, 64, 64)
    x = randn(32, 64)

    def returned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(a(x))
        return h, b(h)

    def reduced(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(a(x))
        return h.sum(0), b(h)

    def cut(x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(a(x))
        return b(h) + h[:, 1:2]

    def reshaped(x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(a(x))
        return b(h).sum() + h.reshape(64, 32).softmax(0).sum()

    def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = torch.relu(a(x))
        y.copy_(h)
        return b(h)

    def beside(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return b(torch.relu(a(x)) + y)

    for model in (returned, reduced, cut, reshaped):
        assert not lying_by_columns(run(model, x)), model
    assert not lying_by_columns(run(written, x, torch.zeros(32, 64)))
    assert not lying_by_columns(run(beside, x, randn(32, 64)))


def test_rows_that_lie_by_columns_already() -> None:
    (a,) = layers(64, 80)
    found = run(lambda x: a(x.t()), randn(64, 32))
    assert by_columns(found) == ["out"]


def test_rows_that_are_apart_and_unaligned() -> None:
    a, b = layers(64, 80, 64)
    found = run(lambda x: b(torch.relu(a(x[:, 3:67]))), randn(32, 100))
    assert sorted(by_columns(found)) == ["in", "out"]


def test_a_bias_of_its_own_for_each_row() -> None:
    (a, b), bias = layers(64, 80, 64), randn(32, 80)
    found = run(lambda x: b(torch.addmm(bias, x, a.weight.t())), randn(32, 64))
    assert sorted(by_columns(found)) == ["in", "out"]
    column = randn(32, 1)
    run(lambda x: b(torch.addmm(column, x, a.weight.t())), randn(32, 64))


def test_weights_of_a_loop_are_turned_once_instead() -> None:
    (a,) = layers(64, 64)

    def model(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.relu(a(x))
        return x

    assert not by_columns(run(model, randn(32, 64)))


def test_infinities_and_nan_stay_in_their_rows() -> None:
    a, b = layers(64, 80, 64)
    x = randn(32, 64)
    x[3, 5], x[17, 0] = float("nan"), float("inf")
    run(lambda x: b(torch.relu(a(x))), x)
