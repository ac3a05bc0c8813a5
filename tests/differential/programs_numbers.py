"""Programs whose ints and floats change: after the first change, one variant must serve numbers
never seen.

`hit` with a number that no earlier call had shows that; `miss` shows that what was compiled for
lifted numbers knows where it is wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from harness import ANY, EAGER, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []
X = torch.linspace(-1, 1, 15).reshape(3, 5)


def lifted(s: Session, f: Any, *calls: tuple[Any, ...], grad: bool = False) -> None:
    """The first calls differ in the numbers that are lifted from then on; the others, with
    numbers of their own, must be served."""
    with torch.set_grad_enabled(grad):
        s.call(f, *calls[0])
        s.call(f, *calls[1])
        s.call(f, *calls[1])
        for call in calls[2:]:
            s.hit(f, *call)


def with_numbers(*numbers: Any) -> list[tuple[torch.Tensor, Any]]:
    return [(torch.randn(3, 5), n) for n in numbers]


@program(PROGRAMS, "a float argument multiplies")
def _(s: Session) -> None:
    f = s.root(lambda x, lr: x - lr * x)
    lifted(s, f, *with_numbers(0.5, 0.25, 0.1, 1e-9, -3.7, float("inf")))
    with torch.no_grad():
        s.miss(f, torch.randn(3, 5), 1e300)


@program(PROGRAMS, "numbers that ATen refuses")
def _(s: Session) -> None:
    f = s.root(lambda x, t: torch.add(x, x, alpha=t) + x**t)
    lifted(s, f, *with_numbers(0.5, 0.25, 2.0))
    with torch.no_grad():
        s.miss(f, torch.randn(3, 5), 1e300)
        s.hit(f, torch.randn(3, 5), 0.75)


@program(PROGRAMS, "a number compared with None and with other objects")
def _(s: Session) -> None:
    def f(x: torch.Tensor, t: Any, n: Any) -> Any:
        if t is not None and n is not True and t is not n:
            x = x * t
        return x + n, t is None, isinstance(t, float), type(n) is int

    g = s.root(f)
    lifted(s, g, *((torch.randn(3), 0.5 + k, k + 2) for k in range(6)))
    with torch.no_grad():
        s.miss(g, torch.randn(3), None, 3)


@program(
    PROGRAMS,
    "a number written on one way and read on another",
    expect=EAGER,
    reason="something was written unseen",
)
def _(s: Session) -> None:
    class Holder:
        def __init__(self) -> None:
            self.n = 1
            self.m = 1

    holder = s.watch(Holder())

    def f(x: torch.Tensor, k: int) -> Any:
        vars(holder)["n"] = k * 2
        holder.m += 1
        return x * holder.n + vars(holder)["m"], holder.n

    g = s.root(f)
    with torch.no_grad():
        for k in range(8):
            s.call(g, torch.randn(3), k + 3)
            s.call(g, torch.randn(3), k + 3)


@program(PROGRAMS, "a slot written and read by setattr and getattr")
def _(s: Session) -> None:
    class Slotted:
        __slots__ = ("n",)

    holder = Slotted()
    holder.n = 0

    def f(x: torch.Tensor) -> Any:
        setattr(holder, "n", holder.n + 1)  # noqa: B010
        y = x * getattr(holder, "n")  # noqa: B009
        holder.n += 2
        return y + holder.n, holder.n

    g = s.root(f)
    with torch.no_grad():
        for _ in range(8):
            s.call(g, torch.randn(3))


@program(PROGRAMS, "an int argument in arithmetic and division")
def _(s: Session) -> None:
    f = s.root(lambda x, n: (x * n + n) / (n + 1) - (n - x) + n / (x * x + 1))
    lifted(s, f, *with_numbers(1, 2, 3, 40, 5000, 0, -7, 1 << 40))


@program(PROGRAMS, "an int becomes a bool or a float: another variant")
def _(s: Session) -> None:
    f = s.root(lambda x, n: x * n)
    lifted(s, f, *with_numbers(1, 2, 3, 4))
    with torch.no_grad():
        s.miss(f, torch.randn(3, 5), True)
        s.miss(f, torch.randn(3, 5), 2.0)
    s.call(f, torch.randn(3, 5), 5)


@program(PROGRAMS, "a step counter of a module is written back")
def _(s: Session) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(5, 5)
            self.step = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.step += 1
            return self.linear(x) * (1 - 0.9**self.step)

    model = s.watch(Scaled())
    f = s.root(model)
    with torch.no_grad():
        for _ in range(3):
            s.call(f, torch.randn(3, 5))
        for _ in range(9):
            s.hit(f, torch.randn(3, 5))


@program(PROGRAMS, "Adam by hand: bias corrections, alpha, value")
def _(s: Session) -> None:
    state = s.watch({"step": 0, "lr": 0.1, "m": torch.zeros(6), "v": torch.zeros(6)})
    p = s.watch(torch.randn(6))

    def step(grad: torch.Tensor) -> None:
        state["step"] += 1
        m, v = state["m"], state["v"]
        m.mul_(0.9).add_(grad, alpha=0.1)
        v.mul_(0.99).addcmul_(grad, grad, value=0.01)
        first = 1 - 0.9 ** state["step"]
        second = math.sqrt(1 - 0.99 ** state["step"])
        p.addcdiv_(m, v.sqrt().div_(second).add_(1e-8), value=-state["lr"] / first)

    f = s.root(step)
    with torch.no_grad():
        for _ in range(3):
            s.call(f, torch.randn(6))
        for k in range(6):
            state["lr"] = 0.1 * 0.9**k
            (s.call if k == 1 or k == 2 else s.hit)(f, torch.randn(6))


@program(PROGRAMS, "a schedule of the decay: lerp, add with alpha, sub with alpha")
def _(s: Session) -> None:
    ema = s.watch(torch.zeros(4))

    def update(x: torch.Tensor, decay: float) -> torch.Tensor:
        ema.mul_(decay).add_(x, alpha=1 - decay)
        return torch.sub(x, ema, alpha=decay) + torch.add(x, ema, alpha=-decay)

    f = s.root(update)
    lifted(s, f, *((torch.randn(4), d) for d in (0.9, 0.8, 0.7, 0.6, 0.999)))


@program(PROGRAMS, "a temperature from a config object")
def _(s: Session) -> None:
    @dataclasses.dataclass
    class Config:
        temperature: float = 1.0

    config = Config()

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x / config.temperature, -1)

    g = s.root(f)
    with torch.no_grad():
        for t in (1.0, 0.5, 0.5):
            config.temperature = t
            s.call(g, torch.randn(3, 5))
        for t in (0.7, 0.1, 3.0):
            config.temperature = t
            s.hit(g, torch.randn(3, 5))


RATE = 1.0


@program(PROGRAMS, "a global float")
def _(s: Session) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x * RATE + RATE

    g = s.root(f)
    with torch.no_grad():
        for k, rate in enumerate((1.0, 0.5, 0.5, 0.25, 0.125, 8.0)):
            s.patch(globals(), "RATE", rate)
            (s.call if k < 3 else s.hit)(g, torch.randn(3))


@program(PROGRAMS, "a float in a closure's cell")
def _(s: Session) -> None:
    rate = 1.0

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * rate

    g = s.root(f)
    with torch.no_grad():
        for k, value in enumerate((1.0, 0.5, 0.5, 0.25, 0.125, 8.0)):
            rate = value
            (s.call if k < 3 else s.hit)(g, torch.randn(3))


@program(PROGRAMS, "numbers in a dict, a list and a tuple")
def _(s: Session) -> None:
    def f(x: torch.Tensor, d: Any, items: Any, pair: Any) -> torch.Tensor:
        return x * d["a"] + items[1] - pair[0] * x

    g = s.root(f)
    calls = [(torch.randn(3), {"a": 0.5 + k}, [0, 1.5 * k + 1], (2.5 - k, [1])) for k in range(7)]
    lifted(s, g, *calls)


@program(PROGRAMS, "keyword and starred arguments")
def _(s: Session) -> None:
    def f(x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        return x * rest[0] + rest[1] * named["b"] + named["c"]

    g = s.root(f)
    with torch.no_grad():
        for k in range(7):
            (s.call if k < 3 else s.hit)(g, torch.randn(3), k + 0.5, k + 2, b=1.5 - k, c=k + 3)


@program(PROGRAMS, "arguments of a module")
def _(s: Session) -> None:
    class Weighted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, weight: float, bias: float = 0.0) -> torch.Tensor:
            return self.linear(x) * weight + bias

    f = s.root(Weighted())
    with torch.no_grad():
        for k in range(7):
            (s.call if k < 3 else s.hit)(f, torch.randn(2, 4), k + 0.5, bias=0.5 - k)


@program(PROGRAMS, "a branch on a number is a relation, not a value")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        if n > 10:
            return x - n
        return x * n

    g = s.root(f)
    lifted(s, g, *with_numbers(1, 2, 3, 9, 10, 0, -4))
    with torch.no_grad():
        s.miss(g, torch.randn(3, 5), 11)
        s.miss(g, torch.randn(3, 5), 12)
        s.hit(g, torch.randn(3, 5), 13)
        s.hit(g, torch.randn(3, 5), 4)


@program(PROGRAMS, "truth, not, chained comparisons, min and max of numbers")
def _(s: Session) -> None:
    def f(x: torch.Tensor, a: float, b: int) -> torch.Tensor:
        if a and not b < 0 and 0 < a < 100:
            x = x + min(a, 5.0) * max(b, 3)
        return x * abs(a) - round(a, 1) + int(a) + float(b)

    g = s.root(f)
    lifted(s, g, *((torch.randn(3), a, b) for a, b in [
        (1.25, 3), (2.5, 4), (3.75, 5), (99.0, 6), (7.5, 1000),
    ]))  # fmt: skip
    with torch.no_grad():
        s.miss(g, torch.randn(3), 0.0, 3)
        s.miss(g, torch.randn(3), 101.0, 3)
        s.call(g, torch.randn(3), -0.0, 3)


@program(PROGRAMS, "functions of math")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int, t: float) -> torch.Tensor:
        scale = math.sqrt(n) + math.log(t + 1) + math.cos(math.pi * n / 100) + math.floor(t)
        return x * scale + math.exp(-t) * math.pow(t, n) + n // 3 + n % 3 + divmod(n, 2)[0]

    g = s.root(f)
    lifted(s, g, *((torch.randn(3), n, 0.5 + n / 7) for n in (4, 5, 6, 7, 10)))


@program(PROGRAMS, "a step that raises: the body raises as it would")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        return x * (10 / n) + math.sqrt(n)

    g = s.root(f)
    lifted(s, g, *with_numbers(1, 2, 3, 4))
    with torch.no_grad():
        s.miss(g, torch.randn(3, 5), 0)
        s.miss(g, torch.randn(3, 5), -1)
        s.hit(g, torch.randn(3, 5), 9)


@program(PROGRAMS, "a power that becomes complex, an int that does not fit")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        return x * abs((n - 5) ** 0.5) + n

    g = s.root(f)
    lifted(s, g, *with_numbers(6, 7, 8, 1 << 52))
    with torch.no_grad():
        s.miss(g, torch.randn(3, 5), 1)
        s.miss(g, torch.randn(3, 5), (1 << 53) + 1)
        s.call(g, torch.randn(3, 5), 1 << 70)


@program(PROGRAMS, "used as a size or an index: by value")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int) -> torch.Tensor:
        y = x[:, :n] * n
        for _ in range(n):
            y = y + 1
        return y.reshape(n, -1)

    g = s.root(f)
    with torch.no_grad():
        for n in (1, 2, 3, 1, 2, 3):
            s.warm(g, torch.randn(3, 5), n)


@program(PROGRAMS, "in an f-string, as a key, in print: by value")
def _(s: Session) -> None:
    table = {1: 0.5, 2: 0.25, 3: 0.125}

    def f(x: torch.Tensor, n: int) -> Any:
        print(n)
        return {f"scaled by {n}": x * n * table[n]}

    g = s.root(f)
    with torch.no_grad():
        for n in (1, 2, 3, 1, 2, 3):
            s.warm(g, torch.randn(3), n)


@program(PROGRAMS, "numbers returned, in containers, with their types")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int, t: float) -> Any:
        return x + n, n, [t, n * 2], {"t": t / 2, "n": n}, (n, n)

    g = s.root(f)
    lifted(s, g, *((torch.randn(3), n, n / 7) for n in (1, 2, 3, 4, 1000)))


@program(PROGRAMS, "a number that only the result has")
def _(s: Session) -> None:
    counter = s.watch({"calls": 0})

    def f(x: torch.Tensor) -> Any:
        counter["calls"] += 1
        return x * 2

    g = s.root(f)
    with torch.no_grad():
        for k in range(8):
            (s.call if k < 3 else s.hit)(g, torch.randn(3))


@program(PROGRAMS, "a counter is printed after it was counted up", expect=ANY)
def _(s: Session) -> None:
    counter = s.watch({"calls": 0})

    def f(x: torch.Tensor) -> Any:
        counter["calls"] += 1
        y = x * 2
        print(f"call {counter['calls']}")
        return y + counter["calls"]

    g = s.root(f)
    with torch.no_grad():
        for _ in range(16):
            s.call(g, torch.randn(3))


@program(PROGRAMS, "a list of numbers is appended to")
def _(s: Session) -> None:
    seen = s.watch([])

    def f(x: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(t * 2)
        return x * t

    g = s.root(f)
    lifted(s, g, *with_numbers(0.5, 1.5, 2.5, 3.5))


@program(PROGRAMS, "reduced precision: by value; and double", expect=ANY)
def _(s: Session) -> None:
    def f(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, t: float) -> Any:
        return a * t + t, b * t - t, c / t, (a > t, b < t, c >= t)

    g = s.root(f)
    with torch.no_grad():
        for t in (0.5, 0.3, 0.3, 0.7, 1 / 3, 1e-3):
            x = torch.randn(7)
            s.call(g, x.bfloat16(), x.half(), x.double(), t)
            s.call(g, x.bfloat16(), x.half(), x.double(), t)


@program(PROGRAMS, "tensors without dimensions keep their dtype")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: torch.Tensor, t: float, k: int) -> Any:
        return x * t, x + k, n * k, n + k, x > t, x**k, k - n

    g = s.root(f)
    lifted(s, g, *((torch.tensor(1.5 + k), torch.tensor(k), 0.1 * k, k) for k in (1, 2, 3, 4, 5)))


@program(PROGRAMS, "integer tensors with floats: by value, with eager's dtype")
def _(s: Session) -> None:
    f = s.root(lambda x, t: (x * t, x + t, x / 3, (x > 1) * t))
    with torch.no_grad():
        for t in (0.5, 1.5, 2.5):
            s.warm(f, torch.arange(4), t)


@program(PROGRAMS, "int32 and bool tensors with ints", expect=ANY)
def _(s: Session) -> None:
    f = s.root(lambda x, m, n: (x * n, x + n, m * n, x == n))
    with torch.no_grad():
        for n in (1, 2, 2, 3, 4, 1 << 33):
            s.call(f, torch.arange(4, dtype=torch.int32), torch.tensor([True, False]), n)


@program(PROGRAMS, "powers of tensors and of numbers")
def _(s: Session) -> None:
    f = s.root(lambda x, t, n: (x.abs() ** t, t**x, x**n, x.abs().pow(t)))
    lifted(s, f, *((torch.randn(6), t, n) for t, n in [
        (0.5, 2), (1.5, 3), (2.0, 4), (3.25, 1), (0.5, 0), (1.0, 5),
    ]))  # fmt: skip


@program(PROGRAMS, "in-place operators and methods")
def _(s: Session) -> None:
    def f(x: torch.Tensor, t: float) -> torch.Tensor:
        y = x.clone()
        y *= t
        y += t
        y.sub_(t).div_(t + 1).mul_(t)
        y -= t
        return torch.mul(y, t) + torch.add(y, t)

    g = s.root(f)
    lifted(s, g, *with_numbers(0.5, 0.25, 3.0, 7.5))


@program(PROGRAMS, "NaN is never lifted", expect=ANY)
def _(s: Session) -> None:
    def f(x: torch.Tensor, t: float) -> Any:
        return x * t, t in (t,), t == 0.5

    g = s.root(f)
    with torch.no_grad():
        for t in (0.5, float("nan"), float("nan"), 1.5, float("nan"), 2.5, 0.5):
            s.call(g, torch.randn(3), t)


@program(PROGRAMS, "signed zero where its sign counts")
def _(s: Session) -> None:
    def f(x: torch.Tensor, t: float) -> Any:
        return x * t, math.copysign(1.0, t), repr(t)

    g = s.root(f)
    with torch.no_grad():
        for t in (1.0, 0.0, -0.0, 0.0, -0.0, 2.0):
            s.warm(g, torch.randn(3), t)


@program(PROGRAMS, "is, in and equality of numbers")
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int, m: int) -> Any:
        return x * n, n == m, n in (1, 2, 3), n is m, n != 5

    g = s.root(f)
    with torch.no_grad():
        for n, m in [(1, 1), (2, 2), (2, 3), (7, 7), (3, 4), (1000, 1000), (5, 5)]:
            s.call(g, torch.randn(3), n, m)
            s.call(g, torch.randn(3), n, m)


@program(PROGRAMS, "one number under two names")
def _(s: Session) -> None:
    class Holder:
        def __init__(self) -> None:
            self.a = 1.5
            self.b = 1.5

    holder = s.watch(Holder())

    def f(x: torch.Tensor) -> Any:
        holder.a = holder.b * 2
        holder.b += 1
        return x * holder.a + holder.b, holder.a == holder.b

    g = s.root(f)
    with torch.no_grad():
        for k in range(8):
            (s.call if k < 4 else s.hit)(g, torch.randn(3))


@program(PROGRAMS, "properties, slots, class attributes, named tuples")
def _(s: Session) -> None:
    class Slotted:
        __slots__ = ("rate",)

    class Options:
        base = 2.0

        def __init__(self) -> None:
            self._rate = 1.0

        @property
        def rate(self) -> float:
            return self._rate * self.base

    point = collections.namedtuple("point", "x y")
    slotted, options = Slotted(), Options()

    def f(x: torch.Tensor, p: Any) -> torch.Tensor:
        return x * slotted.rate + options.rate - p.y

    g = s.root(f)
    with torch.no_grad():
        for k in range(7):
            slotted.rate, options._rate = 0.5 + k, 1.5 * k + 1
            (s.call if k < 3 else s.hit)(g, torch.randn(3), point(1, k + 0.25))


@program(PROGRAMS, "training with a changing weight of the loss")
def _(s: Session) -> None:
    model = s.watch(torch.nn.Linear(4, 2))

    def loss(x: torch.Tensor, weight: float, step: int) -> torch.Tensor:
        y = model(x)
        return (y**2).mean() * weight + y.abs().sum() * (weight / (step + 1))

    f = s.root(loss)
    for k in range(8):
        model.zero_grad()
        result = (s.call if k < 3 else s.hit)(f, torch.randn(3, 4), 0.5 + k, k)
        result.backward()


@program(PROGRAMS, "gradients through powers and divisions by numbers")
def _(s: Session) -> None:
    p = s.watch(torch.nn.Parameter(torch.rand(4) + 0.5))

    def f(t: float, n: int) -> torch.Tensor:
        return (p**t / n + n / p - t * torch.exp(p * t)).sum()

    g = s.root(f)
    for k in range(7):
        (s.call if k < 3 else s.hit)(g, 1.5 + k / 4, k + 1).backward()


@program(PROGRAMS, "changing sizes and numbers together")
def _(s: Session) -> None:
    def f(x: torch.Tensor, t: float) -> Any:
        return torch.softmax(x * t, -1) + x.shape[0], t + 1

    g = s.root(f)
    with torch.no_grad():
        for k in range(9):
            (s.call if k < 5 else s.hit)(g, torch.randn(k + 2, 5), 0.5 + k)


@program(PROGRAMS, "a number plus a size")
def _(s: Session) -> None:
    def f(x: torch.Tensor, past: int) -> Any:
        total = past + x.shape[0]
        return x * total, total

    g = s.root(f)
    with torch.no_grad():
        for k in range(6):
            s.call(g, torch.randn(3, 5), k)
        for k in range(3):
            s.hit(g, torch.randn(3, 5), 100 + k)
        for k in range(4):
            s.call(g, torch.randn(3 + k, 5), k)


@program(PROGRAMS, "a callback of C code gets numbers")
def _(s: Session) -> None:
    def f(x: torch.Tensor, a: float, b: float) -> Any:
        order = sorted([a, b], key=lambda v: -v)
        return x * order[0], list(map(lambda v: v * 2, (a, b))), max((a, b), key=abs)

    g = s.root(f)
    with torch.no_grad():
        for k in range(6):
            s.warm(g, torch.randn(3), 1.0 + k, 3.5 - k)


@program(PROGRAMS, "inlined functions with defaults and generators")
def _(s: Session) -> None:
    def scale(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        return x * by

    def rates(start: float) -> Any:
        for k in range(3):
            yield start / (k + 1)

    def f(x: torch.Tensor, t: float) -> torch.Tensor:
        return sum((scale(x, r) for r in rates(t)), scale(x))

    g = s.root(f)
    lifted(s, g, *with_numbers(0.5, 0.25, 3.0, 7.5))


@program(PROGRAMS, "masked fill and where with numbers", expect=ANY)
def _(s: Session) -> None:
    def f(x: torch.Tensor, t: float) -> Any:
        return x.masked_fill(x > 0, t), torch.where(x > t, x, t), x.clamp(-t, t), x.fill_(t)

    g = s.root(f)
    with torch.no_grad():
        for t in (0.5, 0.25, 0.25, 3.0, 7.5):
            s.call(g, torch.randn(4), t)


@program(PROGRAMS, "dropout's p and a functional's epsilon change")
def _(s: Session) -> None:
    def f(x: torch.Tensor, p: float, eps: float) -> torch.Tensor:
        return F.dropout(x, p, True) + F.layer_norm(x, (5,), eps=eps)

    g = s.root(f)
    with torch.no_grad():
        for p, eps in [(0.5, 1e-5), (0.25, 1e-5), (0.25, 1e-3)]:
            s.warm(g, torch.randn(3, 5), p, eps)


@program(PROGRAMS, "numbers of a list and of nested dicts, written in place")
def _(s: Session) -> None:
    state = s.watch({"inner": {"step": 0}, "rates": [0.5, 2]})

    def f(x: torch.Tensor) -> torch.Tensor:
        state["inner"]["step"] += 1
        return x * state["rates"][0] + state["inner"]["step"] * state["rates"][1]

    g = s.root(f)
    with torch.no_grad():
        for k in range(8):
            state["rates"][0] = 0.5 / (k + 1)
            (s.call if k < 3 else s.hit)(g, torch.randn(3))
        state["inner"]["step"] = 100
        state["rates"][0] = 7.5
        s.hit(g, torch.randn(3))
        state["rates"][0] = 7
        s.miss(g, torch.randn(3))


@program(PROGRAMS, "training epochs with a smaller last batch")
def _(s: Session) -> None:
    model = s.watch(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh()))
    f = s.root(lambda x: (model(x) ** 2).mean())
    for epoch in range(4):
        for size in (6, 6, 3):
            model.zero_grad()
            (s.call if epoch < 2 else s.hit)(f, torch.randn(size, 4)).backward()


@program(PROGRAMS, "a rate that gradients flow past, and a size that changes, in training")
def _(s: Session) -> None:
    model = s.watch(torch.nn.Linear(4, 2))
    f = s.root(lambda x, rate: model(x).sum() * rate + rate)
    for k in range(14):
        model.zero_grad()
        (s.call if k < 9 else s.hit)(f, torch.randn(3 + k % 2, 4), 0.25 * (k + 1)).backward()


@program(PROGRAMS, "counters of a split function", expect=ANY)
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.rate, self.seen = 0, 1.0, {"calls": 0}

        def forward(self, x):
            self.steps += 1
            y = torch.tanh(x) * self.steps
            zlib.crc32(b"exit")
            self.rate = self.rate * 0.5
            self.seen["calls"] += 1
            return torch.sin(y) * self.rate + self.seen["calls"], self.steps

    model = s.root(s.watch(Model()))
    for _ in range(8):
        s.call(model, X)
    s.split(model, X, segments=2, calls=0, tries=1)
    s.split(model, X, segments=2, calls=0, tries=1)


@program(PROGRAMS, "a counter that grows in a loop with an exit", expect=ANY)
def _(s: Session) -> None:
    class State:
        step = 0
        scale = 1.0

    state = s.watch(State())

    def f(batches):
        total = 0.0
        for x in batches:
            state.step += 1
            y = torch.tanh(x) * state.step
            if state.step % 3 == 0:
                state.scale *= 0.5
            total += (y * state.scale).sum().item()
        return total, state.step

    f = s.root(f)
    for _ in range(8):
        s.call(f, [X, X + 1, X, X * 2])
    s.split(f, [X, X + 1, X, X * 2], segments=4)


@program(PROGRAMS, "a number of an outer list, across an exit and into results", expect=ANY)
def _(s: Session) -> None:
    history = s.watch([1])

    def f(x):
        last = history[0]
        y = torch.tanh(x) + last
        zlib.crc32(b"exit")
        history[0] = last + 2
        return torch.cos(y) * 2, last, history[0]

    f = s.root(f)
    s.split(f, X, calls=45)


# ---------------------------------------------------------------- sizes and positions

CACHE = torch.linspace(-1, 1, 4 * 64 * 8).reshape(4, 64, 8)
SIZED: dict[str, Any] = {
    "an item": lambda x, n: torch.sin(CACHE[:, n]) + x,
    "items behind others": lambda x, n: torch.sin(CACHE[..., n, None, :2]) + x.sum(),
    "from the end": lambda x, n: torch.sin(CACHE[:, -n]) + x,
    "the first": lambda x, n: torch.sin(CACHE[:, :n]).sum(1) + x,
    "the last": lambda x, n: torch.sin(CACHE[:, -n:]).sum(1) + x,
    "every": lambda x, n: torch.sin(CACHE[:, ::n]).sum(1) + x,
    "narrow": lambda x, n: torch.sin(CACHE.narrow(1, n, 2)).sum(1) + x,
    "select": lambda x, n: torch.sin(CACHE.select(1, n)) + x,
    "arange": lambda x, n: torch.sin(torch.arange(n) * 0.5).sum() + x,
    "arange from": lambda x, n: torch.cos(torch.arange(n, n + 8) * 0.5) + x,
    "arange up to": lambda x, n: torch.cos(torch.arange(n, 16) * 0.5).sum() + x,
    "zeros beside": lambda x, n: torch.cat([torch.zeros(4, n), x], 1) * 2,
    "full": lambda x, n: torch.full((n, 8), 2.5) * x[0],
    "expand": lambda x, n: (x[None].expand(n, 4, 8) * 2).sum(0),
    "repeat": lambda x, n: torch.tanh(x.repeat(n, 1)),
    "tril": lambda x, n: torch.tril(CACHE[0, :8], n - 2) * 2,
    "roll": lambda x, n: torch.roll(CACHE, n, 1) * 2,
    "pad": lambda x, n: F.pad(x, (n, 1)) + 1,
    "a mask": lambda x, n: (torch.arange(64) < n)[None, :, None] * CACHE,
    "two numbers": lambda x, n: torch.sin(CACHE[:, n : 2 * n + 1]).sum(1) * n + x,
    "with a size": lambda x, n: torch.sin(CACHE[:, n : n + x.shape[1]]).sum(1) + x / n,
    "to a size": lambda x, n: torch.sin(CACHE[:, : CACHE.shape[1] - n]).sum(1) + x,
    "returned": lambda x, n: (torch.sin(CACHE[:, :n]).sum(1), n + 1, x.shape[0] * n),
}


def _sized(name: str, f: Any) -> None:
    @program(PROGRAMS, f"a position that changes: {name}")
    def _(s: Session) -> None:
        x = torch.linspace(-2, 2, 32).reshape(4, 8)
        lifted(s, s.root(f), *((x + k, n) for k, n in enumerate((3, 5, 7, 8, 13, 4))))


for _name, _f in SIZED.items():
    _sized(_name, _f)


@program(PROGRAMS, "a cache that is filled step by step")
def _(s: Session) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.register_buffer("k", torch.zeros(2, 32, 8))
            self.register_buffer("v", torch.zeros(2, 32, 8))
            self.position = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            self.k[:, self.position] = k
            self.v[:, self.position] = v
            self.position += 1
            keys, values = self.k[:, : self.position], self.v[:, : self.position]
            weights = torch.softmax((keys * q[:, None]).sum(-1) * 8**-0.5, -1)
            return (weights[..., None] * values).sum(1)

    torch.manual_seed(3)
    model = s.root(s.watch(Attention()))
    with torch.no_grad():
        for k in range(6):
            s.call(model, torch.randn(2, 8) + k)
        for k in range(6):
            s.hit(model, torch.randn(2, 8) - k)


@program(PROGRAMS, "a position beyond the end", expect=ANY)
def _(s: Session) -> None:
    f = s.root(lambda x, n: x[n] * 2 + n)
    g = s.root(lambda x, n: x[:n].sum(0) * 2)
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    with torch.no_grad():
        for n in (2, 3, 3, 4, 5, 6, 7, -1, -6, -7, 0, 1, 2):
            s.call(f, x, n)
            s.call(g, x, n)


@program(PROGRAMS, "a position and open sizes", expect=ANY)
def _(s: Session) -> None:
    def f(x: torch.Tensor, cache: torch.Tensor, n: int) -> Any:
        if n + x.shape[0] > cache.shape[0]:
            n = 0
        cache[n : n + x.shape[0]] = x
        return cache[: n + x.shape[0]].sum(0) * 2, n + x.shape[0]

    f = s.root(f)
    cache = s.watch(torch.zeros(12, 3))
    with torch.no_grad():
        n = 2
        for k in (2, 3, 2, 4, 3, 2, 2, 5, 3):
            n = s.call(f, torch.ones(k, 3), cache, n)[1]
        for k in (2, 4, 3):
            s.call(f, torch.ones(k, 3), cache, k)


@program(PROGRAMS, "positions where gradients are wanted", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(torch.linspace(-1, 1, 24).reshape(6, 4).requires_grad_())
    f = s.root(lambda n: (torch.tanh(w[:n]) * n).sum() + w[n].sum())
    for n in (2, 3, 3, 4, 5, 2, 3):
        s.call(f, n).backward()


@program(PROGRAMS, "a number that is a size here and a value there", expect=ANY)
def _(s: Session) -> None:
    def f(x: torch.Tensor, n: int) -> Any:
        y = torch.full((n,), n) + x[:n].sum()
        parts = [x * k for k in range(n)]
        return y, sum(parts), [n] * n, str(n), {n: x + n}

    f = s.root(f)
    with torch.no_grad():
        for n in (2, 3, 3, 4, 5, 2, 3):
            s.call(f, torch.ones(6), n)
