"""Programs that accel once answered wrongly. Each stays here for good."""

from __future__ import annotations

import abc
import array
import collections
import decimal
import enum
import functools
import operator
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.nn.functional as F
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


class AttributeDict(dict):
    __getattr__ = dict.__getitem__


class Holder:
    def __init__(self, k):
        self.k = k


def state() -> Holder:
    s = Holder(0)
    s.cfg = AttributeDict(k=2.0)
    s.lists = [[1], [1, 2]]
    s.holders = [Holder(1.0), Holder(3.0)]
    s.deque = collections.deque([1, 2], maxlen=4)
    s.ordered = collections.OrderedDict(a=1, b=2)
    s.function = lambda a=2.0: a
    s.partial = functools.partial(max, key=4)
    s.error = KeyError(5.0)
    s.bytes = bytearray(b"abc")
    s.array = array.array("i", [1, 2])
    s.default = collections.defaultdict(int)
    s.decimal = decimal.Decimal("1.5")
    return s


# What is read by C code from an object that came from outside, and what changes it.
READS_BY_C: list[tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    ("dict as attributes", lambda s: s.cfg.k, lambda s: s.cfg.update(k=5.0)),
    ("map with len", lambda s: [*map(len, s.lists)][1], lambda s: s.lists[1].append(5)),
    (
        "map with attrgetter",
        lambda s: sum(map(operator.attrgetter("k"), s.holders)),
        lambda s: vars(s.holders[1]).update(k=0.5),
    ),
    ("sorted by len", lambda s: sorted(s.lists, key=len)[0][0], lambda s: s.lists[0].extend([9] * 3)),
    ("member of a deque", lambda s: int(7 in s.deque), lambda s: s.deque.append(7)),
    ("count of a deque", lambda s: s.deque.count(7), lambda s: s.deque.append(7)),
    ("bound of a deque", lambda s: s.deque.maxlen, lambda s: vars(s).update(deque=collections.deque((), 7))),
    ("order of keys", lambda s: int(list(s.ordered)[-1] == "a"), lambda s: s.ordered.move_to_end("a")),
    ("first key", lambda s: int(next(iter(s.ordered)) == "a"), lambda s: s.ordered.move_to_end("a")),
    ("defaults", lambda s: s.function.__defaults__[0], lambda s: setattr(s.function, "__defaults__", (7.0,))),
    ("partial", lambda s: s.partial.keywords["key"], lambda s: s.partial.keywords.update(key=9)),
    ("exception", lambda s: s.error.args[0], lambda s: setattr(s.error, "args", (9.0,))),
    ("text of an exception", lambda s: len(str(s.error)), lambda s: setattr(s.error, "args", ("longer",))),
    ("bytearray", lambda s: s.bytes[0] + sum(s.bytes), lambda s: s.bytes.__setitem__(0, 9)),
    ("array", lambda s: s.array[0] + sum(s.array), lambda s: s.array.__setitem__(0, 9)),
    ("default factory", lambda s: int(s.default.default_factory is int), lambda s: setattr(s.default, "default_factory", list)),
    ("decimal", lambda s: float(s.decimal), lambda s: vars(s).update(decimal=decimal.Decimal("2.5"))),
]  # fmt: skip


def _read_by_c(
    read: Callable[[Any], Any], change: Callable[[Any], Any]
) -> Callable[[Session], None]:
    def body(s: Session) -> None:
        def f(x, held):
            return x * read(held)

        f, x, held = s.root(f), torch.randn(3), state()
        for _ in range(3):
            s.call(f, x, held)
        change(held)
        for _ in range(2):
            s.call(f, x, held)

    return body


for _name, _read, _change in READS_BY_C:
    program(PROGRAMS, f"read by C code: {_name}", expect=ANY)(_read_by_c(_read, _change))


@program(PROGRAMS, "functions that share a cell, and such that do not")
def _(s: Session) -> None:
    def make(scale):
        def g(x):
            return x * scale

        def h(x):
            return x + scale

        return g, h

    def f(g, h, x):
        return g(x) + h(x)

    f = s.root(f)
    x = torch.ones(3)
    (g1, h1), (g2, h2) = make(1.0), make(5.0)
    s.warm(f, g1, h1, x)
    s.call(f, g1, h2, x)
    s.call(f, g2, h1, x)
    s.call(f, g2, h2, x)
    s.hit(f, g1, h1, x)


