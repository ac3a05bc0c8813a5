"""Products of a GPU with what surrounds them as one Triton kernel: run by the interpreter beside eager
and float64, compiled for GPUs that are not here."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import capture_graph
import pytest
import test_open_graphs
import torch
import torch.nn.functional as F
from capture_graph import capture, compile_it
from plan_runner import run_plan
from test_triton_build import call, of_a_gpu
from triton_interpreter import interpreted, interpreter

from accel import expressions
from accel.capture import recorder
from accel.codegen import (
    CodegenOptions,
    CompileError,
    build_triton,
    compile_graph,
    emit_triton,
    product_blocks,
    products_triton,
    triton_versions,
)
from accel.codegen.build_triton import build_cubins, compile_kernel, kernels_of, load_module
from accel.codegen.build_triton import module_text as module_of
from accel.codegen.product_blocks import Blocks, Operand, Work, best_blocks, candidates, gain
from accel.codegen.products_triton import Product
from accel.codegen.targets import TARGETS
from accel.compile.blueprint import instantiate
from accel.trace import Ref, SegmentGraph, TensorMeta

triton = pytest.importorskip("triton")

GPUS = sorted(product_blocks.GPUS)
SMALL = [Blocks(16, 16, 16, 1, 2, 2), Blocks(16, 32, 16, 1, 2, 3), Blocks(32, 16, 32, 2, 1, 1)]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "cpu", interpreted())
    monkeypatch.setattr(capture_graph, "NATIVE", False)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be one kernel is one."""
    monkeypatch.setattr(products_triton, "gain", lambda blocks, work, gpu: 1.0)


def graph_of(
    function: Callable[..., Any], inputs: list[torch.Tensor], tf32: bool | None = False
) -> tuple[SegmentGraph, list[torch.Tensor], list[torch.Tensor]]:
    graph, sources, results = capture(function, inputs)
    return replace(graph, tf32=tf32), sources, results


def compiled(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    gpu: str = "sm_80",
    tf32: bool | None = False,
) -> Any:
    return compile_it(graph_of(function, list(inputs), tf32)[0], gpu=gpu)


def operations(compilation: Any) -> list[str]:
    return [row["op"] for row in compilation.plan["steps"] if row["op"] != "free"]


def check(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    kernels: int = 1,
    externs: int = 0,
    tf32: bool | None = False,
    rtol: float = 2e-5,
) -> Any:
    """The plan's results are as near to those of float64 as eager's, and lie as these do."""
    graph, sources, expected = graph_of(function, list(inputs), tf32)
    c = compile_it(graph, gpu="sm_80")
    found = operations(c)
    assert (found.count("launch"), found.count("extern")) == (kernels, externs), found
    actual = run_plan(c.plan, capture_graph.library_of(c), sources)
    assert actual is not None
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        exact = function(*wide)
    exact = list(exact) if isinstance(exact, (list, tuple)) else [exact]
    for got, want, truth in zip(actual, expected, exact, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        scale = max(float(truth.abs().max()), 1.0)
        off, eagers_off = (float((t.double() - truth).abs().max()) for t in (got, want))
        assert off <= 2 * eagers_off + scale * rtol, (off, eagers_off, scale)
    return c


# ---------------------------------------------------------------- random products

EPILOGUES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "gelu and residual": lambda y, r: F.gelu(y) + r,
    "relu": lambda y, r: y.relu(),
    "column": lambda y, r: y * r.select(-1, 0).unsqueeze(-1),
    "row": lambda y, r: (y + r.select(-2, 0).unsqueeze(-2)).sigmoid(),
    "cast": lambda y, r: y.float() * 0.5,
    "both": lambda y, r: (y, torch.where(y > r, y, r)),
    "transposed": lambda y, r: (y.transpose(-1, -2) * 2).contiguous(),
    "mask": lambda y, r: (y + r).tril(),
}  # fmt: skip
PREPARATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x,
    "scale": lambda x: x * 0.37,
    "exp": torch.exp,  # of zeros it makes no zeros
    "reciprocal": lambda x: 1 / (x.abs() + 0.5),
    "gated": lambda x: F.silu(x) * (x + 0.25),
}
LAYOUTS = ("plain", "turned", "sliced", "stepped")
EXTENTS = (1, 2, 5, 15, 16, 17, 31, 33, 40, 64)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    n = x.size(-1)
    if layout == "turned":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., n:]
    if layout == "stepped":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x


