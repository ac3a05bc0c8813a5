"""Programs that accel once answered wrongly. Each stays here for good."""

from __future__ import annotations

import collections
import enum
import threading

import torch
from harness import ANY, EAGER, Program, Session, program

PROGRAMS: list[Program] = []


@program(PROGRAMS, "a tensor's method is replaced")
def _(s: Session) -> None:
    def f(x):
        return (x + 1).relu()

    f, x = s.root(f), torch.randn(5)
    s.warm(f, x)
    s.patch(torch.Tensor, "relu", lambda t: t * 0 - 7)
    s.miss(f, x)


@program(PROGRAMS, "a tensor's operator is replaced")
def _(s: Session) -> None:
    def f(x):
        return x * 3

    f, x = s.root(f), torch.randn(5)
    s.warm(f, x)
    s.patch(torch.Tensor, "__mul__", lambda a, b: a - b)
    s.miss(f, x)


@program(PROGRAMS, "an operator replaced before the first call", expect=EAGER, reason="replaced")
def _(s: Session) -> None:
    def f(x):
        return x / 3

    s.patch(torch.Tensor, "__truediv__", lambda a, b: a - b)
    f, x = s.root(f), torch.randn(5)
    for _ in range(3):
        s.call(f, x)


@program(PROGRAMS, "one list under two names, written through one")
def _(s: Session) -> None:
    def f(a, b):
        a.append(b[-1] * 2)
        return len(b), b[-1] + 1

    f, x = s.root(f), torch.randn(3)
    s.warm(f, [x], [x + 1])
    both = [x]
    s.miss(f, both, both)


@program(PROGRAMS, "one object under two names, written through one")
def _(s: Session) -> None:
    class Box:
        def __init__(self, value):
            self.value = value

    def f(a, b, x):
        a.value = 5.0
        return x * b.value

    f, x = s.root(f), torch.randn(3)
    s.warm(f, Box(1.0), Box(2.0), x)
    both = Box(2.0)
    s.miss(f, both, both, x)


@program(PROGRAMS, "thread-local state", expect=EAGER, reason="C code")
def _(s: Session) -> None:
    local = threading.local()
    local.scale = 2.0

    def f(x):
        return x * local.scale

    f, x = s.root(f), torch.randn(3)
    for scale in (2.0, 2.0, 2.0, 7.0):
        local.scale = scale
        s.call(f, x)


@program(PROGRAMS, "one code object in two namespaces")
def _(s: Session) -> None:
    code = compile("def f(x):\n    return x * scale\n", "<two namespaces>", "exec")
    first, second = {"scale": 2.0}, {"scale": 3.0}
    exec(code, first)
    exec(code, second)
    x = torch.randn(3)
    f = s.root(first["f"])
    s.warm(f, x)
    s.call(s.root(second["f"]), x)


@program(PROGRAMS, "an inlined function's code in two namespaces")
def _(s: Session) -> None:
    code = compile("g = lambda x: x * scale\n", "<two lambdas>", "exec")
    first, second = {"scale": 2.0}, {"scale": 3.0}
    exec(code, first)
    exec(code, second)

    def f(x, g):
        return g(x) + 1

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x, first["g"])
    s.miss(f, x, second["g"])


@program(PROGRAMS, "numbers beside 16-bit tensors")
def _(s: Session) -> None:
    def f(x):
        return x % 0.7, torch.fmod(x, 0.7), x.abs() ** 0.7, x + 0.7, 0.7 - x, x * 0.7, x > 0.7

    f = s.root(f)
    for dtype in (torch.bfloat16, torch.float16):
        s.warm(f, torch.linspace(-3, 3, 97).to(dtype))


class Kind(enum.Enum):
    HALF = 0.5
    TWO = 2


Pair = collections.namedtuple("Pair", "first second")


@program(PROGRAMS, "enum values and named tuples")
def _(s: Session) -> None:
    def f(pair, kind):
        return pair.first * kind.value + pair.second, kind.name

    f, x = s.root(f), torch.randn(3)
    s.warm(f, Pair(x, x + 1), Kind.HALF)
    s.miss(f, Pair(x, x + 1), Kind.TWO)


@program(PROGRAMS, "a variant that loses", expect=ANY)
def _(s: Session) -> None:
    """Whatever the trials decide, results stay the same."""

    def f(x):
        return torch.sin(x) + x

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    for _ in range(40):
        s.call(f, x)
