"""C++ text -> shared library, named by its content.

In: kernel texts and options. Out: the library's file name in the output folder. A library
that exists, undamaged, is not built again. Invariant: a library appears under its name complete or not
at all.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from accel.codegen.options import CodegenOptions, CompileError

FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns",
    "-w",
]
_HEADERS = ("preamble.h", "functions.h")  # what every kernel may use
# ... and one with such a call.
_SMALL_PRODUCTS = ("small_products.h", re.compile(r"\b(small|columns)_gemm<"))
# Compiled once for a machine: products of floats, and of pairs of bfloat16.
_OBJECTS = {"_f32(": (), "_bf16(": ("-DPRODUCTS_OF_PAIRS",)}
# Those that were made when accel was installed; of use on a machine of the same kind.
PREBUILT = Path(__file__).parent.parent / "_products"
# Of each kind of vector functions one; torch has all or none.
_SLEEF_NAMES = tuple(f"Sleef_expm1{width}_u10" for width in ("f16", "f8", "d8", "d4"))
_CALLS_SLEEF = re.compile(r"\bm_\w+\(|\bv_(sin|cos|asinh|acosh|remainder|floor_divide)\(|double")
_SEAL = b"accel:1:"
_TIMEOUT_S = 120
# Before the compiler is started again, where processes are limited.
_PAUSES_S = (0.05, 0.2, 1.0, 3.0)
# Texts beyond this many characters are split into parts compiled in parallel.
_PART_CHARACTERS = 12_000


@functools.cache
def cpu_features() -> str:
    """What `-march=native` depends on."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return "unknown"


@functools.cache
def vector_bytes() -> int:
    """Width of the widest vectors of this CPU, in bytes."""
    features = cpu_features().split()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(features):
        return 64
    return 32 if "avx2" in features else 16


@functools.cache
def l1_ways() -> int:
    """Cache lines of one place that this CPU's first-level data cache holds; 0: unknown."""
    try:
        for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
            if (cache / "level").read_text() == "1\n" and (cache / "type").read_text() == "Data\n":
                return int((cache / "ways_of_associativity").read_text())
    except (OSError, ValueError):
        pass
    return 0


def find_compiler(options: CodegenOptions) -> str:
    """The C++ compiler. Errors: CompileError when there is none."""
    names = [options.compiler] if options.compiler else [os.environ.get("CXX"), "g++", "c++"]
    for name in names:
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CompileError("there is no C++ compiler (g++) on the PATH")


@functools.cache
def _compiler_version(compiler: str) -> str:
    try:
        result = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError as error:
        raise CompileError(f"{compiler} does not run: {error}") from error
    return result.stdout.splitlines()[0] if result.stdout else "unknown"


def build(texts: list[str], out_dir: Path, options: CodegenOptions) -> str:
    """Builds a library of the kernels; returns its name.

    Errors: CompileError with the compiler's first lines, or when `out_dir` is not writable.
    """
    compiler = find_compiler(options)
    flags = _flags(options)
    objects, head, source = _around(texts)
    name = _name([head, source, *texts], compiler, flags)
    target = out_dir / name
    if is_sound(target):
        return name
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=".build_") as scratch:
            folder = Path(scratch)
            jobs = []
            linked = []
            for more in objects:
                job = _object_job(compiler, flags, more, source, out_dir)
                prebuilt = PREBUILT / job.target.name
                linked.append(prebuilt if is_sound(prebuilt) else job.target)
                if not is_sound(linked[-1]):
                    jobs.append(job)
            _compile(compiler, flags, head, texts, folder, jobs, linked)
            keep(folder / "out.so", target)
    except OSError as error:
        raise CompileError(f"cannot build in {out_dir}: {error}") from error
    return name


def _around(texts: list[str]) -> tuple[list[tuple[str, ...]], str, str]:
    """Flags of the objects that kernels call, what stands before them, the objects' source."""
    objects = [more for call, more in _OBJECTS.items() if any(call in t for t in texts)]
    headers = [*_HEADERS]
    if any(map(_SMALL_PRODUCTS[1].search, texts)):
        headers.append(_SMALL_PRODUCTS[0])
    if objects:
        headers.append("products.h")
    return objects, _sources(*headers), _object_source() if objects else ""


def built_name(texts: list[str], options: CodegenOptions) -> str:
    """What `build` calls the library of these kernels. Errors: CompileError without a compiler."""
    _, head, source = _around(texts)
    return _name([head, source, *texts], find_compiler(options), _flags(options))


def _name(sources: list[str], compiler: str, flags: list[str]) -> str:
    return f"k_{digest(*sources, *flags, _compiler_version(compiler), cpu_features())}.so"


def multiplies(suffix: str) -> bool:
    """Whether this CPU has what the products of "f32" or "bf16" are written for."""
    return vector_bytes() == 64 and (suffix != "bf16" or "avx512_bf16" in cpu_features().split())


