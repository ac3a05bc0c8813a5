"""Many calls of compiled code: references and memory stay where they are.

`ACCEL_STRESS_CALLS` sets how many (default 100,000).
"""

from __future__ import annotations

import gc
import os
import random
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import accel

CALLS = int(os.environ.get("ACCEL_STRESS_CALLS", "100000"))
SLACK_KB = 4096


def resident_kb() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS in /proc/self/status")


def warm(call: Callable[[], Any]) -> None:
    for _ in range(3):
        call()
        assert accel.wait(60)


def assert_flat(call: Callable[[], Any], watched: list[Any], calls: int) -> None:
    """`calls` calls change neither the references of `watched`, nor objects, nor memory."""
    for _ in range(calls // 10):
        call()
    gc.collect()
    references = [sys.getrefcount(value) for value in watched]
    objects, before_kb = len(gc.get_objects()), resident_kb()
    for _ in range(calls):
        call()
    gc.collect()
    assert [sys.getrefcount(value) for value in watched] == references
    assert abs(len(gc.get_objects()) - objects) < 50
    assert resident_kb() - before_kb < SLACK_KB


def test_compiled_function() -> None:
    def f(x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.relu(x * scale + 1)

    accel.optimize(f)
    x = torch.randn(8, 16)
    warm(lambda: f(x, 2.0))
    before = accel.counters()["calls_compiled"]
    assert_flat(lambda: f(x, 2.0), [x, f, f.__code__, None, True], CALLS)
    assert accel.counters()["calls_compiled"] - before >= CALLS


def test_compiled_module_with_structure_in_and_out() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
            y = self.linear(inputs["x"])
            return {"y": y, "pair": (y + 1, [y.relu()]), "x": inputs["x"]}

    model = accel.optimize(Model().eval().requires_grad_(False))
    inputs = {"x": torch.randn(2, 4)}
    warm(lambda: model(inputs))
    watched = [model, inputs, inputs["x"], model.linear.weight, model.linear]
    assert_flat(lambda: model(inputs), watched, CALLS // 10)


def test_calls_whose_guards_fail() -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        return x * n

    accel.optimize(f)
    x = torch.randn(4)
    numbers = iter(range(10**9))
    warm(lambda: f(x, -1))
    for _ in range(50):  # until no more variants are made
        f(x, next(numbers))
        accel.wait(60)
    assert_flat(lambda: f(x, next(numbers)), [x, f], CALLS // 20)


def test_calls_that_raise() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * 2) @ y

    accel.optimize(f)
    x, good, bad = torch.randn(2, 3), torch.randn(3, 2), torch.randn(4, 2)
    warm(lambda: f(x, good))

    def call() -> None:
        with pytest.raises(RuntimeError):
            f(x, bad)

    assert_flat(call, [x, bad, f], CALLS // 50)


def test_recordings_leave_nothing_behind() -> None:
    def f(x: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        state["last"] = x + 1
        return state["last"] * 2

    accel.optimize(f)
    x, state = torch.randn(4), {}

    def call() -> None:
        accel.reset()
        f(x, state)
        accel.wait(60)
        f(x, state)

    for _ in range(5):
        call()
    gc.collect()
    references, objects = sys.getrefcount(x), len(gc.get_objects())
    for _ in range(20):
        call()
    gc.collect()
    assert sys.getrefcount(x) == references
    assert len(gc.get_objects()) - objects < 200


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="3.13 makes the dict to look into it")
def test_recordings_and_guards_make_no_instance_dicts() -> None:
    """A dict that somebody asked for makes every later access to its object slower."""

    class Settings:
        def __init__(self) -> None:
            self.scale, self.shift = 2.0, 1.0

        def apply(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale + (0.0 if hasattr(self, "absent") else self.shift)

    settings = Settings()
    f = accel.optimize(lambda s, x: s.apply(x))
    warm(lambda: f(settings, torch.ones(4)))
    hits = accel.counters()["calls_compiled"]
    f(settings, torch.ones(4))
    assert accel.counters()["calls_compiled"] == hits + 1
    assert not any(type(referent) is dict for referent in gc.get_referents(settings))


def test_nothing_keeps_arguments_results_or_modules_alive() -> None:
    def f(x: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
        return model(x) + 1

    accel.optimize(f)
    dead = []
    for _ in range(4):
        model, x = torch.nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)
        out = f(x, model)
        accel.wait(60)
        dead += [weakref.ref(model), weakref.ref(x), weakref.ref(out)]
        del model, x, out
    gc.collect()
    assert [reference() for reference in dead] == [None] * len(dead)


def test_results_survive_later_calls() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1

    accel.optimize(f)
    warm(lambda: f(torch.ones(64)))
    kept: list[tuple[float, torch.Tensor]] = []
    generator = random.Random(3)
    for step in range(2000):
        kept.append((step + 1.0, f(torch.full((64,), float(step)))))
        if len(kept) > 20:
            kept.pop(generator.randrange(len(kept)))
        if step % 50 == 0:
            assert all(bool((tensor == value).all()) for value, tensor in kept)


def test_random_changes_are_always_noticed() -> None:
    """A random walk over everything a guard watches; the seed is in the failure message."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3).requires_grad_(False)
            self.gain, self.options = 1.0, {"shift": 0.0}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x) * self.gain + self.options["shift"]
            if hasattr(self, "extra"):
                y = y + self.extra
            return torch.nn.functional.dropout(y, 0.0, self.training)

    seed = int(os.environ.get("ACCEL_STRESS_SEED", random.randrange(10**6)))
    generator = random.Random(seed)
    torch.manual_seed(seed)
    plain, model = Model(), Model()
    model.load_state_dict(plain.state_dict())
    accel.optimize(model)
    accel.disable(plain)
    shape, dtype = (2, 3), torch.float32

    for step in range(120):
        change = generator.randrange(9)
        number = float(generator.randrange(3))
        for m in (plain, model):
            if change == 0:
                m.gain = number
            elif change == 1:
                m.options["shift"] = number
            elif change == 2:
                m.extra = number
            elif change == 3 and hasattr(m, "extra"):
                del m.extra
            elif change == 4:
                m.train(bool(number))
            elif change == 5:
                m.linear.weight.data.fill_(number)
            elif change == 6:
                m.linear.weight = torch.nn.Parameter(
                    torch.full((3, 3), number, dtype=m.linear.weight.dtype), False
                )
            elif change == 7:
                m.to(torch.float64 if number else torch.float32)
        if change == 7:
            dtype = torch.float64 if number else torch.float32
        if change == 8:
            shape = generator.choice([(2, 3), (1, 3), (4, 3), (2, 2, 3)])
        for _ in range(generator.randrange(1, 4)):
            x = torch.randn(shape).to(dtype)
            where = f"seed {seed}, step {step}, change {change}"
            assert torch.allclose(model(x), plain(x), rtol=1e-5, atol=1e-5), where
            if generator.random() < 0.5:
                accel.wait(60)
