"""Random functions with several results, and random things done to these: backwards one by one,
gradients at some tensors, hooks, retained gradients. What arrives is eager's.

`ACCEL_FUZZ_BACKWARDS=n` runs so many (12 else), from seed `ACCEL_FUZZ_SEED`. Left out, since accel
is known to differ: what stands after an error of the engine, which runs some nodes before
it raises, and second derivatives' hooks at results.
"""

from __future__ import annotations

import os
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import accel

FIRST = int(os.environ.get("ACCEL_FUZZ_SEED", "1"))
COUNT = int(os.environ.get("ACCEL_FUZZ_BACKWARDS", "12"))
CALLS = 6
STEPS = (
    "({a} @ {w}).tanh()",
    "{a} * {w}[0]",
    "({a} + {b}).sin()",
    "{a}.detach() * {w}[1] + {b}",
    "{a} * {b}",
    "{a} + {w}[2]",
    "{a}.relu() * 0.5",
    "torch.softmax({a}, -1)",
)
WEIGHTS = ("w0", "w1", "w2", "w3")
Outcome = list[Any]


def function(rng: random.Random) -> tuple[str, Callable[..., Any]]:
    """Its text, and itself: from x, z and four weights to some of its intermediates."""
    names, lines = ["x", "z"], []
    for k in range(rng.randint(4, 7)):
        a, b, w = rng.choice(names), rng.choice(names), rng.choice(WEIGHTS)
        lines.append(f"    t{k} = {rng.choice(STEPS).format(a=a, b=b, w=w)}")
        names.append(f"t{k}")
    results = rng.sample(names[2:], rng.randint(2, 4))
    text = "\n".join(
        [f"def f(x, z, {', '.join(WEIGHTS)}):", *lines, f"    return {', '.join(results)}"]
    )
    space: dict[str, Any] = {"torch": torch}
    exec(compile(text, "<random>", "exec"), space)
    return text, space["f"]


def differentiate(
    rng: random.Random, results: list[torch.Tensor], leaves: dict[str, torch.Tensor]
) -> Outcome:
    """Some backwards from sums over `results`, and all that they leave behind."""
    found: Outcome = []
    visited: list[str] = []
    for result in results:
        what = rng.choice(["retain", "halve", "", "", ""])
        if what == "retain" and result.requires_grad:
            result.retain_grad()
        elif what == "halve" and result.requires_grad:
            result.register_hook(lambda g: g * 0.5)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if rng.random() < 0.4:
        for name, leaf in trained.items():
            leaf.register_hook(lambda _, name=name: visited.append(name))  # type: ignore[misc]
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["backward", "gradients", "gradients", "to some leaves"])
        squared = [rng.random() < 0.5 for _ in range(rng.randint(1, 2))]
        total = sum(
            (r * r if square else r).sum()
            for square in squared
            for r in [results[rng.randrange(len(results))]]
        )
        assert isinstance(total, torch.Tensor)
        retain = rng.random() < 0.5
        some = [*trained.values(), results[rng.randrange(len(results))]]
        some = rng.sample(some, rng.randint(1, len(some)))
        try:
            if kind == "backward":
                total.backward(retain_graph=retain)
            elif kind == "to some leaves":
                total.backward(retain_graph=retain, inputs=list(trained.values())[:2])
            else:
                found += torch.autograd.grad(total, some, retain_graph=retain, allow_unused=True)
        except RuntimeError:  # freed already, or nothing requires grad
            return ["an error"]
    found.append(sorted(visited))
    found += [leaf.grad for leaf in leaves.values()]
    found += [r.grad if r.requires_grad and r.retains_grad else None for r in results]
    return found


def outcome(seed: int, call: int, f: Callable[..., Any], free: list[bool]) -> Outcome:
    torch.manual_seed(call)
    leaves = {name: torch.randn(3, 3) for name in ("x", "z", *WEIGHTS)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in WEIGHTS or free["xz".index(name)])
    computed = seed % 3 == 0
    arguments = [
        leaf * 1 if computed and name in "xz" and leaf.requires_grad else leaf
        for name, leaf in leaves.items()
    ]
    # Every other call does the same to the results, so that what was compiled for it serves.
    rng = random.Random(seed * 100 + (call if call % 2 else 0))
    return differentiate(rng, list(f(*arguments)), leaves)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    return type(ours) is type(theirs) and bool(ours == theirs)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_gradients_are_eagers(seed: int) -> None:
    accel.reset()
    rng = random.Random(seed)
    text, f = function(rng)
    free = [rng.random() < 0.6 for _ in range(2)]
    optimized: Any = accel.optimize(types.FunctionType(f.__code__, f.__globals__))
    plain = types.FunctionType(f.__code__, f.__globals__)
    for call in range(CALLS):
        want = outcome(seed, call, plain, free)
        got = outcome(seed, call, optimized, free)
        assert accel.wait(60)
        if ["an error"] in (want, got):
            continue
        assert len(got) == len(want)
        assert all(map(same, got, want)), f"call {call} of seed {seed}\n{text}\n{got}\n{want}"
    assert accel.counters()["calls_compiled"] + accel.counters()["segments_served"] >= 1, text
    accel.reset()
