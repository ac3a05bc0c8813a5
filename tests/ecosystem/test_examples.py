"""The example programs, unmodified, under `python` and under `python -m accel run`.

The runs use `--tiny` models; `ACCEL_ECOSYSTEM_FULL=1` runs the full ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ["bert_base", "gpt2_prefill", "vit", "resnet50", "mlp_sequential"]
STEPS = 24
WARM_STEPS = 4  # the first calls, a recording, and its compilation
TIMEOUT_S = 300
FULL = os.environ.get("ACCEL_ECOSYSTEM_FULL") == "1"

# What `python -m accel run` does, and the counters at exit, for the test to read.
COUNTED = """
import json, runpy, sys
sys.argv = ["accel", "run", *sys.argv[2:]]
try:
    runpy.run_module("accel", run_name="__main__", alter_sys=True)
finally:
    import accel
    with open({path!r}, "w") as file:
        json.dump(accel.counters(), file)
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def arguments(name: str, saved: Path) -> list[str]:
    script = str(EXAMPLES / f"{name}.py")
    size = [] if FULL else ["--tiny"]
    return [script, "--steps", str(STEPS), "--threads", "1", "--save", str(saved), *size]


def lines(done: subprocess.CompletedProcess[str], word: str) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.startswith(word)]


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, tmp_path: Path) -> None:
    plain_file, accel_file = tmp_path / "plain.pt", tmp_path / "accel.pt"
    counters_file = tmp_path / "counters.json"
    plain = run([sys.executable, *arguments(name, plain_file)])
    counted = COUNTED.format(path=str(counters_file))
    optimized = run(
        [sys.executable, "-c", counted, "run", *arguments(name, accel_file)], ACCEL_SYNC="1"
    )

    assert len(lines(plain, "checksum")) == len(lines(optimized, "checksum")) == 1
    assert_same_outputs(torch.load(plain_file)["outputs"], torch.load(accel_file)["outputs"])
    assert_served_compiled(json.loads(counters_file.read_text()))


def assert_same_outputs(expected: list[torch.Tensor], got: list[torch.Tensor]) -> None:
    assert len(expected) == len(got)
    for left, right in zip(expected, got, strict=True):
        assert (left.dtype, left.shape, left.stride()) == (right.dtype, right.shape, right.stride())
        scale = left.abs().max().clamp(min=1e-6)
        assert float((left - right).abs().max() / scale) <= 1e-5


def assert_served_compiled(counters: dict[str, Any]) -> None:
    assert counters["graph_breaks"] == 0, counters
    assert counters["calls_compiled"] >= 0.9 * (STEPS - WARM_STEPS), counters
    assert counters["recordings_voided"] == 0, counters


def test_the_command_line_gives_the_same_checksum(tmp_path: Path) -> None:
    """The plain command, without our wrapper around it."""
    saved = tmp_path / "out.pt"
    plain = run([sys.executable, *arguments("mlp_sequential", saved)])
    optimized = run([sys.executable, "-m", "accel", "run", *arguments("mlp_sequential", saved)])
    assert lines(plain, "checksum") == lines(optimized, "checksum")
