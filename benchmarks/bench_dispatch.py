"""What dispatch costs: prologue off, miss and hit, module prologues, guards of 100 layers.

In: nothing. Out: a table, and JSON with --json. Units: ns per call, the loop and the call
of an empty C function removed; median over rounds of interleaved measurements.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from accel import _native

LAYERS = 100
HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layered_guards(model: torch.nn.Sequential) -> Any:
    """Per layer: its type and dict, `_parameters`, two tensors, four empty hook tables."""
    rows: list[tuple[Any, ...]] = [
        ("TYPE_IS", -1, 0, type(model)),
        ("INSTANCE_DICT", 1, 0),
        ("DICT_ITEM", 2, 1, "_modules"),
        ("TYPE_ATTRS", -1, 0, torch.nn.Linear, [("forward", torch.nn.Linear.forward)]),
    ]
    slot = 3
    for name, layer in model.named_children():
        module, attributes, parameters, weight, bias = range(slot, slot + 5)
        slot += 5
        rows += [
            ("DICT_ITEM", module, 2, name),
            ("TYPE_IS", -1, module, type(layer)),
            ("INSTANCE_DICT", attributes, module),
            ("DICT_ITEM", parameters, attributes, "_parameters"),
            ("TYPE_IS", -1, parameters, dict),
            ("DICT_ITEM", weight, parameters, "weight"),
            ("TENSOR", -1, weight, layer.weight),
            ("DICT_ITEM", bias, parameters, "bias"),
            ("TENSOR", -1, bias, layer.bias),
        ]
        for table in HOOK_TABLES:
            rows += [("DICT_ITEM", slot, attributes, table), ("LEN", -1, slot, 0)]
            slot += 1
    return _native.GuardProgram(rows, 1)


def armed_entry() -> Any:
    """An entry whose only variant has one type guard and a constant result."""
    program = _native.GuardProgram([("TYPE_IS", -1, 0, int)], 2)
    variant = _native.Variant(program, _native.Ambient(), lambda inputs: inputs, [], ("const", 1))
    entry = _native.Entry("bench")
    entry.variants = (variant,)
    entry.state = "armed"
    return entry


KEPT: list[Any] = []  # entries live as long as their owner holds them


def subjects() -> dict[str, Callable[[], object]]:
    prologue, module_prologue = _native.prologue, _native.module_prologue
    off, hit, miss = _native.Entry("off"), armed_entry(), armed_entry()
    KEPT.extend((off, hit, miss))
    off.state = "off"
    miss.threshold = 0
    module, args, kwargs = torch.nn.ReLU(), (1,), {}
    _native.set_module_hook(lambda entry, roots: None)
    counted = torch.nn.ReLU()
    _native.module_entry(module).state = "off"
    _native.module_entry(counted).threshold = 0
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(LAYERS)))
    guards, roots = layered_guards(model), (model,)
    cold_guards = layered_guards(model)
    i_off, i_hit, i_miss = off.index, hit.index, miss.index

    def touch() -> int:
        model[0].__dict__["touched"] = None
        return cold_guards.check(roots)

    assert guards.check(roots) == -1 and prologue(i_hit, 1) == 1
    return {
        "prologue, off": lambda: prologue(i_off, 1),
        "prologue, miss": lambda: prologue(i_miss, "a"),
        "prologue, hit (one guard, Python executor)": lambda: prologue(i_hit, 1),
        "module prologue, off": lambda: module_prologue(module, args, kwargs),
        "module prologue, counting": lambda: module_prologue(counted, args, kwargs),
        f"guards of {LAYERS} layers": lambda: guards.check(roots),
        f"guards of {LAYERS} layers, one dict written before": touch,
    }


def per_call_ns(f: Callable[[], object], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        f()
    return (time.perf_counter_ns() - start) / calls


def measure(rounds: int, calls: int) -> dict[str, float]:
    todo = subjects()
    samples: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds):
        empty = per_call_ns(lambda: _native.is_paused(), calls)
        for name, f in todo.items():
            count = calls // 20 if "layers" in name else calls
            samples[name].append(per_call_ns(f, count) - empty)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(options.rounds, options.calls)
    if options.json:
        json.dump({"unit": "ns", "results": results}, sys.stdout, indent=2)
        return
    for name, ns in results.items():
        print(f"{name:55s} {ns:10.1f} ns")


if __name__ == "__main__":
    main()
