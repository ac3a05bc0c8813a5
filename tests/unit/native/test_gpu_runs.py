"""Runs on a GPU: streams, devices and memory, and what becomes of errors.

With stand-ins for NVIDIA's driver and torch's CUDA library, whose memory is the processor's. Each
case is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import test_cuda_driver
import test_random_streams
import torch
from test_cuda_driver import driver_folder  # noqa: F401
from test_random_streams import folder  # noqa: F401

pytestmark = test_random_streams.pytestmark

_SETTING = """
import threading
torch_library = ctypes.CDLL("libtorch_cuda.so")
torch_library.fake_stream.argtypes = [ctypes.c_int, ctypes.c_void_p]
ctypes.CDLL("libc10_cuda.so")
fake = ctypes.CDLL("libfake_generator.so")
driver = ctypes.CDLL("libcuda.so.1")

def executor(device=0, **more):
    return native.Executor(plan(device=f"cuda:{device}", **more), os.environ["IMAGES"])

def values(tensor):
    return list((ctypes.c_float * 7).from_address(tensor.data_ptr()))

def note(text):
    print(text, file=open(os.environ["FAKE_CUDA_LOG"], "a"))

x = torch.arange(8.0)
FLAG = {"sizes": [], "strides": [], "dtype": "bool"}

def speculating(device=0):
    made = plan(device=f"cuda:{device}")
    made["inputs"].append(FLAG)
    made["buffers"].append({"kind": "input", "index": 1})
    made["speculations"] = [{"buffer": 3, "expected": True}]
    return native.Executor(made, os.environ["IMAGES"])

def committing(steps):
    # Doubles its input in place, in so many commit steps.
    made = plan(device="cuda:0")
    made["steps"], made["outputs"] = made["steps"][:1], []
    made["buffers"] = made["buffers"][:2]
    step = {"op": "launch", "symbol": "twice", "buffers": [1, 0], "grid": 1, "numbers": [8]}
    made["commit"] = [{**step, "writes": [0]}] * steps
    return native.Executor(made, os.environ["IMAGES"])

def entry_of(run, ambient=None):
    program = native.GuardProgram([("TENSOR", -1, 0, x)], 2)
    variant = native.Variant(program, native.Ambient(), run, [0], ("tensor", 0))
    entry = native.Entry("test", None)
    entry.variants, entry.state = (variant,), "armed"
    entry.on_event = lambda entry, kind, text: print(kind, text)
    return entry, variant

def call(entry):
    try:
        result = native.prologue(entry.index, x)
        return "body" if result is native.RUN_BODY else "served"
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}: {str(error).splitlines()}"
"""


@pytest.fixture(scope="module")
def stand_ins(folder: Path) -> Path:  # noqa: F811
    torch_folder = Path(torch.__file__).parent
    source = Path(__file__).with_name("fake_c10_cuda.cpp")
    command = [test_random_streams._COMPILER or "", "-std=c++20", "-shared", "-fPIC", "-w", "-O0"]
    command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", str(source), "-lc10"]
    subprocess.run([*command, "-o", str(folder / "libc10_cuda.so")], check=True)
    return folder


def run(script: str, stand_ins: Path, log: Path) -> tuple[list[str], list[str]]:
    """What the script prints, and the stand-ins' log of what it did behind "begin"."""
    preloaded = [os.environ.get("LD_PRELOAD", ""), str(stand_ins / "libfake_generator.so")]
    lines = test_cuda_driver.run(
        test_cuda_driver._PLAN + _SETTING + 'note("begin")\n' + script + '\nnote("end")',
        stand_ins,
        log,
        LD_PRELOAD=" ".join(filter(None, preloaded)),
    )
    begin = lines.index("begin")
    return lines[:begin], lines[begin + 1 : lines.index("end")]


def the_launches(log: list[str]) -> list[str]:
    """Of each launch where it went: "stream 0x1000", " on 1" behind it on the second GPU."""
    return [line[line.index("stream") :] for line in log if line.startswith("launch")]


def test_memory_is_of_the_stream_that_launches_go_to(stand_ins: Path, tmp_path: Path) -> None:
    """A run's intermediates are free when it ends: behind its launches, for that stream alone."""
    script = """
e = executor()
torch_library.fake_stream(0, 0x77)
note("run")
(y,) = e.run([x])
note("done")
print(values(y))
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == [str([4.0 * i for i in range(7)])]
    assert log[log.index("run") + 1 : log.index("done")] == [
        "allocate 64 on 0 stream 0x77",
        "allocate 32 on 0 stream 0x77",
        "launch twice of WIDE grid 3 1 1 block 128 1 1 shared 0 stream 0x77",
        "launch twice of WIDE grid 1 1 1 block 128 1 1 shared 0 stream 0x77",
        "free 64 on 0 stream 0x77",
    ]


def test_each_run_asks_for_the_stream(stand_ins: Path, tmp_path: Path) -> None:
    script = """
