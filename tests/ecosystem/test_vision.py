"""Some models of `benchmarks/vision.py`, on small images: as right as eager, whole, served compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import vision

# Not in the environment itself, see examples/setup.sh.
FOLDER = Path(sys.prefix) / "vision"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "timm").is_dir() and importlib.util.find_spec("timm") is None,
    reason="needs timm and torchvision (pip install --no-deps --target FOLDER timm torchvision pillow)",
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
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    options = ["--child", "--batch=2", f"--size={size}", "--seconds=0", *(["--train"] * train)]
    done = subprocess.run(
        [sys.executable, vision.__file__, *options, name],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert vision.is_right(row), row
    assert row["breaks"] == 0, row
    assert row["calls_compiled"] == 1, row
    assert row["share"] > 99, row
