"""Triton text -> one file of machine code for a GPU, named by its content.

In: kernels' texts with their signatures, and an architecture. Out: the file's name, and for
every kernel where its images lie in it. A kernel that takes pointers from outside has two:
one for pointers that are multiples of 16 bytes, whose accesses are wide, and one for any.
Nothing here needs a GPU. Invariant: as `build`: the file appears complete or not at all,
with its own digest at its end; no cache but ours is read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from accel.codegen import triton_versions
from accel.codegen.build import digest, is_sound, keep
from accel.codegen.emit_triton import HEAD, STAGES
from accel.codegen.options import CompileError
from accel.errors import MissingError

PREAMBLE = Path(__file__).with_name("triton_preamble.py")
ALIGNMENT = 16
_WARP = 32
_HEAD, _STAGES = (re.escape(text).replace(r"\{\}", "(.*?)") for text in (HEAD, STAGES))
_HEADS = re.compile(f"{_HEAD}(?:{_STAGES})?\n")
_PLAIN_STAGES = 3  # of loops without products, which Triton leaves as they are


@dataclass(frozen=True)
class TritonKernel:
    """One function: its text, its parameters' types in order, and how it is to be compiled."""

    symbol: str
    text: str
    signature: tuple[str, ...]
    warps: int
    stages: int = _PLAIN_STAGES

    def alignments(self) -> tuple[int, ...]:
        return (ALIGNMENT, 1) if any(t.startswith("*") for t in self.signature) else (1,)


def kernels_of(texts: dict[str, str]) -> list[TritonKernel]:
    """The kernels of texts as `emit_triton` writes them, text -> name."""
    found = []
    for text, symbol in texts.items():
        head = _HEADS.match(text)
        assert head is not None
        named = text.replace("\ndef @(", f"\n@triton.jit\ndef {symbol}(")
        stages = int(head[3] or _PLAIN_STAGES)
        found.append(TritonKernel(symbol, named, tuple(head[1].split()), int(head[2]), stages))
    return found


def module_text(kernels: list[TritonKernel]) -> str:
    """A Python module with all the kernels."""
    return "\n\n".join([PREAMBLE.read_text(), *(k.text for k in kernels)])


def build_cubins(
    kernels: list[TritonKernel], out_dir: Path, gpu: str
) -> tuple[str, list[dict[str, Any]]]:
    """Compiles for `gpu` ("sm_90"): the file's name, and a row of the plan for each kernel.

    The file begins with a line that says where images lie behind it; a file that exists,
    undamaged, is not built again. Errors: CompileError with Triton's first lines, or when
    `out_dir` is not writable; MissingError.
    """
    pointers = triton_versions.scratch_pointers()
    if gpu not in triton_versions.ARCHITECTURES:
        known = ", ".join(triton_versions.ARCHITECTURES)
        raise MissingError(f"no kernels are made for GPUs of architecture {gpu}, only for {known}")
    text = module_text(kernels)
    name = f"k_{digest(text, gpu, str(triton_versions.version()))}.cubins"
    target = out_dir / name
    try:
        if not is_sound(target):
            content = _content(text, kernels, gpu)
            out_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=out_dir, prefix=".build_") as folder:
                made = Path(folder) / "out.cubins"
                made.write_bytes(content)
                keep(made, target)
        with target.open("rb") as file:
            index = file.readline()
    except OSError as error:
        raise CompileError(f"cannot build in {out_dir}: {error}") from error
    return name, [_row(kernel, len(index), pointers) for kernel in json.loads(index)]


def _row(kernel: dict[str, Any], first: int, pointers: int) -> dict[str, Any]:
    """A kernel of the file as the plan has it: offsets count from the file's start."""
    images = [{**image, "offset": image["offset"] + first} for image in kernel["images"]]
    return {**kernel, "images": images, "scratch_pointers": pointers}


def _content(text: str, kernels: list[TritonKernel], gpu: str) -> bytes:
    index, images = [], []
    offset = 0
    with tempfile.TemporaryDirectory(prefix="accel-triton-") as scratch, _surroundings(scratch):
        module = load_module(text, Path(scratch) / "kernels.py")
        for kernel in kernels:
            places = []
            for alignment in kernel.alignments():
                image, shared_bytes = _compile(module, kernel, gpu, alignment)
                images.append(image)
                places.append(
                    {
                        "alignment": alignment,
                        "offset": offset,
                        "size": len(image),
                        "shared_bytes": shared_bytes,
                    }
                )
                offset += len(image)
            threads = kernel.warps * _WARP
            index.append({"symbol": kernel.symbol, "threads": threads, "images": places})
    return json.dumps(index).encode() + b"\n" + b"".join(images)


def _compile(
    module: ModuleType, kernel: TritonKernel, gpu: str, alignment: int
) -> tuple[bytes, int]:
    """One image and the shared memory that it wants, with as many stages as fit.

    Errors: CompileError, also of a kernel that would never fit.
    """
    for stages in range(kernel.stages, 0, -1):
        tried = replace(kernel, stages=stages)
        metadata = (compiled := compile_kernel(module, tried, gpu, alignment)).metadata
        if metadata.shared <= triton_versions.SHARED_BYTES[gpu]:
            break
    else:
        raise CompileError(f"kernel {kernel.symbol} wants {metadata.shared} bytes of shared memory")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise CompileError(f"kernel {kernel.symbol} wants scratch memory")
    return compiled.asm["cubin"], int(metadata.shared)


def compile_kernel(
    module: ModuleType, kernel: TritonKernel, gpu: str, alignment: int = ALIGNMENT
) -> Any:
    """Triton's compiled kernel. Errors: CompileError with its first lines."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module, kernel.symbol)
    signature = dict(zip(function.arg_names, kernel.signature, strict=True))
    attributes = {
        (i,): [["tt.divisibility", alignment]]
        for i, type_ in enumerate(kernel.signature)
        if type_.startswith("*") and alignment > 1
    }
    try:
        source = ASTSource(function, signature, {}, attributes)
        target = GPUTarget("cuda", int(gpu.removeprefix("sm_")), _WARP)
        # Products and sums are contracted, as in ATen's kernels.
        options: dict[str, Any] = {"num_warps": kernel.warps, "num_stages": kernel.stages}
        options["enable_fp_fusion"] = True
        # Assertions, of what is asserted by ourselves: indices in range.
        options |= {"debug": True, "sanitize_overflow": False}
        return triton.compile(source, target=target, options=options)
    except Exception as error:  # whatever Triton raises: the kernel cannot be made
        lines = "\n".join(str(error).splitlines()[:8])
        raise CompileError(f"Triton failed on {kernel.symbol}: {lines}") from error


def load_module(text: str, path: Path) -> ModuleType:
    """The module of a text; Triton reads functions' sources from the file."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"accel_kernels_{digest(text)}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    return module


@contextmanager
def _surroundings(folder: str) -> Iterator[None]:
    """Triton's cache is a folder of this build alone; no names of files get into the code."""
    settings = {"TRITON_CACHE_DIR": folder, "TRITON_DISABLE_LINE_INFO": "1"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
