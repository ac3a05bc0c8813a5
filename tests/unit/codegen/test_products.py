"""Matrix products and one-pixel convolutions: layouts, remainders, epilogues, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, check, compile_it, library_of
from plan_runner import run_plan

from accel.codegen import convolutions
from accel.codegen.build import cpu_features, vector_bytes
from accel.codegen.products import column_block, row_block
from accel.codegen.program import LoopNode, TemplateNode

pytestmark = pytest.mark.skipif(vector_bytes() != 64, reason="needs vectors of 64 bytes")
randn = torch.randn
# Around every block size: few rows, a panel, several panels, chunks along k, row blocks.
SHAPES = [
    (1, 768, 768),
    (2, 70, 640),
    (5, 300, 200),
    (10, 64, 640),
    (3, 33, 100),
    (8, 64, 256),
    (9, 90, 77),
    (11, 768, 100),
    (16, 257, 130),
    (33, 300, 200),
    (49, 1024, 97),
    (128, 1024, 300),
    (300, 512, 520),
    (17, 129, 17),
]


def externs(compilation: object) -> list[str]:
    plan = compilation.plan  # type: ignore[attr-defined]
    return [s["target"] for s in plan["steps"] if s["op"] == "extern"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(shape: tuple[int, int, int], bias: bool) -> None:
    m, k, n = shape
    layer = torch.nn.Linear(k, n, bias=bias)
    assert not externs(check(lambda x: layer(x), randn(m, k), rtol=1e-4, atol=1e-5))
    # Rows that are apart in memory.
    check(lambda x: layer(x[:, :k]), randn(m, 2 * k), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[8:], ids=str)
def test_products_with_a_matrix_by_rows(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    b, c = randn(k, n) / k**0.5, randn(m, n)
    check(lambda x: x @ b, randn(m, k), rtol=1e-4, atol=1e-4)
    check(lambda x: torch.addmm(c, x, b), randn(m, k), rtol=1e-4, atol=1e-4)
    check(lambda x: torch.addmm(c[:, :1], x, b), randn(m, k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    layer = torch.nn.Linear(k, n).bfloat16()
    c = check(lambda x: layer(x), randn(m, k).bfloat16(), rtol=2e-2, atol=1e-2)
    features = cpu_features().split()
    if "avx512_bf16" in features and "amx_bf16" not in features and k % 2 == 0:
        assert not externs(c)


@pytest.mark.parametrize("rows", [1, 9, 40, 70])
def test_epilogues(rows: int) -> None:
    layer, other = torch.nn.Linear(96, 200), torch.nn.Linear(96, 200)
    scale = randn(200)

    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = layer(x)
        return F.gelu(h) + y, torch.relu(h * scale).double(), other(x).sum(-1), h > 0

    check(model, randn(rows, 96), randn(rows, 200), rtol=1e-4, atol=1e-5, externs=0)


def test_results_with_two_readers_are_computed_once() -> None:
    layer = torch.nn.Linear(300, 300)

    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = layer(x)
        return h.t() + 1, h.softmax(-1)

    check(model, randn(40, 300), rtol=1e-4, atol=1e-5, externs=0)


def test_products_of_the_same_rows_pack_them_once() -> None:
    layers = [torch.nn.Linear(256, 300) for _ in range(3)]
    c = check(lambda x: tuple(layer(x) for layer in layers), randn(30, 256), rtol=1e-4, atol=1e-5)
    packs = [s for s in c.plan["steps"] if len(s["buffers"]) == 2]
    assert len(packs) == 1


@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 256, 56, 56, 1),
        (2, 256, 64, 14, 14, 1),
        (2, 128, 256, 28, 28, 2),
        (3, 20, 30, 9, 5, 1),
        (1, 1024, 70, 7, 7, 1),
        (2, 17, 600, 15, 15, 2),
        (1, 16, 16, 10, 11, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_one_pixel_convolutions(shape: tuple[int, ...], bias: bool) -> None:
    images, channels, filters, height, width, step = shape
    weight = randn(filters, channels, 1, 1) / channels**0.5
    add = randn(filters) if bias else None
    x = randn(images, channels, height, width)

    def model(x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv2d(x, weight, add, stride=step))

    check(model, x, rtol=1e-4, atol=1e-4, externs=0)


CONVOLUTIONS = [
    # images, channels, filters, size, taps, options
    (1, 24, 40, (14, 14), (3, 3), {"padding": 1}),
    (1, 16, 35, (7, 7), (3, 3), {"padding": 1}),
    (3, 16, 35, (7, 7), (3, 3), {"padding": 1}),
    (2, 16, 33, (20, 37), (3, 3), {}),
    (2, 16, 33, (20, 37), (3, 3), {"stride": 2, "padding": 1}),
    (1, 3, 64, (64, 64), (7, 7), {"stride": 2, "padding": 3}),
    (1, 16, 32, (40, 9), (5, 2), {"stride": (1, 3), "padding": (4, 1)}),
    (2, 16, 32, (18, 18), (3, 3), {"dilation": 3, "padding": 3}),
    (2, 17, 37, (12, 31), (1, 4), {"dilation": (2, 5), "padding": (0, 2), "stride": (3, 1)}),
    (1, 1, 32, (16, 16), (4, 4), {"stride": 4}),
    (2, 70, 32, (5, 5), (5, 5), {"padding": 4}),
    (1, 300, 16, (4, 4), (1, 1), {"padding": 1}),
    (2, 20, 34, (50,), (5,), {"padding": 2}),
    (3, 20, 34, (50,), (3,), {"stride": 2, "dilation": 2}),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("layout", ["as it comes", "unaligned"])
def test_convolutions(case: tuple[Any, ...], layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "_PIXELS_FOR_ONEDNN", 1 << 30)
    images, channels, filters, size, taps, options = case
    convolve = F.conv2d if len(size) == 2 else F.conv1d
    weight = randn(filters, channels, *taps) / (channels * taps[0] * taps[-1]) ** 0.5
    bias, scale = randn(filters), randn(filters, *(1 for _ in size))
    x = randn(images, channels, *size)
    if layout == "unaligned":
        x = randn(x.numel() + 1)[1:].view(x.shape)

    def model(x: torch.Tensor) -> torch.Tensor:
        out = convolve(x, weight, bias, **options)
        return F.gelu(out * scale) + out

    check(model, x, rtol=1e-4, atol=1e-4, externs=0)


def test_convolutions_do_not_read_outside_of_their_images() -> None:
    weight = torch.ones(32, 16, 3, 3)
    inside = torch.full((3, 16, 9, 9), torch.nan)
    inside[1] = 1.0  # neighbours in memory must not reach this image

    c = check(lambda x: F.conv2d(x[1:2], weight, padding=1), inside)
    assert not externs(c)
    check(lambda x: F.conv2d(x, weight, padding=1), inside)


def test_infinite_pixels() -> None:
    weight = randn(32, 16, 3, 3)
    x = randn(2, 16, 9, 9)
    x[0, 3, 4, 4], x[1, 2, 0, 0] = torch.inf, torch.nan
    check(lambda x: F.conv2d(x, weight, padding=1), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        ((1, 32, 8, 8), (32, 16, 3, 3), {"groups": 2}),
        ((1, 32, 8, 8), (31, 32, 2, 3), {}),
        ((1, 32, 3, 3), (32, 32, 3, 3), {"padding": 1}),
        ((1, 2, 20, 20), (32, 2, 2, 2), {}),
        ((1, 1, 40, 40), (32, 1, 9, 9), {}),
        ((1, 16, 5, 5, 5), (16, 16, 3, 3, 3), {}),
        ((4, 32, 20, 20), (32, 32, 3, 3), {"padding": 1, "dilation": 2}),
    ],
    ids=str,
)
def test_other_convolutions_stay_with_aten(case: tuple[Any, ...]) -> None:
    sizes, taps, options = case
    weight = randn(taps)
    convolve = F.conv2d if len(sizes) == 4 else F.conv3d
    c = check(lambda x: convolve(x, weight, **options), randn(sizes), rtol=1e-4, atol=1e-4)
    assert externs(c) == ["aten::convolution"]


def test_epilogues_write_only_what_is_read() -> None:
    layer = torch.nn.Linear(300, 200)
    c = check(lambda x: F.gelu(layer(x)) * 2, randn(40, 300), rtol=1e-4, atol=1e-5)
    product = c.plan["steps"][-1]
    kinds = [c.plan["buffers"][b]["kind"] for b in product["buffers"]]
    assert len(kinds) == 4 and kinds.count("output") == 1  # rows, weight, bias
    weight, scale = randn(32, 16, 1, 1), randn(32, 1, 1)
    c = check(
        lambda x: F.relu(F.conv2d(x, weight) * scale) + 1, randn(2, 16, 8, 8), rtol=1e-4, atol=1e-4
    )
    (product,) = c.plan["steps"]
    assert len(product["buffers"]) == 4


@pytest.mark.parametrize("options", [{"march": "haswell"}, {"products": False}], ids=str)
def test_without_our_products(options: dict[str, object]) -> None:
    layer, weight = torch.nn.Linear(300, 200), randn(32, 32, 1, 1)
    c = check(lambda x: F.gelu(layer(x)), randn(40, 300), **options)
    assert externs(c) == ["aten::addmm.out"]
    c = check(lambda x: F.relu(F.conv2d(x, weight)), randn(2, 32, 9, 9), **options)
    assert externs(c) == ["aten::convolution"]


@pytest.mark.parametrize("cores", [1, 16, 64])
def test_many_cores_get_smaller_units(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    layer = torch.nn.Linear(300, 200)
    check(lambda x: layer(x) @ layer.weight, randn(300, 300), rtol=1e-4, atol=1e-4, externs=0)
    assert 64 <= column_block(300, 200) <= 256 and row_block(300, 200) % 12 == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_thread_count_gives_the_same(threads: int) -> None:
    layer = torch.nn.Linear(600, 500)
    x = randn(200, 600)
    graph, inputs, _ = capture(lambda x: layer(x) @ layer.weight, [x])
    c = compile_it(graph)
    one = run_plan(c.plan, library_of(c), inputs, threads=1)
    many = run_plan(c.plan, library_of(c), inputs, threads=threads)
    assert one is not None and many is not None and torch.equal(one[0], many[0])


@pytest.mark.parametrize("threads", [2, 3])
def test_every_thread_count_gives_the_same_convolution(threads: int) -> None:
    weight, thin = randn(600, 32, 3, 3), randn(40, 600, 1, 1)
    x = randn(3, 32, 7, 7)
    graph, inputs, _ = capture(
        lambda x: F.conv2d(F.relu(F.conv2d(x, weight, padding=1)), thin), [x]
    )
    c = compile_it(graph)
    assert not externs(c)
    one = run_plan(c.plan, library_of(c), inputs, threads=1)
    many = run_plan(c.plan, library_of(c), inputs, threads=threads)
    assert one is not None and many is not None and torch.equal(one[0], many[0])


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt())


def _is_as_accurate(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    graph, sources, (eager,) = capture(function, list(inputs))
    c = compile_it(graph)
    ours = run_plan(c.plan, library_of(c), sources)
    assert ours is not None
    exact = function(*(t.double() for t in inputs))
    assert _error(ours[0], exact) <= 1.5 * _error(eager, exact)


@pytest.mark.parametrize(
    "shape", [(1, 768, 3072), (8, 4096, 512), (128, 3072, 768), (32, 768, 768)], ids=str
)
def test_accuracy(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    torch.manual_seed(3)
    w, x = randn(n, k), randn(m, k)
    _is_as_accurate(lambda x, w: F.linear(x, w), x, w)
    _is_as_accurate(lambda x, w: F.linear(x, w), x.abs(), w.abs())
    if m >= 16:
        _is_as_accurate(lambda x, w: x @ w, x, randn(k, n))


@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 64, 20, 3),
        (2, 256, 32, 7, 3),
        (1, 512, 64, 9, 1),
        (2, 3, 32, 33, 7),
        (1, 40, 17, 5, 5),
    ],
    ids=str,
)
def test_accuracy_of_convolutions(shape: tuple[int, ...]) -> None:
    images, channels, filters, size, taps = shape
    torch.manual_seed(5)
    x, w = randn(images, channels, size, size), randn(filters, channels, taps, taps)

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, padding=taps // 2)

    _is_as_accurate(model, x, w)
    _is_as_accurate(model, x.abs(), w.abs())


@pytest.mark.parametrize("shape", [(3, 64, 256), (8, 33, 100), (10, 96, 48)], ids=str)
def test_accuracy_of_few_rows(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    torch.manual_seed(6)
    x, w = randn(m, k), randn(n, k)
    _is_as_accurate(lambda x, w: F.linear(x, w), x, w)


@pytest.mark.parametrize("m", [1, 5, 7, 8, 11, 12, 13, 24, 25, 29])
def test_small_products_of_any_number_of_rows(m: int) -> None:
    for k, n in ((20, 48), (33, 17), (64, 400)):
        b, c = randn(k, n), randn(n)
        check(lambda x: x @ b, randn(m, k), rtol=1e-4, atol=1e-4, externs=0)
        check(lambda x: torch.addmm(c, x, b), randn(m, k), rtol=1e-4, atol=1e-4, externs=0)


def test_a_weight_of_a_loop_is_turned_once() -> None:
    weight = randn(256, 64) / 8

    def loop(steps: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def f(x: torch.Tensor) -> torch.Tensor:
            for _ in range(steps):
                x = torch.tanh(F.linear(x, weight))[:, :64]
            return x

        return f

    for steps, by_rows in ((2, 0), (3, 3), (7, 7)):
        c = check(loop(steps), randn(8, 64), rtol=1e-4, atol=1e-4, externs=0)
        texts = [step.text for step in c.program.steps if isinstance(step, TemplateNode)]
        assert sum("small_gemm<8, 256, 64, false>" in text for text in texts) == by_rows
        written = [s.buffer for s in c.program.steps if isinstance(s, LoopNode)]
        turned = [b for b in written if c.graph.buffers[b].view.sizes == (64, 256)]
        assert len(turned) == (by_rows > 0)


def test_a_weight_that_the_graph_writes_is_turned_anew() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = F.linear(x, w)
        w.mul_(0.5)
        for _ in range(3):
            x = F.linear(x, w)
        return x

    check(f, randn(8, 64), randn(64, 64) / 8, rtol=1e-4, atol=1e-4, externs=0)


@pytest.mark.parametrize(
    "shape",
    [(4, 3, 64, 32, 40, 7, 2, 3), (5, 1, 32, 20, 28, 5, 1, 2), (4, 3, 96, 33, 31, 4, 4, 0)],
    ids=str,
)
def test_first_layers_over_several_images(shape: tuple[int, ...]) -> None:
    images, channels, filters, height, width, taps, step, padding = shape
    weight, bias = randn(filters, channels, taps, taps) / taps, randn(filters)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(F.conv2d(x, weight, bias, step, padding))

    check(model, randn(images, channels, height, width), rtol=1e-4, atol=1e-5, externs=0)
