"""Which of two ways to multiply matrices is faster on this machine: measured, once for a shape.

In: the extents of a product and how its right side lies. Out: whether the kernels of products.cpp
are to be taken rather than ATen's. Processors differ: with one 512-bit multiplication a cycle those kernels
keep up with any library, with two a library's packing of both operands pays where rows are many.
Invariant: what was measured is kept beside the libraries, under the machine's and the kernels'
digest; where nothing can be measured, the answer is the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from accel.codegen import trial_files
from accel.codegen.build import PREBUILT, build, built_name, digest, is_sound, multiplies
from accel.codegen.options import CodegenOptions, CompileError

# Less work is not worth a measurement; BLAS needs longer for a call than it could gain.
MIN_WORK = 1 << 21  # multiplications
MIN_NARROW_WORK = 1 << 17  # ... of results with few columns
_MAX_WORK = 1 << 28  # of one run; a longer one is cut in its columns
_MAX_EXTENT = 4096
_COLUMNS = 192  # whole units of both kinds; at least two of these stay
_ROUNDS = 4
_SECONDS = 0.06  # after which one round is enough
_COLD_BYTES = 32 << 20  # of right sides that are taken in turn: weights come from memory
_HOT_BYTES = 1 << 19  # ... but small ones stay in the second-level cache
_MARGIN = 1.05  # what an epilogue, which saves a pass over the results, may cost


@dataclass(frozen=True)
class Shape:
    """[M, K] times [K, N], of `dtype`; `turned`: the right side lies as [N, K]."""

    dtype: str
    m: int
    n: int
    k: int
    turned: bool
    block: int  # as products.py chooses it: columns of packed rows, or rows, of a unit


def pays(shape: Shape, epilogue: bool, out_dir: Path, options: CodegenOptions) -> bool:
    """True where the kernels, with what may follow them as their epilogue, are as fast as ATen's."""
    ours, others = _seconds_of(_cut(shape), out_dir, options)
    return ours <= others * (_MARGIN if epilogue else 1)


def _seconds_of(shape: Shape, out_dir: Path, options: CodegenOptions) -> tuple[float, float]:
    """Ours and ATen's; zeros where nothing can be measured."""
    path = trial_files.path_of(out_dir, _digest(shape, options))
    known = trial_files.kept(path)
    if known is not None:
        return known["ours_s"], known["aten_s"]
    try:
        ours, others = _measure(shape, out_dir, options)
    except (CompileError, OSError, RuntimeError):  # no compiler; no memory
        return 0.0, 0.0
    trial_files.keep(path, {"ours_s": ours, "aten_s": others, "shape": str(shape)})
    return ours, others


def _digest(shape: Shape, options: CodegenOptions) -> str:
    """Of all that the answer depends on, the way of measuring included."""
    kernels = built_name([_text(shape.dtype)], options)
    return digest(str(shape), torch.__version__, kernels, Path(__file__).read_text())


