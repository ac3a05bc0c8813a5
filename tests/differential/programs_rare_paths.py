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


@program(PROGRAMS, "numbers that differ between calls as keys of a dict")
def _(s: Session) -> None:
    seen = s.watch({})

    def outer(x, k):
        seen[k] = seen.get(k, 0) + 1
        return (x * 2).relu() + k

    def inner(x, k):
        parts = {k: x * 2, k + 1: x * 3}
        return parts[k].exp() + parts[k + 1]

    for function in (outer, inner):
        f = s.root(function)
        for k in range(10, 26):
            s.call(f, torch.randn(4), k)
        s.call(f, torch.randn(4), 10)
        s.split(f, torch.randn(4), 99, segments=1)


@program(PROGRAMS, "five values of a number, over and over")
def _(s: Session) -> None:
    table = {k: 0.5 * k for k in range(6)}

    def f(x, k):
        return x * table[k] + 1

    f = s.root(f)
    for _ in range(6):
        for k in range(5):
            s.call(f, torch.randn(4), k)
    s.hit(f, torch.randn(4), 3)
