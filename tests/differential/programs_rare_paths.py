"""Functions whose first calls show little of them: early returns, warm-up, nothing to do yet."""

from __future__ import annotations

import torch
from harness import Program, Session, program

PROGRAMS: list[Program] = []


@program(PROGRAMS, "an early return comes first")
def _(s: Session) -> None:
    def step(x, y, go):
        if not go:
            return x
        for _ in range(3):
            x = torch.tanh(x) * y + x
        return x

    f = s.root(step)
    x, y = torch.ones(4, 4), torch.randn(4, 4)
    for go in (False, False, False, True, True, True, True, True, True):
        s.call(f, x, y, go)
    s.call(f, x, y, False)
    s.hit(f, x, y, True)


@program(PROGRAMS, "an early return behind an exit comes first")
def _(s: Session) -> None:
    def step(x, y):
        if torch.equal(x, y):
            return x
        for _ in range(3):
            x = torch.tanh(x) * y + x
        return x

    f = s.root(step)
    x = torch.ones(4, 4)
    for _ in range(3):
        s.call(f, x, x)
    for _ in range(20):
        s.call(f, x, torch.randn(4, 4))
    s.call(f, x, x)
    s.split(f, x, torch.randn(4, 4), segments=1)
