"""Launches that follow each other, as CUDA graphs: when, with which addresses, and what becomes of errors.

With stand-ins for NVIDIA's driver and torch's CUDA library, whose memory is the processor's. Each
case is a process of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import test_gpu_runs
import test_random_streams
from test_cuda_driver import driver_folder  # noqa: F401
from test_gpu_runs import stand_ins  # noqa: F401
from test_random_streams import folder  # noqa: F401

pytestmark = test_random_streams.pytestmark

_SETTING = """
native.set_cuda_graphs(0, True)

def launch(from_, to):
    return {"op": "launch", "symbol": "twice", "buffers": [from_, to], "grid": 1, "numbers": [8]}

ARENA = [{"kind": "arena", "offset": 64 * n, **LAYOUT} for n in range(3)]
CHAIN = [launch(0, 1), launch(1, 2), launch(2, 3), launch(3, 4)]
BUFFERS = [{"kind": "input", "index": 0}, *ARENA, {"kind": "output", **LAYOUT}]
MORE = {"buffers": BUFFERS, "outputs": [4], "arena_bytes": 192}

# x * 16, by four launches.
def chain(device=0, steps=CHAIN, **more):
    made = plan(device=f"cuda:{device}", steps=steps, **{**MORE, **more})
    return native.Executor(made, os.environ["IMAGES"])

def whole(tensor):
    return list((ctypes.c_float * 8).from_address(tensor.data_ptr()))

# Eight numbers at an address that is a multiple of 16, and `bytes_behind`.
def numbers(first, bytes_behind=0):
    memory = torch.zeros(32)
    skip = (-memory.data_ptr() % 16 + bytes_behind) // 4
    made = memory[skip : skip + 8]
    return made.copy_(torch.arange(8.0) + first)

def is_right(e, made):
    (y,) = e.run([made])
    return whole(y) == (16 * made).tolist()

def facts():
    return [native.cuda_graphs()[name] for name in ("alive", "made", "launched", "failed")]
"""


def run(script: str, stand_ins: Path, log: Path) -> tuple[list[str], list[str]]:  # noqa: F811
    return test_gpu_runs.run(_SETTING + script, stand_ins, log)


def starts(log: list[str]) -> list[str]:
    return [line.removeprefix("start graph ") for line in log if line.startswith("start")]


def test_after_some_runs_launches_are_a_graph(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    """In the same order, with each run's own addresses and results."""
    script = """
e = chain()
kept = []
for turn in range(7):
    x = numbers(turn)
    (y,) = e.run([x])
    kept.append((x, y))
    print(turn, facts())
print(all(whole(y) == (16 * x).tolist() for x, y in kept), len({y.data_ptr() for _, y in kept}))
del e
print(facts())
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed[:3] == [f"{turn} [0, 0, 0, 0]" for turn in range(3)]
    assert printed[3:7] == [f"{turn} [1, 1, {turn - 2}, 0]" for turn in range(3, 7)]
    # What the program holds stays what it was, whatever ran behind it.
    assert printed[7:] == ["True 7", "[0, 1, 4, 0]"]
    assert starts(log) == ["stream 0x1000"] * 4
    assert len([line for line in log if line.startswith("launch")]) == 7 * 4
    assert log.count("instantiate 4") == 1 and log.index("instantiate 4") > log.index("graph")
    assert log[-2:] == ["destroy instance", "destroy graph"]


def test_what_has_not_changed_is_not_set_again(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    script = """
e = chain()
x, y = numbers(0), numbers(100)
for _ in range(4):
    e.run([x])
note("another input")
assert is_right(e, y)
note("again")
assert is_right(e, y)
"""
    _, log = run(script, stand_ins, tmp_path / "log")
    # How memory is handed out is the stand-in's affair; only the first kernel reads the input.
    assert 1 <= log[log.index("another input") :].count("set") <= 8
    assert len(starts(log)) == 3


@pytest.mark.parametrize(
    "case",
    [
        "native.set_cuda_graphs(0, False); e = chain()",
        "e = chain(device=1)",
        "e = chain(steps=[launch(0, 1), launch(1, 2), launch(2, 4)])",
    ],
    ids=["off", "another GPU", "few"],
)
def test_launches_that_stay_launches(case: str, stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    script = f"""
{case}
x = numbers(0)
for _ in range(8):
    e.run([x])
print(facts())
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[0, 0, 0, 0]"] and not starts(log)
    assert sum(line.startswith("launch") for line in log) >= 24


