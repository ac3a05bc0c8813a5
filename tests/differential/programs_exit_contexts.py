"""Exits inside context managers made of generators, exit stacks, comprehensions and generators.

What Python has to run there stays in its own frame; the parts around it run compiled.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from typing import Any

import torch
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []
X = torch.linspace(-1, 2, 6)


@program(PROGRAMS, "an exit inside a with of the user's own generator", expect=ANY)
def _(s: Session) -> None:
    seen = s.watch([])

    @contextlib.contextmanager
    def scaled(scale):
        seen.append(scale)
        try:
            yield scale * 2
        except ValueError as error:
            seen.append(str(error))
        finally:
            seen.append(-scale)

    def f(x, fails):
        x = torch.tanh(x) + 1
        with scaled(3) as factor:
            x = torch.sin(x) * factor
            zlib.crc32(b"exit")
            x = torch.cos(x) + 1
            if fails:
                raise ValueError("on purpose")
            x = x * 2
        return torch.sin(x) + 1

    f = s.root(f)
    s.split(f, X, False)
    s.split(f, X, True)
    s.call(f, -X, False)


@program(PROGRAMS, "callbacks of an ExitStack around exits", expect=ANY)
def _(s: Session) -> None:
    seen = s.watch([])

    def f(x, n):
        with contextlib.ExitStack() as stack:
            for k in range(n):
                stack.callback(seen.append, k)
            x = torch.tanh(x) + n
            stack.enter_context(torch.no_grad())
            zlib.crc32(b"exit")
            x = torch.sin(x) * 2
        x = torch.cos(x) + 1
        seen.append(torch.is_grad_enabled())
        return x * 2

    f = s.root(f)
    s.split(f, X, 2, segments=1)
    s.call(f, X, 1)
    s.call(f, -X, 2)


@program(PROGRAMS, "exits in comprehensions", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 6).eval()

    def f(parts, x):
        x = torch.tanh(x) + 1
        values = [torch.relu(model(p)).sum().item() for p in parts]
        named = {k: p.max().item() + x for k, p in enumerate(parts)}
        x = torch.sin(x) * 2
        kept = {round(v, 3) for v in values if zlib.crc32(b"exit")}
        return torch.cos(x) + 1, values, named, kept

    f = s.root(f)
    with torch.no_grad():
        s.split(f, [X, -X], X)
        s.call(f, [X, X + 1, -X], X)
        s.call(f, [], X)


@program(PROGRAMS, "a generator that is advanced at exits", expect=ANY)
def _(s: Session) -> None:
    def batches(n):
        x = X
        for k in range(n):
            x = torch.tanh(x) + k
            yield x
            x = torch.sin(x) * 2

    def f(n):
        total = torch.zeros(6)
        source = batches(n)
        first = next(source)
        zlib.crc32(b"exit")
        total = total + torch.cos(first) * 2
        for x in source:
            total = total + torch.relu(x) * 2
            zlib.crc32(b"exit")
            total = total - x / 2
        return total * 2, list(source)

    f = s.root(f)
    s.split(f, 4)
    s.call(f, 1)
    s.call(f, 2)


@program(PROGRAMS, "what a generator calls is served", expect=ANY)
def _(s: Session) -> None:
    def part(x):
        x = torch.tanh(x) + 1
        zlib.crc32(b"exit")
        return torch.sin(x) * 2

    part = s.root(part)

    def stream(x):
        for _ in range(3):
            x = part(x)
            sent = yield x
            if sent is not None:
                x = x * sent

    def drive(x):
        source = stream(x)
        results = [next(source), source.send(2), source.send(0.5)]
        source.close()
        return results

    s.split(drive, X, segments=6)
    s.split(drive, -X, segments=6)


@program(PROGRAMS, "what a coroutine calls is served, itself it is left alone", expect=ANY)
def _(s: Session) -> None:
    def part(x):
        x = torch.tanh(x) + 1
        zlib.crc32(b"exit")
        return torch.sin(x) * 2

    part = s.root(part)

    async def both(x):
        y = part(x)
        await asyncio.sleep(0)
        return y + part(x + 1)

    def drive(x):
        async def main() -> Any:
            return await asyncio.gather(both(x), both(-x))

        return asyncio.run(main())

    s.split(drive, X, segments=8)


@program(PROGRAMS, "exits in nested withs, one of which swallows", expect=ANY)
def _(s: Session) -> None:
    @contextlib.contextmanager
    def doubled():
        yield 2

    def f(x, n):
        x = torch.tanh(x) + 1
        with contextlib.suppress(ZeroDivisionError), doubled() as factor:
            for k in range(2, -2, -1):
                x = torch.sin(x) * factor
                zlib.crc32(b"exit")
                x = x + n // k
            x = x + 100
        return torch.cos(x) * 2

    f = s.root(f)
    s.split(f, X, 6, segments=5)
    s.call(f, -X, 3)
    s.call(f, -X, 6)
