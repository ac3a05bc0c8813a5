"""Programs on a GPU that is not there, in processes of their own: from recording to launch and back."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

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
