"""Hand-written plans for the executor's tests, and the kernels they call.

In: torch tensors as examples of layouts. Out: plan dictionaries and a shared library built
with g++. Invariant: what `Builder.plan()` returns went through JSON, as real plans do.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

KERNELS = r"""
#include <unistd.h>
typedef void* const* P;
extern "C" {
// float32, 8 elements
void add_one(P p, long) { for (int i = 0; i < 8; i++) ((float*)p[1])[i] = ((float*)p[0])[i] + 1; }
void twice(P p, long) { for (int i = 0; i < 8; i++) ((float*)p[1])[i] = ((float*)p[0])[i] * 2; }
void add(P p, long) {
  for (int i = 0; i < 8; i++) ((float*)p[2])[i] = ((float*)p[0])[i] + ((float*)p[1])[i];
}
void positive(P p, long) { *(bool*)p[1] = ((float*)p[0])[0] > 0; }
void fill_million(P p, long) { for (long i = 0; i < 1000000; i++) ((float*)p[0])[i] = 7; }
void slow_add_one(P p, long t) { add_one(p, t); usleep(2000); }
void threads(P p, long t) { *(long*)p[0] = t; }
// what OpenMP really gives
void team(P p, long t) {
  long* out = (long*)p[0]; *out = 0;
  #pragma omp parallel num_threads(t)
  { __atomic_fetch_add(out, 1, __ATOMIC_RELAXED); }
}
}
"""


def build_library(folder: Path) -> str:
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(KERNELS)
    flags = ["-O2", "-shared", "-fPIC", "-fopenmp"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return str(library)


def layout(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "sizes": list(tensor.size()),
        "strides": list(tensor.stride()),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }


class Builder:
    """Collects the parts of one plan; methods that make a buffer return its id."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.buffers: list[Any] = []
        self.steps: list[Any] = []
        self.commit: list[Any] = []
        self.speculations: list[Any] = []
        self.arena_bytes = 0

    def input(self, like: torch.Tensor) -> int:
        self.inputs.append(layout(like))
        return self._buffer({"kind": "input", "index": len(self.inputs) - 1})

    def arena(self, like: torch.Tensor) -> int:
        offset = self.arena_bytes
        size = like.untyped_storage().nbytes()
        self.arena_bytes += (size + 63) // 64 * 64
        return self._buffer({"kind": "arena", "offset": offset, **layout(like)})

    def output(self, like: torch.Tensor) -> int:
        return self._buffer({"kind": "output", **layout(like)})

    def dynamic(self, like: torch.Tensor | None = None) -> int:
        return self._buffer({"kind": "dynamic", **(layout(like) if like is not None else {})})

    def view(self, base: int, like: torch.Tensor, offset: int = 0) -> int:
        return self._buffer({"kind": "view", "base": base, "offset": offset, **layout(like)})

    def kernel(
        self, symbol: str, *buffers: int, parallel: bool = False, commit: bool = False, **more: Any
    ) -> None:
        step = {"op": "kernel", "symbol": symbol, "buffers": buffers, "parallel": parallel, **more}
        (self.commit if commit else self.steps).append(step)

    def extern(
        self,
        target: str,
        *args: Any,
        results: tuple[int | None, ...] = (),
        commit: bool = False,
        **kwargs: Any,
    ) -> None:
        step = {"op": "extern", "target": target, "args": args, "kwargs": kwargs}
        (self.commit if commit else self.steps).append({**step, "results": results})

    def free(self, buffer: int) -> None:
        self.steps.append({"op": "free", "buffer": buffer})

    def speculate(self, buffer: int, expected: bool) -> None:
        self.speculations.append({"buffer": buffer, "expected": expected})

    def plan(self, *outputs: int) -> dict[str, Any]:
        plan = {
            "version": 1,
            "library": "kernels.so",
            "inputs": self.inputs,
            "arena_bytes": self.arena_bytes,
            "buffers": self.buffers,
            "steps": self.steps,
            "commit": self.commit,
            "speculations": self.speculations,
            "outputs": outputs,
        }
        return json.loads(json.dumps(plan))  # type: ignore[no-any-return]

    def _buffer(self, buffer: dict[str, Any]) -> int:
        self.buffers.append(buffer)
        return len(self.buffers) - 1
