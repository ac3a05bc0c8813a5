"""The harness must catch an optimizer that is wrong: one fake for each way to be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fakes
import pytest
import torch
from fakes import Fake
from harness import COMPILED, EAGER, Eager, Program, Session, check


def body(s: Session) -> None:
    scale = {"factor": 2.0}
    seen = s.watch([])

    def step(x: torch.Tensor, out: torch.Tensor) -> dict[str, Any]:
        print("step", x.dtype)
        if x.numel() == 1:
            raise ValueError("too small")
        noise = torch.rand(1)
        seen.append(x.numel())
        out.add_(1)
        view = x.t()
        return {"x": x, "view": view, "y": x * scale["factor"] + noise, "out": out}

    step = s.root(step)
    out = torch.zeros(2)
    for _ in range(3):
        s.call(step, torch.randn(2, 3), out)
    scale["factor"] = 3.0
    s.call(step, torch.randn(2, 3), out)
    s.call(step, torch.randn(1, 1), out)


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "values": (fakes.change(y=lambda y: y + 1e-3), "values differ"),
    "dtype": (fakes.change(y=torch.Tensor.double), "dtype"),
    "strides": (fakes.change(view=lambda v: v.contiguous()), "strides"),
    "requires_grad": (fakes.change(y=lambda y: y.requires_grad_()), "requires_grad"),
    "copied view": (
        fakes.change(view=lambda v: v.clone(memory_format=torch.preserve_format)),
        "storage",
    ),
    "copied input": (fakes.change(x=torch.clone), "the same object"),
    "big storage": (fakes.change(y=lambda y: torch.cat([y, y])[:2]), "storage_bytes"),
    "container": (fakes.change(out=lambda out: (out,)), "out"),
    "stale": (fakes.stale(), "values differ"),
    "memory reused": (fakes.reuses_memory(), "at the end"),
    "arguments held": (fakes.holds_arguments(), "references"),
    "print lost": (fakes.silences, "printed"),
    "exception lost": (fakes.swallows, "exception"),
    "exception reworded": (fakes.rewords, "message"),
    "effects twice": (fakes.runs_twice, "state"),
    "random stream": (fakes.draws_noise, "rng"),
    "write lost": (fakes.undoes_writes, "values differ"),
    "grad mode leaked": (fakes.leaks_grad_mode, "grad_mode"),
}


def test_an_honest_engine_passes() -> None:
    check(Program("honest", body), Fake(fakes.honest))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_caught(name: str) -> None:
    wrapper, symptom = WRONG[name]
    try:
        with pytest.raises(AssertionError, match=symptom):
            check(Program(name, body), Fake(wrapper))
    finally:
        torch.set_grad_enabled(True)


def test_calls_that_should_be_compiled_must_be() -> None:
    def warmed(s: Session) -> None:
        s.warm(s.root(torch.sin), torch.ones(2))

    check(Program("compiled", warmed, COMPILED), Fake(fakes.honest))
    with pytest.raises(AssertionError, match="not served compiled"):
        check(Program("not compiled", warmed, COMPILED), Eager())


def test_calls_that_should_be_eager_need_the_right_reason() -> None:
    def warmed(s: Session) -> None:
        s.call(torch.sin, torch.ones(2))

    check(
        Program("eager", warmed, EAGER, "opaque call"), Fake(fakes.honest, ("an opaque call: f",))
    )
    with pytest.raises(AssertionError, match="no reason contains"):
        check(Program("eager", warmed, EAGER, "opaque call"), Fake(fakes.honest, ("other",)))


def test_stale_code_is_caught_by_miss() -> None:
    def missed(s: Session) -> None:
        s.miss(s.root(torch.sin), torch.ones(2))

    with pytest.raises(AssertionError, match="stale"):
        check(Program("miss", missed), Fake(fakes.honest))