def random_product(seed: int) -> None:
    pick = random.Random(seed)
    torch.manual_seed(seed)
    m, n, k = (pick.choice(EXTENTS) for _ in range(3))
    dtype = pick.choice([torch.float32, torch.float32, *HALVES])
    kind = pick.choice(["mm", "linear", "addmm", "bmm", "baddbmm", "matmul"])
    batch = {"bmm": (3,), "baddbmm": (2,), "matmul": (2, 2)}.get(kind, ())
    left = laid_out(torch.randn(*batch, m, k), pick.choice(LAYOUTS)).to(dtype)
    right = laid_out(torch.randn(*batch, k, n), pick.choice(LAYOUTS)).to(dtype)
    rest = torch.randn(*batch, m, n).to(dtype)
    bias = torch.randn(*pick.choice([(n,), (m, n), (1, n), (m, 1)])).to(dtype)
    before = [pick.choice([*PREPARATIONS, "plain", "plain"]) for _ in range(2)]
    behind = pick.choice(list(EPILOGUES))
    alpha, beta = pick.choice([(1, 1), (0.5, 2), (-1.25, 1), (3, -1)])

    def function(
        left: torch.Tensor, right: torch.Tensor, rest: torch.Tensor, bias: torch.Tensor
    ) -> Any:
        left, right = PREPARATIONS[before[0]](left), PREPARATIONS[before[1]](right)
        if kind == "linear":
            y = F.linear(
                left, right.t(), bias[:, 0] if bias.shape == (n, 1) else bias.flatten()[:n]
            )
        elif kind == "addmm":
            y = torch.addmm(bias, left, right, alpha=alpha, beta=beta)
        elif kind == "baddbmm":
            y = torch.baddbmm(bias, left, right, alpha=alpha, beta=beta)
        else:
            y = left @ right
        return EPILOGUES[behind](y, rest)

    if kind == "linear" and bias.numel() < n:
        bias = torch.randn(n).to(dtype)
    rounding = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    graph, _, _ = graph_of(function, [left, right, rest, bias])
    c = compile_it(graph, gpu="sm_80")
    assert "extern" not in operations(c), (kind, before, behind, c.plan["steps"])
    check(function, left, right, rest, bias, kernels=len(operations(c)), rtol=rounding)


