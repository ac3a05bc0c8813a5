"""What a caller may ask of the compiler, and the error it answers with.

In: nothing. Out: `CodegenOptions`, `CompileError`. Invariant: options that change the
generated code are part of the library's content hash through the source or the flags.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from accel.errors import CompileError as CompileError


@dataclass(frozen=True)
class CodegenOptions:
    """How to compile one graph.

    `threads` is the thread count to schedule for (None: torch's), `gpu` is the
    architecture of the GPU to compile for ("sm_90"), `gpu_blocks` how many blocks of 256 threads are
    resident on it at once, which decides what its random numbers are, `gpu_name` what it is called: without it nothing is measured
    on it; `march` goes to the compiler's `-march`,
    `verify` runs the IR verifier after every pass, `measure` lets choices between kernels and
    ATen's functions be measured, `fast_dropout` draws masks as random_masks.py does,
    `tiled_convolutions` lets winograd.py compute what it can, and
    `dump_dir` receives one numbered file per stage.
    """

    threads: int | None = None
    gpu: str | None = None
    gpu_blocks: int | None = None
    gpu_name: str | None = None
    march: str = "native"
    verify: bool = bool(os.environ.get("ACCEL_VERIFY"))
    dump_dir: Path | None = None
    fuse: bool = True
    products: bool = True
    measure: bool = True
    fast_dropout: bool = False
    tiled_convolutions: bool = True
    compiler: str | None = None
