"""Whole graphs beside eager: fusion counts, aliasing, writes, speculations, externs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, check, compile_it, library_of
from plan_runner import run_plan

from accel.codegen import CodegenOptions, CompileError, compile_graph
from accel.codegen.build import vector_bytes
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

_WIDE_VECTORS = vector_bytes() == 64  # products of our own need them


def randn(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes)


def test_pointwise_chains_are_one_kernel() -> None:
    check(lambda a, b: F.gelu(a * b + 1).tanh() - a, randn(8, 40), randn(40), kernels=1, externs=0)


def test_branches_of_a_chain_are_one_kernel() -> None:
    check(
        lambda a, b, c: (a.exp() * b.sigmoid() + c.tanh()).relu(),
        *(randn(8, 40) for _ in range(3)),
        kernels=1,
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: F.softmax(x * 2, -1) + 1,
        lambda x, w, b: F.log_softmax(x + w, -1),
        lambda x, w, b: F.layer_norm(x + 1, (96,), w, b),
        lambda x, w, b: F.rms_norm(x * 2, (96,), w) * b,
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
        lambda x, w, b: F.gelu(F.layer_norm(x, (96,), w, b)).sum(-1),
    ],
)
def test_a_row_is_one_kernel(function: object) -> None:
    check(function, randn(6, 7, 96), randn(96), randn(96), kernels=1, externs=0)  # type: ignore[arg-type]


def test_kernels_of_equal_layers_are_shared() -> None:
    layers = [torch.nn.Linear(200, 200) for _ in range(6)]

    def model(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = F.gelu(layer(x)) + x
        return x

    c = check(model, randn(9, 200), externs=0 if _WIDE_VECTORS else 6)
    assert len(c.texts) <= 2


def test_linear_by_blas_is_bit_equal_to_eager() -> None:
    layer = torch.nn.Linear(300, 200)
    x = randn(33, 300)
    check(lambda a: layer(a), x, rtol=0, atol=0, externs=1, products=False)


@pytest.mark.parametrize(
    "shape", [(1, 5, 7), (8, 16, 16), (3, 128, 128), (17, 33, 1), (128, 3, 127)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_small_products(shape: tuple[int, int, int], bias: bool) -> None:
    m, k, n = shape
    layer = torch.nn.Linear(k, n, bias=bias)
    check(lambda a: F.relu(layer(a)), randn(m, k), externs=0)
    check(lambda a, b: a @ b, randn(m, k), randn(k, n), externs=0)
    check(lambda a, b: a.t() @ b.t(), randn(k, m), randn(n, k))


def test_attention_and_convolution_call_aten() -> None:
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    norm = torch.nn.BatchNorm2d(8).eval()
    check(lambda a: F.relu(norm(conv(a))), randn(2, 3, 9, 9), externs=1)
    q = randn(2, 4, 9, 8)
    check(lambda a: F.scaled_dot_product_attention(a, a, a) * 2, q, externs=1)


def test_an_embedding_out_of_range_is_left_to_the_program() -> None:
    """Which raises eager's error (test_gathers.py)."""
    graph, inputs, _ = capture(
        lambda i, w: F.embedding(i, w) * 2, [torch.tensor([1, 2]), randn(5, 3)]
    )
    c = compile_it(graph)
    for outside in (5, 7, -1, 1 << 33):
        assert run_plan(c.plan, library_of(c), [torch.tensor([1, outside]), inputs[1]]) is None
    assert run_plan(c.plan, library_of(c), [torch.tensor([4, 0]), inputs[1]]) is not None


@pytest.mark.parametrize("dim", [0, -1])
def test_a_division_by_one_number_in_and_behind_a_loop(dim: int) -> None:
    def normalised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = x.abs().amax(dim, keepdim=True)
        y = x / largest
        return y, y.sum(dim, keepdim=True) / largest

    def scaled(x: torch.Tensor) -> torch.Tensor:
        y = x / 3.0
        return y - y.sum(dim, keepdim=True) / 3.0

    for function in (normalised, scaled):
        check(function, randn(9, 60), externs=0)
        check(function, randn(9, 60).bfloat16(), externs=0)


def test_two_loops_that_need_one_value_which_is_the_same_in_all_their_rounds() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        v = torch.trunc(x * x)
        return v / (v.abs().amax(1, keepdim=True) + 0.1)

    check(scaled, randn(33, 1).expand(33, 40), externs=0)
    check(lambda x: (x.expand(33, 40) * 2).std(1), randn(33, 1), externs=0)


