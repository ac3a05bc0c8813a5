"""Convolutions over tiles: every kind of block, edges, accuracy, numbers that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_graph import _OUT_DIR, capture, check, compile_it, library_of
from plan_runner import run_plan
from test_training import check as check_gradients
from test_training import check_each, differentiable, leaf

from accel.codegen import CodegenOptions, compile_graph, winograd
from accel.codegen.build import vector_bytes

pytestmark = pytest.mark.skipif(vector_bytes() != 64, reason="needs vectors of 64 bytes")
randn = torch.randn

# images, channels, filters, height, width, padding
CASES = [
    (1, 16, 64, 14, 14, 1),  # one image, one block
    (5, 24, 40, 7, 7, 1),  # several images a block, the last one not full
    (2, 64, 48, 56, 56, 1),  # lines of tiles
    (1, 33, 33, 9, 300, 0),  # parts of a line
    (3, 70, 1, 20, 21, 2),  # one filter; padding that whole tiles see
    (1, 200, 300, 13, 15, 1),  # sums in chunks, filters in parts
    (2, 16, 64, 150, 5, (2, 0)),
    (1, 65, 20, 40, 3, (0, 3)),
]


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


def _is_over_tiles(compilation: object) -> bool:
    return any("winograd_f32(" in text for text in compilation.texts)  # type: ignore[attr-defined]


def _convolution(padding: object, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.conv2d(x, weight, padding=padding)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["planes", "by channels", "images by channels"])
def test_every_kind_of_block(case: tuple[int, ...], threads: int, layout: str) -> None:
    images, channels, filters, height, width, padding = case
    weight, bias = randn(filters, channels, 3, 3) / (9 * channels) ** 0.5, randn(filters)
    x = randn(images, channels, height, width)
    if layout != "planes":
        x = x.to(memory_format=torch.channels_last)
    if layout == "by channels":
        weight = weight.to(memory_format=torch.channels_last)

    def model(x: torch.Tensor) -> torch.Tensor:
        out = F.conv2d(x, weight, bias, padding=padding)
        return F.gelu(out) + out

    graph, inputs, (eager,) = capture(model, [x])
    c = compile_it(graph)
    assert _is_over_tiles(c)
    ours = run_plan(c.plan, library_of(c), inputs, threads=threads)
    assert ours is not None
    torch.testing.assert_close(ours[0], eager, rtol=1e-4, atol=1e-5)
    assert ours[0].stride() == eager.stride()


@pytest.mark.parametrize("channels", [16, 64, 128, 600])
@pytest.mark.parametrize("numbers", ["normal", "positive", "behind relu", "offset weights"])
def test_accuracy(channels: int, numbers: str) -> None:
    torch.manual_seed(channels)
    x, w = randn(2, channels, 28, 28), randn(32, channels, 3, 3)
    if numbers == "positive":
        x, w = x.abs(), w.abs()
    elif numbers == "behind relu":
        x = x.relu()
    elif numbers == "offset weights":
        w = w + 5

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, padding=1)

    graph, sources, (eager,) = capture(model, [x, w])
    c = compile_it(graph)
    assert _is_over_tiles(c)
    ours = run_plan(c.plan, library_of(c), sources)
    assert ours is not None
    exact = model(x.double(), w.double())
    assert _error(ours[0], exact) <= 1.5 * _error(eager, exact)


def test_without_tiles() -> None:
    weight = randn(32, 32, 3, 3)
    off = {"tiled_convolutions": False}
    c = check(_convolution(1, weight), randn(1, 32, 20, 20), rtol=1e-4, atol=1e-4, **off)
    assert not _is_over_tiles(c)


def test_whole_numbers_are_exact() -> None:
    x = torch.randint(-8, 9, (2, 40, 30, 30)).float()
    weight = torch.randint(-8, 9, (50, 40, 3, 3)).float()
    check(_convolution(1, weight), x, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_numbers_that_spread_no_further_than_in_eager(
    value: float, layout: torch.memory_format
) -> None:
    """Tiles overlap more results than windows do; these must not see the number."""
    weight = randn(40, 32, 3, 3).to(memory_format=layout)
    for place in ((0, 3, 4, 5), (1, 31, 0, 0), (1, 0, 15, 16)):
        x = randn(2, 32, 16, 17).to(memory_format=layout)
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


def _calls(gradient: dict[str, Any]) -> list[str]:
    return [s["target"] for s in gradient["plan"]["steps"] if s["op"] == "extern"]


@pytest.mark.parametrize("padding", [0, 1, 2, (2, 0)])
def test_gradients(padding: int | tuple[int, int]) -> None:
    w, b = leaf(40, 24, 3, 3), leaf(40)
    check_gradients(
        lambda x, w, b: F.conv2d(x, w / 15, b, padding=padding), leaf(3, 24, 19, 23), w, b
    )


def test_a_gradient_for_images_alone_needs_no_call() -> None:
    x, weight = leaf(2, 24, 19, 23), randn(40, 24, 3, 3) / 15
    (gradient,) = check_each(lambda x, w: F.conv2d(x, w, padding=1).tanh(), x, weight)
    assert _calls(gradient) == []


def test_gradients_for_weights_alone() -> None:
    x, weight = randn(2, 24, 19, 23), leaf(40, 24, 3, 3)
    (gradient,) = check_each(lambda x, w: F.conv2d(x, w / 15, padding=1), x, weight)
    assert _calls(gradient) == ["aten::convolution_backward"]


@pytest.mark.parametrize("options", [{"padding": 3}, {"dilation": 2}, {"stride": 2}], ids=str)
def test_gradients_of_other_convolutions(options: dict[str, int]) -> None:
    x, weight = leaf(2, 24, 20, 20), randn(40, 24, 3, 3) / 15
    (gradient,) = check_each(lambda x, w: F.conv2d(x, w, **options), x, weight)  # type: ignore[arg-type]
    assert _calls(gradient) == ["aten::convolution_backward"]


def test_accuracy_of_gradients() -> None:
    torch.manual_seed(1)
    x, w = leaf(2, 128, 20, 20), randn(128, 128, 3, 3)
    graph, (out,) = differentiable(lambda x, w: F.conv2d(x, w, padding=1), [x, w])
    plan = compile_graph(graph, out_dir=_OUT_DIR, options=CodegenOptions())
    (gradient,) = plan["gradients"]
    saved = [[x, w][i].detach() for kind, i in gradient["saved"] if kind == "input"]
    grad = torch.randn_like(out)
    ours = run_plan(gradient["plan"], _OUT_DIR / plan["library"], [*saved, grad])
    assert ours is not None and not _calls(gradient)
    (eager,) = torch.autograd.grad(out, x, grad)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.conv2d(wide, w.double(), padding=1), wide, grad.double())
    assert _error(ours[0], exact) <= 1.5 * _error(eager, exact)


@pytest.mark.parametrize("by_channels", [False, True], ids=["planes", "by channels"])
def test_what_a_masked_tap_meets_does_not_count(by_channels: bool) -> None:
    """Not in the last digit: a pixel that a causal kernel must not see, and the sign of sums of nothing negative."""
    layout = torch.channels_last if by_channels else torch.contiguous_format
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [0, 0, 0]])
    causal = torch.randn(48, 32, 3, 3) * mask
    plus = torch.rand(48, 32, 3, 3) * torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])

    def run(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        weight, x = weight.to(memory_format=layout), x.to(memory_format=layout)
        graph, inputs, _ = capture(lambda x, w: F.conv2d(x, w, padding=1), [x, weight])
        c = compile_it(graph)
        assert _is_over_tiles(c)
        answer = run_plan(c.plan, library_of(c), inputs)
        assert answer is not None
        return answer[0]

    x = torch.randn(2, 32, 20, 20)
    later = x.clone()
    later[:, :, 10, 7:] = torch.randn(2, 32, 13)
    later[:, :, 11:] = torch.randn(2, 32, 9, 20)
    before, after = run(causal, x), run(causal, later)
    assert torch.equal(before[:, :, :10], after[:, :, :10])
    assert torch.equal(before[:, :, 10, :7], after[:, :, 10, :7])
    sparse = torch.rand(2, 32, 20, 20) * (torch.rand(2, 1, 20, 20) > 0.9)
    sums = run(plus, sparse)
    assert (sums >= 0).all()
    assert torch.equal(sums == 0, F.conv2d(sparse, plus, padding=1) == 0)
