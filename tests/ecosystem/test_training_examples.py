"""The training examples, unmodified, under `python` and under `python -m accel run`.

Loss curves are compared step by step, and the final parameters. Two runs that differ in
float32 noise drift apart exponentially, so what is allowed grows with the step.
`ACCEL_ECOSYSTEM_FULL=1` runs the full models for 200 steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import COUNTED, EXAMPLES, FULL, lines, run

NAMES = ["train_mlp", "train_gpt", "train_cnn", "train_bert"]
STEPS = 200 if FULL else 30
WARM_STEPS = 6  # the first calls, a recording, its compilation, and that of the gradients that come


def arguments(name: str, saved: Path) -> list[str]:
    script = str(EXAMPLES / f"{name}.py")
    size = [] if FULL else ["--tiny"]
    return [script, "--steps", str(STEPS), "--threads", "1", "--save", str(saved), *size]


@pytest.mark.parametrize("name", NAMES)
def test_training(name: str, tmp_path: Path) -> None:
    plain_file, accel_file = tmp_path / "plain.pt", tmp_path / "accel.pt"
    counters_file = tmp_path / "counters.json"
    plain = run([sys.executable, *arguments(name, plain_file)])
    counted = COUNTED.format(path=str(counters_file))
    run([sys.executable, "-c", counted, "run", *arguments(name, accel_file)], ACCEL_SYNC="1")
    assert len(lines(plain, "checksum")) == 1
    expected, got = (torch.load(f)["outputs"] for f in (plain_file, accel_file))
    assert_same_curve(expected[0], got[0])
    for left, right in zip(expected[1:], got[1:], strict=True):
        scale = left.abs().max().clamp(min=1e-3)
        assert float((left - right).abs().max() / scale) <= (0.2 if FULL else 5e-3)
    assert_compiled(json.loads(counters_file.read_text()))


def assert_same_curve(expected: torch.Tensor, got: torch.Tensor) -> None:
    apart = ((expected - got).abs() / expected.abs().clamp(min=1e-2)).tolist()
    allowed = [1e-5 * 1.25 ** min(step, 40) for step in range(len(apart))]
    worst = [i for i, (a, b) in enumerate(zip(apart, allowed, strict=True)) if a > b]
    assert not worst, [(i, apart[i]) for i in worst[:5]]


def assert_compiled(counters: dict[str, Any]) -> None:
    assert counters["backwards_compiled"] >= 0.8 * (STEPS - WARM_STEPS), counters
    assert counters["optimizer_steps"] >= STEPS - 1, counters
    assert counters["backwards_recomputed"] <= 2, counters
