"""Some rows of `benchmarks/architectures.py`: equal to eager, whole, and served compiled."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import architectures

NAMES = [
    "bloom",  # autograd functions
    "deberta-v2",
    "gpt2, generate()",
    "mamba2",
    "mixtral",  # grouped products
    "t5",
    "wav2vec2",
    "vit",
    "graph network",
    "llama by hand",
    "lstm tagger, training",
    "mixture of experts, training",
    "nanogpt, sampling",
    "u-net, training",
]


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str) -> None:
    architectures.provide_torchvision_schema()
    row = architectures.measure(name)
    assert not row.wrong, row.line()
    assert row.is_whole, row.line()
    assert row.compiled >= architectures.CALLS, row.line()


def test_the_table_has_what_it_promises() -> None:
    rows = architectures.rows()
    modes = [mode for mode, _, _ in rows.values()]
    assert len(architectures.ARCHITECTURES) >= 30
    assert modes.count("generate") >= 10
