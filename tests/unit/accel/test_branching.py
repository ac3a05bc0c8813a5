"""Branches that go both ways: which of them are given up, and which stay assumed."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import accel
from accel import arming, branching, driver
from accel.capture import branches
from accel.capture.twins import TwinFactory

IF, LOOP, OTHER = (("f.py", "f", (line, line, 0, 9)) for line in (1, 2, 3))


def variant(*assumed: Any, hits: int = 0, failed: int = 1, refusals: int = 0) -> Any:
    executor = types.SimpleNamespace(refusals=refusals)
    native = types.SimpleNamespace(misspeculations=failed, hits=hits, executor=executor)
    recording = types.SimpleNamespace(assumed=assumed)
    return types.SimpleNamespace(native=native, recording=recording)


def recording(*assumed: Any) -> Any:
    return types.SimpleNamespace(assumed=assumed)


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [
        ([(IF, True)], [(IF, False)], IF),
        ([(IF, True)], [(IF, True)], None),
        ([(IF, True), (LOOP, False)], [(IF, True), (LOOP, True), (LOOP, False)], LOOP),
        # Parted before, by something that no tensor decides.
        ([(IF, True), (LOOP, True)], [(OTHER, True), (LOOP, False)], None),
        ([], [(IF, True)], None),
    ],
)
def test_where_two_runs_part(a: Any, b: Any, place: Any) -> None:
    assert branching.parting(a, b) == place == branching.parting(b, a)


def test_straight_code_may_go_a_few_ways() -> None:
    ways = [[(IF, False), (OTHER, True)], [(IF, False), (OTHER, False)], [(IF, False)]]
    new = recording((IF, True))
    for count in range(branching.MAX_PATHS):
        assert not branching.places_to_leave([variant(*way) for way in ways[:count]], new)
    assert branching.places_to_leave([variant(*way) for way in ways], new) == {IF}


def test_a_loop_that_turns_elsewhere_is_left_at_once() -> None:
    short = [(LOOP, True), (LOOP, False)]
    long = [(LOOP, True), (LOOP, True), (LOOP, False)]
    assert branching.places_to_leave([variant(*short)], recording(*long)) == {LOOP}
    # What served often enough is worth more than the one call that it did not.
    assert not branching.places_to_leave([variant(*short, hits=50)], recording(*long))
    # It did not fail: something else kept it from serving.
    assert not branching.places_to_leave([variant(*short, failed=0)], recording(*long))
    assert not branching.places_to_leave([variant(*short, refusals=1)], recording(*long))


def test_busy_variants_come_first() -> None:
    fixed, rare, busy = variant(hits=1), variant((IF, True), hits=2), variant((IF, False), hits=9)
    family = variant(hits=5)
    variants = [fixed, rare, busy, family]
    assert branching.order(variants)
    assert variants == [fixed, busy, rare, family]
    assert not branching.order(variants)


@contextlib.contextmanager
def optimized(f: Any, **options: Any) -> Iterator[Any]:
    code = f.__code__
    accel.reset()
    try:
        yield accel.optimize(f, **options)
    finally:
        accel.reset()
        f.__code__ = code


def _root(f: Any) -> Any:
    assert driver.current is not None
    return next(r for r in driver.current.roots if r.name == f.__qualname__ and r.code)


def test_a_branch_that_flips_splits_its_root_and_the_place_is_named() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x) + 1
        if x.sum() > 7:
            return torch.sin(x) * 2
        return torch.cos(x) - 1

    with optimized(f):
        x = torch.linspace(-1, 1, 7)
        for k in range(40):
            f(-x - 1 if k % 2 else x + 1)
            assert accel.wait(60)
        root = _root(f)
        assert root.state == "split"
        line = f.__code__.co_firstlineno + 2
        assert any(f"{__file__}:{line}" in why for why in root.split.reasons.values())
        assert [place[2][0] for place in branches.both_ways] == [line]
        failed = accel.counters()["speculations_failed"]
        assert failed >= branching.FIRST_DOUBT  # those of dropped variants count
        before = accel.counters()["recordings"]
        for k in range(20):
            f(-x - 1 if k % 2 else x + 1)
        assert accel.counters()["recordings"] == before
        assert accel.counters()["speculations_failed"] == failed
    assert not branches.both_ways  # reset


def test_a_root_that_cannot_be_split_goes_on_assuming() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x) + 1
        if x is None:
            eval("x")  # functions that could look at their locals are not split
        if x.sum() > 7:
            return torch.sin(x) * 2
        return torch.cos(x) - 1

    def g(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x) + 1
        if x.sum() > 7:
            return torch.sin(x) * 2
        return torch.cos(x) - 1

    x = torch.linspace(-1, 1, 7)
    for function, options in ((f, {}), (g, {"fullgraph": True})):
        with optimized(function, **options):
            for k in range(40):
                function(-x - 1 if k % 2 else x + 1)
                assert accel.wait(60)
            root = _root(function)
            assert root.state == "compiled" and len(root.variants) == 2
            assert root.assumes_all == (function is f)


def test_an_operation_that_cannot_be_traced_is_left_to_python() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        kept = x[x > 0]
        return torch.sin(kept) * 2

    with optimized(f):
        x = torch.linspace(-1, 1, 7)
        for _ in range(8):
            expected = torch.sin(torch.tanh(x)[torch.tanh(x) > 0]) * 2
            torch.testing.assert_close(f(x), expected)
            assert accel.wait(60)
        root = _root(f)
        assert root.state == "split" and len(branches.untraceable) == 1
        assert all(len(node.variants) == 1 for node in root.split.nodes)


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_only_the_programs_own_functions_are_armed() -> None:
    import textwrap

    def generator(x: Any) -> Any:
        yield x

    twins = TwinFactory(lambda code: code.replace(co_name=f"twin of {code.co_name}"))
    functions = [_inner, generator, textwrap.dedent, torch.nn.functional.softmax]
    codes = []
    for f in functions:
        assert isinstance(f, types.FunctionType)
        twin = twins.function(f)
        assert twin is not None
        codes.append(twin.__code__)
    assert list(arming.functions_to_arm(twins, codes, lambda _: False)) == [_inner]
    assert not list(arming.functions_to_arm(twins, codes, lambda module: module == __name__))
    assert not list(arming.functions_to_arm(twins, [], lambda _: False))
