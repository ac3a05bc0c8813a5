"""`accel bench kernel`: dumped graphs run again and timed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accel import cli, replay

PROGRAM = """
import torch
import accel

layer = torch.nn.Linear(64, 64).eval()

def f(x):
    return torch.softmax(torch.relu(layer(x)), -1).sort(-1).values + 1

with torch.no_grad():
    for _ in range(4):
        f(torch.randn(40, 64))
        accel.wait(60)
"""


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "accel", "run", "--dump-dir", "dump", "program.py"]
    environment = dict(os.environ, ACCEL_CACHE_DIR=str(folder / "cache"))
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder / "dump"


def test_every_step_is_timed(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernel", str(dump), "--rounds", "5", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    names = {s["name"] for s in result["steps"]}
    assert any(n.startswith("k") for n in names) and any(n.startswith("aten::sort") for n in names)
    for step in result["steps"]:
        assert step["in_place_ns"] > 0 and step["bytes"] >= 40 * 64 * 4
    # An operation may allocate, and what it made is gone when the kernel behind it is repeated.
    alone = {s["name"] for s in result["steps"] if s["alone_ns"] is not None}
    assert alone and all(n.startswith("k") for n in alone)
    assert result["rounds"] == 5
    total = sum(s["in_place_ns"] for s in result["steps"])
    assert 0.3 * result["whole_ns"] < total < 3 * result["whole_ns"]


def test_a_person_reads_a_table(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", "kernel", str(dump), "--threads", "1", "--rows", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert "us, 1 thread(s), medians of 21" in lines[0]
    assert lines[1].split()[:2] == ["step", "times"] and len(lines) == 4
    assert "more; --rows" in lines[3]


def test_one_kernel_alone(dump: Path) -> None:
    (folder,) = replay.folders(dump)
    whole = replay.replay(folder, 3)
    kernel = next(s.name for s in whole.steps if s.name.startswith("k"))
    alone = replay.replay(folder, 3, kernel)
    assert {s.name for s in alone.steps} == {kernel}
    with pytest.raises(replay.ReplayError, match="no step is called 'k99'; there are k0"):
        replay.replay(folder, 3, "k99")


def test_an_edited_kernel_is_what_is_timed(dump: Path, tmp_path: Path) -> None:
    (folder,) = replay.folders(dump)
    text = (folder / replay.TEXT).read_text()
    (tmp_path / replay.PLAN).write_bytes((folder / replay.PLAN).read_bytes())
    kernel = next(s.name for s in replay.replay(folder, 3).steps if s.name.startswith("k"))
    head = re.compile(rf'extern "C" void {kernel}\(void\* const\* p, long( threads)?\) \{{')
    assert head.search(text)
    slow = head.sub(r"\g<0> for (volatile long i = 0; i < 3000000; i++) {}", text)
    (tmp_path / replay.TEXT).write_text(slow)
    (step,) = replay.replay(tmp_path, 3, kernel).steps
    assert step.in_place_ns > 500_000 and step.alone_ns is not None and step.alone_ns > 500_000


def test_what_cannot_be_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernel", str(tmp_path)]) == 2
    assert "holds no dumped graph; `accel run --dump-dir" in capsys.readouterr().err
    (tmp_path / replay.PLAN).write_text("{")
    assert cli.main(["bench", "kernel", str(tmp_path)]) == 2
    assert "is not a plan" in capsys.readouterr().err
    assert cli.main(["bench", "kernel", str(tmp_path), "--rounds", "0"]) == 2
    assert "--rounds wants at least 1, not 0" in capsys.readouterr().err


def test_inputs_of_any_layout_are_made_up() -> None:
    rows = [([7, 5], [0, 1]), ([7, 5], [1, 7]), ([], []), ([0, 3], [3, 1]), ([4, 2], [3, 1])]
    for dtype in ("float32", "bfloat16", "int64", "bool", "complex64"):
        for sizes, strides in rows:
            made = replay._made_up({"sizes": sizes, "strides": strides, "dtype": dtype})
            assert list(made.shape) == sizes and list(made.stride()) == strides
            assert made.dtype == getattr(torch, dtype)


def test_a_graph_that_cannot_be_timed_does_not_hide_the_others(
    dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = replay.folders(dump)
    for name, extra in (("one size", {}), ("several", {"sizes": {}})):
        (tmp_path / name).mkdir()
        plan = json.loads((folder / replay.PLAN).read_text()) | extra
        (tmp_path / name / replay.PLAN).write_text(json.dumps(plan))
        (tmp_path / name / replay.TEXT).write_bytes((folder / replay.TEXT).read_bytes())
    assert cli.main(["bench", "kernel", str(tmp_path), "--rounds", "3"]) == 0
    out, err = capsys.readouterr()
    assert "one size: " in out and "several: a graph for several sizes" in err
    assert cli.main(["bench", "kernel", str(tmp_path / "several")]) == 2


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (replay.TEXT, None, "No such file"),
        (replay.TEXT, b"\xff\xfe\xff", "is not text"),
        (replay.TEXT, b'extern "C" void other(void* const*, long) {}', "is not a plan for"),
        (replay.TEXT, b"nonsense", "cannot be compiled"),
        (replay.PLAN, b"{}", "is not a plan for"),
        (replay.PLAN, b"[]", "is not a plan for"),
    ],
    ids=["no text", "bytes", "renamed", "no C++", "empty plan", "list"],
)
def test_what_somebody_has_changed_is_told_in_a_line(
    file: str,
    content: bytes | None,
    words: str,
    dump: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder,) = replay.folders(dump)
    for name in ("good", "bad"):
        shutil.copytree(folder, tmp_path / name)
    if content is None:
        (tmp_path / "bad" / file).unlink()
    else:
        (tmp_path / "bad" / file).write_bytes(content)
    assert cli.main(["bench", "kernel", str(tmp_path), "--rounds", "3"]) == 0
    out, err = capsys.readouterr()
    assert "good: " in out and words in err and "bad" in err and "Traceback" not in err


def test_more_threads_than_there_can_be(dump: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernel", str(dump), "--threads", "1000000000000"]) == 2
    assert "--threads wants at most" in capsys.readouterr().err
