"""benchmarks/bench_gpu.py without a GPU: rows run, nothing is written, verdicts come from numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bench_gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_small_rows_are_served_and_agree() -> None:
    done = run("--check", "--only", "cross-entropy-1G-bf16", "tiny")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert json.loads(line.partition(": ")[2]) == {"served_compiled": True, "agrees": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    before = sorted(BENCHMARKS.glob("results/gpu-*"))
    done = run("--only", "tiny")
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
    assert sorted(BENCHMARKS.glob("results/gpu-*")) == before


def _record(row: str, group: str, us: dict[str, float], **facts: bool) -> dict[str, Any]:
    def interval(value: float) -> dict[str, float]:
        return {"median": value, "low": value, "high": value}

    ratios = {n: interval(v / us["accel"]) for n, v in us.items() if n != "accel"}
    known = {"served_compiled": True, "agrees": True} | facts
    return {
        "row": row,
        "group": group,
        "machine": {"gpu": "a GPU"},
        "us": {n: interval(v) for n, v in us.items()},
        "speedup": ratios,
        "facts": {"accel": known},
    }


def test_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu_rows import GROUPS, gpu_table

    empty = gpu_table(tmp_path).splitlines()
    assert len(empty) == 2 + len(GROUPS)
    assert not any(character.isdigit() for line in empty[2:] for character in line.split("|")[3])

    fast = {"eager": 20.0, "torch.compile": 11.0, "copy": 9.5, "accel": 10.0}
    slow = fast | {"torch.compile": 9.0}
    records = [
        _record("k1", "kernels", fast),
        _record("k2", "kernels", slow),
        _record("k3", "kernels", fast, served_compiled=False),
        _record("k4", "kernels", fast, agrees=False),
        _record("m1", "models", {"eager": 20.0, "torch.compile": 14.0, "accel": 10.0}),
        _record("m2", "models", {"eager": 20.0, "torch.compile": 9.0, "accel": 10.0}),
        _record("tiny", "tiny", {"eager": 30.0, "accel": 10.5}),
        _record("first", "first", {"eager": 1e6, "accel": 1.4e6}),
    ]
    for record in records:
        (tmp_path / f"gpu-{record['row']}.json").write_text(json.dumps(record))
    verdicts = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in gpu_table(tmp_path).splitlines()}  # fmt: skip
    assert verdicts["k1"] == "yes"
    assert verdicts["k2"] == "**no**"
    assert verdicts["k3"] == "**no** (not compiled)"
    assert verdicts["k4"] == "**no** (another result)"
    assert verdicts["**models, geometric mean**"] == "yes"  # 1.4 and 0.9: 1.12
    assert verdicts["tiny"] == "**no**"
    assert verdicts["first"] == "yes"
