"""Segments that are slower than Python are dropped; the others stay."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import accel
from accel import driver, metering
from accel.roots import Root
from accel.trial import Trial


def test_a_meter_takes_the_time_from_a_node_to_the_next_landing() -> None:
    nodes = [Root(str(k), "node", "", None) for k in range(2)]
    meter = metering.Meter(nodes)
    meter.mark(0)
    time.sleep(0.002)
    meter.mark(-1)
    time.sleep(0.002)  # the exit
    meter.mark(1)
    meter.mark(-1)
    meter.mark(-1)
    assert len(nodes[0].eager_ns) == 1 and nodes[0].eager_ns[0] > 1_500_000
    assert len(nodes[1].eager_ns) == 1 and nodes[1].eager_ns[0] < 1_500_000


def fast_and_slow(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """A backend whose code is right: slow where it computes a sine, else very fast."""
    if "sin" not in str(gm.graph):
        return lambda x: [x + ADDED]

    def run(*inputs: Any) -> Any:
        time.sleep(0.004)
        return gm(*inputs)

    return run


ADDED = 300


@pytest.fixture(autouse=True)
def forgets() -> Any:
    accel.reset()
    yield
    accel.reset()


def test_a_losing_node_runs_as_python_and_the_other_stays() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for _ in range(ADDED):
            x = x + 1
        zlib.crc32(b"exit")
        return torch.sin(x) * 2

    code = f.__code__
    optimized = accel.optimize(f, backend=fast_and_slow)
    x = torch.arange(8.0)  # whole numbers: adding them up is exact
    with torch.no_grad():
        expected = f(x)
        assert driver.current is not None
        for k in range(2000):
            torch.testing.assert_close(optimized(x), expected)
            assert accel.wait(60)
            split = next(r for r in driver.current.roots if r.code == code).split
            if k > 20 and split.nodes[1].state == "losing":
                break
    first, second = split.nodes
    assert second.state == "losing" and "us compiled" in second.reason and not second.variants
    assert first.state == "compiled" and first.variants
    assert accel.counters()["variants_losing"] == 1
    hits = first.hits
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), expected)
    assert first.hits == hits + 1 and second.hits > 0


def test_metered_calls_are_rare_and_count_as_calls() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x) + 1
        zlib.crc32(b"exit")
        return torch.cos(x) * 2

    optimized = accel.optimize(f)
    x = torch.linspace(-1, 1, 64)
    metered = 0
    for _ in range(600):
        before = accel.counters()["segments_served"]
        optimized(x)
        assert accel.wait(60)
        metered += accel.counters()["segments_served"] == before
    counts = accel.counters()
    assert counts["calls_split"] + counts["calls_eager"] == 600
    assert metered < 30


def test_a_review_asks_for_eager_times_until_it_can_say() -> None:
    class Native:
        misspeculations, errors, executor, gradients = 3, 1, None, None

        def __init__(self, ns: int) -> None:
            self.hits, self.ns_compiled, self.review_at, self.probe_every = 16, [ns] * 16, 0, 1

        def clear_probes(self) -> None:
            self.ns_compiled = []

    class Entry:
        variants: Any = ()
        state = "armed"

    def node(ns: int) -> tuple[Root, Any]:
        root = Root("f:1", "node", "f.py:1", Entry())
        native = Native(ns)
        root.variants.append(type("V", (), {"native": native, "operations": 2})())  # type: ignore[arg-type]
        root.state = "compiled"
        return root, native

    def due(native: Any, ns: int) -> None:
        native.review_at, native.hits = 0, native.hits + 16
        native.ns_compiled = [*native.ns_compiled, *([ns] * 16)][-64:]

    slow, trial = node(9000)[0], Trial()
    native = slow.variants[0].native
    assert not metering.review(slow, trial) and native.review_at > native.hits
    due(native, 9000)
    assert metering.review(slow, trial)
    for _ in range(4):
        slow.eager_ns += [1000, 1100, 1200]
        due(native, 9000)
        metering.review(slow, trial)
        if slow.state == "losing":
            break
    assert slow.state == "losing" and slow.entry.state == "off" and slow.retired.hits > 0
    assert slow.retired.operations == 2 * slow.retired.hits
    assert (slow.retired.failures, slow.retired.errors) == (3, 1)
    fast, trial = node(500)[0], Trial()
    native = fast.variants[0].native
    for _ in range(6):
        fast.eager_ns += [1000, 1100, 1200]
        metering.review(fast, trial)
        due(native, 500)
    assert fast.state == "compiled" and fast.variants
