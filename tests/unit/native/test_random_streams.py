"""Plans that draw on a GPU: what they take of the generator's stream and when they give it back.

With stand-ins for NVIDIA's driver and torch's CUDA library. Each case is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import test_cuda_driver
import torch
from test_cuda_driver import driver_folder  # noqa: F401

_COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = [
    pytest.mark.skipif(_COMPILER is None, reason="no C++ compiler for the stand-ins"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has generators of its own"),
]

_PLAN = """
ctypes.CDLL("libtorch_cuda.so")
torch_cuda = ctypes.CDLL("libfake_generator.so")
torch_cuda.fake_generator_set.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
torch_cuda.fake_generator_offset.restype = ctypes.c_uint64
driver = ctypes.CDLL("libcuda.so.1")
open(os.environ["IMAGES"], "wb").write(b"ANY\\0")
SEED, OFFSET = (1 << 63) + 5, (1 << 35) + 8

def plan(numbers=({"drawn": 0}, "seed", {"drawn": 2}), draws=12, **more):
    image = {"alignment": 1, "offset": 0, "size": 4, "shared_bytes": 0}
    kernel = {"symbol": "draw", "threads": 128, "scratch_pointers": 0, "images": [image]}
    step = {"op": "launch", "symbol": "draw", "buffers": [0], "grid": 1, "numbers": list(numbers)}
    made = {
        "version": 1, "device": "cuda:0", "arena_bytes": 0, "outputs": [], "commit": [],
        "inputs": [{"sizes": [], "strides": [], "dtype": "bool"}], "steps": [step],
        "buffers": [{"kind": "input", "index": 0}], "kernels": [kernel],
        "speculations": [{"buffer": 0, "expected": True}], "draws": draws, **more,
    }
    return {name: value for name, value in made.items() if value is not None}

def executor(*args, **more):
    return native.Executor(plan(*args, **more), os.environ["IMAGES"])

def stream():
    return torch_cuda.fake_generator_offset() - OFFSET

