"""The random programs of tests/fuzz with their tensors on a simulated GPU.

python tests/simulated_gpu/fuzz_programs_on_gpu.py --programs 100 --seed 1
"""

from __future__ import annotations

import sys
from types import CodeType
from typing import Any

import run_programs  # first: it installs the GPU

sys.path.insert(0, str(run_programs.HERE.parent / "fuzz"))
import fuzz_programs


def code_of(case: Any) -> CodeType:
    return run_programs.moved(case.source(), f"<fuzz {case.seed}>")


fuzz_programs.DEVICE = "cuda"
fuzz_programs.LIMIT_S = 120.0  # Triton's interpreter runs the kernels
fuzz_programs.code_of = code_of

if __name__ == "__main__":
    status = fuzz_programs.main()
    print(f"{len(run_programs.simulated_gpu.launches)} launches")
    sys.exit(status)
