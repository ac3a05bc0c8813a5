"""Classes that change between calls: special methods that appear, descriptors, metaclasses, bases;
and objects of classes below the builtin ones, which hold more than their type says."""

from __future__ import annotations

import collections
import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from harness import Program, Session, program

PROGRAMS: list[Program] = []

# Makes the function, its arguments behind x, and what is done to the world after four calls.
Case = Callable[[], tuple[Callable[..., Any], tuple[Any, ...], Callable[[], Any]]]


def changes(s: Session, *cases: Case) -> None:
    x = torch.ones(2)
    for case in cases:
        function, arguments, change = case()
        f = s.root(function)
        s.warm(f, x, *arguments)
        s.hit(f, x, *arguments)
        change()
        for _ in range(3):
            s.call(f, x, *arguments)


def setting(owner: Any, name: str, value: Any) -> Callable[[], Any]:
    return lambda: setattr(owner, name, value)


@program(PROGRAMS, "objects of classes below int, float, str, bytes and complex")
def _(s: Session) -> None:
    class Steps(int):
        pass

    class Rate(float):
        pass

    class Name(str):
        pass

    class Raw(bytes):
        pass

    class Phase(complex):
        pass

    def loop(x, n):
        for _ in range(n):
            x = x + 1
        return x, n > 2, -n, divmod(n, 2), f"{n}", x[:n]

    x = torch.ones(3)
    for function, values in (
        (loop, [Steps(1), Steps(3), 3, True]),
        (lambda x, r: (x + r * 2, bool(r), max(r, 2.0)), [Rate(1.5), Rate(2.5), Rate(-0.0)]),
        (lambda x, n: x + 1 if n == "mean" else x - len(n), [Name("mean"), Name("sum"), "mean"]),
        (lambda x, b: x * b[0], [Raw(b"a"), Raw(b"b")]),
        (lambda x, c: x * (c * 2).real, [Phase(1 + 2j), Phase(3 + 2j)]),
    ):
        f = s.root(function)
        s.warm(f, x, values[0])
        for value in values[1:]:
            s.call(f, x, value)
            s.call(f, x, value)
            s.miss(f, x, type(value)(value * 2)) if type(value) in (Steps, Name) else None
        s.hit(f, x, type(values[0])(values[0]))


@program(PROGRAMS, "deques of a class of the program")
def _(s: Session) -> None:
    class Queue(collections.deque):
        pass

    x = torch.ones(3)
    for function in (
        lambda x, q: x * len(q),
        lambda x, q: x * q[0],
        lambda x, q: x * (2 if q else 3),
        lambda x, q: x * (2 if 2.0 in q else 3),
        lambda x, q: x * (2 if q == collections.deque([1.0, 2.0]) else 3),
        lambda x, q: [x * part for part in q],
    ):
        f = s.root(function)
        s.warm(f, x, Queue([1.0, 2.0]))
        for parts in ([1.0, 3.0], [3.0, 2.0], [1.0, 2.0, 3.0], []):
            s.call(f, x, Queue(parts))
            s.call(f, x, Queue(parts))
        s.hit(f, x, Queue([1.0, 2.0]))


@program(PROGRAMS, "what super() finds")
def _(s: Session) -> None:
    def case(name: str, value: Any, read: str) -> Case:
        def made():
            class Base(torch.nn.Module):
                k = 2.0

                def forward(self, x):
                    return x + 1

                @property
                def p(self):
                    return 3.0

                @classmethod
                def c(cls):
                    return 4.0

            class Net(Base):
                def forward(self, x):
                    return super().forward(x) * super().k * super().p * super().c()

            return lambda x, net: net(x), (Net(),), setting(Base, name, value)

        return made

    def between():
        class A:
            def scale(self):
                return 2.0

        class B(A):
            def scale(self):
                return super().scale()

        class Middle(A):
            def scale(self):
                return 7.0

        return lambda x, b: x * b.scale(), (B(),), setting(B, "__bases__", (Middle,))

    changes(
        s,
        case("forward", lambda self, x: x - 1, "forward"),
        case("k", 17.0, "k"),
        case("p", property(lambda self: 5.0), "p"),
        case("c", classmethod(lambda cls: 6.0), "c"),
        between,
    )


def _special(name: str, value: Any, use: Callable[..., Any], base: type = object) -> Case:
    def made():
        kind = type("Made", (base,), {})
        thing = kind([2.0]) if base in (list, tuple, set) else kind()
        return lambda x: (x * 2, use(thing)), (), setting(kind, name, value)

    return made