e = executor()
for stream in (0x10, 0x20, None, 0x10):
    torch_library.fake_stream(0, stream)
    e.run([x])
"""
    _, log = run(script, stand_ins, tmp_path / "log")
    streams = ["0x10", "0x20", "0x1000", "0x10"]
    assert the_launches(log) == [f"stream {s}" for s in streams for _ in range(2)]
    assert sum(line.startswith("load") for line in log) == 2


def test_a_plan_runs_on_its_own_device(stand_ins: Path, tmp_path: Path) -> None:
    """Whatever the current one is, which stays; images are loaded for each device's context."""
    script = """
first, second = executor(0), executor(1)
for current in (0, 1):
    fake.fake_set_device(current)
    for e in (first, second):
        print(values(e.run([x])[0])[:3], fake.fake_device(), driver.fake_contexts())
driver.fake_fail(b"cuLaunchKernel", 701)
print(failure(first.run, [x]), fake.fake_device(), driver.fake_contexts())
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed[:-1] == [f"[0.0, 4.0, 8.0] {current} 0" for current in (0, 0, 1, 1)]
    assert printed[-1] == ("ExecutorError: kernel twice cannot be launched: CUDA_ERROR_UNKNOWN 1 0")
    assert the_launches(log) == (["stream 0x1000"] * 2 + ["stream 0x1001 on 1"] * 2) * 2
    assert [line for line in log if line.startswith("load")] == [
        f"load {image}{place}" for place in ("", " on 1") for image in ("ANY", "WIDE")
    ]
    of_second = [line for line in log if "stream 0x1001" in line and "launch" not in line]
    assert of_second and all(" on 1 " in line for line in of_second)


def test_threads_with_streams_of_their_own(stand_ins: Path, tmp_path: Path) -> None:
    """No two runs that are under way have memory in common."""
    script = """
e = executor(arena_bytes=4096)
def work(stream):
    torch_library.fake_stream(0, stream)
    for k in range(200):
        mine = torch.arange(8.0) + k + stream
        (y,) = e.run([mine])
        if values(y) != (4 * mine[:7]).tolist():
            print("wrong", stream, k)
