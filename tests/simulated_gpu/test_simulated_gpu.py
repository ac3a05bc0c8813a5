"""Programs on a GPU that is not there, in processes of their own: from recording to launch and back."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
RUN = str(Path(__file__).with_name("run_programs.py"))


def run(*arguments: str) -> tuple[str, int, int]:
    """What it prints; how many programs there were, and how many launched kernels."""
    done = subprocess.run(
        [sys.executable, RUN, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    last = re.findall(r"(\d+) programs, 0 differ, (\d+) launched kernels", done.stdout)
    assert done.returncode == 0 and last, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, int(last[0][0]), int(last[0][1])


@pytest.mark.parametrize("area", ["guards: ", "autocast: ", "torch: "])
def test_programs_of_one_area(area: str) -> None:
    printed, programs, launched = run(area)
    assert launched >= programs * 3 // 4, printed


def test_programs_of_all_areas() -> None:
    printed, programs, launched = run("--every", "12")
    assert programs > 90
    assert launched >= programs // 2, printed


_HEAD = """
import os, sys
sys.path[:0] = [{here!r}, {codegen!r}]
import simulated_gpu
simulated_gpu.install()
import torch, accel

def plain(x):
    return (x * 2 + 1).softmax(-1)

def noisy(x):
    return torch.nn.functional.dropout(x * 2, 0.5) + torch.rand_like(x)

def served(f, *sizes):
    before = accel.counters()["calls_compiled"]
    root = accel.optimize(f)
    for turn in range(4):
        x = torch.randn(*sizes, device="cuda")
        torch.manual_seed(turn)
        got, behind = root(x), torch.rand(3, device="cuda")
        accel.wait()
        with accel.disable():
            torch.manual_seed(turn)
            torch.testing.assert_close(got, f(x))
            torch.testing.assert_close(behind, torch.rand(3, device="cuda"))
    return accel.counters()["calls_compiled"] - before
"""


def script(text: str) -> list[str]:
    """What it prints, and what accel tells the user."""
    here = Path(__file__).parent
    head = _HEAD.format(here=str(here), codegen=str(here.parent / "unit" / "codegen"))
    done = subprocess.run(
        [sys.executable, "-c", head + text],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = [line for line in done.stderr.splitlines() if line.startswith("accel:")]
    return [*done.stdout.splitlines(), *told]


def test_kernels_run_where_they_agree_with_eager(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path))
    text = "print(served(plain, 5, 7), served(noisy, 5, 7), len(simulated_gpu.launches) > 20)"
    assert script(text) == ["3 3 True"]


def test_a_gpu_whose_kernels_are_wrong_is_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path))
    printed = script(
        """
simulated_gpu._run = lambda *_: 0  # a launch that does nothing
print(served(plain, 5, 7), served(noisy, 5, 7))
"""
    )
    assert printed[0] == "0 0" and len(printed) == 2
    assert "programs on cuda:0 stay eager: pointwise on simulated" in printed[1]


def test_a_gpu_that_draws_otherwise_draws_in_eager(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path))
    printed = script(
        """
state = torch.cuda
facts = vars(state.get_device_properties())
state.get_device_properties = lambda device=None: type("Facts", (), {**facts, "multi_processor_count": 1})
print(served(plain, 5, 7), served(noisy, 5, 7))
"""
    )
    assert printed[0] == "3 0" and len(printed) == 2
    assert "random numbers on cuda:0 stay eager: random numbers on simulated" in printed[1]


_TWO_DEVICES = """
def numbers(x):
    return torch.where(x > 0, x, torch.tensor(-1.0)) * torch.tensor(0.5, dtype=torch.float64)

def table(x):
    steps = torch.arange(7, dtype=torch.float32) ** 2
    steps[0] = 3
    return x + steps.to(x.device) + torch.tensor([1.0] * 7).cuda()

def kept(x):
    scale = torch.tensor(2.0)
    return (x * 2).relu() * scale, scale * 3

def moved(x):
    y = x.cuda()
    return y.softmax(-1) * 2 + 1

def fetched(x):
    y = (x.relu() * 2).sum(-1).cpu()
    return y * 3 + 1

def host_scalar(x, s=torch.tensor(0.5)):
    return (x.relu() * s + 1).sum(-1)

def sorted_there(x):
    return x.relu() * 2 + torch.tensor([1, 1, 0, 2, 0, 2, 1]).argsort().to(x.device)

def drawn(x):
    return x.relu() * 2 + torch.rand(7).to(x.device)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(7, 7)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.device)).relu() * 2

def count():
    counts = accel.counters()
    return counts["calls_compiled"], counts["segments_served"]

def tried(f, device):
    root = accel.optimize(f)
    for turn in range(10):
        x = torch.randn(5, 7, device=device)
        before = count()
        torch.manual_seed(turn)
        got = root(x)
        served = [b - a for a, b in zip(before, count())]
        accel.wait()
        with accel.disable():
            torch.manual_seed(turn)
            wanted = f(x)
        torch.testing.assert_close(got, wanted, check_device=True)
    return served
