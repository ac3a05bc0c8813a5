"""Split functions whose ints and floats are others at each visit of a node: one segment serves
numbers never seen.

`s.split(..., segments=n)` asks for n compiled segments in one call: as many as the loop has rounds,
which no segment that fits one number alone could serve.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from harness import Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []
ROUNDS = 12  # more than variants that a node may have


def _rounds(s: Session, f: Any, *args: Any, segments: int = ROUNDS) -> None:
    """Compiled code runs in every round, after a few calls with other numbers of rounds."""
    f = s.root(f)
    s.split(f, *args, ROUNDS, segments=segments)
    for count in (ROUNDS + 3, 0, 1, ROUNDS - 5):
        s.call(f, *args, count)


@program(PROGRAMS, "the number of the round, and a total")
def _(s: Session) -> None:
    def f(x, count):
        total = 0.0
        for i in range(count):
            x = x * 0.5 + i * 0.01
            total += x.sum().item()
        return total, x

    _rounds(s, f, torch.randn(5))


@program(PROGRAMS, "a learning rate that decays")
def _(s: Session) -> None:
    def f(x, count):
        losses, lr = [], 0.5
        for step in range(1, count + 1):
            x = x - lr * x.sign() / step
            losses.append(round(x.abs().mean().item(), 4))
            lr = lr * 0.9 if losses[-1] < 1e9 else 0.0
        return losses, lr, x

    _rounds(s, f, torch.randn(5))


@program(PROGRAMS, "a counter of a while loop")
def _(s: Session) -> None:
    def f(x, count):
        n, seen = 0, []
        while n < count:
            n += 1
            x = torch.tanh(x + 1.0 / n)
            seen.append((n, zlib.crc32(b"%d" % n)))
        return x, seen

    _rounds(s, f, torch.randn(5))


@program(PROGRAMS, "a position in a cache")
def _(s: Session) -> None:
    def f(x, cache, count):
        kept = []
        for pos in range(count):
            cache[:, pos] = x
            x = cache[:, : pos + 1].mean(1) * 0.5 + x
            kept.append(x.argmax().item())
        return kept, x

    def g(x, count):
        return f(x, torch.zeros(3, 32), count)

    f = s.root(f)
    with torch.no_grad():
        s.split(g, torch.randn(3), ROUNDS, segments=ROUNDS - 2)
        for count in (20, 0, 1, 5):
            s.call(g, torch.randn(3), count)


@program(PROGRAMS, "sampling until a limit, with the history's length")
def _(s: Session) -> None:
    def f(logits, count):
        tokens = []
        while True:
            scores = logits / (1.0 + 0.1 * len(tokens))
            token = int(scores.softmax(-1).argmax())
            tokens.append(token)
            logits = logits.roll(1) * 0.9
            if len(tokens) > count:
                return tokens

    _rounds(s, f, torch.randn(7), segments=ROUNDS - 2)


@program(PROGRAMS, "the number is an int, then a float")
def _(s: Session) -> None:
    def f(x, count):
        n = 1
        for _ in range(count):
            x = x * n
            n = n + 1 if n < 4 else n * 0.5
            x = x / x.abs().max().item()
        return x, n

    _rounds(s, f, torch.randn(5), segments=ROUNDS - 6)


@program(PROGRAMS, "whether two numbers are one object")
def _(s: Session) -> None:
    def f(x, count):
        n, same = 1000, []
        for _ in range(count):
            before = n
            x = x + n * 0.001
            zlib.crc32(b"exit")
            same.append(before is n)
            n = n + 1000
            same.append(n is before)
        return x, same

    _rounds(s, f, torch.randn(5))


@program(PROGRAMS, "a number kept in a list, in an object and in a closure")
def _(s: Session) -> None:
    class Holder:
        n = 0

    holder = s.watch(Holder())

    def f(x, count):
        kept, shared = [], 0

        def bump():
            nonlocal shared
            shared += 2
            return shared

        for i in range(count):
            kept.append(i + 300)
            holder.n = i * 2
            x = x * 0.9 + holder.n * 0.01 + bump()
            zlib.crc32(b"exit")
            x = x + kept[-1] * 0.001
        return x, kept, shared

    _rounds(s, f, torch.randn(5), segments=ROUNDS - 4)


@program(PROGRAMS, "numbers in a try, with an error at one of them")
def _(s: Session) -> None:
    def f(x, count):
        errors = []
        for i in range(count):
            try:
                x = x * 0.5 + 1.0 / (i - 7)
                zlib.crc32(b"exit")
                x = x + i
            except ZeroDivisionError as error:
                errors.append((i, str(error)))
                x = x - 1
            finally:
                x = x * 0.9
        return x, errors

    _rounds(s, f, torch.randn(5))


@program(PROGRAMS, "a branch on the number")
def _(s: Session) -> None:
    def f(x, count):
        for i in range(count):
            x = x * 0.5 + i
            if i % 3 == 0:
                x = torch.sin(x)
            zlib.crc32(b"exit")
            x = x.cos() if i > 5 else x.sin()
        return x

    _rounds(s, f, torch.randn(5))


@program(PROGRAMS, "training steps in one function, with a schedule of its own")
def _(s: Session) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    s.watch(model)

    def f(x, y, count):
        losses = []
        for step in range(count):
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            lr = 0.1 / (1 + 0.5 * step)
            with torch.no_grad():
                for p in model.parameters():
                    p -= lr * p.grad
                    p.grad = None
            losses.append(loss.item())
        return losses

    _rounds(s, f, torch.randn(6, 4), torch.randn(6, 2))


@program(PROGRAMS, "numbers that wait on the stack")
def _(s: Session) -> None:
    def f(x, count):
        total = 0
        for i in range(count):
            total = total + i * (x * i).sum().item() + i
            x = x + total * 1e-6
        return total, x

    _rounds(s, f, torch.randn(5))


@program(PROGRAMS, "infinite, negative zero and huge numbers")
def _(s: Session) -> None:
    def f(x, numbers):
        out = []
        for n in numbers:
            out.append((x * n).sum().item())
            out.append((x + n).max().item())
        return out

    f = s.root(f)
    numbers = [0.5, 1.5, -0.0, 0.0, float("inf"), -1e300, 1e-320, 3, 2**62, True, 7.25, -2]
    s.split(f, torch.rand(5), numbers, segments=8)
    s.call(f, torch.rand(5), [float("nan"), 10**30, 2.0])


@program(PROGRAMS, "whether two names are one big number")
def _(s: Session) -> None:
    def f(x, count):
        out = []
        for i in range(count):
            a = b = i * 1000
            x = x + a * 1e-7
            out.append((a, a is b, i))
            zlib.crc32(b"exit")
            out.append((a is b, b is not a, a is i))
        return x, out

    f = s.root(f)
    for count in (5, 5, 6, 7, 8, 9, 3):
        s.call(f, torch.ones(3), count)


@program(PROGRAMS, "one big number as two arguments")
def _(s: Session) -> None:
    def f(x, m, n):
        return x * m + n, m is n, n is not m

    f = s.root(f)
    for n in (1000, 2000, 3000, 4000, 5, 6, 7):
        s.call(f, torch.ones(3), n, n)
        s.call(f, torch.ones(3), n, int(str(n)))


@program(PROGRAMS, "one number as two arguments, which an operation wants to be what it is")
def _(s: Session) -> None:
    def f(x, m, n):
        return torch.full_like(x, m) * x.clamp(max=n), m is n, n is not m

    f = s.root(f)
    nan = float("nan")
    for n in (1000, 2000, 3000, 4000, 5, 6, 7.5, 8.5, nan, 0.0):
        s.call(f, torch.ones(3), n, n)
        s.call(f, torch.ones(3), n, type(n)(str(n)))


@program(PROGRAMS, "floats that are one object, not a number among them")
def _(s: Session) -> None:
    def f(x, m, n):
        return x * m + n, m is n

    f = s.root(f)
    nan = float("nan")
    for m, n in ((1.5, 2.5), (3.5, 4.5), (5.5, 6.5), (nan, nan), (nan, float("nan")), (0.0, -0.0)):
        s.call(f, torch.ones(3), m, n)
        s.call(f, torch.ones(3), n, n)