@pytest.mark.parametrize("seed", range(24))
def test_random_products(seed: int, taken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = SMALL[seed % len(SMALL)]
    monkeypatch.setattr(products_triton, "best_blocks", lambda work, gpu: blocks)
    random_product(seed)


@pytest.mark.parametrize("seed", range(100, 108))
def test_random_products_by_the_blocks_that_are_chosen(seed: int, taken: None) -> None:
    random_product(seed)


@pytest.mark.parametrize("seed", range(200, 204))
def test_positions_of_64_bits(seed: int, taken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit_triton, "_NARROW", 0)
    random_product(seed)


# ---------------------------------------------------------------- what is one kernel

X, W, B = torch.randn(20, 24), torch.randn(40, 24), torch.randn(40)


def test_a_layer_is_one_kernel(taken: None) -> None:
    check(lambda x, w, b: F.gelu(F.linear(x, w, b)), X, W, B)
    check(lambda x, w, b: F.gelu(F.linear(x, w, b)), X.view(4, 5, 24), W, B)


def test_a_gate_is_computed_where_it_is_multiplied(taken: None) -> None:
    c = check(lambda x, u, w: F.linear(F.silu(x) * u, w), X, X + 1, W)
    (product,) = c.steps
    assert isinstance(product, Product) and len(c.texts) == 1


def test_what_two_products_multiply_is_computed_once(taken: None) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> Any:
        y = F.silu(x)
        return (y @ w.t()).relu(), (y @ v.t()).tanh()

    check(function, X, W, W[:7] + 1, kernels=3)


def test_weights_in_bytes_are_widened_where_they_are_multiplied(taken: None) -> None:
    weight = torch.randint(-128, 128, (40, 24), dtype=torch.int8)
    scale = torch.rand(40, 1) / 64

    def function(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight.to(x.dtype) * scale.to(x.dtype))

    check(function, X, weight, scale)
    c = check(function, X.half(), weight, scale, rtol=3e-3)
    assert "*i8" in next(iter(c.texts))


def test_an_operand_that_is_only_cast(taken: None) -> None:
    """Sums of 32 terms, so whole rounds, where a plain load needs no mask either."""
    x, w = torch.randn(20, 32), torch.randn(40, 32)
    for dtype in (torch.float16, torch.bfloat16):
        check(lambda x, w: F.linear(x.to(w.dtype), w).relu(), x.to(dtype), w)
        check(lambda x, w: F.linear(x.to(w.dtype), w).relu(), x, w.to(dtype), rtol=1e-2)


def test_sums_of_one_term_and_of_the_same_terms(taken: None) -> None:
    check(lambda x, w: (x[:, :1] @ w[:, :1].t()).relu(), X, W)
    x = X[:, :1].clone()
    x[3] = torch.inf  # times nothing behind the last term, that would be NaN
    graph, sources, (want,) = graph_of(
        lambda x, w: (x.expand(20, 23) @ w[:, :23].abs().t()) * 2, [x, W]
    )
    c = compile_it(graph, gpu="sm_80")
    (got,) = run_plan(c.plan, capture_graph.library_of(c), sources) or []
    assert "extern" not in operations(c) and want[3].isinf().all()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    check(lambda x, w: (w[:, :1].expand(40, 23) @ x[:, :1].expand(20, 23).t()).relu(), X, W)


def test_two_products_of_which_one_takes_what_follows(taken: None) -> None:
    check(lambda x, w, v: F.silu(x @ w.t()) * (x @ v.t()), X, W, W + 1, externs=1)


def test_a_chain_takes_what_is_between_once(taken: None) -> None:
    c = check(lambda x, w, v: (F.gelu(x @ w.t()) @ v).relu(), X, W, W, kernels=2)
    assert all(isinstance(s, Product) for s in c.steps)


def test_heads_are_written_where_they_belong(taken: None) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (F.linear(x, w) * 2).view(4, 5, 8, 5).transpose(1, 2).contiguous()

    check(function, X, W)


def test_a_product_that_others_read_too_is_stored(taken: None) -> None:
    check(lambda x, w: (y := x @ w.t(), y.exp() + 1), X / 8, W)
    check(lambda x, w: ((y := x @ w.t()) * 2, y.softmax(-1)), X, W, kernels=2)


def test_what_cannot_be_one_kernel_calls_aten(taken: None) -> None:
    check(lambda x, w: (x @ w.t()).softmax(-1), X, W, externs=1)
    check(lambda x, w: (x @ w.t())[:, :8] * 2, X, W, externs=1)
    check(lambda x, w: x @ w.t(), X, W, kernels=0, externs=1)
    check(lambda x, w: (x.double() @ w.double().t()).relu(), X, W, kernels=3, externs=1)
    # Somebody else wants what is multiplied; both sides are the same.
    check(lambda x, w: (y := x.exp(), y @ w.t()), X, W, externs=1)
    check(lambda x: (y := x.exp() * 0.5) @ y.t(), X, externs=1)
    check(lambda x, w: torch.addmm(y := x.exp(), y, w), X[:, :20], W[:20, :20], externs=1)
    # What is multiplied with nothing may be anything.
    nan = torch.full((40,), torch.nan)
    y = lambda x, w, b: torch.addmm(b, x, w.t(), beta=0).relu()  # noqa: E731
    assert operations(compiled(y, X, W, nan)) == ["extern", "launch"]


def test_float32_needs_to_know_what_is_allowed(taken: None) -> None:
    function = lambda x, w: (x @ w.t()).relu()  # noqa: E731
    assert operations(compiled(function, X, W, tf32=None)) == ["extern", "launch"]
    assert operations(compiled(function, X.half(), W.half(), tf32=None)) == ["launch"]
    (exact,), (rounded,) = (compiled(function, X, W, tf32=t).texts for t in (False, True))
    assert 'input_precision="ieee"' in exact and "round_tf32" not in exact
    assert 'input_precision="tf32"' in rounded and rounded.count("round_tf32") == 2


def test_no_gpu_that_is_known_no_products(taken: None) -> None:
    function = lambda x, w: (x @ w.t()).relu()  # noqa: E731
    assert operations(compiled(function, X, W, gpu="sm_86")) == ["extern", "launch"]
    graph, _, _ = graph_of(function, [X, W])
    assert operations(compile_it(graph, gpu="sm_80", products=False)) == ["extern", "launch"]
    assert operations(compile_it(graph, gpu="sm_80", fuse=False)) == ["extern", "launch"]


@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_nothing_times_nothing(sizes: tuple[int, int, int], taken: None) -> None:
    m, n, k = sizes
    x, w, b = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    graph, sources, (want,) = graph_of(lambda x, w, b: torch.addmm(b, x, w).relu(), [x, w, b])
    c = compile_it(graph, gpu="sm_80")
    (got,) = run_plan(c.plan, capture_graph.library_of(c), sources) or []
    assert got.shape == want.shape and torch.allclose(got, want)


def test_infinities_stay_where_eager_has_them(taken: None) -> None:
    x, w = X.clone(), W.clone()
    x[3, 5], w[7, 2], x[9, 1] = torch.inf, torch.nan, -torch.inf
    # Behind the last of 24 terms nothing is multiplied with what a preparation makes of zeros.
    function = lambda x, w: ((1 / x) @ w.exp().t()) + 0.5  # noqa: E731
    graph, sources, (want,) = graph_of(function, [x[:, :23], w[:, :23]])
    c = compile_it(graph, gpu="sm_80")
    assert operations(c) == ["launch"]
    (got,) = run_plan(c.plan, capture_graph.library_of(c), sources) or []
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_tf32_is_rounded_to_the_nearest() -> None:
    odd = [
        1 + 2**-11,
        1 + 3 * 2**-11,
        -1 - 2**-11,
        1 + 2**-12,
        torch.inf,
        -torch.inf,
        torch.nan,
        0.0,
    ]
    values = torch.tensor([*odd, -0.0, 3.4e38, 1e-40])
    bits = torch.cat(
        [values, torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)]
    )
    text = (
        f"{emit_triton.HEAD.format('*fp32 *fp32', 1)}\ndef @(p0, p1):\n"
        "    x = tl.arange(0, 16)\n    value = tl.load(p0 + x, x < 13, other=0)\n"
        "    tl.store(p1 + x, round_tf32(value), x < 13)\n"
    )
    memory = [bits.clone().share_memory_(), torch.zeros(13).share_memory_()]
    interpreter().launch(text, 1, memory, [])
    got = memory[1]
    finite = got.view(torch.int32)[~got.isnan()]
    assert torch.all(finite & 0x1FFF == 0)
    assert got[:4].tolist() == [1 + 2**-10, 1 + 2**-9, -1 - 2**-10, 1.0]
    assert torch.equal(got[4:6], values[4:6]) and torch.all(got[[6, 11, 12]].isnan())
    assert torch.all(got[[6, 11, 12]].view(torch.int32) & 0x400000 != 0)  # no payload below is lost
    assert torch.equal(torch.signbit(got[7:9]), torch.tensor([False, True]))