"""


def test_programs_on_a_gpu_and_on_the_processor() -> None:
    """What is made of numbers alone is computed with the rest; else there is a graph break."""
    printed = script(
        _TWO_DEVICES
        + """
with torch.no_grad():
    print(tried(numbers, "cuda"), tried(table, "cuda"))
    print(tried(kept, "cuda")[1] > 0, tried(drawn, "cuda")[1] > 0, tried(sorted_there, "cuda")[1] > 0)
    print(tried(moved, "cpu")[1], tried(fetched, "cuda")[1], tried(host_scalar, "cuda"))
    print(tried(Model().cuda(), "cpu")[1] > 0)
"""
    )
    assert printed == ["[1, 0] [1, 0]", "True True True", "1 2 [1, 0]", "True"]


def test_numbers_that_change_are_given_to_launches() -> None:
    """Python's, and tensors without dimensions on the processor, of every dtype; one variant for all values."""
    printed = script(
        """
class Schedule:
    def __init__(self):
        self.temperature = 1.0

schedule = Schedule()

def cooled(x):
    return (x / schedule.temperature).softmax(-1) * schedule.temperature

def with_number(x, n):
    return x * n, torch.where(x > 0, x, n), (x + n).sum(-1)

def trained(x, w, n):
    return ((x @ w).tanh() * n).sum()

def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)

root = accel.optimize(cooled)
for turn in range(12):
    schedule.temperature = 0.5 + turn / 3
    x, before = torch.randn(3, 5, device="cuda"), accel.counters()["calls_compiled"]
    got = root(x)
    accel.wait()
    with accel.disable():
        same(got, cooled(x))
served = accel.counters()["calls_compiled"] - before
(variants,) = (len(r.variants) for r in accel.driver.current.roots if r.name == "cooled")
print(served, variants <= 2)

for dtype in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split():
    def one(x, n):
        return with_number(x, n)

    root = accel.optimize(one)
    for value in (3, 1, 0, 2, 7):
        n = torch.tensor(value).to(getattr(torch, dtype))
        x, before = torch.randn(3, 5, device="cuda"), accel.counters()["calls_compiled"]
        got = root(x, n)
        accel.wait()
        with accel.disable():
            same(got, with_number(x, n))
    assert accel.counters()["calls_compiled"] - before == 1, dtype

root = accel.optimize(trained)
for turn in range(4):
    x, n = torch.randn(3, 4, device="cuda"), torch.tensor(turn + 0.5)
    w = torch.randn(4, 2, device="cuda", requires_grad=True)
    before = accel.counters()["backwards_compiled"]
    root(x, w, n).backward()
    accel.wait()
    (got, w.grad) = (w.grad, None)
    with accel.disable():
        trained(x, w, n).backward()
    same(got, w.grad)
print(accel.counters()["backwards_compiled"] - before)
"""
    )
    assert printed == ["1 True", "1"]


def test_a_gpu_without_a_number_is_the_current_one() -> None:
    """The compiler cannot ask which it is; a recording says it, and guards it."""
    printed = script(
        """
from accel import _native
from accel.capture.operations import with_gpu_number

assert "current GPU" in _native.ambient()
torch.cuda.current_device = lambda: 3
print(with_gpu_number("cuda"), repr(with_gpu_number(torch.device("cuda"))))
print(with_gpu_number("cuda:1"), with_gpu_number("cpu"), with_gpu_number(torch.device("cuda:0")))
"""
    )
    assert printed == ["cuda:3 device(type='cuda', index=3)", "cuda:1 cpu cuda:0"]


_REPEATED = """
def steps(x):
    for turn in range(5):
        x = torch.cumsum(x, turn % 2) / 8
    return x

def replayed():
    root, held = accel.optimize(steps), []
    for turn in range(12):
        x = torch.randn(6, 9, device="cuda")
        held.append((x, root(x)))
        accel.wait()
    with accel.disable():
        for x, y in held:
            torch.testing.assert_close(y, steps(x))
    return accel.counters()["calls_compiled"] >= 8, accel.counters()["cuda_graphs_launched"]
"""


def test_kernels_are_launched_as_graphs_where_wanted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path))
    (printed,) = script(_REPEATED + "print(*replayed())")
    assert printed == "True 0"
    monkeypatch.setenv("ACCEL_CUDA_GRAPHS", "1")
    (printed,) = script(_REPEATED + "print(*replayed())")
    served, launched = printed.split()
    assert served == "True" and int(launched) > 5 + 3  # the trial's, and the program's


def test_a_gpu_whose_graphs_are_wrong_launches_one_by_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCEL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("ACCEL_CUDA_GRAPHS", "1")
    printed = script(
        _REPEATED
        + """
from accel import runtime
run, known = simulated_gpu._run, []
def without_effect(*given):
    if runtime.native.cuda_graphs()["made"]:  # the first launch of a graph
        known.append(1)
        if len(known) <= 6:
            return 0
    return run(*given)
simulated_gpu._run = without_effect
print(*replayed())
"""
    )
    served, launched = printed[0].split()
    assert served == "True" and int(launched) == 5
    assert "kernels on cuda:0 are launched without CUDA graphs: a graph's result" in printed[1]