torch_cuda.fake_generator_set(SEED, OFFSET)
yes, no = torch.tensor(True), torch.tensor(False)
"""


@pytest.fixture(scope="module")
def folder(driver_folder: Path) -> Path:  # noqa: F811
    torch_folder = Path(torch.__file__).parent
    command = [_COMPILER or "", "-std=c++20", "-shared", "-fPIC", "-w", "-O0"]
    command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    command += [str(Path(__file__).with_name("fake_generator.cpp"))]
    command += [
        "-lc10",
        "-ltorch_cpu",
        f"-Wl,-rpath,{torch_folder / 'lib'}",
        "-o",
        str(driver_folder / "libfake_generator.so"),
    ]
    subprocess.run(command, check=True)
    return driver_folder


def run(script: str, folder: Path, log: Path) -> list[str]:
    """torch asks for its CUDA library once, when it is imported. What the environment preloads
    (a sanitizer's runtime) stays first."""
    preloaded = [os.environ.get("LD_PRELOAD", ""), str(folder / "libfake_generator.so")]
    libraries = " ".join(filter(None, preloaded))
    return test_cuda_driver.run(_PLAN + script, folder, log, LD_PRELOAD=libraries)


def test_runs_take_their_part_of_the_stream(folder: Path, tmp_path: Path) -> None:
    script = "e = executor()\nfor _ in range(2): print(e.run([yes]), stream())"
    lines = run(script, folder, tmp_path / "log")
    assert lines[:2] == ["[] 12", "[] 24"]
    first, seed = ((1 << 35) + 8) // 4, (1 << 63) + 5
    numbers = [first, seed, first + 2, first + 3, seed, first + 5]
    assert [line for line in lines if line.startswith("number")] == [f"number {n}" for n in numbers]


def test_what_fails_gives_it_back(folder: Path, tmp_path: Path) -> None:
    script = """
e = executor()
print(e.run([no]), stream())
driver.fake_fail(b"cuLaunchKernel", 719)
print(failure(e.run, [yes]), stream())
driver.fake_fail(b"", 0)
print(e.run([yes]), stream())
print(torch_cuda.fake_dropouts_begun_anew())
"""
    assert run(script, folder, tmp_path / "log")[:4] == [
        "None 0",
        "DeclinedError: kernel draw cannot be launched: CUDA_ERROR_UNKNOWN 0",
        "[] 12",
        "1",  # by the test itself
    ]


def test_a_captured_stream_is_not_drawn_from(folder: Path, tmp_path: Path) -> None:
    script = """
e = executor()
for status in (1, 2, 0):
    driver.fake_capture(status)
    print(failure(e.run, [yes]), stream())
driver.fake_capture(1)
print(executor((1, 2, 3), draws=None, speculations=[]).run([yes]), stream())
"""
    refused = "DeclinedError: random numbers while a stream is captured 0"
    lines = run(script, folder, tmp_path / "log")
    assert lines[:4] == [refused, refused, "None 12", "[] 12"]


def test_a_position_inside_of_a_block_is_refused(folder: Path, tmp_path: Path) -> None:
    script = (
        "torch_cuda.fake_generator_set(SEED, OFFSET + 1)\n"
        + "print(failure(executor().run, [yes]), stream())"
    )
    (line, *_) = run(script, folder, tmp_path / "log")
    assert line == "ExecutorError: the generator stands in the middle of a block 1"


def test_faulty_plans(folder: Path, tmp_path: Path) -> None:
    script = """
for more in ({"draws": 6}, {"draws": 0}, {"device": "cpu"}, {"draws": None},
             {"numbers": ["sed"]}, {"numbers": [{"drawn": 3}]}, {"numbers": [{"drawn": -1}]},
             {"numbers": [1.5]}):
    print(failure(lambda: executor(**more)))
"""
    where = "ValueError: plan: steps[0].numbers"
    assert run(script, folder, tmp_path / "log")[:8] == [
        "ValueError: plan: draws: not a multiple of 4",
        "ValueError: plan: draws: not a multiple of 4",
        "ValueError: plan: draws: from the stream of a GPU only",
        f"{where}: a number of a stream that the plan does not draw from",
        f"{where}: expected 'seed'",
        f"{where}: out of range",
        f"{where}: out of range",
        f"{where}: expected an integer",
    ]


_NUMBERS = """
def with_number(number, dtype, sizes=(), host=True, buffers=(0,), **more):
    row = {"sizes": list(sizes), "strides": [1] * len(sizes), "dtype": dtype}
    inputs = [{"sizes": [], "strides": [], "dtype": "bool"}, {**row, "host": True} if host else row]
    both = [{"kind": "input", "index": 0}, {"kind": "input", "index": 1}]
    made = plan(({"host": number}, 1, 2), draws=None, inputs=inputs, **{"buffers": both, "speculations": [], **more})
    made["steps"][0]["buffers"] = list(buffers)
    return native.Executor(made, os.environ["IMAGES"])
"""


def test_numbers_of_the_processor_are_read_at_each_launch(folder: Path, tmp_path: Path) -> None:
    """Of every width, as bits; the tensor may have changed in between."""
    script = (
        _NUMBERS
        + """
for dtype, value in (("float64", 0.5), ("float32", -2.0), ("int64", -3), ("uint8", 200), ("bfloat16", 1.0)):
    e, n = with_number(1, dtype), torch.tensor(value, dtype=getattr(torch, dtype))
    e.run([yes, n])
    e.run([yes, n.add_(n)])
"""
    )
    lines = run(script, folder, tmp_path / "log")

    def bits(value: float, dtype: torch.dtype) -> int:
        raw = torch.tensor([value], dtype=dtype).view(torch.uint8).tolist()
        return int.from_bytes(bytes(raw), "little")

    wanted = [
        bits(value, dtype)
        for dtype, first, second in (
            (torch.float64, 0.5, 1.0),
            (torch.float32, -2.0, -4.0),
            (torch.int64, -3, -6),
            (torch.uint8, 200, 144),
            (torch.bfloat16, 1.0, 2.0),
        )
        for value in (first, second)
    ]
    numbers = [line for line in lines if line.startswith("number")]
    assert numbers == [f"number {n}" for bits_ in wanted for n in (bits_, 1, 2)]


def test_faulty_plans_with_numbers_of_the_processor(folder: Path, tmp_path: Path) -> None:
    script = (
        _NUMBERS
        + """
for args, more in (((0, "float32"), {}), ((1, "float32"), {"host": False}), ((1, "float32"), {"sizes": (2,)}),
                   ((1, "complex128"), {}), ((1, "float32"), {"buffers": (0, 1)}), ((7, "float32"), {})):
    print(failure(lambda: with_number(*args, **more)))
"""
    )
    assert run(script, folder, tmp_path / "log")[:6] == [
        "ValueError: plan: steps[0].numbers: not a number on the processor",
        "ValueError: plan: steps[0].numbers: not a number on the processor",
        "ValueError: plan: inputs[1]: not one number",
        "ValueError: plan: inputs[1]: not one number",
        "ValueError: plan: steps[0]: a kernel cannot read the processor's memory",
        "ValueError: plan: steps[0].numbers.host: there is no buffer 7",
    ]
