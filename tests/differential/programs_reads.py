"""Programs whose Python code reads state deeply: equality, formatting, lookups that fail."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import operator
import os
import re
import sys
from collections import ChainMap, OrderedDict, namedtuple

import torch
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []


class Mode(enum.Enum):
    ADD = "add"
    MULTIPLY = "multiply"


class Size(enum.IntEnum):
    SMALL = 1
    BIG = 10


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Settings:
    gain: float = 2.0
    names: list[str] = dataclasses.field(default_factory=list)


@program(PROGRAMS, "nested list equality", expect=ANY)
def _(s: Session) -> None:
    a, b = [1, [2, 3]], [1, [2, 3]]

    def f(x):
        return x + 1 if a == b else x - 1

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    a[1][1] = 4
    s.call(f, x)
    b[1][1] = 4
    s.call(f, x)


@program(PROGRAMS, "nested dict equality", expect=ANY)
def _(s: Session) -> None:
    a, b = {"k": {"deep": [1]}}, {"k": {"deep": [1]}}

    def f(x):
        return x + 1 if a == b else x - 1

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    a["k"]["deep"].append(2)
    s.call(f, x)
    b["k"]["deep"] = [1, 2]
    s.call(f, x)


@program(PROGRAMS, "tuple and dataclass equality", expect=ANY)
def _(s: Session) -> None:
    a, b = Settings(1.0, ["x"]), Settings(1.0, ["x"])

    def f(x):
        if (1, a) == (1, b):
            return x + 1
        return x - 1

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    a.names.append("y")
    s.call(f, x)
    b.names.append("y")
    s.call(f, x)
    b.gain = 4.0
    s.call(f, x)


@program(PROGRAMS, "membership in nested containers", expect=ANY)
def _(s: Session) -> None:
    known = [[1], [2, [3]]]

    def f(x):
        return x * 2 if [2, [3]] in known else x * 3

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    known[1][1][0] = 9
    s.call(f, x)


@program(PROGRAMS, "sorted reads keys deeply", expect=ANY)
def _(s: Session) -> None:
    items = [[3, 1], [2, 5]]

    def f(x):
        return x * sorted(items)[0][0]

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    items[0][0] = 1
    s.call(f, x)


@program(PROGRAMS, "repr of a list", expect=ANY)
def _(s: Session) -> None:
    state = [1, [2]]

    def f(x):
        return x + len(repr(state))

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    state[1].append(1000)
    s.call(f, x)


@program(PROGRAMS, "str.format and f-strings", expect=ANY)
def _(s: Session) -> None:
    state = {"n": [1]}

    def f(x):
        text = "{} {n[0]}".format(state, n=state["n"]) + f"{state!r:>20}{x.shape[0]}"
        return x + len(text), text

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    state["n"][0] = 12345
    s.call(f, x)


@program(PROGRAMS, "percent formatting of an object", expect=ANY)
def _(s: Session) -> None:
    class Named:
        name = "abc"

        def __str__(self):
            return self.name

    thing = Named()

    def f(x):
        return x + len("%s" % thing)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    thing.name = "abcdef"
    s.call(f, x)


@program(PROGRAMS, "missing key of os.environ", expect=ANY)
def _(s: Session) -> None:
    key = "ACCEL_TEST_MISSING_KEY"

    def f(x):
        if os.environ.get(key) == "1":
            return x * 10
        return x * (2 if key in os.environ else 3)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.patch(os.environ, key, "0")
    s.call(f, x)
    s.patch(os.environ, key, "1")
    s.call(f, x)


@program(PROGRAMS, "os.getenv", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x * float(os.getenv("ACCEL_TEST_GAIN", "2"))

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.patch(os.environ, "ACCEL_TEST_GAIN", "5")
    s.call(f, x)


@program(PROGRAMS, "globals()", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x * globals().get("HIDDEN_GAIN", 2.0)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.patch(globals(), "HIDDEN_GAIN", 7.0)
    s.call(f, x)


@program(PROGRAMS, "locals() and vars()", expect=ANY)
def _(s: Session) -> None:
    settings = Settings()

    def f(x):
        y = x + 1
        return sorted(locals()), x * vars(settings)["gain"]

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    settings.gain = 3.0
    s.call(f, x)


@program(PROGRAMS, "frames", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        name = sys._getframe().f_code.co_name
        caller = sys._getframe(1).f_code.co_filename.endswith("harness.py")
        return x + 1, name, caller

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "interned tuples and strings")
def _(s: Session) -> None:
    shape = ()

    def f(x, size, name):
        if size == () and name == "sum":
            return x.sum().reshape(size)
        return x.reshape(size) + len(name)

    f = s.root(f)
    s.warm(f, torch.ones(3), shape, "sum")
    s.call(f, torch.ones(1), (), "sum")
    s.call(f, torch.ones(4), (2, 2), "sum")
    s.call(f, torch.ones(4), (4,), "other")


@program(PROGRAMS, "empty tuple shared with other state")
def _(s: Session) -> None:
    class Model:
        extra = ()
        other = ()

    model = Model()

    def f(x):
        for e in model.extra:
            x = x + e
        for e in model.other:
            x = x * e
        return x * 2

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    model.other = (5.0,)
    s.miss(f, x)
    model.extra = (1.0, 2.0)
    s.miss(f, x)


@program(PROGRAMS, "callbacks from C", expect=ANY)
def _(s: Session) -> None:
    gains = {"g": 2.0}

    class Key:
        def __init__(self, n):
            self.n = n

        def __lt__(self, other):
            return self.n * gains["g"] < other.n * 3

    def f(x):
        order = sorted([3, 1, 2], key=lambda n: -n * gains["g"])
        best = min([Key(1), Key(2)]).n
        text = re.sub(r"\d", lambda m: str(int(m.group()) * gains["g"]), "a1b2")
        return x * order[0] + best + len(text)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    gains["g"] = -200.0
    s.call(f, x)


@program(PROGRAMS, "attribute lookups that fail")
def _(s: Session) -> None:
    class Model:
        pass

    model = Model()

    def f(x):
        try:
            x = x + model.shift
        except AttributeError:
            x = x * 2
        return x

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    model.shift = 1.0
    s.miss(f, x)
    s.call(f, x)
    del model.shift
    s.patch(Model, "shift", 5.0)
    s.call(f, x)


@program(PROGRAMS, "getattr with computed names")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(3):
                setattr(self, f"layer{i}", nn.Linear(3, 3))

        def forward(self, x):
            for i in range(3):
                x = getattr(self, f"layer{i}")(x)
            return x

    model = Model().requires_grad_(False)
    f, x = s.root(model), torch.randn(2, 3)
    s.warm(f, x)
    model.layer1 = nn.Identity()
    s.miss(f, x)


@program(PROGRAMS, "isinstance, type and callable")
def _(s: Session) -> None:
    def f(x, y):
        if isinstance(y, (int, float)) and not isinstance(y, bool):
            return x * y
        if type(y) is torch.Tensor:
            return x + y
        return y(x) if callable(y) else x

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x, 2.0)
    s.miss(f, x, torch.ones(3))
    s.miss(f, x, True)
    s.miss(f, x, torch.neg)
    s.miss(f, x, None)


@program(PROGRAMS, "enum members")
def _(s: Session) -> None:
    def f(x, mode, size):
        y = x + size if mode is Mode.ADD else x * size
        return y if mode == Mode.ADD else y * (size > Size.SMALL)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x, Mode.ADD, Size.BIG)
    s.miss(f, x, Mode.MULTIPLY, Size.BIG)
    s.miss(f, x, Mode.MULTIPLY, Size.SMALL)
    s.call(f, x, Mode("add"), Size.BIG)


@program(PROGRAMS, "enum value and name", expect=ANY)
def _(s: Session) -> None:
    def f(x, mode):
        return x * len(mode.value) + len(mode.name)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x, Mode.ADD)
    s.call(f, x, Mode.MULTIPLY)


@program(PROGRAMS, "namedtuple in and out", expect=ANY)
def _(s: Session) -> None:
    def f(pair):
        return Pair(pair.first + 1, pair[1] * 2), pair._replace(first=pair.second)

    f = s.root(f)
    s.warm(f, Pair(torch.ones(3), torch.ones(3)))
    s.call(f, Pair(torch.ones(4), torch.ones(4)))


@program(PROGRAMS, "dict methods")
def _(s: Session) -> None:
    options = {"a": 1.0, "b": 2.0}

    def f(x):
        total = x * options.get("a", 0.0) + options.get("c", 3.0)
        for key in options:
            total = total + options[key]
        for value in options.values():
            total = total * value
        return total, len(options), "b" in options

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    options["c"] = 4.0
    s.miss(f, x)
    options["a"] = options.pop("a")
    s.call(f, x)


@program(PROGRAMS, "dict methods that build", expect=ANY)
def _(s: Session) -> None:
    def f(x, **options):
        merged = {"gain": 1.0, **options} | {"shift": 2.0}
        merged.setdefault("other", 5.0)
        gain = merged.pop("gain")
        merged.update(extra=x)
        return x * gain + sum(v for k, v in sorted(merged.items()) if k != "extra"), merged

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.call(f, x, gain=3.0)
    s.call(f, x, other=1.0)


@program(PROGRAMS, "mutated list read by index and slice")
def _(s: Session) -> None:
    weights = [1.0, 2.0, 3.0]

    def f(x):
        return x * weights[-1] + weights[0] + len(weights[1:])

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    weights[0] = 7.0
    s.miss(f, x)
    weights.append(4.0)
    s.miss(f, x)
    weights.reverse()
    s.call(f, x)


@program(PROGRAMS, "list methods and tuple arithmetic", expect=ANY)
def _(s: Session) -> None:
    def f(x, sizes):
        parts = [x]
        parts.extend([x * 2, x * 3])
        parts.insert(0, x - 1)
        last = parts.pop()
        parts += [last] * 2
        shape = (*sizes, 1) + tuple(x.shape)
        return torch.stack(parts).sum(0), parts.index(last), shape, shape.count(1), parts[::-1]

    f = s.root(f)
    s.warm(f, torch.ones(3), (2, 1))
    s.call(f, torch.ones(4), [1, 1])


@program(PROGRAMS, "chain map, ordered dict and json", expect=ANY)
def _(s: Session) -> None:
    base, over = OrderedDict(a=1.0, b=2.0), {}
    both = ChainMap(over, base)

    def f(x):
        return x * both["a"] + len(json.dumps(dict(both), sort_keys=True)), list(base)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    over["a"] = 10.0
    s.call(f, x)
    base.move_to_end("a")
    s.call(f, x)


@program(PROGRAMS, "cached property and lru_cache", expect=ANY)
def _(s: Session) -> None:
    class Model:
        gain = 2.0

        @functools.cached_property
        def scale(self):
            return self.gain * 2

    model = s.watch(Model())

    def f(x):
        return x * model.scale

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    del model.scale
    model.gain = 5.0
    s.call(f, x)
    s.call(f, x)


@program(PROGRAMS, "class attribute behind a metaclass", expect=ANY)
def _(s: Session) -> None:
    class Meta(type):
        @property
        def gain(cls):
            return cls._gain * 2

    class Model(metaclass=Meta):
        _gain = 2.0

    def f(x):
        return x * Model.gain

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.patch(Model, "_gain", 3.0)
    s.call(f, x)


@program(PROGRAMS, "slots", expect=ANY)
def _(s: Session) -> None:
    class Slotted:
        __slots__ = ("gain", "maybe")

        def __init__(self):
            self.gain = 2.0

    thing = s.watch(Slotted())

    def f(x):
        return x * thing.gain + getattr(thing, "maybe", 0.0)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    thing.gain = 3.0
    s.call(f, x)
    thing.maybe = 4.0
    s.call(f, x)


@program(PROGRAMS, "number of positional and keyword arguments")
def _(s: Session) -> None:
    def f(*args, scale=1.0, **kwargs):
        total = args[0] * scale
        for a in args[1:]:
            total = total + a
        for key, value in kwargs.items():
            total = total * value + len(key)
        return total, len(args), len(kwargs)

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x, x, scale=2.0, k=x)
    s.miss(f, x, scale=2.0, k=x)
    s.miss(f, x, x, scale=2.0, kk=x)
    s.miss(f, x, x, scale=2.0)
    s.call(f, *[x] * 5)
    s.call(f)


@program(PROGRAMS, "operator module", expect=ANY)
def _(s: Session) -> None:
    table = {"+": operator.add, "*": operator.mul}

    def f(x, symbol):
        return table[symbol](x, operator.getitem([2.0, 3.0], operator.index(1)))

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x, "+")
    s.call(f, x, "*")
    table["+"] = operator.sub
    s.call(f, x, "+")


@program(PROGRAMS, "state of an imported module")
def _(s: Session) -> None:
    def f(x):
        import snapshots

        return x * snapshots.TEST_GAIN

    import snapshots

    s.patch(snapshots, "TEST_GAIN", 2.0)
    f, x = s.root(f), torch.ones(3)
    s.warm(f, x)
    s.patch(snapshots, "TEST_GAIN", 3.0)
    s.miss(f, x)
