"""Launches on a GPU, with a stand-in for NVIDIA's driver that writes calls down.

The driver is found once in a process, so each case is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(_COMPILER is None, reason="no C++ compiler for the stand-in")

_HEAD = """
import ctypes, json, os, sys
import torch
from accel import runtime
native = runtime.native

def failure(function, *args):
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""

_PLAN = """
LAYOUT = {"sizes": [8], "strides": [1], "dtype": "float32"}
WIDE, ANY = b"WIDE\\0", b"ANY\\0"
open(os.environ["IMAGES"], "wb").write(b"[]\\n" + WIDE + ANY)

def plan(grid=3, shared=0, **more):
    images = [
        {"alignment": 1, "offset": 8, "size": 4, "shared_bytes": 0},
        {"alignment": 16, "offset": 3, "size": 5, "shared_bytes": shared},
    ]
    kernel = {"symbol": "twice", "threads": 128, "scratch_pointers": 2, "images": images}
    steps = [
        {"op": "launch", "symbol": "twice", "buffers": [0, 1], "grid": grid, "numbers": [8]},
        {"op": "launch", "symbol": "twice", "buffers": [1, 2], "grid": 1, "numbers": [7]},
    ]
    return {
        "version": 1, "inputs": [LAYOUT], "arena_bytes": 64, "speculations": [], "outputs": [2],
        "steps": steps, "commit": [], "kernels": [kernel],
        "buffers": [
            {"kind": "input", "index": 0},
            {"kind": "arena", "offset": 0, **LAYOUT},
            {"kind": "output", **LAYOUT},
        ],
        **more,
    }

def executor(**more):
    return native.Executor(plan(**more), os.environ["IMAGES"])
"""


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).with_name("fake_cuda.cpp")
    command = [_COMPILER or "", "-std=c++17", "-shared", "-fPIC", "-w", str(source)]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)
    shutil.copy(folder / "libcuda.so.1", folder / "libtorch_cuda.so")
    return folder


def run(script: str, folder: Path | None, log: Path, **environment: str) -> list[str]:
    """What the script prints, and the stand-in's log behind it."""
    log.write_text("")
    path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}" if folder else ""
    variables = {
        **os.environ, "FAKE_CUDA_LOG": str(log), "FAKE_CUDA_VERSION": "13000",
        "IMAGES": str(log.with_name("images")), "LD_LIBRARY_PATH": path, **environment,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _HEAD + script],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *log.read_text().splitlines()]


def test_launches_pass_what_kernels_take(driver_folder: Path, tmp_path: Path) -> None:
    lines = run(
        _PLAN
        + """
e = executor(shared=60_000)
print(e.describe()["launches"])
x = torch.arange(8.0)
(y,) = e.run([x])
print(y[:7].tolist())
(y,) = e.run([torch.arange(9.0)[1:]])
print(y[:7].tolist())
del e
""",
        driver_folder,
        tmp_path / "log",
    )
    aligned = "block 128 1 1 shared 60000 stream (nil)"
    other = "block 128 1 1 shared 0 stream (nil)"
    assert lines == [
        "2",
        str([4.0 * i for i in range(7)]),
        str([4.0 * i for i in range(1, 8)]),
        "retain 100",
        "load ANY",
        "finish ANY",
        "load WIDE",
        "attribute 8 60000",
        "finish WIDE",
        f"launch twice of WIDE grid 3 1 1 {aligned}",
        f"launch twice of WIDE grid 1 1 1 {aligned}",
        f"launch twice of ANY grid 3 1 1 {other}",
        f"launch twice of WIDE grid 1 1 1 {aligned}",
    ]


def test_images_are_loaded_once_and_stay(driver_folder: Path, tmp_path: Path) -> None:
    """A graph that the program has captured may launch them when no executor is left."""
    lines = run(
        _PLAN
        + """
first, second = executor(), executor()
del first, second
executor()
executor(shared=60_000)  # of other machine code, or for more memory: another one
""",
        driver_folder,
        tmp_path / "log",
    )
    once = ["load ANY", "finish ANY", "load WIDE", "finish WIDE"]
    again = ["load WIDE", "attribute 8 60000", "finish WIDE"]
    assert [line for line in lines if not line.startswith("retain")] == [*once, *again]


@pytest.mark.parametrize("function", ["cuModuleGetFunction", "cuFuncSetAttribute", "cuFuncLoad"])
def test_what_cannot_be_launched_is_unloaded(
    function: str, driver_folder: Path, tmp_path: Path
) -> None:
    lines = run(
        _PLAN
        + f"""
driver = ctypes.CDLL("libcuda.so.1")
driver.fake_fail(b"{function}", 200)
print(failure(lambda: executor(shared=60_000)))
driver.fake_fail(b"", 0)
print(failure(lambda: executor(shared=60_000)), driver.fake_contexts())
""",
        driver_folder,
        tmp_path / "log",
    )
    assert lines[0].endswith("CUDA_ERROR_INVALID_IMAGE") and lines[1] == "None 0"
    counts = [sum(line.startswith(word) for line in lines) for word in ("load", "unload")]
    assert counts[0] - counts[1] == 2 and counts[1] == 1


