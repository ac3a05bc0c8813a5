"""Products are measured beside ATen's, once for a machine, and the faster way is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_graph import capture

from accel.codegen import pipeline, trials
from accel.codegen.build import cpu_features, vector_bytes
from accel.codegen.options import CodegenOptions
from accel.codegen.trials import Shape, pays

randn = torch.randn
needs_wide_vectors = pytest.mark.skipif(vector_bytes() < 64, reason="needs vectors of 64 bytes")
SHAPE = Shape("float32", 200, 768, 768, True, 256)
OPTIONS = CodegenOptions()


class Times:
    """Stands for the measurement: says how often it was asked."""

    def __init__(self, ours: float, aten: float) -> None:
        self.times, self.asked = (ours, aten), 0

    def __call__(self, *_: Any) -> tuple[float, float]:
        self.asked += 1
        return self.times


@needs_wide_vectors
def test_the_answer_follows_the_times_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, times, alone, continued in (
        ("slower", Times(1.5, 1.0), False, False),
        ("faster", Times(1.0, 1.5), True, True),
        ("about the same", Times(1.03, 1.0), False, True),  # the epilogue decides
    ):
        monkeypatch.setattr(trials, "_measure", times)
        (tmp_path / folder).mkdir()
        for _ in range(2):
            assert pays(SHAPE, False, tmp_path / folder, OPTIONS) is alone
            assert pays(SHAPE, True, tmp_path / folder, OPTIONS) is continued
        assert times.asked == 1
        assert pays(replace(SHAPE, m=500), False, tmp_path / folder, OPTIONS) is alone
        assert times.asked == 2


DAMAGES = {
    "cut": '{"ours',
    "deep": "[" * 200_000,
    "long": '{"ours_s": 1' + "0" * 400 + ', "aten_s": 1.0}',
    "no number": '{"ours_s": NaN, "aten_s": 1.0}',
    "no time": '{"ours_s": -1.0, "aten_s": 1.0}',
}


@needs_wide_vectors
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = Times(2.0, 1.0)
    monkeypatch.setattr(trials, "_measure", times)
    assert not pays(SHAPE, False, tmp_path, OPTIONS)
    (record,) = tmp_path.glob("*.trial")
    record.write_text(DAMAGES[damage])
    assert not pays(SHAPE, False, tmp_path, OPTIONS)
    assert times.asked == 2 and json.loads(record.read_text())["ours_s"] == 2.0


@needs_wide_vectors
def test_a_record_that_cannot_be_kept_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_measure", Times(2.0, 1.0))
    assert not pays(SHAPE, False, tmp_path, OPTIONS)
    (record,) = tmp_path.glob("*.trial")
    record.unlink()
    record.mkdir()
    assert not pays(SHAPE, False, tmp_path, OPTIONS)
    assert list(tmp_path.iterdir()) == [record]


@needs_wide_vectors
def test_measuring_minds_no_default_dtype(tmp_path: Path) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # memory of half the size would be written beyond
    try:
        assert all(t > 0 for t in trials._measure(SHAPE, tmp_path, OPTIONS))
        assert trials.torch.zeros(1).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


@needs_wide_vectors
def test_what_cannot_be_measured_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> tuple[float, float]:
        raise RuntimeError("no memory")

    monkeypatch.setattr(trials, "_measure", fails)
    assert pays(SHAPE, False, tmp_path, OPTIONS)
    assert not list(tmp_path.iterdir())


@needs_wide_vectors
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_measured_are_products(dtype: str, turned: bool, tmp_path: Path) -> None:
    """Otherwise the times would say nothing."""
    if dtype == "bfloat16" and "avx512_bf16" not in cpu_features().split():
        pytest.skip("this CPU multiplies no bfloat16")
    m, n, k = 100, 200, 300
    left = randn(m, k).to(getattr(torch, dtype))
    right = randn(n, k).to(left.dtype).t() if turned else randn(k, n).to(left.dtype)
    packed, out = torch.zeros(112, k, dtype=left.dtype), torch.full((m, n), torch.nan)
    block = 64 if turned else 60
    run = trials._function(Shape(dtype, m, n, k, turned, block), tmp_path, OPTIONS)
    run(*(t.data_ptr() for t in (left, right, packed, out)), m, n, k, block)
    torch.testing.assert_close(out, left.float() @ right.float(), rtol=1e-3, atol=1e-3)


@needs_wide_vectors
def test_measuring_ends_soon_and_changes_no_settings(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        huge = trials._cut(Shape("float32", 1 << 20, 50257, 8192, True, 256))
        assert huge.m * huge.n * huge.k < 1 << 31 and huge.n % 192 == 0
        ours, aten = trials._measure(replace(SHAPE, m=64), tmp_path, OPTIONS)
        assert 0 < ours < 1 and 0 < aten < 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@needs_wide_vectors
@pytest.mark.parametrize("turned", [True, False])
def test_graphs_take_the_faster_way(
    turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, small = randn(256, 256), randn(256, 60)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ (weight.t() if turned else weight)) @ small

    for times, externs in ((Times(2.0, 1.0), 1), (Times(1.0, 2.0), 0)):
        monkeypatch.setattr(trials, "_measure", times)
        folder = tmp_path / str(externs)
        folder.mkdir()
        graph, _, _ = capture(f, [randn(100, 256)])
        plan = pipeline.run_passes(graph, folder, OPTIONS).plan
        assert sum("mm" in str(step) for step in plan["steps"] if "op" in str(step)) == externs
        assert times.asked == 1  # the small product is not worth it


@needs_wide_vectors
def test_products_with_few_columns_are_measured_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing the rows is much of their work."""
    head = randn(10, 256)
    for times, externs in ((Times(2.0, 1.0), 1), (Times(1.0, 2.0), 0)):
        monkeypatch.setattr(trials, "_measure", times)
        folder = tmp_path / str(externs)
        folder.mkdir()
        graph, _, _ = capture(lambda x: torch.relu(x @ head.t()), [randn(128, 256)])
        plan = pipeline.run_passes(graph, folder, OPTIONS).plan
        assert sum("mm" in str(step) for step in plan["steps"] if "op" in str(step)) == externs
        assert times.asked == 1
