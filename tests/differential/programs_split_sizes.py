"""Split functions whose tensors differ in size from call to call, and from round to round.

Sizes that have been seen to change are left open: new ones are served without a recording.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []


def _rows(n: int) -> torch.Tensor:
    return torch.linspace(-1, 1, n * 6).reshape(n, 6)


def _grow(s: Session, f: Any, make: Any, segments: int = 2) -> None:
    """Calls of growing sizes; in the end sizes never seen must be served by so many segments."""
    for n in (3, 4, 5, 7, 3, 6):
        for _ in range(3):
            s.call(f, make(n))
    for n in (9, 12, 17):
        s.split(f, make(n), segments=segments, calls=0, tries=1)


@program(PROGRAMS, "a batch of any size around an exit", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 8), nn.Linear(8, 3)

    def f(x):
        x = torch.relu(first(x)) * 2
        zlib.crc32(b"exit")
        return torch.tanh(second(x)) + 1

    f = s.root(f)
    with torch.no_grad():
        _grow(s, f, _rows)


@program(PROGRAMS, "sizes as numbers across an exit", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        n, width = x.shape
        y = torch.tanh(x).reshape(n * width) + 1
        half = n // 2
        zlib.crc32(b"exit")
        y = torch.sin(y) * 2
        zlib.crc32(b"exit")
        return y.view(n, width), half, (n, [n * 2])

    f = s.root(f)
    _grow(s, f, _rows)


@program(PROGRAMS, "batches of different sizes in one loop", expect=ANY)
def _(s: Session) -> None:
    def f(batches):
        results = []
        for x in batches:
            y = torch.tanh(x) * 2
            zlib.crc32(b"exit")
            results.append((y - y.mean(0)).sum(1))
        return results

    f = s.root(f)
    _grow(s, f, lambda n: [_rows(k) for k in (n, n + 1, n, 2 * n)], segments=8)


@program(PROGRAMS, "a mask gives another number of rows each time", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        x = torch.tanh(x) + 0.1
        kept = x[x.sum(1) > 0]
        kept = torch.sin(kept) * 2 + 1
        zlib.crc32(b"exit")
        return torch.cos(kept) - kept.sum()

    f = s.root(f)
    _grow(s, f, _rows, segments=3)


@program(PROGRAMS, "an exit in a module that is called with sequences of any length", expect=ANY)
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, tokens):
            x = self.embedding(tokens)
            zlib.crc32(b"exit")
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return torch.tanh(x).mean(1)

    torch.manual_seed(1)
    model = s.root(s.watch(Model().eval()))
    with torch.no_grad():
        _grow(s, model, lambda n: torch.arange(2 * n).reshape(2, n) % 11, segments=1)


@program(PROGRAMS, "gradients in segments of several sizes", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(torch.linspace(-1, 1, 6).requires_grad_())

    def f(x):
        y = torch.tanh(x * w) * 2
        zlib.crc32(b"exit")
        return (torch.sin(y) + w).sum()

    f = s.root(f)
    for n in (3, 4, 3, 5, 4, 3):
        for _ in range(3):
            s.call(f, _rows(n)).backward()
    s.split(f, _rows(3))
    s.split(f, _rows(4), calls=2)


@program(PROGRAMS, "the size decides, in a segment", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        x = torch.tanh(x) + 1
        zlib.crc32(b"exit")
        if x.shape[0] > 5:
            x = x[: x.shape[0] // 2] * 2
        return torch.sin(x) * 2

    f = s.root(f)
    _grow(s, f, _rows)
    s.split(f, _rows(2), calls=3)
    s.split(f, _rows(1), calls=3)


@program(PROGRAMS, "fixed sizes where the user wants them", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        x = torch.tanh(x) + 1
        zlib.crc32(b"exit")
        return torch.sin(x) * 2

    f = s.root(f, dynamic=False)
    for n in (3, 4, 5):
        s.split(f, _rows(n))
