"""Times the native executor on hand-written plans, beside eager, in one process.

In: nothing (needs g++ for the kernels). Out: a table on stderr and one JSON object on stdout:
medians in ns of a tiny kernel plan, of 100 kernel steps, and of 50 x (addmm + relu).
Arguments: `--repeat N` samples a row (default 30).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from accel import _native

KERNELS = r"""
extern "C" void relu128(void* const* p, long) {
  const float* a = (const float*)p[0]; float* b = (float*)p[1];
  for (long i = 0; i < 128; i++) b[i] = a[i] > 0 ? a[i] : 0;
}
extern "C" void nothing(void* const*, long) {}
"""

LAYERS, BATCH, WIDTH = 50, 8, 16


def meta(*sizes: int) -> dict[str, Any]:
    strides = [1] * len(sizes)
    for i in range(len(sizes) - 2, -1, -1):
        strides[i] = strides[i + 1] * sizes[i + 1]
    return {"sizes": list(sizes), "strides": strides, "dtype": "float32"}


def plan(inputs: list[Any], buffers: list[Any], steps: list[Any], **fields: Any) -> dict[str, Any]:
    base = {"version": 1, "library": "k.so", "arena_bytes": 4096, "commit": [], "speculations": []}
    return {**base, "inputs": inputs, "buffers": buffers, "steps": steps, **fields}


def tiny_plan(symbol: str = "relu128", steps: int = 1) -> dict[str, Any]:
    small = meta(BATCH, WIDTH)
    step = {"op": "kernel", "symbol": symbol, "buffers": [0, 1], "parallel": False}
    buffers = [{"kind": "input", "index": 0}, {"kind": "output", **small}]
    return plan([small], buffers, [step] * steps, outputs=[1])


def layers_plan() -> dict[str, Any]:
    small, weight = meta(BATCH, WIDTH), meta(WIDTH, WIDTH)
    inputs = [small] + [weight, meta(WIDTH)] * LAYERS
    buffers: list[Any] = [{"kind": "input", "index": i} for i in range(len(inputs))]
    product = len(buffers)
    buffers += [{"kind": "arena", "offset": 512 * i, **small} for i in range(2)]
    buffers.append({"kind": "output", **small})
    steps = []
    for layer in range(LAYERS):
        buffers.append(
            {"kind": "view", "base": 1 + 2 * layer, **weight, "strides": [1, WIDTH], "offset": 0}
        )
        source = 0 if layer == 0 else product + 1
        target = product + 2 if layer == LAYERS - 1 else product + 1
        args = [{"b": 2 + 2 * layer}, {"b": source}, {"b": len(buffers) - 1}]
        extern = {"op": "extern", "target": "aten::addmm.out", "args": args}
        steps.append({**extern, "kwargs": {"out": {"b": product}}, "results": []})
        relu = {"op": "kernel", "symbol": "relu128", "buffers": [product, target]}
        steps.append({**relu, "parallel": False})
    return plan(inputs, buffers, steps, outputs=[product + 2])


def sample(function: Callable[[], Any], count: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(count):
        function()
    return (time.perf_counter_ns() - start) / count


def build(folder: Path) -> str:
    source, library = folder / "k.cpp", folder / "k.so"
    source.write_text(KERNELS)
    flags = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return str(library)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=30)
    repeat = parser.parse_args().repeat
    torch.set_num_threads(1)
    x = torch.randn(BATCH, WIDTH)
    modules = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*(m for layer in modules for m in (layer, torch.nn.ReLU())))
    weights = [p for layer in modules for p in (layer.weight, layer.bias)]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        library = build(Path(folder))
        tiny = _native.Executor(tiny_plan(), library)
        hundred = _native.Executor(tiny_plan("nothing", 100), library)
        layers = _native.Executor(layers_plan(), library)
        torch.testing.assert_close(layers.run([x, *weights])[0], model(x))
        arguments = [x, *weights]
        rows: dict[str, tuple[Callable[[], Any], int]] = {
            "tiny plan": (lambda: tiny.run([x]), 2000),
            "tiny plan, 100 empty kernels": (lambda: hundred.run([x]), 2000),
            "torch.relu": (lambda: torch.relu(x), 2000),
            "torch.empty": (lambda: torch.empty(BATCH, WIDTH), 2000),
            "50 x (addmm + relu kernel)": (lambda: layers.run(arguments), 100),
            "50 x (Linear + ReLU), eager": (lambda: model(x), 20),
        }
        samples: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(repeat):
            for name, (function, count) in rows.items():
                samples[name].append(sample(function, count))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, value in medians.items():
        print(f"{name:32} {value:12.0f} ns", file=sys.stderr)
    json.dump({"unit": "ns", "medians": medians}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
