"""Every pointwise function of torch, and some reductions, over ten kinds of values: eager and accel.

    python benchmarks/bench_functions.py [--dtype float32] [--numbers 40000]

In: nothing. Out: for each function where accel takes clearly longer than eager (more than 1.15 times,
and 3 us), the kinds of values and both medians in us; the number of functions. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import accel

TORCH = """exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan tanh sigmoid erf erfc erfinv sinh cosh
asin acos atan asinh acosh atanh abs neg floor ceil round trunc frac sign reciprocal square lgamma
digamma isnan nan_to_num""".split()
FUNCTIONAL = """relu gelu silu elu selu celu softplus mish hardswish hardsigmoid leaky_relu logsigmoid
softsign tanhshrink""".split()
OTHERS: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda x: x.view(40, -1).softmax(-1),
    "masked softmax": lambda x: x.view(40, -1).masked_fill(x.view(40, -1) < 1, -1e4).softmax(-1),
    "log_softmax": lambda x: x.view(40, -1).log_softmax(-1),
    "logsumexp": lambda x: x.view(40, -1).logsumexp(-1),
    "cumsum": lambda x: x.view(40, -1).cumsum(1),
    "x ** 2.5": lambda x: x**2.5,
    "x ** 3": lambda x: x**3,
    "x ** -0.5": lambda x: x**-0.5,
    "fmod": lambda x: torch.fmod(x, 1.7),
    "remainder": lambda x: torch.remainder(x, 1.7),
    "atan2": lambda x: torch.atan2(x, x + 1),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "logaddexp": lambda x: torch.logaddexp(x, x + 1),
    "xlogy": lambda x: torch.xlogy(x, x),
    "half": lambda x: x.half() * 2,
    "bfloat16": lambda x: x.bfloat16() * 2,
    "to int32": lambda x: x.to(torch.int32),
    "sum": lambda x: x.sum(),
    "std": lambda x: x.view(40, -1).std(1),
}
ROUNDS = 40


def kinds(usual: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {name: torch.where(usual < 1, float(name), usual) for name in ("-inf", "inf", "nan")}
    scales = {"big": 1e3, "huge": 1e30, "tiny": 1e-30, "denormal": 1e-40}
    found |= {name: usual * scale for name, scale in scales.items()}
    return {"usual": usual, "zero": usual * 0, "positive": usual.abs() + 0.1, **found}


def median_us(function: Callable[[Any], Any], x: torch.Tensor) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--numbers", type=int, default=40_000, help="a multiple of 40")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = kinds(torch.randn(options.numbers, dtype=getattr(torch, options.dtype)))
    functions = {name: getattr(torch, name) for name in TORCH}
    functions |= {name: getattr(F, name) for name in FUNCTIONAL} | OTHERS
    for name, function in functions.items():

        def call(x: torch.Tensor, function: Callable[[Any], Any] = function) -> Any:
            return function(x)

        compiled: Any = accel.optimize(call)
        for _ in range(4):
            compiled(values["usual"])
            accel.wait(60)
        slow = []
        for kind, x in values.items():
            with accel.disable():
                eager = median_us(function, x)
            ours = median_us(compiled, x)
            if ours > 1.15 * eager and ours - eager > 3:
                slow.append(f"{kind} {eager:.0f} -> {ours:.0f}")
        if slow:
            print(f"{name}: {'; '.join(slow)}", flush=True)
        accel.reset()
    print(f"{len(functions)} functions")


if __name__ == "__main__":
    main()
