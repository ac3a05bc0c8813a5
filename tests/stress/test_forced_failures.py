"""Deopt everywhere: guards, speculations and executors fail by order, and the answers stay.

A seeded sample runs by default; `ACCEL_DEOPT_ALL=1` fails every place of every program in turn.
`ACCEL_DEOPT_SEED` chooses another sample; `ACCEL_DEOPT_SHARD=0/2` takes every second program, from
the first on, for as many processes as there are cores.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from forced import KINDS, Order, check_each, check_failing, programs, stays

import accel
from accel import runtime

ALL = os.environ.get("ACCEL_DEOPT_ALL") == "1"
SEED = int(os.environ.get("ACCEL_DEOPT_SEED", "1"))
SAMPLE = 24
PROGRAMS = programs()
SHARD, SHARDS = map(int, os.environ.get("ACCEL_DEOPT_SHARD", "0/1").split("/"))
NAMES = (
    sorted(PROGRAMS)[SHARD::SHARDS]
    if ALL
    else sorted(random.Random(SEED).sample(sorted(PROGRAMS), SAMPLE))
)


@pytest.mark.parametrize("name", NAMES)
def test_answers_stay_when_places_fail(name: str) -> None:
    program = PROGRAMS[name]
    if ALL:
        list(check_each(program))
        return
    seed = random.Random(f"{SEED} {name}").randrange(1 << 30)
    truth, _ = check_failing(program, tuple(Order(k) for k in KINDS))
    stays(program, tuple(Order(k, share=0.4, seed=seed) for k in KINDS), truth)
    for kind in KINDS:
        stays(program, (Order(kind, share=1.0),), truth)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ordered_failure_happens(kind: str) -> None:
    """Otherwise the tests above would show nothing."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1 if x.sum() > -100 else x

    accel.optimize(f)
    x = torch.randn(4)
    for _ in range(3):
        f(x)
        assert accel.wait(60)
    before = accel.counters()
    runtime.native.force_failures(kind, at=1)
    for _ in range(3):
        assert torch.equal(f(x), torch.relu(x) + 1)
    assert runtime.native.stop_failures()[kind] == (3, 1)
    assert accel.counters()["calls_compiled"] - before["calls_compiled"] == 2
    for _ in range(3):
        f(x)
    assert runtime.native.stop_failures()[kind] == (0, 0)


def test_a_kind_that_is_none() -> None:
    with pytest.raises(ValueError, match="guard, speculation or executor"):
        runtime.native.force_failures("nothing")