threads = [threading.Thread(target=work, args=[0x100 * n]) for n in (1, 2, 3)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == []
    for n in (1, 2, 3):
        mine = [line for line in log if line.endswith(f"stream {0x100 * n:#x}")]
        kinds = [line.split()[0] for line in mine if not line.startswith("free 32")]
        assert kinds == ["allocate", "allocate", "launch", "launch", "free"] * 200


# ---- errors ----


def test_without_memory_the_body_runs(stand_ins: Path, tmp_path: Path) -> None:
    """All that the run had is free by then, and what it had drawn is given back."""
    script = """
fake.fake_generator_set.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
fake.fake_generator_offset.restype = ctypes.c_uint64
fake.fake_generator_set(5, 8)
entry, variant = entry_of(executor(draws=4))
for left in (0, 1, 2, -1):
    fake.fake_allocations(left, 0)
    print(call(entry), variant.errors, fake.fake_generator_offset())
    note("called")
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == ["body 0 8", "body 0 8", "served 0 12", "served 0 16"]
    calls = " ".join(line.split()[0] for line in log if line[0] in "acf").split("called")
    assert [part.split() for part in calls[:2]] == [
        [*["finish"] * 2],
        ["allocate", "free"],
    ]


def test_a_variant_that_never_gets_memory_is_dropped(stand_ins: Path, tmp_path: Path) -> None:
    script = """
entry, variant = entry_of(executor())
def without(calls):
    fake.fake_allocations(0, 0)
    print({call(entry) for _ in range(calls)}, variant.errors, len(entry.variants))
    fake.fake_allocations(-1, 0)
without(16)
print(call(entry))
without(16)
print(call(entry))
without(19)
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    shortage = "error CUDA out of memory. Tried to allocate a lot."
    assert printed == [
        "{'body'} 0 1", "served", "{'body'} 0 1", "served", *[shortage] * 3, "{'body'} 3 0",
    ]  # fmt: skip


def test_a_lost_gpu_is_torchs_to_report(stand_ins: Path, tmp_path: Path) -> None:
    """The body meets the error where it would have without us; no variant is blamed."""
    script = """
entry, variant = entry_of(executor())
driver.fake_fail(b"cuLaunchKernel", 710)
print({call(entry) for _ in range(50)}, variant.errors, len(entry.variants))
driver.fake_fail(b"", 0)
fake.fake_allocations(0, 710)
print({call(entry) for _ in range(50)}, variant.errors, len(entry.variants))
fake.fake_allocations(0, 1)  # of that call alone
print(call(entry), variant.errors)
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == ["{'body'} 0 1", "{'body'} 0 1", "error CUDA error: of torch", "body 1"]
    kinds = [line.split()[0] for line in log]
    assert kinds.count("allocate") == kinds.count("free") == 100 and "launch" not in kinds


def test_a_gpu_lost_in_a_commit(stand_ins: Path, tmp_path: Path) -> None:
    """The body cannot run: torch's own error is raised."""
    script = """
for code in (710, 701):
    entry, variant = entry_of(committing(2))
    for done in (0, 1, 2):
        driver.fake_fail(b"cuLaunchKernel", code)
        driver.fake_fail_after(done)
        x.copy_(torch.arange(8.0))
        print(call(entry), x[1].item())
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    torn = "accel._native.TornCommitError: ['kernel twice cannot be launched: CUDA_ERROR_UNKNOWN']"
    lost = (
        "torch.AcceleratorError: "
        "['CUDA error: device-side assert triggered', \"with torch's hints\"]"
    )
    failed = "error kernel twice cannot be launched: CUDA_ERROR_UNKNOWN"
    assert printed == [
        "body 1.0", "body 1.0", f"{lost} 4.0",
        failed, "body 1.0", failed, "body 1.0", f"{torn} 4.0",
    ]  # fmt: skip


def test_errors_of_an_executor_called_from_python(stand_ins: Path, tmp_path: Path) -> None:
    """As those of a graph for several sizes: what is no fault of the plan drops no variant."""
    script = """
e = executor()
entry, variant = entry_of(e.run)
fake.fake_allocations(0, 0)
print(failure(e.run, [x]), issubclass(native.NoMemoryError, native.ExecutorError))
print({call(entry) for _ in range(16)}, variant.errors)
fake.fake_allocations(-1, 0)
driver.fake_fail(b"cuLaunchKernel", 710)
print(failure(e.run, [x]))
print({call(entry) for _ in range(50)}, variant.errors)
driver.fake_fail(b"", 0)
print(call(entry), variant.errors)
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == [
        "NoMemoryError: CUDA out of memory. Tried to allocate a lot. True",
        "{'body'} 0",
        "DeclinedError: kernel twice cannot be launched: CUDA_ERROR_ASSERT",
        "{'body'} 0",
        "served 0",
    ]


# ---- the program's own captures ----


def test_what_a_capture_forbids_is_not_begun(stand_ins: Path, tmp_path: Path) -> None:
    """A plan that asks for a value would wait, which ends the recording."""
    script = """
e, plain = speculating(), executor()
entry, variant = entry_of(plain)
yes = torch.tensor(True)
note("captured")
driver.fake_capture(1)
print(failure(e.run, [x, yes]))
print(call(entry), variant.errors)
driver.fake_capture(0)
note("free again")
print(len(e.run([x, yes])), e.run([x, ~yes]))
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == [
        "DeclinedError: a value is asked for while a stream is captured",
        "served 0",
        "1 None",
    ]
    kinds = [line.split()[0] for line in log[log.index("captured") + 1 : log.index("free again")]]
    assert kinds == ["allocate", "allocate", "launch", "launch", "free", "free"]


def test_a_checkpoints_second_run_has_no_body(stand_ins: Path, tmp_path: Path) -> None:
    """What fails there ends it, with torch's own error where torch has one to give."""
    script = """
entry, variant = entry_of(executor())
def first(tensor): return tensor
def again(tensor): return tensor
def refuse(name, why): raise LookupError(why)
native.set_checkpoints(
    first.__code__, again.__code__, lambda pack: (None, True), lambda *_: None,
    lambda pack, callee: variant, refuse,
)
with torch.autograd.graph.saved_tensors_hooks(lambda t: t, again):
    print(call(entry))
    driver.fake_fail(b"cuLaunchKernel", 710)
    print(call(entry))
    driver.fake_fail(b"cuLaunchKernel", 701)
    print(call(entry))
    fake.fake_allocations(0, 0)
    print(call(entry))
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == [
        "served",
        "torch.AcceleratorError: "
        "['CUDA error: device-side assert triggered', \"with torch's hints\"]",
        "builtins.LookupError: ['kernel twice cannot be launched: CUDA_ERROR_UNKNOWN']",
        "torch.OutOfMemoryError: ['CUDA out of memory. Tried to allocate a lot.']",
    ]