def test_images_are_loaded_while_a_stream_is_captured(driver_folder: Path, tmp_path: Path) -> None:
    lines = run(
        _PLAN
        + """
driver = ctypes.CDLL("libcuda.so.1")
driver.fake_capture(1)
e = executor()
print(driver.fake_capture_mode())
(y,) = e.run([torch.arange(8.0)])
""",
        driver_folder,
        tmp_path / "log",
    )
    assert lines[0] == "0"
    assert [line.split()[0] for line in lines[2:]] == [*["load", "finish"] * 2, *["launch"] * 2]


_LAYER = """
from dataclasses import replace
from pathlib import Path
import torch.nn.functional as F
from accel.codegen import CodegenOptions, compile_graph, products_triton
from accel.codegen.product_blocks import Blocks
from accel.codegen.targets import TARGETS
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

TARGETS["cpu"] = TARGETS["cuda"]
x, w = torch.randn(100, 192, dtype=torch.half), torch.randn(200, 192, dtype=torch.half)
y = F.linear(x, w).relu()
operations = [
    Operation("v0", "call_function", "torch.nn.functional.linear", (Ref("x"), Ref("w"))),
    Operation("v1", "call_function", "torch.relu", (Ref("v0"),)),
]
inputs = [("x", TensorMeta.of(x)), ("w", TensorMeta.of(w))]
graph = SegmentGraph(inputs, operations, ["v1"], [TensorMeta.of(y)])
folder = Path(os.environ["IMAGES"]).parent
"""

_FUSED = """
products_triton.gain = lambda blocks, work, gpu: 1.0
products_triton.best_blocks = lambda work, gpu: Blocks(64, 128, 64, 4, 3)
plan = compile_graph(graph, out_dir=folder, options=CodegenOptions(gpu="sm_90"))
e = native.Executor(plan, str(folder / plan["library"]))
(got,) = e.run([x, w])
print(plan["kernels"][0]["images"][0]["shared_bytes"], tuple(got.shape), got.dtype)
"""


