"""Triton kernels compiled for GPUs that are not here: what is in the machine code, what is said."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import capture_graph
import pytest
import test_compiled_programs
import test_loop_ir
import test_lowerings
import test_open_graphs
import test_random_graphs
import test_training
import torch
import torch.nn.functional as F
from capture_graph import capture, compile_it
from triton_blocks import BLOCKS

from accel.codegen import CodegenOptions, CompileError, compile_graph, triton_versions
from accel.codegen.build import is_sound
from accel.codegen.build_triton import (
    build_cubins,
    compile_kernel,
    kernels_of,
    load_module,
    module_text,
)
from accel.codegen.targets import TARGETS
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

triton = pytest.importorskip("triton")

GPUS = ["sm_80", "sm_90"]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The texts of all kernels that the test has compiled plans for."""
    found: dict[str, str] = {}

    def note(texts: dict[str, str], out_dir: Path, options: Any) -> dict[str, Any]:
        for text in texts:
            found.setdefault(text, f"k{len(found)}")
        return {"library": None}

    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cuda"], build=note))
    return found


def only_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `check` of a test module compile the graph and leave it at that."""

    def check(function: Callable[..., Any], *inputs: torch.Tensor, **more: Any) -> Any:
        return compile_it(capture(function, list(inputs))[0])

    for module in (test_lowerings, test_random_graphs, test_compiled_programs):
        monkeypatch.setattr(module, "check", check)


def ptx_of(function: Callable[..., Any], *inputs: torch.Tensor, **options: Any) -> list[str]:
    """The PTX of the kernels of a function on an H100."""
    texts = compile_it(capture(function, list(inputs))[0]).texts
    kernels = kernels_of(texts)
    module = load_module(module_text(kernels), Path(capture_graph._OUT_DIR) / "ptx.py")
    return [compile_kernel(module, k, "sm_90", **options).asm["ptx"] for k in kernels]


@pytest.mark.parametrize("name", test_loop_ir.FUNCTIONS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_compile(
    name: str, blocks: str, gpu: str, texts: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    BLOCKS[blocks](monkeypatch)
    compile_it(capture(test_loop_ir.FUNCTIONS[name], [torch.randn(20, 37)])[0])
    library, rows = build_cubins(kernels_of(texts), tmp_path, gpu)
    assert is_sound(tmp_path / library)
    content = (tmp_path / library).read_bytes()
    assert [row["symbol"] for row in rows] == list(texts.values())
    end = content.index(b"\n") + 1
    for row in rows:
        assert [image["alignment"] for image in row["images"]] == [16, 1]
        for image in row["images"]:
            assert image["offset"] == end
            end += image["size"]
            assert content[image["offset"] :].startswith(b"\x7fELF")
            assert row["symbol"].encode() in content[image["offset"] : end]


@pytest.mark.parametrize("dtype", test_lowerings.DTYPES, ids=str)
@pytest.mark.parametrize("gpu", GPUS)
def test_elementwise_rows_compile(
    dtype: torch.dtype, gpu: str, texts: dict[str, str], monkeypatch: Any, tmp_path: Path
) -> None:
    only_compiled(monkeypatch)
    test_lowerings.test_elementwise_rows_equal_eager(dtype, "contiguous")
    build_cubins(kernels_of(texts), tmp_path, gpu)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("gpu", GPUS)
def test_random_graphs_compile(
    seed: int, gpu: str, texts: dict[str, str], monkeypatch: Any, tmp_path: Path
) -> None:
    only_compiled(monkeypatch)
    test_random_graphs.run(seed)
    if texts:
        build_cubins(kernels_of(texts), tmp_path, gpu)


@pytest.mark.parametrize("name", test_open_graphs.GRAPHS)
@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_for_several_sizes_compile(
    name: str, gpu: str, texts: dict[str, str], tmp_path: Path
) -> None:
    operations, eager, dims = test_open_graphs.GRAPHS[name]
    x = torch.randn(6, 9)
    made = test_open_graphs.graph(
        test_open_graphs.named(operations), [x], [(0, d) for d in dims], [eager(x)], ["v0"]
    )
    compile_graph(replace(made, outputs=[operations[-1].name]), out_dir=tmp_path)
    if texts:
        build_cubins(kernels_of(texts), tmp_path, gpu)


@pytest.mark.parametrize("name", test_training.FUNCTIONS)
@pytest.mark.parametrize("gpu", GPUS)
def test_kernels_of_training_compile(
    name: str, gpu: str, texts: dict[str, str], tmp_path: Path
) -> None:
    inputs = [test_training.leaf(*sizes) for sizes in ((4, 6), (6, 6), (6,))]
    graph, _ = test_training.differentiable(test_training.FUNCTIONS[name], inputs)
    compile_graph(graph, out_dir=tmp_path)
    if texts:
        build_cubins(kernels_of(texts), tmp_path, gpu)


ROWS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "pointwise": (lambda x: F.gelu(x) * x.sigmoid(), (1 << 20,)),
    "softmax": (lambda x: x.softmax(-1), (512, 4096)),
    "layer norm": (lambda x: F.layer_norm(F.gelu(x), x.shape[-1:]), (256, 8192)),
    "longest kept row": (lambda x: F.layer_norm(F.gelu(x), x.shape[-1:]), (64, 16384)),
    "sums of columns": (lambda x: (x * x).sum(0), (4096, 4096)),
    "transposed": (lambda x: (x.t() + 1).contiguous(), (4096, 4096)),
}


@pytest.mark.parametrize("name", ROWS)
def test_values_stay_in_registers(name: str, texts: dict[str, str], tmp_path: Path) -> None:
    function, sizes = ROWS[name]
    compile_it(capture(function, [torch.randn(sizes)])[0])
    for kernel in kernels_of(texts):
        module = load_module(module_text([kernel]), tmp_path / f"{kernel.symbol}.py")
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compile_kernel(module, kernel, "sm_80").asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        done = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        )
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
        assert (used["STACK"], used["LOCAL"]) == ("0", "0"), done.stdout
        assert int(used["REG"]) * 32 * kernel.warps <= 1 << 16


def test_nothing_is_approximate(texts: dict[str, str]) -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x / y).sqrt().bfloat16().float() + y

    (ptx,) = ptx_of(function, torch.randn(64), torch.randn(64))
    assert "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx
    assert not re.search(r"(div|sqrt|rcp|ex2|lg2)\.(full|approx)", ptx)
    assert "cvt.rn.bf16" in ptx  # there and back again is not nothing


def test_pointers_known_to_be_aligned_are_read_in_wide_steps(texts: dict[str, str]) -> None:
    x = torch.randn(1 << 14)
    (wide,) = ptx_of(lambda x: x * 2, x)
    (narrow,) = ptx_of(lambda x: x * 2, x, alignment=1)
    assert "ld.global.v4" in wide and "ld.global.v4" not in narrow


def test_kernels_take_what_a_launch_passes(texts: dict[str, str]) -> None:
    (ptx,) = ptx_of(lambda x, y: x + y, torch.randn(64), torch.randn(64))
    entry = ptx[ptx.index(".entry") :]
    parameters = entry[: entry.index(")")].count(".param")
    assert parameters == 3 + triton_versions.scratch_pointers()


# ---------------------------------------------------------------- whole graphs


def of_a_gpu(*operations: Operation, device: str = "cuda:0", **more: Any) -> SegmentGraph:
    meta = TensorMeta((64, 96), (96, 1), "float32", device)
    return SegmentGraph([("x", meta)], list(operations), [operations[-1].name], [meta], **more)


def call(name: str, target: str, *args: Any) -> Operation:
    return Operation(name, "call_function", target, args)


SOFTMAX = call("v0", "torch.softmax", Ref("x"), -1)


def test_a_graph_on_a_gpu_gets_triton_kernels(tmp_path: Path) -> None:
    graph = of_a_gpu(SOFTMAX, call("v1", "torch.logcumsumexp", Ref("v0"), 0))
    options = CodegenOptions(verify=True, gpu="sm_90")
    plan = compile_graph(graph, out_dir=tmp_path, options=options)
    assert plan["device"] == "cuda:0"
    launch, extern = plan["steps"][:2]
    assert (launch["op"], extern["op"]) == ("launch", "extern")
    assert launch["grid"] >= 1 and launch["numbers"] == []
    (kernel,) = plan["kernels"]
    assert kernel["symbol"] == launch["symbol"] and kernel["threads"] % 32 == 0
    assert is_sound(tmp_path / plan["library"])
    assert compile_graph(graph, out_dir=tmp_path, options=options) == plan


def test_a_product_on_a_gpu_calls_aten(tmp_path: Path) -> None:
    graph = of_a_gpu(call("t", "torch.t", Ref("x")), call("v0", "torch.matmul", Ref("x"), Ref("t")))
    out = TensorMeta((64, 64), (64, 1), "float32", "cuda:0")
    plan = compile_graph(replace(graph, output_metas=[out]), out_dir=tmp_path)
    assert [row["op"] for row in plan["steps"]] == ["extern"] and plan["library"] is None


def test_numbers_of_the_processor_may_meet_a_gpu(tmp_path: Path) -> None:
    number = call("n", "torch.tensor", 2.5)
    graph = of_a_gpu(number, call("v0", "torch.mul", Ref("x"), Ref("n")))
    plan = compile_graph(graph, out_dir=tmp_path, options=CodegenOptions(gpu="sm_80"))
    (step,) = plan["steps"]
    assert step["op"] == "launch" and len(step["buffers"]) == 2
    given_back = replace(
        graph,
        outputs=["v0", "n"],
        output_metas=[*graph.output_metas, TensorMeta((), (), "float32")],
    )
    with pytest.raises(CompileError, match="output n is on cpu, the graph on cuda:0"):
        compile_graph(given_back, out_dir=tmp_path, options=CodegenOptions(gpu="sm_80"))


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_numbers_of_every_dtype_are_given_to_launches(gpu: str, tmp_path: Path) -> None:
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    graph = of_a_gpu(
        *(
            call(f"v{k}", "torch.mul", Ref(f"v{k - 1}" if k else "x"), Ref(f"n{k}"))
            for k in range(10)
        ),
        call("v", "torch.softmax", Ref("v9"), -1),
    )
    numbers = [(f"n{k}", TensorMeta((), (), dtype)) for k, dtype in enumerate(dtypes)]
    graph = replace(graph, inputs=[*graph.inputs, *numbers])
    options = CodegenOptions(verify=True, gpu=gpu)
    plan = compile_graph(graph, out_dir=tmp_path, options=options)
    (step,) = plan["steps"]
    assert step["op"] == "launch" and len(step["buffers"]) == 2
    assert [
        plan["inputs"][plan["buffers"][n["host"]]["index"]]["dtype"] for n in step["numbers"]
    ] == dtypes
    assert is_sound(tmp_path / plan["library"])


def test_what_cannot_be_compiled_for_a_gpu_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompileError, match="not known for which GPU"):
        compile_graph(of_a_gpu(SOFTMAX), out_dir=tmp_path)
    with pytest.raises(CompileError, match="tensors on xpu; only cpu and cuda are compiled"):
        compile_graph(of_a_gpu(SOFTMAX, device="xpu:0"), out_dir=tmp_path)
    with pytest.raises(CompileError, match="architecture sm_70"):
        compile_graph(of_a_gpu(SOFTMAX), out_dir=tmp_path, options=CodegenOptions(gpu="sm_70"))
    mixed = of_a_gpu(call("v0", "torch.add", Ref("x"), Ref("y")))
    mixed = replace(mixed, inputs=[*mixed.inputs, ("y", TensorMeta((96,), (1,), "float32"))])
    with pytest.raises(CompileError, match="on cuda:0 and on cpu in one graph"):
        compile_graph(mixed, out_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(triton_versions, "version", lambda: (2, 1))
    with pytest.raises(CompileError, match=r"Triton 2\.1 is not supported, only"):
        compile_graph(of_a_gpu(SOFTMAX), out_dir=tmp_path, options=CodegenOptions(gpu="sm_90"))
    monkeypatch.setattr(triton_versions, "version", lambda: None)
    with pytest.raises(CompileError, match="Triton is not installed"):
        compile_graph(of_a_gpu(SOFTMAX), out_dir=tmp_path, options=CodegenOptions(gpu="sm_90"))