def _raised(use: Callable[[], Any]) -> Any:
    try:
        return use()
    except TypeError as error:
        return str(error)


@program(PROGRAMS, "special methods that a class gets later")
def _(s: Session) -> None:
    class Plain:
        k = 3.0

    changes(
        s,
        _special("__getattribute__", lambda self, name: 50.0, lambda t: t.k, Plain),
        _special("__getattr__", lambda self, name: 50.0, lambda t: hasattr(t, "zz")),
        _special("__len__", lambda self: 9, lambda t: len(t), list),
        _special("__bool__", lambda self: False, lambda t: 1 if t else 2),
        _special("__bool__", lambda self: False, lambda t: 1 if t else 2, list),
        _special("__iter__", lambda self: iter([9.0]), lambda t: [v for v in t], list),
        _special("__iter__", lambda self: iter([9.0]), lambda t: [v for v in t], tuple),
        _special("__getitem__", lambda self, k: 9.0, lambda t: t[0], list),
        _special("__contains__", lambda self, k: True, lambda t: 5 in t, list),
        _special("__contains__", lambda self, k: True, lambda t: 5 in t, set),
        _special("__eq__", lambda self, other: True, lambda t: t == 5),
        _special("__eq__", lambda self, other: False, lambda t: t == (2.0,), tuple),
        _special("__ne__", lambda self, other: False, lambda t: t != Plain),
        _special("__call__", lambda self: 1, lambda t: callable(t)),
        _special("__add__", lambda self, other: [7], lambda t: t + [1], list),
        _special("__format__", lambda self, spec: "abc", lambda t: f"{t}"[:3], list),
        _special("__repr__", lambda self: "abc", lambda t: repr(t), list),
        _special("__neg__", lambda self: 4.0, lambda t: _raised(lambda: -t)),
    )


@program(PROGRAMS, "operators that a class gets later")
def _(s: Session) -> None:
    def arithmetic(name: str, value: Callable[[type], Any], use: Callable[..., Any]) -> Case:
        def made():
            class Number:
                def __init__(self, v):
                    self.v = v

                def __add__(self, other):
                    return Number(self.v + other.v)

                def __iter__(self):
                    return iter([self.v])

            class Special(Number):
                pass

            arguments = Number(1.0), Special(2.0)
            return use, arguments, setting(Special, name, value(Number))

        return made

    def in_place(x, a, b):
        b += a
        return x * b.v

    changes(
        s,
        arithmetic("__iadd__", lambda n: lambda self, other: n(100.0), in_place),
        arithmetic(
            "__radd__", lambda n: lambda self, other: n(100.0), lambda x, a, b: x * (a + b).v
        ),
        arithmetic(
            "__contains__", lambda n: lambda self, k: False, lambda x, a, b: (x * 2, 2.0 in b)
        ),
    )


@program(PROGRAMS, "metaclasses that change, and classes that get another")
def _(s: Session) -> None:
    def made(name: str, value: Any, use: Callable[..., Any], on_class: bool = False) -> Case:
        def case():
            class Meta(type):
                z = 1.0

            class Thing(metaclass=Meta):
                k = 2.0

                def __init__(self, v=3.0):
                    self.v = v

            owner = Thing if on_class else Meta
            function = lambda x, cls, other: (x * 2, use(cls, other))
            return function, (Thing, types.SimpleNamespace()), setting(owner, name, value)

        return case

    class Other(type):
        z = 9.0

    replaced = lambda self, v=3.0: types.SimpleNamespace(v=50.0)
    changes(
        s,
        made("z", 5.0, lambda c, o: c.z),
        made("z", 5.0, lambda c, o: c.z, on_class=True),
        made("k", property(lambda self: 7.0), lambda c, o: c.k),
        made("__getattribute__", lambda self, name: 8.0, lambda c, o: c.k),
        made("__call__", replaced, lambda c, o: c(2.0).v),
        made("__instancecheck__", lambda self, thing: True, lambda c, o: isinstance(o, c)),
        made("__subclasscheck__", lambda self, thing: True, lambda c, o: issubclass(int, c)),
        made("__repr__", lambda self: "abc", lambda c, o: len(str(c))),
        made("__module__", "another", lambda c, o: f"{c}"[:10], on_class=True),
        made("__class__", Other, lambda c, o: c.z, on_class=True),
        made("__del__", lambda self: None, lambda c, o: c(1.0).v, on_class=True),
    )