def prebuild(folder: Path, options: CodegenOptions | None = None) -> None:
    """Makes the objects that every library with matrix products links; for the installation.

    Errors: CompileError.
    """
    options = options or CodegenOptions()
    compiler, flags, source = find_compiler(options), _flags(options), _object_source()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build_") as scratch:
            for call, more in _OBJECTS.items():
                if not multiplies(call.strip("_(")):
                    continue
                job = _object_job(compiler, flags, more, source, folder)
                if not is_sound(job.target):
                    job.run(Path(scratch))
    except OSError as error:
        raise CompileError(f"cannot build in {folder}: {error}") from error


@functools.cache
def sleef() -> str:
    """The library that holds SLEEF's vector functions, which is torch's own; "" where it has none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library))  # loaded long ago
    except OSError:
        return ""
    return str(library) if all(hasattr(found, name) for name in _SLEEF_NAMES) else ""


def _flags(options: CodegenOptions) -> list[str]:
    flags = [*FLAGS, f"-march={options.march}"]
    if sleef():
        flags.append("-DACCEL_SLEEF")
    if options.march == "native" and l1_ways():
        flags.append(f"-DL1_WAYS={l1_ways()}")
    if vector_bytes() == 64 and options.march == "native":
        flags.append("-mprefer-vector-width=512")
    return flags


def _object_source() -> str:
    return _sources("preamble.h", "products.cpp", "winograd.cpp")


def _sources(*names: str) -> str:
    return "".join(Path(__file__).with_name(name).read_text() for name in names)


def _object_job(
    compiler: str, flags: list[str], more: tuple[str, ...], source: str, folder: Path
) -> _ObjectJob:
    name = digest(source, *flags, _compiler_version(compiler), cpu_features(), *more)
    return _ObjectJob([compiler, *flags, *more], source, folder / f"k_{name}.o")


def keep(made: Path, target: Path) -> None:
    """Moves a file to its place, with its own digest at its end (linkers ignore that)."""
    with made.open("ab+") as file:
        file.seek(0)
        file.write(_SEAL + hashlib.sha256(file.read()).digest())
    os.replace(made, target)


def is_sound(path: Path) -> bool:
    """True for a file that `keep` has put there and nobody has changed."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    body, seal = content[: -len(_SEAL) - 32], content[-len(_SEAL) - 32 :]
    return seal == _SEAL + hashlib.sha256(body).digest()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class _ObjectJob:
    """An object file that is kept; it appears complete or not at all."""

    command: list[str]
    source: str
    target: Path

    def run(self, folder: Path) -> None:
        source = folder / f"{self.target.stem}.cpp"
        source.write_text(self.source)
        made = source.with_suffix(".o")
        _run([*self.command, "-c", str(source), "-o", str(made)], folder)
        keep(made, self.target)


def _compile(
    compiler: str,
    flags: list[str],
    head: str,
    texts: list[str],
    folder: Path,
    jobs: list[_ObjectJob],
    linked: list[Path],
) -> None:
    parts = _parts(texts)
    libraries = ["-lm"]
    if sleef() and any(map(_CALLS_SLEEF.search, texts)):  # linking with it takes 0.1 s
        libraries.append(sleef())
    sources = []
    for i, part in enumerate(parts):
        source = folder / f"part{i}.cpp"
        source.write_text(head + "\n" + "\n".join(part))
        sources.append(source)
    if len(sources) == 1 and not jobs:
        objects = [str(o) for o in linked]
        command = [compiler, *flags, "-shared", str(sources[0]), *objects, "-o", "out.so"]
        _run([*command, *libraries], folder)
        return
    tasks: list[Callable[[], None]] = [lambda job=job: job.run(folder) for job in jobs]  # type: ignore[misc]
    for s in sources:
        command = [compiler, *flags, "-c", str(s), "-o", f"{s}.o"]
        tasks.append(lambda command=command: _run(command, folder))  # type: ignore[misc]
    with ThreadPoolExecutor(min(len(tasks), os.cpu_count() or 1)) as pool:
        for result in [pool.submit(task) for task in tasks]:
            result.result()
    objects = [*(f"{s}.o" for s in sources), *(str(o) for o in linked)]
    _run([compiler, "-shared", *objects, "-o", "out.so", *libraries], folder)


def _parts(texts: list[str]) -> list[list[str]]:
    """Splits the kernels into about equal parts, one for each core at most."""
    total = sum(map(len, texts))
    count = max(1, min(total // _PART_CHARACTERS + 1, os.cpu_count() or 1, len(texts)))
    parts: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for text in sorted(texts, key=len, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(text)
        sizes[smallest] += len(text)
    return parts


def _run(command: list[str], folder: Path) -> None:
    try:
        result = _start(command, folder)
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"the C++ compiler took more than {_TIMEOUT_S} s") from error
    if result.returncode != 0:
        lines = "\n".join(result.stderr.splitlines()[:8])
        raise CompileError(f"the C++ compiler failed ({result.returncode}): {lines}")


def _start(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Errors: OSError when the compiler cannot be started; a full process table is waited for."""
    run = functools.partial(
        subprocess.run, command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    for pause_s in _PAUSES_S:
        try:
            return run()
        except BlockingIOError:  # EAGAIN of fork
            time.sleep(pause_s)
    return run()