def _cut(s: Shape) -> Shape:
    """A product of which this one is many times the same."""
    m, k = min(s.m, _MAX_EXTENT // 4), min(s.k, _MAX_EXTENT)
    n = min(s.n, _MAX_EXTENT, max(_MAX_WORK // (m * k) // _COLUMNS, 2) * _COLUMNS)
    return Shape(s.dtype, m, n, k, s.turned, s.block)


def _measure(s: Shape, out_dir: Path, options: CodegenOptions) -> tuple[float, float]:
    """Seconds of processor time, ours and ATen's, on one thread; minima of interleaved runs."""
    dtype = getattr(torch, s.dtype)
    left = torch.full((s.m, s.k), 0.5, dtype=dtype)
    size = s.n * s.k * dtype.itemsize
    count = _COLD_BYTES // size if _HOT_BYTES < size < _COLD_BYTES else 1
    rights = torch.full((count, s.n, s.k) if s.turned else (count, s.k, s.n), 0.5, dtype=dtype)
    turns = itertools.cycle(rights.mT if s.turned else rights)
    out = torch.empty(s.m, s.n, dtype=dtype)
    sums = torch.zeros(s.m, s.n, dtype=torch.float32)
    packed = torch.zeros((s.m + 15) // 16 * 16, s.k, dtype=dtype)
    run = _function(s, out_dir, options)

    def kernels() -> None:
        pointers = [t.data_ptr() for t in (left, next(turns), packed, sums)]
        run(*pointers, s.m, s.n, s.k, s.block)

    def aten() -> None:
        torch.mm(left, next(turns), out=out)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            times = [(_seconds(kernels), _seconds(aten))]  # the first ones touch their memory
            while len(times) <= _ROUNDS and (len(times) < 2 or sum(map(sum, times)) < _SECONDS):
                times.append((_seconds(kernels), _seconds(aten)))
    finally:
        torch.set_num_threads(threads)
    return min(t for t, _ in times[1:]), min(t for _, t in times[1:])


def _seconds(run: Callable[[], None]) -> float:
    """Of this thread: others, which the program beside us keeps busy, do not count."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def _function(s: Shape, out_dir: Path, options: CodegenOptions) -> Callable[..., None]:
    library = _library(s.dtype, out_dir, options)
    function = library.trial_product if s.turned else library.trial_wide
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 4
    function.restype = None
    return function  # type: ignore[no-any-return]


@functools.cache
def _library(dtype: str, out_dir: Path, options: CodegenOptions) -> ctypes.CDLL:
    texts = [_text(dtype)]
    library = PREBUILT / built_name(texts, options)
    if not is_sound(library):
        library = out_dir / build(texts, out_dir, options)
    return ctypes.CDLL(str(library))


def prebuild(folder: Path) -> None:
    """Makes the libraries of kernels that are measured; for the installation.

    Errors: CompileError.
    """
    options = CodegenOptions()
    for dtype, (_, suffix, _, _) in _ELEMENTS.items():
        if multiplies(suffix):
            build([_text(dtype)], folder, options)


_ELEMENTS = {
    "float32": ("float", "f32", 1, "pack_rows((const float*)"),
    "bfloat16": ("pair", "bf16", 2, "pack_pairs((const bfloat16*)"),
}
_TEXT = """
struct @_place { float* out; i64 columns; const void* right; };
static void @_finish(const void* context, i64 m, i64 n, i64 length, const float* values) {
  const @_place& p = *(const @_place*)context;
  __builtin_memcpy(p.out + m * p.columns + n, values, length * sizeof(float));
}
static char* @_where(const void* context, i64 m, i64 n) {
  const @_place& p = *(const @_place*)context;
  return (char*)(p.out + m * p.columns + n);
}
static constexpr Results @_results = {@_finish, @_where};
extern "C" void trial_product(void* left, void* right, void* packed, void* out, long m, long n, long k, long block) {
  typedef {element} E;
  const @_place place = {(float*)out, n, right};
  k /= {numbers};
  pack_columns_{suffix}((const E*)left, k, (E*)packed, m, k, 0, (m + W - 1) / W);
  const i64 units = (n + BLOCK - 1) / BLOCK * ((m + block - 1) / block);
  product_{suffix}((const E*)packed, (const E*)right, k, m, n, k, block, 0, units, &@_results, &place);
}
extern "C" void trial_wide(void* left, void* right, void*, void* out, long m, long n, long k, long block) {
  typedef {element} E;
  const @_place place = {(float*)out, n, right};
  const auto pack = [](const void* context, i64 k, i64 count, i64 n, i64 columns, E* to) {
    const @_place& p = *(const @_place*)context;
    {pack}p.right, p.columns, k, count, n, columns, to);
  };
  const i64 units = (n + WIDE - 1) / WIDE * ((m + block - 1) / block);
  k /= {numbers};
  wide_{suffix}((const E*)left, k, m, n, k, block, 0, units, pack, &@_results, &place, (const char*)right,
                n * sizeof(E) / {numbers}, sizeof(E) / {numbers});
}
"""


def _text(dtype: str) -> str:
    element, suffix, numbers, pack = _ELEMENTS[dtype]
    text = _TEXT.replace("{element}", element).replace("{suffix}", suffix)
    return text.replace("{numbers}", str(numbers)).replace("{pack}", pack).replace("@", "trial")