@program(PROGRAMS, "what becomes a descriptor, or another one")
def _(s: Session) -> None:
    def becomes():
        class Late:
            pass

        class Owner:
            d = Late()

        owner = Owner()
        owner.__dict__["d"] = 2.0

        def change():
            Late.__get__ = lambda self, o, t: 9.0
            Late.__set__ = lambda self, o, v: None

        return lambda x, a: x * a.d, (owner,), change

    def another_class():
        class Given:
            def __init__(self, v):
                self.v = v

            def __get__(self, o, t):
                return self.v

        class Other(Given):
            def __get__(self, o, t):
                return 33.0

        class Owner:
            d = Given(2.0)

        return lambda x, a: x * a.d, (Owner(),), setting(Owner.__dict__["d"], "__class__", Other)

    changes(s, becomes, another_class)


@program(PROGRAMS, "modules that get attributes, and another class")
def _(s: Session) -> None:
    def asked():
        module = types.ModuleType("module_of_this_program")
        use = lambda x, m: x * (m.opt if hasattr(m, "opt") else 3)
        return use, (module,), setting(module, "__getattr__", lambda name: 9.0)

    def another_class():
        class Lazy(types.ModuleType):
            k = property(lambda self: 9.0)

        module = types.ModuleType("module_of_this_program")
        module.k = 2.0
        return lambda x, m: x * m.k, (module,), setting(module, "__class__", Lazy)

    changes(s, asked, another_class)


@program(PROGRAMS, "enum members whose class gets another comparison")
def _(s: Session) -> None:
    class Mode(enum.Enum):
        A = 1
        B = 2

    use = lambda x, mode: x * (2 if mode == Mode.A else 3)
    changes(s, lambda: (use, (Mode.A,), setting(Mode, "__eq__", lambda self, other: False)))


@program(PROGRAMS, "NaNs are found as objects")
def _(s: Session) -> None:
    nan = float("nan")
    f = s.root(lambda x, parts, v: (x * 2, v in parts, parts.count(v), parts == [v]))
    x = torch.ones(2)
    for parts, v in (([nan], nan), ([float("nan")], nan), ([nan], nan), ([1.0], nan), ([nan], 1.0)):
        for _ in range(3):
            s.call(f, x, parts, v)


@program(PROGRAMS, "constants that are one object, and are handed on")
def _(s: Session) -> None:
    def words(x, c):
        return x * (2 if c.a is c.b else 3), c.a is c.b

    x = torch.ones(2)
    f = s.root(words)
    for text in ("hello world!", (1, 2), 1.5, 10**9):
        again = type(text)(list(text)) if type(text) is tuple else type(text)(str(text))
        if type(text) is str:
            again = "".join(["hello ", "world!"])
        for _ in range(4):
            s.call(f, x, types.SimpleNamespace(a=text, b=text))
        for _ in range(2):
            s.call(f, x, types.SimpleNamespace(a=text, b=again))

    def hands_on(x, c):
        c.z = c.a
        return x + 1, c.a

    g = s.root(hands_on)
    for k in range(5):
        c = types.SimpleNamespace(a="a b " + str(4))
        result = s.call(g, x, c)
        assert result[1] is c.a and c.z is c.a


@program(PROGRAMS, "what bounded caches forget")
def _(s: Session) -> None:
    asked = s.watch([])

    @functools.lru_cache(maxsize=2)
    def twice(k):
        asked.append(k)
        return k * 2.0

    f = s.root(lambda x: x * twice(1))
    x = torch.ones(2)
    s.warm(f, x)
    for k in (2, 3, 4):
        twice(k)
        s.call(f, x)
        s.call(f, x)
    twice(1)
    s.call(f, x)


@program(PROGRAMS, "a bounded cache that has forgotten, and computed again")
def _(s: Session) -> None:
    rate = {"m": 2.0}

    @functools.lru_cache(maxsize=1)
    def scaled(k):
        return [k * rate["m"]]

    f = s.root(lambda x: x + scaled(2)[0])
    x = torch.ones(2)
    s.warm(f, x)
    scaled(9)
    rate["m"] = 7.0
    scaled(2)  # in the link that held the first value
    s.call(f, x)
    s.call(f, x)
