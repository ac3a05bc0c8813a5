"""Some models of `benchmarks/vision.py`, on small images: as right as eager, whole, served compiled."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import vision

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None,
    reason="needs timm and torchvision (pip install --no-deps timm torchvision)",
)

CONVOLUTIONS = [
    "convnext_atto_rms",
    "efficientvit_b0",  # regions of autocast
    "hrnet_w18_small",
    "mobilenetv3_small_050",
    "poolformerv2_s12",  # means over windows with padding
    "repghostnet_050",
]


@pytest.mark.parametrize(
    ("name", "train", "size"),
    [
        *((name, False, 64) for name in CONVOLUTIONS),
        ("mobilenetv3_small_050", True, 64),
        ("edgenext_xx_small", True, 64),
        ("xcit_nano_12_p8_224", False, 0),
    ],
)
def test_model(name: str, train: bool, size: int) -> None:
    row = vision.measure(name, 2, train, size, seconds=0.0)
    assert vision.is_right(row), row
    assert row["breaks"] == 0, row
    assert row["calls_compiled"] == 1, row
    assert row["share"] > 99, row