@pytest.mark.parametrize("keepdim", [False, True])
def test_any_and_all_over_no_dimensions(keepdim: bool) -> None:
    for function in (torch.any, torch.all):
        check(lambda x: function(x > 0, dim=(), keepdim=keepdim), randn(5, 17))
        check(lambda x: function(x > 0, dim=(0, 1), keepdim=keepdim), randn(5, 17), externs=0)
    check(lambda x: x.sum((), keepdim=keepdim), randn(5, 17), externs=0)


def test_norms_of_nothing() -> None:
    check(lambda x: x.norm(dim=-1), randn(3, 0))
    check(lambda x: F.cosine_similarity(x, x * 2, dim=-1), randn(3, 0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.bool])
@pytest.mark.parametrize("size", [(5, 7), (16,), (33,), (3, 1000)])
def test_narrow_integers(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    x = torch.randint(-40000, 40000, size).to(dtype)
    other = torch.randint(-40000, 40000, size).to(dtype)
    for index in ((...,), (..., slice(None, None, 2)), (..., slice(1, None))):
        y, z = x[index], other[index]
        if dtype is torch.bool:
            check(lambda a, b: (~a & b, a ^ b, a.double() * 2, a + b.int()), y, z, externs=0)
        else:
            check(lambda a, b: (a * b + a - 3, a + b.double(), a > b, a.long()), y, z, externs=0)
    check(
        lambda a: (a.sum(-1), (a.float() * 3).to(dtype)), x if dtype is torch.bool else x.abs() % 7
    )


# ---------------------------------------------------------------- aliasing


def test_outputs_that_are_inputs_or_views() -> None:
    check(lambda x: (x, x[1:], x.t(), x + 1), randn(4, 6))
    check(lambda x: ((x * 2)[1:], (x * 2).t()), randn(4, 6))


def test_outputs_that_share_a_base_which_is_not_returned() -> None:
    check(lambda x: (x * 2).chunk(2, 1), randn(4, 6))


def test_equal_outputs_stay_apart() -> None:
    graph, inputs, _ = capture(lambda x: (x + 1, x + 1), [randn(3)])
    c = compile_it(graph)
    first, second = run_plan(c.plan, library_of(c), inputs) or (None, None)
    assert first is not None and second is not None
    assert first.data_ptr() != second.data_ptr()


def test_one_tensor_returned_twice_and_a_view_of_it() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = x + 1
        return [y, y, y.view_as(y)]

    graph, _, _ = capture(function, [randn(3)])
    a, b, c = compile_it(graph).plan["outputs"]
    assert a == b != c


# ---------------------------------------------------------------- writes


def add_in_place(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x * 2


def write_rows(x: torch.Tensor) -> torch.Tensor:
    x[1:3] = 0.5
    x[0].mul_(3)
    return x.sum(0)


def write_own_tensor(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(4, 6)
    y[:, 1:4] = x[:, :3] * 2
    y[2] += 1
    return y.relu_()


def swap(x: torch.Tensor, y: torch.Tensor) -> None:
    t = x.clone()
    x.copy_(y)
    y.copy_(t)
    return x.sum()  # type: ignore[return-value]


def shifted(x: torch.Tensor) -> torch.Tensor:
    x[1:] = x[:-1].clone() + 1
    return x


def through_a_view(x: torch.Tensor) -> torch.Tensor:
    v = x.view(-1)
    v[::2] = 7
    return x + v.view(4, 6)


@pytest.mark.parametrize(
    "function", [add_in_place, write_rows, write_own_tensor, shifted, through_a_view]
)
def test_writes(function: object) -> None:
    check(function, randn(4, 6))  # type: ignore[arg-type]


def test_writes_to_two_inputs() -> None:
    check(swap, randn(4, 6), randn(4, 6))


def test_a_cache_is_written_in_its_region_only() -> None:
    def update(cache: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        cache[:, 3:5] = k * 2
        return cache[:, :5].sum(1)

    check(update, randn(2, 9, 4), randn(2, 2, 4))
    graph, _, _ = capture(update, [randn(2, 9, 4), randn(2, 2, 4)])
    (row,) = compile_it(graph).plan["commit"]
    assert len(row["buffers"]) == 2


def test_batch_norm_in_training_updates_its_statistics() -> None:
    norm = torch.nn.BatchNorm2d(5).train()
    graph, inputs, expected = capture(norm, [randn(3, 5, 4, 4)])
    fresh = torch.nn.BatchNorm2d(5)
    buffers = {
        id(norm.running_mean): fresh.running_mean,
        id(norm.running_var): fresh.running_var,
        id(norm.num_batches_tracked): fresh.num_batches_tracked,
    }
    mine = [buffers.get(id(t), t) for t in inputs]
    c = compile_it(graph)
    (out,) = run_plan(c.plan, library_of(c), mine) or [None]
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(fresh.running_mean, norm.running_mean)
    torch.testing.assert_close(fresh.running_var, norm.running_var)
    assert fresh.num_batches_tracked == 1


# ---------------------------------------------------------------- speculations, errors


def graph_with_speculation(expected: bool) -> SegmentGraph:
    meta = TensorMeta((4,), (1,), "float32")
    total = TensorMeta((), (), "float32")
    return SegmentGraph(
        [("x", meta)],
        [
            Operation("p", "call_method", "sum", (Ref("x"),)),
            Operation("y", "call_method", "mul_", (Ref("x"), 2.0)),
            Operation("s", "call_method", "sum", (Ref("y"),)),
        ],
        ["s"],
        [total],
        [("p", expected)],
    )


def test_a_failed_speculation_commits_nothing() -> None:
    c = compile_it(graph_with_speculation(True))
    x = torch.ones(4)
    (out,) = run_plan(c.plan, library_of(c), [x]) or [None]
    assert out == 8 and x.tolist() == [2.0] * 4
    zero = torch.zeros(4)
    assert run_plan(c.plan, library_of(c), [zero]) is None
    assert zero.tolist() == [0.0] * 4


def one_operation(target: str, *args: object) -> SegmentGraph:
    meta = TensorMeta((4,), (1,), "float32")
    operation = Operation("y", "call_function", target, (Ref("x"), *args))
    return SegmentGraph([("x", meta)], [operation], ["y"], [meta])


def test_what_cannot_be_compiled_says_why(tmp_path: object) -> None:
    with pytest.raises(CompileError, match="nonzero"):
        compile_it(one_operation("torch.nonzero"))
    with pytest.raises(CompileError, match="when recorded"):
        compile_it(one_operation("torch.sum"))
    with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
        compile_graph(
            one_operation("torch.relu"),
            out_dir=tmp_path,  # type: ignore[arg-type]
            options=CodegenOptions(compiler="no-such-compiler"),
        )


def test_a_library_is_built_once(tmp_path: object) -> None:
    graph = one_operation("torch.relu")
    first = compile_graph(graph, out_dir=tmp_path)  # type: ignore[arg-type]
    again = compile_graph(
        graph,
        out_dir=tmp_path,  # type: ignore[arg-type]
        options=CodegenOptions(compiler="g++"),
    )
    assert first == again


def test_passes_are_dumped(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path)) / "dump"
    compile_it(one_operation("torch.relu"), dump_dir=folder)
    names = [p.name for p in sorted(folder.iterdir())]
    assert names[0] == "00_trace.txt" and "08_build.txt" in names
    assert names[-2:] == ["kernels.cpp", "plan.json"]  # what `accel bench kernel` reads


def test_native_executor_runs_plans() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        x.add_(1)
        z = F.softmax(x @ y, -1)
        return [z, z.t(), x[0], x.topk(2)[0] * 2]

    check(function, randn(150, 20), randn(20, 200), native=True)


def test_big_graphs_use_threads() -> None:
    c = check(lambda x: F.gelu(x).softmax(-1), randn(600, 1000), native=True)
    assert any(s.get("parallel") for s in c.plan["steps"])
    c = check(lambda x: F.gelu(x), randn(100_003), native=True)
    assert any(s.get("parallel") for s in c.plan["steps"])


def test_severed_outputs_are_marked() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = x.data
        return x.detach(), x.view(-1), x.t().detach(), x * 2, x.detach()[1:], own[0], own.detach()

    c = check(function, randn(3, 4), native=True)
    rows = [c.plan["buffers"][i] for i in c.plan["outputs"]]
    how = [row.get("severed") for row in rows]
    assert how == ["detach", None, "detach", None, None, None, "detach"]
    of = [c.plan["buffers"][row["of"]]["severed"] if "of" in row else None for row in rows]
    assert of == [None, None, None, None, "detach", "data", "data"]
