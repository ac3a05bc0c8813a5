"""Convolutions over tiles: every kind of block, edges, accuracy, numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, check, compile_it, library_of
from plan_runner import run_plan

from accel.codegen import winograd
from accel.codegen.build import vector_bytes

pytestmark = pytest.mark.skipif(vector_bytes() != 64, reason="needs vectors of 64 bytes")
randn = torch.randn

# images, channels, filters, height, width, padding
CASES = [
    (1, 16, 32, 14, 14, 1),  # one image, one block
    (5, 24, 40, 7, 7, 1),  # several images a block, the last one not full
    (2, 64, 48, 56, 56, 1),  # lines of tiles
    (1, 17, 33, 9, 300, 0),  # parts of a line
    (3, 70, 1, 20, 21, 2),  # one filter; padding that whole tiles see
    (1, 200, 300, 13, 15, 1),  # sums in chunks, filters in parts
    (2, 16, 16, 150, 5, (2, 0)),
    (1, 33, 20, 40, 3, (0, 3)),
]


def _is_over_tiles(compilation: object) -> bool:
    return any("winograd_f32(" in text for text in compilation.texts)  # type: ignore[attr-defined]


def _convolution(padding: object, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.conv2d(x, weight, padding=padding)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_kind_of_block(case: tuple[int, ...], threads: int) -> None:
    images, channels, filters, height, width, padding = case
    weight, bias = randn(filters, channels, 3, 3) / (9 * channels) ** 0.5, randn(filters)
    x = randn(images, channels, height, width)

    def model(x: torch.Tensor) -> torch.Tensor:
        out = F.conv2d(x, weight, bias, padding=padding)
        return F.gelu(out) + out

    graph, inputs, (eager,) = capture(model, [x])
    c = compile_it(graph)
    assert _is_over_tiles(c)
    ours = run_plan(c.plan, library_of(c), inputs, threads=threads)
    assert ours is not None
    torch.testing.assert_close(ours[0], eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 64, 128, 600])
@pytest.mark.parametrize("positive", [False, True])
def test_accuracy(channels: int, positive: bool) -> None:
    torch.manual_seed(channels)
    x, w = randn(2, channels, 28, 28), randn(32, channels, 3, 3)
    if positive:
        x, w = x.abs(), w.abs()

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, padding=1)

    graph, sources, (eager,) = capture(model, [x, w])
    c = compile_it(graph)
    assert _is_over_tiles(c)
    ours = run_plan(c.plan, library_of(c), sources)
    assert ours is not None
    exact = model(x.double(), w.double())

    def error(got: torch.Tensor) -> float:
        return float((got.double() - exact).square().mean().sqrt())

    assert error(ours[0]) <= 1.5 * error(eager)


def test_whole_numbers_are_exact() -> None:
    x = torch.randint(-8, 9, (2, 40, 30, 30)).float()
    weight = torch.randint(-8, 9, (50, 40, 3, 3)).float()
    check(_convolution(1, weight), x, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
def test_numbers_that_spread_no_further_than_in_eager(value: float) -> None:
    """Tiles overlap more results than windows do; these must not see the number."""
    weight = randn(40, 32, 3, 3)
    for place in ((0, 3, 4, 5), (1, 31, 0, 0), (1, 0, 15, 16)):
        x = randn(2, 32, 16, 17)
        x[place] = value
        check(_convolution(1, weight), x, rtol=1e-4, atol=1e-4)
    if value != 3e38:  # whose sums depend on their order
        check(_convolution(1, weight), torch.full((2, 32, 16, 17), value), rtol=1e-4, atol=1e-4)


def test_large_numbers_do_not_overflow() -> None:
    x = torch.full((1, 16, 16, 16), 2e38)
    weight = torch.zeros(16, 16, 3, 3)
    weight[:, :, 1, 1] = 1 / 16  # sums of a tile overflow, results do not
    check(_convolution(1, weight), x, rtol=1e-5, atol=0)


def test_weights_that_are_not_finite() -> None:
    weight = randn(32, 16, 3, 3)
    weight[3, 2, 1, 1] = torch.inf
    check(_convolution(0, weight), randn(1, 16, 18, 18), rtol=1e-4, atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    inside = torch.full((3, 16, 9, 9), torch.nan)
    inside[1] = 1.0
    c = check(lambda x: F.conv2d(x[1:2], torch.ones(32, 16, 3, 3), padding=1), inside)
    assert _is_over_tiles(c)
    check(_convolution(1, torch.ones(32, 16, 3, 3)), inside)


def test_weights_change_between_calls() -> None:
    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, padding=1)

    x, w = randn(1, 16, 16, 16), randn(32, 16, 3, 3)
    graph, sources, _ = capture(model, [x, w])
    c = compile_it(graph)
    library = library_of(c)
    for _ in range(3):
        ours = run_plan(c.plan, library, sources)
        assert ours is not None
        torch.testing.assert_close(ours[0], model(x, w), rtol=1e-4, atol=1e-4)
        w.mul_(1.5)


@pytest.mark.parametrize(
    "case",
    [
        ((1, 64, 4, 4), (64, 64, 3, 3), {"padding": 1}),  # too few tiles for the weights' work
        ((1, 8, 40, 40), (64, 8, 3, 3), {}),
        ((1, 32, 20, 20), (32, 32, 3, 3), {"stride": 2}),
        ((1, 32, 20, 20), (32, 32, 3, 3), {"dilation": 2}),
        ((1, 32, 20, 20), (32, 16, 3, 3), {"groups": 2}),
        ((1, 32, 20, 20), (32, 32, 3, 1), {}),
    ],
    ids=str,
)
def test_other_convolutions(case: tuple[object, ...]) -> None:
    sizes, taps, options = case
    weight = randn(taps)  # type: ignore[arg-type]
    c = check(lambda x: F.conv2d(x, weight, **options), randn(sizes), rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    assert not _is_over_tiles(c)


@pytest.mark.parametrize("cores", [1, 4, 64])
def test_units(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    for images, channels, filters, height, width, _ in CASES:
        t = winograd.Tiling(images, channels, height, width, filters, height, width, 1, 1)
        assert t.part % 32 == 0 and t.units >= t.blocks
        block_images, down, across = t.block
        assert block_images * down * across <= 64
    small = winograd.Tiling(1, 64, 14, 14, 256, 14, 14, 1, 1)
    assert small.units == min(8, 2 * cores)
    weight = randn(256, 64, 3, 3)
    check(_convolution(1, weight), randn(1, 64, 14, 14), rtol=1e-4, atol=1e-4, externs=0)