def test_the_sum_of_tf32_is_as_near_as_ten_bits_are(taken: None) -> None:
    check(lambda x, w: (x @ w.t()).relu(), X, W, tf32=True, rtol=2**-10)


def test_what_is_allowed_is_asked_when_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (TensorMeta((2,), (1,), "float32", device) for device in ("cpu", "cuda:0"))
    answers = {True: "tf32", False: "ieee", None: "none"}
    for allowed, answer in answers.items():
        getter = {("cuda", "matmul"): answer}
        monkeypatch.setattr(
            torch._C, "_get_fp32_precision_getter", lambda *asked: getter[asked], raising=False
        )
        assert recorder._tf32([here]) is None
        assert recorder._tf32([here, there]) is bool(allowed)
    monkeypatch.setattr(torch._C, "_get_fp32_precision_getter", lambda *asked: "tf32")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert recorder._tf32([there]) is False


# ---------------------------------------------------------------- several sizes


def test_open_sizes(taken: None, tmp_path: Path) -> None:
    x, w = torch.randn(6, 9), torch.randn(7, 9)
    named = [
        call("v0", "torch.nn.functional.linear", Ref("a0"), Ref("a1")),
        call("v1", "torch.nn.functional.gelu", Ref("v0")),
    ]
    made = test_open_graphs.graph(named, [x, w], [(0, 0)], [F.gelu(F.linear(x, w))], ["v1"])
    options = CodegenOptions(verify=True, gpu="sm_80")
    blueprint = compile_graph(replace(made, tf32=False), out_dir=tmp_path, options=options)
    for rows in (2, 15, 16, 17, 33, 50):
        x = torch.randn(rows, 9)
        assert all(expressions.holds(t, [rows]) for t in blueprint["sizes"]["tests"])
        plan = instantiate(blueprint, [rows])
        assert [row["op"] for row in plan["steps"]] == ["launch"]
        found = run_plan(plan, tmp_path / plan["library"], [x, w, torch.tensor([rows])])
        assert found is not None
        torch.testing.assert_close(found[0], F.gelu(F.linear(x, w)), rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------- machine code


@pytest.fixture
def texts(taken: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The texts of all kernels of plans that the test compiles."""
    found: dict[str, str] = {}

    def note(texts: dict[str, str], out_dir: Path, options: Any) -> dict[str, Any]:
        found.update(texts)
        return {"library": None}

    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cuda"], build=note))
    return found


def machine_code(texts: dict[str, str], gpu: str, folder: Path) -> Any:
    (kernel,) = kernels_of(texts)
    module = load_module(module_of([kernel]), folder / "kernels.py")
    made = compile_kernel(module, kernel, gpu)
    assert made.metadata.shared <= triton_versions.SHARED_BYTES[gpu]
    return made


def layer(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w)) + r


def gated(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(x) * x, w * 0.5) + r


FACTS = [
    (layer, torch.bfloat16, False, (512, 512, 512)),
    (layer, torch.float16, False, (511, 513, 515)),
    (layer, torch.float32, True, (512, 512, 512)),
    (layer, torch.float32, False, (512, 512, 512)),
    (layer, torch.bfloat16, False, (8, 1024, 4096)),
    (gated, torch.bfloat16, False, (4096, 512, 512)),
    (gated, torch.float32, True, (300, 200, 100)),
]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", range(len(FACTS)))
def test_products_compile(case: int, gpu: str, texts: dict[str, str], tmp_path: Path) -> None:
    function, dtype, tf32, (m, n, k) = FACTS[case]
    inputs = [torch.zeros(sizes, dtype=dtype) for sizes in ((m, k), (n, k), (m, n))]
    compiled(function, *inputs, gpu=gpu, tf32=tf32)
    ptx = machine_code(texts, gpu, tmp_path).asm["ptx"]
    in_tensor_cores = "mma.sync" in ptx or "wgmma.mma_async" in ptx
    assert in_tensor_cores == (dtype != torch.float32 or tf32)
    if function is layer and k % 8 == 0:
        assert "cp.async" in ptx  # rounds overlap


@pytest.mark.parametrize("gpu", GPUS)
def test_large_blocks_use_what_the_gpu_has(
    gpu: str, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks(128, 128, 64, 8, 3)
    monkeypatch.setattr(products_triton, "best_blocks", lambda work, gpu: blocks)
    compiled(layer, *(torch.zeros(512, 512, dtype=torch.float16) for _ in range(3)), gpu=gpu)
    made = machine_code(texts, gpu, tmp_path)
    assert ("wgmma.mma_async" in made.asm["ptx"]) == (gpu == "sm_90")
    # Operands as estimated; what turns layouts around takes their place.
    assert made.metadata.shared <= blocks.shared_bytes(2)


def test_stages_give_way_to_shared_memory(
    texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = Blocks(64, 64, 64, 4, 4)
    monkeypatch.setattr(products_triton, "best_blocks", lambda work, gpu: blocks)
    compiled(layer, *(torch.zeros(256, 256, dtype=torch.float16) for _ in range(3)))

    def shared(most: int) -> int:
        monkeypatch.setitem(triton_versions.SHARED_BYTES, "sm_80", most)
        _, (row,) = build_cubins(kernels_of(texts), tmp_path / str(most), "sm_80")
        return max(image["shared_bytes"] for image in row["images"])

    assert shared(163 << 10) == 3 * 16384  # a stage is in registers
    assert shared(40_000) == 2 * 16384
    with pytest.raises(CompileError, match="bytes of shared memory"):
        shared(1000)


def test_the_stages_are_part_of_the_text() -> None:
    head = emit_triton.HEAD.format("*fp32", 4)
    (plain,) = kernels_of({f"{head}\ndef @(p0):\n    pass\n": "k0"})
    (staged,) = kernels_of({f"{head}{emit_triton.STAGES.format(5)}\ndef @(p0):\n    pass\n": "k0"})
    assert (plain.warps, plain.signature) == (staged.warps, staged.signature) == (4, ("*fp32",))
    assert (plain.stages, staged.stages) == (build_triton._PLAIN_STAGES, 5)


# ---------------------------------------------------------------- choices


def work(kind: str, m: int, n: int, k: int, batch: int = 1) -> Work:
    """A product with one pointwise kernel behind it."""
    item = product_blocks.item_bytes(kind)
    left, right, out = (batch * a * b * item for a, b in ((m, k), (k, n), (m, n)))
    apart = left + right + 3 * out
    return Work(batch, m, n, k, kind, Operand(left), Operand(right), out, apart, 1)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "tf32", "float32"])
def test_candidates_fit_every_gpu(kind: str, gpu: str) -> None:
    pick = random.Random(3)
    for _ in range(300):
        m, n, k = (pick.randint(1, 2 ** pick.randint(0, 14)) for _ in range(3))
        w = work(kind, m, n, k, pick.choice([1, 1, 16]))
        found = list(candidates(w, gpu))
        assert found, (m, n, k)
        for b in found:
            extents = (b.rows, b.columns, b.inner)
            assert all(e >= 16 and e & (e - 1) == 0 for e in extents), b
            item = product_blocks.item_bytes(kind)
            assert b.shared_bytes(item) <= triton_versions.SHARED_BYTES[gpu]
            assert b.rows * b.columns <= 32 * b.warps * 128  # sums in registers
        best = best_blocks(w, gpu)
        assert best in found
        assert product_blocks.seconds_with(best, w, gpu) < 1


@pytest.mark.parametrize("gpu", GPUS)
def test_what_memory_bounds_is_one_kernel_and_what_multiplies_long_is_not(gpu: str) -> None:
    def pays(*extents: int, kind: str = "bfloat16") -> bool:
        w = work(kind, *extents)
        best = best_blocks(w, gpu)
        assert best is not None
        return gain(best, w, gpu) > 0

    assert pays(64, 512, 512) and pays(65536, 256, 256) and pays(8192, 512, 64)
    assert not pays(4096, 4096, 4096) and not pays(8192, 8192, 8192)
    assert not pays(32, 128, 16384)  # few programs with long sums
    assert not pays(4096, 4096, 1024, kind="float32")


def test_choices_are_made_by_what_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Work] = []

    def note(blocks: Blocks, work: Work, gpu: str) -> float:
        seen.append(work)
        return -1.0

    monkeypatch.setattr(products_triton, "gain", note)
    x, w = torch.randn(20, 24), torch.randn(40, 24)
    c = compiled(lambda x, w, r: F.linear(F.silu(x), w) + r, x, w, torch.randn(20, 40))
    assert operations(c) == ["launch", "extern", "launch"]
    both, one = seen
    out, left, right = 4 * 20 * 40, 4 * 20 * 24, 4 * 40 * 24
    assert (both.m, both.n, both.k, both.kind) == (20, 40, 24, "float32")
    assert (both.apart_kernels, one.apart_kernels) == (2, 1)
    assert (both.left.size_bytes, both.right.size_bytes) == (left, right)
    assert both.left.cost > 1 and both.left.numel == 20 * 24 and one.left.cost == 0
    assert both.around_bytes == 2 * out  # the residual and the result
    assert one.apart_bytes == left + right + out + 3 * out
    assert both.apart_bytes == one.apart_bytes + 2 * left


# ---------------------------------------------------------------- whole graphs


def test_a_layer_on_a_gpu_is_one_launch(tmp_path: Path) -> None:
    graph = of_a_gpu(
        call("t", "torch.t", Ref("x")),
        call("v0", "torch.matmul", Ref("x"), Ref("t")),
        call("v1", "torch.relu", Ref("v0")),
        tf32=True,
    )
    out = TensorMeta((64, 64), (64, 1), "float32", "cuda:0")
    graph = replace(graph, output_metas=[out])
    assert SegmentGraph.from_json(graph.to_json()).tf32 is True
    options = CodegenOptions(verify=True, gpu="sm_90")
    plan = compile_graph(graph, out_dir=tmp_path, options=options)
    (launch,) = plan["steps"]
    assert launch["op"] == "launch" and launch["grid"] >= 1
    (kernel,) = plan["kernels"]
    assert [image["alignment"] for image in kernel["images"]] == [16, 1]
    unknown = compile_graph(replace(graph, tf32=None), out_dir=tmp_path, options=options)
    assert [row["op"] for row in unknown["steps"]] == ["extern", "launch"]
