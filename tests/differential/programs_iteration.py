"""Programs that take tensors apart row by row, through what CPython iterates with."""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import torch
from harness import Program, Session, program

PROGRAMS: list[Program] = []

# Name -> what takes the rows of one tensor, or of two.
TAKERS: dict[str, Any] = {
    "zip": lambda a, b: [x * y for x, y in zip(a, b)],  # noqa: B905
    "strict zip": lambda a, b: [x * y + n for x, y, n in zip(a, b, [1.0, 2.0, 3.0], strict=True)],
    "enumerate": lambda a, b: [x * i for i, x in enumerate(a, start=2)],
    "enumerate and zip": lambda a, b: [x * y + i for i, (x, y) in enumerate(zip(a, b))],  # noqa: B905
    "list and tuple": lambda a, b: (list(a)[0] + tuple(b)[-1], [*a][1] - b[0]),
    "iter and next": lambda a, b: next(iter(a)) * next(iter(b), None),
    "map": lambda a, b: list(map(torch.add, a, b)),
    "map of a lambda": lambda a, b: sum(map(lambda x, y: x * y, a, b)),
    "pairwise and product": lambda a, b: (
        [x - y for x, y in itertools.pairwise(a)],
        [x * y for x, y in itertools.product(a, b)],
    ),
    "a star": lambda a, b: torch.stack([*a, *b]),
    "dict of rows": lambda a, b: dict(zip("xyz", a, strict=True)),
    "rows written in place": lambda a, b: [row.add_(other) for row, other in zip(a * 1, b)],  # noqa: B905
}


def _taker(s: Session, name: str) -> None:
    f = s.root(TAKERS[name])
    s.warm(f, torch.rand(3, 4), torch.rand(3, 4))
    s.hit(f, torch.rand(3, 4), torch.rand(3, 4))
    s.call(f, torch.rand(2, 4), torch.rand(2, 4))
    s.call(f, torch.rand(()), torch.rand(3, 4))


for _name in TAKERS:
    program(PROGRAMS, f"rows under {_name}")(lambda s, name=_name: _taker(s, name))


@program(PROGRAMS, "a score over rows, with an exit in each round")
def _(s: Session) -> None:
    def f(predictions, labels, k):
        total = hits = 0
        for prediction, label in zip(predictions, labels, strict=True):
            top = prediction.topk(k).indices
            hits += (top == label).any().item()
            total += 1
            zlib.crc32(b"exit")
        return hits / total

    f = s.root(f)
    s.split(f, torch.rand(6, 9), torch.randint(0, 9, (6, 1)), 3, segments=6)
    s.call(f, torch.rand(2, 9), torch.randint(0, 9, (2, 1)), 2)


@program(PROGRAMS, "rows of a parameter")
def _(s: Session) -> None:
    weight = s.watch(torch.rand(3, 4).requires_grad_())

    def f(x):
        total = 0
        for i, (row, other) in enumerate(zip(weight, x, strict=True)):
            total = total + (row * other).sum() * (i + 1)
        return total

    def step(x):
        loss = root(x)
        loss.backward()
        return loss.detach()

    root = s.root(f)
    s.warm(step, torch.rand(3, 4))
    s.hit(step, torch.rand(3, 4))


@program(PROGRAMS, "numbered rows, with a print in each round")
def _(s: Session) -> None:
    def f(x, scale):
        out = []
        for i, row in enumerate(x):
            out.append(torch.tanh(row * scale) + i)
            print(i, end=" ")
        return torch.stack(out)

    f = s.root(f)
    s.warm(f, torch.rand(5, 3), 2.0)
    s.call(f, torch.rand(2, 3), 0.5)
