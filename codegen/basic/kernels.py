"""Emission: groups of pointwise nodes and row kernels become C++ functions.

In: nodes with the layouts of the buffers they read and write. Out: C++ text of one function
whose buffers come in the order given. Invariant: equal bodies give equal text, so that
layers of one shape share a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from accel.codegen.basic import pointwise

PARALLEL_NUMEL = 32768  # below this, waking a thread costs more than it saves


@dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie. Units: elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def is_contiguous(self) -> bool:
        expected = 1
        for n, s in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if n != 1 and s != expected:
                return False
            expected *= n
        return True


def broadcast_strides(layout: Layout, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of `layout` seen as a tensor of `sizes`."""
    missing = len(sizes) - len(layout.sizes)
    own = [0 if n == 1 else s for n, s in zip(layout.sizes, layout.strides, strict=True)]
    return (0,) * missing + tuple(own)


def collapse(
    sizes: tuple[int, ...], strides: list[tuple[int, ...]]
) -> tuple[list[int], list[list[int]]]:
    """Merges neighbouring dimensions that every operand walks through as one."""
    dims: list[int] = []
    walks: list[list[int]] = [[] for _ in strides]
    for d, n in enumerate(sizes):
        if n == 1:
            continue
        mergeable = bool(dims) and all(
            walk[-1] == s[d] * n for walk, s in zip(walks, strides, strict=True)
        )
        if mergeable:
            dims[-1] *= n
            for walk, s in zip(walks, strides, strict=True):
                walk[-1] = s[d]
        else:
            dims.append(n)
            for walk, s in zip(walks, strides, strict=True):
                walk.append(s[d])
    if not dims:
        return [1], [[0] for _ in strides]
    return dims, walks


def _index(walk: list[int]) -> str:
    terms = [f"i{d}" if s == 1 else f"i{d} * {s}L" for d, s in enumerate(walk) if s != 0]
    return " + ".join(terms) or "0"


def pointwise_kernel(
    nodes: list[fx.Node],
    reads: list[tuple[fx.Node, Layout]],
    writes: list[tuple[fx.Node, Layout]],
) -> tuple[str, bool]:
    """The text of a fused pointwise function (named @NAME@) and whether it is parallel.

    Buffers: `reads`, then `writes`.
    """
    sizes = tuple(nodes[-1].meta["val"].shape)
    layouts = [layout for _, layout in reads] + [layout for _, layout in writes]
    dims, walks = collapse(sizes, [broadcast_strides(l, sizes) for l in layouts])
    lines, names = [], {}
    head = []
    for i, (node, layout) in enumerate(reads):
        c = pointwise.C_TYPES[layout.dtype]
        head.append(f"const {c}* __restrict r{i} = (const {c}*)p[{i}];")
        lines.append(f"{c} x{i} = r{i}[{_index(walks[i])}];")
        names[node] = f"x{i}"
    for i, (_, layout) in enumerate(writes):
        c = pointwise.C_TYPES[layout.dtype]
        head.append(f"{c}* __restrict w{i} = ({c}*)p[{len(reads) + i}];")
    for i, node in enumerate(nodes):
        expression = pointwise.lower(node, lambda a: names[a])
        c = pointwise.C_TYPES[node.meta["val"].dtype]
        lines.append(f"{c} t{i} = {expression};")
        names[node] = f"t{i}"
    for i, (node, _) in enumerate(writes):
        lines.append(f"w{i}[{_index(walks[len(reads) + i])}] = {names[node]};")
    parallel = math.prod(dims) * min(len(nodes), 8) >= 4 * PARALLEL_NUMEL
    return _loops(head, dims, lines, parallel), parallel


def _loops(head: list[str], dims: list[int], body: list[str], parallel: bool) -> str:
    text = ['extern "C" void @NAME@(void* const* p, i64 threads) {']
    text += [f"  {line}" for line in head]
    last = len(dims) - 1
    for d, n in enumerate(dims):
        pad = "  " * (d + 1)
        if parallel and d == 0:
            simd = " simd" if d == last else ""
            text.append(f"{pad}#pragma omp parallel for{simd} num_threads(threads)")
        elif d == last:
            text.append(f"{pad}#pragma omp simd")
        text.append(f"{pad}for (i64 i{d} = 0; i{d} < {n}L; i{d}++) {{")
    pad = "  " * (last + 2)
    text += [pad + line for line in body]
    text += ["  " * (d + 1) + "}" for d in range(last, -1, -1)]
    text.append("}")
    return "\n".join(text)


def softmax_kernel(rows: int, columns: int, log: bool) -> tuple[str, bool]:
    """Softmax over rows of float32. Buffers: input, output."""
    parallel = rows * columns >= PARALLEL_NUMEL // 2 and rows > 1
    final = "q[i] = p0[i] - m - lg;" if log else "q[i] *= inverse;"
    prepare = "float lg = __builtin_logf(sum);" if log else "float inverse = 1.f / sum;"
    store = "" if log else "q[i] = e; "
    body = f"""
extern "C" void @NAME@(void* const* p, i64 threads) {{
  {_pragma(parallel)}
  for (i64 r = 0; r < {rows}L; r++) {{
    const float* __restrict p0 = (const float*)p[0] + r * {columns}L;
    float* __restrict q = (float*)p[1] + r * {columns}L;
    float m = -__builtin_inff(), bad = 0;
    #pragma omp simd reduction(max : m) reduction(+ : bad)
    for (i64 i = 0; i < {columns}L; i++) {{
      m = p0[i] > m ? p0[i] : m;
      bad += p0[i] != p0[i] ? 1.f : 0.f;
    }}
    m = bad ? __builtin_nanf("") : m;
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < {columns}L; i++) {{
      float e = a_exp(p0[i] - m);
      {store}sum += e;
    }}
    {prepare}
    #pragma omp simd
    for (i64 i = 0; i < {columns}L; i++) {{ {final} }}
  }}
}}"""
    return body.strip(), parallel


def layer_norm_kernel(
    rows: int, columns: int, eps: float, weight: bool, bias: bool
) -> tuple[str, bool]:
    """Layer norm of float32 rows. Buffers: input, weight?, bias?, output."""
    parallel = rows * columns >= PARALLEL_NUMEL // 2 and rows > 1
    w = "((const float*)p[1])[i]" if weight else "1.f"
    b = f"((const float*)p[{1 + weight}])[i]" if bias else "0.f"
    body = f"""
extern "C" void @NAME@(void* const* p, i64 threads) {{
  {_pragma(parallel)}
  for (i64 r = 0; r < {rows}L; r++) {{
    const float* __restrict x = (const float*)p[0] + r * {columns}L;
    float* __restrict q = (float*)p[{1 + weight + bias}] + r * {columns}L;
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < {columns}L; i++) sum += x[i];
    float mean = sum / {columns}L, square = 0;
    #pragma omp simd reduction(+ : square)
    for (i64 i = 0; i < {columns}L; i++) {{ float d = x[i] - mean; square += d * d; }}
    float scale = 1.f / __builtin_sqrtf(square / {columns}L + {eps!r}f);
    #pragma omp simd
    for (i64 i = 0; i < {columns}L; i++) q[i] = (x[i] - mean) * scale * {w} + {b};
  }}
}}"""
    return body.strip(), parallel


def _pragma(parallel: bool) -> str:
    return "#pragma omp parallel for num_threads(threads)" if parallel else "(void)threads;"


Namer = Callable[[str], str]