def test_a_product_with_its_epilogue_is_launched_with_its_shared_memory(
    driver_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    first, *lines = run(_LAYER + _FUSED, driver_folder, tmp_path / "log")
    shared, rest = first.split(" ", 1)
    assert rest == "(100, 200) torch.float16" and int(shared) > 48 << 10
    assert f"attribute 8 {shared}" in lines
    (launch,) = [line for line in lines if line.startswith("launch")]
    assert launch.split(" of ")[0] == "launch k0"
    assert f"grid 4 1 1 block 128 1 1 shared {shared} stream (nil)" in launch


_MEASURED = """
from accel.codegen import product_trials

asked = []
measure = product_trials._measure
product_trials._measure = lambda *args: asked.append(1) or measure(*args)
product_trials._CLEAR, product_trials._MOST_BLOCKS = 1e9, 1

def compiled(name):
    options = CodegenOptions(gpu="sm_90", gpu_name=name)
    plan = compile_graph(graph, out_dir=folder, options=options)
    return [step["op"] for step in plan["steps"]], len(asked)

def record():
    (path,) = folder.glob("*.trial")
    return path, json.loads(path.read_text())

products_triton.gain = lambda blocks, work, gpu: -1.0  # it is not likely
print(compiled(None))
print(compiled("stand-in"), compiled("stand-in"))
path, known = record()
# Kernels do nothing here, ATen's call multiplies.
print(0 < known["ours_s"] < known["aten_s"], sorted(known["blocks"]))
path.write_text(json.dumps({**known, "ours_s": 1.0, "aten_s": 0.5}))
print(compiled("stand-in"))
path.write_text(json.dumps({"ours_s": 0.5, "aten_s": 1.0}))
print(compiled("stand-in"), record()[1] != {"ours_s": 0.5, "aten_s": 1.0})
process = product_trials._process()
process.running.kill()
print(compiled("another"))  # a new process is started
until, product_trials._BUDGET_S = product_trials._BUDGET_S, -1.0
print(compiled("without time"), compiled("another"))
product_trials._BUDGET_S = until
product_trials.MAIN = folder / "broken.py"
product_trials.MAIN.write_text("print('no')")
process.close()
print(compiled("a third one"), process.failed)
print(compiled("a fourth one"), process.running)
"""


def test_the_faster_way_is_measured_in_a_process_of_its_own(
    driver_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    lines = run(_LAYER + _MEASURED, driver_folder, tmp_path / "log")
    names = ["columns", "group", "inner", "rows", "stages", "warps"]
    assert lines[:9] == [
        "(['extern', 'launch'], 0)",
        "(['launch'], 1) (['launch'], 1)",
        f"True {names}",
        "(['extern', 'launch'], 1)",
        "(['launch'], 2) True",
        "(['launch'], 3)",
        "(['extern', 'launch'], 3) (['launch'], 3)",
        "(['extern', 'launch'], 4) the measuring process fails: Expecting value: "
        "line 1 column 1 (char 0)",
        "(['extern', 'launch'], 5) None",
    ]
    # Only there, many times each, are kernels launched.
    launches = [line for line in lines if line.startswith("launch")]
    assert len(launches) >= 3 * 2 * 18


def test_errors_say_what_failed(driver_folder: Path, tmp_path: Path) -> None:
    lines = run(
        _PLAN
        + """
driver = ctypes.CDLL("libcuda.so.1")
print(native.cuda_driver())
for name in ("cuModuleLoadData", "cuModuleGetFunction"):
    driver.fake_fail(name.encode(), 200)
    print(failure(executor))
driver.fake_fail(b"", 0)
for faulty in ({"grid": -1}, {"kernels": []}, {"device": "meta"}, {"device": "cuda"}):
    print(failure(lambda: executor(**faulty)))
broken = plan()
broken["kernels"][0]["images"][0]["size"] = 99
print(failure(native.Executor, broken, os.environ["IMAGES"]))
print(failure(native.Executor, plan(), "/nowhere"))
x = torch.zeros(8)
print(failure(executor(grid=1 << 40).run, [x]))
nothing = executor(grid=0)
nothing.run([x])
driver.fake_fail(b"cuLaunchKernel", 719)
print(failure(executor().run, [x]))
print(failure(native.cuda_stream, 0))
""",
        driver_folder,
        tmp_path / "log",
    )
    assert lines[:12] == [
        "{'version': 13000, 'devices': 2}",
        "OSError: kernel twice does not load: CUDA_ERROR_INVALID_IMAGE",
        "OSError: kernel twice is not in its image: CUDA_ERROR_INVALID_IMAGE",
        "ValueError: plan: steps[0]: a negative grid",
        "ValueError: plan: steps[0]: there is no kernel 'twice'",
        "ValueError: plan: device: not one that plans run on",
        "ValueError: plan: device: it has no number",
        "ValueError: plan: kernels[0].images: it ends behind the file of images",
        "OSError: cannot load kernels: /nowhere cannot be read",
        "ExecutorError: kernel twice would need too many programs",
        "DeclinedError: kernel twice cannot be launched: CUDA_ERROR_UNKNOWN",
        "OSError: this torch has no CUDA streams",
    ]
    # An image whose function is not in it goes; the two that can be launched stay.
    counts = [sum(line.startswith(word) for line in lines) for word in ("load", "unload")]
    assert counts == [3, 1]
    assert sum(line.startswith("launch") for line in lines) == 1  # of no programs, none


def test_the_stream_is_torchs_current_one(driver_folder: Path, tmp_path: Path) -> None:
    script = """
ctypes.CDLL("libtorch_cuda.so")
print([hex(native.cuda_stream(n)) for n in (0, 3)])
"""
    assert run(script, driver_folder, tmp_path / "log") == ["['0x1000', '0x1003']"]


ABSENT = {
    "old": ({"FAKE_CUDA_VERSION": "11040"},
            "NVIDIA's driver is too old: it knows CUDA 11.4, kernels need 12.0; install a newer one"),
    "without a GPU": ({"FAKE_CUDA_INIT": "100"},
                      "NVIDIA's driver does not start: CUDA_ERROR_UNKNOWN; `nvidia-smi` may say why"),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSENT)
def test_a_driver_that_will_not_do(name: str, driver_folder: Path, tmp_path: Path) -> None:
    environment, text = ABSENT[name]
    script = _PLAN + "print(failure(native.cuda_driver)); print(failure(executor))"
    lines = run(script, driver_folder, tmp_path / "log", **environment)
    assert lines == [f"OSError: {text}"] * 2


def test_no_driver(tmp_path: Path) -> None:
    script = _PLAN + "print(failure(native.cuda_driver)); print(failure(executor))"
    lines = run(script, None, tmp_path / "log")
    if lines[0] == "None":
        pytest.skip("there is a driver here")
    assert lines == ["OSError: NVIDIA's driver (libcuda.so.1) is not installed; install it"] * 2


def test_importing_accel_loads_neither_triton_nor_the_driver(
    driver_folder: Path, tmp_path: Path
) -> None:
    script = """
import accel
from accel.codegen import CodegenOptions, compile_graph
print("triton" in sys.modules, "libcuda" in open("/proc/self/maps").read())
"""
    assert run(script, driver_folder, tmp_path / "log") == ["False False"]