def test_a_graph_is_for_a_stream_that_keeps_coming(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    """Else two streams would wait for each other: launches of one graph are in order."""
    script = """
e = chain()
def runs(*streams):
    for stream in streams:
        torch_library.fake_stream(0, stream)
        assert is_right(e, numbers(stream))
    print(facts())
runs(*[0x10] * 5)
runs(*[0x20, 0x10] * 5)
runs(*[0x20] * 5)
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[1, 1, 2, 0]", "[1, 1, 2, 0]", "[1, 1, 4, 0]"]
    assert starts(log) == ["stream 0x10"] * 2 + ["stream 0x20"] * 2


def test_while_the_program_captures(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    """Launches go into its graph one by one; what another thread captures does not matter."""
    script = """
e = chain()
x = numbers(0)
for _ in range(5):
    e.run([x])
driver.fake_capture(1)
for _ in range(3):
    assert is_right(e, x)
print(facts())
driver.fake_capture(0)
assert is_right(e, x)
print(facts(), driver.fake_capture_mode(), driver.fake_contexts())
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[1, 1, 2, 0]", "[1, 1, 3, 0] 0 0"]


def test_a_capture_elsewhere_forbids_nothing(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    script = """
driver.fake_capture_elsewhere(1)
e = chain()
x = numbers(0)
for _ in range(5):
    assert is_right(e, x)
print(facts(), driver.fake_capture_mode())
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[1, 1, 2, 0] 0"]


def test_threads_share_no_graph(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    script = """
e = chain()
def work(n):
    for k in range(150):
        if not is_right(e, numbers(1000 * n + k)):
            print("wrong", n, k)
threads = [threading.Thread(target=work, args=[n]) for n in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
print(facts()[0], facts()[2] > 100)
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == ["1 True"]


def test_other_machine_code_is_launched_as_it_is(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    """Addresses that the graph's kernels cannot take are another image's."""
    script = """
e = chain()
aligned, other = numbers(0), numbers(0, bytes_behind=4)
for x in (*[aligned] * 5, other, other, aligned):
    assert is_right(e, x)
print(facts())
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[1, 1, 3, 0]"]


def test_numbers_that_each_run_draws(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    """Parameters like others: a graph draws what launches would."""
    script = """
fake.fake_generator_set.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
image = {"alignment": 1, "offset": 8, "size": 4, "shared_bytes": 0}
kernel = {"symbol": "draw", "threads": 128, "scratch_pointers": 0, "images": [image]}
step = {"op": "launch", "symbol": "draw", "buffers": [0], "grid": 1,
        "numbers": [{"drawn": 0}, "seed", {"drawn": 2}]}
e = chain(steps=[step] * 4, kernels=[kernel], draws=12, outputs=[])
def drawn(wanted):
    native.set_cuda_graphs(0, wanted)
    fake.fake_generator_set(5, 8)
    note(f"graphs {wanted}")
    for _ in range(6):
        e.run([numbers(0)])
drawn(False)
drawn(True)
print(facts())
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[1, 1, 3, 0]"]
    middle = log.index("graphs True")
    plain, graphed = (
        [line for line in part if line.startswith("number")]
        for part in (log[:middle], log[middle:])
    )
    assert plain == graphed and len(set(plain)) > 6


def test_commits_are_launched_one_by_one(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of them the run knows which have been launched when one fails."""
    script = """
e = committing(6)
for _ in range(6):
    e.run([x])
print(facts())
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[0, 0, 0, 0]"]


# ---- errors ----

_REFUSALS = [
    "cuGraphCreate", "cuGraphAddKernelNode_v2", "cuGraphInstantiateWithFlags",
    "cuGraphExecKernelNodeSetParams_v2",
]  # fmt: skip


@pytest.mark.parametrize("function", _REFUSALS)
def test_what_the_driver_refuses_is_launched(
    function: str,
    stand_ins: Path,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In the same run, for want of memory too; and it is not tried again."""
    script = f"""
os.dup2(1, 2)
e, other = chain(), chain()
driver.fake_fail(b"{function}", 2)
for turn in range(4):
    assert is_right(e, numbers(turn))
keep = [numbers(turn) for turn in range(9)]
assert all(is_right(e, x) for x in keep)
driver.fake_fail(b"", 0)
assert all(is_right(e, x) for x in keep)
print(facts()[0], facts()[3], driver.fake_contexts(), driver.fake_capture_mode(), flush=True)
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    told = [line for line in printed if line.startswith("accel: ")]
    assert len(told) == 1 and "without a CUDA graph" in told[0]
    assert printed[-1] == "0 1 0 0"
    assert log.count("graph") == log.count("destroy graph") <= 1
    assert sum(line.startswith("launch") for line in log) == 22 * 4


def test_a_graph_that_cannot_be_launched(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    """What of it has run is not known: this run is the body's, later ones are launches."""
    script = """
os.dup2(1, 2)
e = chain()
for _ in range(4):
    e.run([numbers(0)])
driver.fake_fail(b"cuGraphLaunch", 2)
print(failure(e.run, [numbers(0)]), flush=True)
print(is_right(e, numbers(1)), facts(), flush=True)
"""
    printed, log = run(script, stand_ins, tmp_path / "log")
    assert "DeclinedError: a graph cannot be launched: CUDA_ERROR_UNKNOWN" in printed
    assert printed[-1] == "True [0, 1, 1, 1]"
    assert log.count("destroy instance") == 1


def test_a_lost_gpu_is_no_graphs_affair(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    script = """
e = chain()
for _ in range(4):
    e.run([numbers(0)])
driver.fake_fail(b"cuGraphLaunch", 719)
print(failure(e.run, [numbers(0)]), facts())
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == ["DeclinedError: a graph cannot be launched: CUDA_ERROR_UNKNOWN [1, 1, 1, 0]"]


def test_how_many_graphs_there_are_is_bounded(stand_ins: Path, tmp_path: Path) -> None:  # noqa: F811
    script = """
many = [chain() for _ in range(260)]
x = numbers(0)
for e in many:
    for _ in range(4):
        assert is_right(e, x)
print(facts())
del many[:10], e
assert all(is_right(e, x) for e in many)
print(facts()[:2])
"""
    printed, _ = run(script, stand_ins, tmp_path / "log")
    assert printed == ["[256, 256, 256, 0]", "[250, 260]"]