@program(PROGRAMS, "where a tensor begins in its storage", expect=ANY)
def _(s: Session) -> None:
    base = torch.arange(12.0)
    for function in (
        lambda x: x * x.storage_offset(),
        lambda x: x.as_strided((2,), (1,), 3) + 1,
        lambda x: torch.as_strided(x, (2,), (1,), 3) + 1,
    ):
        f = s.root(function)
        for start in (0, 0, 0, 2, 3, 0, 5):
            s.call(f, base[start : start + 6])


@program(PROGRAMS, "a view of wider elements that begins at an odd place", expect=ANY)
def _(s: Session) -> None:
    base = torch.arange(12.0)
    f = s.root(lambda x: x.view(torch.float64) + 1)
    for start in (0, 0, 0, 1, 2):
        s.call(f, base[start : start + 6])


@program(PROGRAMS, "hasattr() of a tensor that gets the attribute later")
def _(s: Session) -> None:
    weight = torch.ones(3)
    f = s.root(lambda x: x * 2 if hasattr(weight, "scale") else x * weight)
    s.warm(f, torch.randn(3))
    weight.scale = 1
    s.miss(f, torch.randn(3))
    s.warm(f, torch.randn(3))


@program(PROGRAMS, "a store that kills an object with a finaliser", expect=ANY)
def _(s: Session) -> None:
    class Dying:
        scale = 2.0

        def __init__(self, log: list[str]) -> None:
            self.log = log

        def __del__(self) -> None:
            self.log.append("dead")

    class Holder:
        pass

    def by_attribute(holder: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * holder.it.scale
        holder.it = None
        holder.log.append("after")
        return y.relu()

    def by_item(holder: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * holder.items["it"].scale
        holder.items["it"] = None
        holder.log.append("after")
        return y.relu()

    for function in (by_attribute, by_item):
        f = s.root(function)
        for _ in range(5):
            holder = Holder()
            holder.log = s.watch([])
            holder.it, holder.items = Dying(holder.log), {"it": Dying(holder.log)}
            s.call(f, holder, torch.ones(3))


@program(PROGRAMS, "isinstance() of an abstract class that a class is registered with later")
def _(s: Session) -> None:
    class Abstract(abc.ABC):  # noqa: B024
        pass

    class Late:
        pass

    f = s.root(lambda x, o: x * 2 if isinstance(o, Abstract) else x * 3)
    g = s.root(lambda x, o: x * 2 if issubclass(type(o), (int, Abstract)) else x * 3)
    x, late = torch.randn(3), Late()
    s.warm(f, x, late)
    s.warm(g, x, late)
    Abstract.register(Late)
    s.miss(f, x, late)
    s.miss(g, x, late)
    s.warm(f, x, late)


@program(PROGRAMS, "isinstance() that a metaclass answers from what changes", expect=ANY)
def _(s: Session) -> None:
    answers = [True]

    class Meta(type):
        def __instancecheck__(cls, value):
            return answers[0]

        __subclasscheck__ = __instancecheck__

    class Asked(metaclass=Meta):
        pass

    functions = (
        lambda x, o: x * 2 if isinstance(o, Asked) else x * 3,
        lambda x, o: x * 2 if isinstance(o, (str, Asked)) else x * 3,
        lambda x, o: x * 2 if isinstance(o, Asked | str) else x * 3,
        lambda x, o: x * 2 if issubclass(int, Asked) else x * 3,
    )
    x = torch.randn(3)
    for function in functions:
        f = s.root(function)
        for answer in (True, True, True, False, False, 0, [], "yes", True):
            answers[0] = answer
            s.call(f, x, 5)
            s.call(f, x, Asked())


@program(PROGRAMS, "isinstance() that a metaclass answers, replaced", expect=ANY)
def _(s: Session) -> None:
    class Meta(type):
        def __instancecheck__(cls, value):
            return value > 3

    class Asked(metaclass=Meta):
        pass

    f, x = s.root(lambda x, o: x * 2 if isinstance(o, Asked) else x * 3), torch.randn(3)
    for value in (5, 5, 5, 2, 2, 5):
        s.call(f, x, value)
    s.patch(Meta, "__instancecheck__", lambda cls, value: value < 3)
    for value in (5, 5, 5, 2, 2, 5):
        s.call(f, x, value)


@program(PROGRAMS, "isinstance() of a protocol, which looks at the instance", expect=ANY)
def _(s: Session) -> None:
    @typing.runtime_checkable
    class Sized(typing.Protocol):
        size: int

    class Thing:
        pass

    f, x, thing = s.root(lambda x, o: x * 2 if isinstance(o, Sized) else -x), torch.ones(2), Thing()
    for _ in range(4):
        s.call(f, x, thing)
    thing.size = 3
    for _ in range(4):
        s.call(f, x, thing)


@program(PROGRAMS, "a module imported in a function, replaced in sys.modules")
def _(s: Session) -> None:
    def f(x):
        import accel_test_scales  # noqa: PLC0415

        return x * accel_test_scales.scale

    def g(x):
        from accel_test_scales import inner, scale  # noqa: PLC0415

        return x * scale + inner.scale

    def scales(scale):
        module = types.ModuleType("accel_test_scales")
        module.scale, module.inner = scale, types.ModuleType("accel_test_scales.inner")
        module.inner.scale = scale + 1
        s.patch(sys.modules, "accel_test_scales.inner", module.inner)
        return module

    f, g, x = s.root(f), s.root(g), torch.randn(3)
    s.patch(sys.modules, "accel_test_scales", scales(2.0))
    s.warm(f, x)
    s.warm(g, x)
    s.patch(sys.modules, "accel_test_scales", scales(5.0))
    s.miss(f, x)
    s.miss(g, x)


@program(PROGRAMS, "operations that raise for some values, caught", expect=ANY)
def _(s: Session) -> None:
    def root_of(x):
        x = x + 0
        try:
            return torch.linalg.cholesky(x) + 1
        except RuntimeError:
            return x * 0 - 7

    def picked(x, i):
        try:
            return (x * 2)[i] + 1
        except IndexError as error:
            return str(error), x * 3

    root_of, picked = s.root(root_of), s.root(picked)
    good, bad = torch.eye(2), -torch.eye(2)
    for x in (bad, bad, bad, good, bad, good):
        s.call(root_of, x)
    for i in (5, 5, 5, 1, 6, 0):
        s.call(picked, good, torch.tensor([i]))


@program(PROGRAMS, "operations that raise for some sizes and positions, caught", expect=ANY)
def _(s: Session) -> None:
    def seven(x):
        try:
            y = (x * 2).view(7)
        except RuntimeError as error:
            return str(error), x + 1
        return y * 100

    def at(x, position):
        try:
            return (x * 2)[position]
        except IndexError as error:
            return str(error), x + 1

    seven, at = s.root(seven), s.root(at)
    for n in (5, 6, 8, 9, 10, 7, 7, 11):
        s.call(seven, torch.randn(n))
    for position in (4, 5, 6, 7, 1, 2, 0, 9):
        s.call(at, torch.randn(3), position)


@program(
    PROGRAMS, "an operation that raises in an inlined function, caught further out", expect=ANY
)
def _(s: Session) -> None:
    def inner(x):
        return torch.linalg.cholesky(x * 1)

    def f(x):
        for jitter in (0.0, 10.0):
            try:
                found = inner(x + jitter * torch.eye(2))
            except RuntimeError:
                print("again")
            else:
                return found + jitter
        return x

    f = s.root(f)
    for scale in (-1, -1, -1, 1, 1, -20, -1, 1):
        s.call(f, torch.eye(2) * scale)


@program(PROGRAMS, "an operation raises once, uncaught", expect=ANY)
def _(s: Session) -> None:
    f = s.root(lambda x, y: (x @ y) * 2)
    for rows in (4, 3, 3, 4, 3, 5, 3):
        s.call(f, torch.randn(2, 3), torch.randn(rows, 2))


@program(PROGRAMS, "a position is also the value that is stored there")
def _(s: Session) -> None:
    def f(x, n):
        y = x.clone()
        y[n] = n
        y[0, n - 1] = n + 1
        return y * 2

    f = s.root(f)
    for n in (2, 3, 4):
        s.call(f, torch.randn(9, 9), n)
    for n in (5, 6, 7, 5):
        s.hit(f, torch.randn(9, 9), n)


@program(PROGRAMS, "operations that check their operands' values")
def _(s: Session) -> None:
    def is_positive(x):
        try:
            torch.linalg.cholesky(x)  # nobody reads its result
        except RuntimeError:
            return x - 1
        return x + 1

    def required(x):
        torch._assert_async((x > 0).any())
        return x + 1

    rows = {
        "cholesky": lambda x: torch.linalg.cholesky(x) + 1,
        "inv": lambda x: torch.linalg.inv(x + 0),
        "solve": lambda x: torch.linalg.solve(x, x) * 2,
        "one_hot": lambda x: torch.nn.functional.one_hot(x.long(), num_classes=3) * 2,
        "is_positive": is_positive,
        "required": required,
    }
    good = torch.eye(2)
    for f in rows.values():
        f = s.root(f)
        s.warm(f, good)
        for bad in (good * 0, -good, good * 7):
            s.call(f, bad)


def _unread_checks() -> list[Callable[[torch.Tensor, torch.Tensor], Any]]:
    F = torch.nn.functional
    return [
        lambda y, i: y[i],
        lambda y, i: y.index_select(0, i),
        lambda y, i: y.gather(0, i),
        lambda y, i: F.embedding(i, y.reshape(2, 2)),
        lambda y, i: (i + 1) // i,
        lambda y, i: F.cross_entropy(y.reshape(1, 4), i),
        lambda y, i: F.binary_cross_entropy(i.to(y.dtype), y[:1] * 0),
    ]


@program(PROGRAMS, "operations whose result nobody reads, and whose error somebody does")
def _(s: Session) -> None:
    def unread(operation):
        def f(y, i):
            operation(y, i)
            return y * i

        return f

    for operation in _unread_checks():
        f = s.root(unread(operation))
        for grad in (False, True):
            y = torch.rand(4).requires_grad_(grad)
            s.warm(f, y, torch.tensor([1]))
            for wrong in (9, 0, -9):
                s.call(f, y, torch.tensor([wrong]))


@program(PROGRAMS, "whether two tuples of tensors are one object")
def _(s: Session) -> None:
    f = s.root(lambda x, a, b: x + a[1] if a is b else x * 2 + a[0] + b[1])
    x, pair, other = torch.ones(3), (torch.ones(3), torch.rand(3)), (torch.ones(3), torch.rand(3))
    s.warm(f, x, pair, other)
    s.miss(f, x, pair, pair)
    s.call(f, x, pair, pair)
    s.hit(f, x, other, other)
    s.hit(f, x, other, pair)


@program(PROGRAMS, "operations that check their operands' values, in training")
def _(s: Session) -> None:
    w = torch.eye(2, requires_grad=True)
    f = s.root(lambda x: (torch.linalg.cholesky(x * w) + 1).sum())
    s.warm(f, torch.eye(2))
    for scale in (0.0, -1.0, 4.0):
        s.call(f, torch.eye(2) * scale)


@program(
    PROGRAMS, "an infinite numpy number, warnings are errors", expect=EAGER, reason="float64 gave"
)
def _(s: Session) -> None:
    f = s.root(lambda x, n: x * numpy.float64(n) + n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            s.call(f, torch.ones(2), float("inf"))


@program(PROGRAMS, "functions of one code are told apart where that counts")
def _(s: Session) -> None:
    def make(k):
        return lambda v: v * k

    def plain():
        def g(v):
            return v * 2

        return g

    for maker in (lambda: make(2), plain):
        first, second = maker(), maker()

        def f(x, fn, first=first):
            table = {first: 1.0}
            y = fn(x) + 1 if fn is first else fn(x) - 1
            return y, table.get(fn, 5.0), fn == first, fn in (first,), fn in {first}, {fn: x}

        f = s.root(f)
        x = torch.ones(2)
        s.warm(f, x, first)
        for fn in (second, first, maker(), second):
            s.call(f, x, fn)
            s.call(f, x, fn)
        s.hit(f, x * 2, first)


@program(PROGRAMS, "functions made anew at each call share what was compiled")
def _(s: Session) -> None:
    def f(x, fn):
        return fn(x) + 1

    def make(k, scale):
        def g(v, shift=scale, *rest):
            return v * k + shift

        return g

    f = s.root(f)
    s.warm(f, torch.ones(2), make(2, 1.5))
    s.hit(f, torch.ones(2), make(2, 1.5))
    s.miss(f, torch.ones(2), make(3, 1.5))
    s.miss(f, torch.ones(2), make(2, 2.5))
    s.call(f, torch.ones(2), make(2, torch.ones(2)))
    s.call(f, torch.ones(2), make(2, torch.ones(2) * 3))


@program(PROGRAMS, "warnings that torch's Python functions give")
def _(s: Session) -> None:
    given = s.watch([])

    def loss(a, b):
        return F.mse_loss(a, b) * 2

    def shares(x):
        y = torch.relu(x) + 1
        return F.softmax(y) * 2

    f, g = s.root(loss), s.root(shares)
    for n in range(3, 11):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            s.call(f, torch.ones(n, 1), torch.ones(n))
            s.call(g, torch.ones(3, n))
        given.append([(str(w.message)[:60], w.category.__name__) for w in caught])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            try:
                s.call(f, torch.ones(3, 1), torch.ones(3))
            except UserWarning as error:
                given.append(str(error)[:40])
