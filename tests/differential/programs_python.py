"""Programs around their tensors as different people write them: the standard library's part."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import itertools
import json
import logging
import math
import operator
import re
import string
import types
import typing
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []

LOGGER = logging.getLogger("accel.tests.programs_python")
REDUCTIONS = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}
COUNTER = {"calls": 0}


class Mode(enum.Enum):
    TRAIN = "train"
    EVAL = "eval"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Flags(enum.Flag):
    RELU = enum.auto()
    SCALE = enum.auto()
    SHIFT = enum.auto()


@dataclasses.dataclass
class Options:
    scale: float = 2.0
    layers: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    names: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Frozen:
    width: int
    bias: float = 0.5


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor | None = None
    extras: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    k: float = 1.0


class Point(typing.NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    label: str = "p"


@program(PROGRAMS, "simple namespace as a config")
def _(s: Session) -> None:
    config = types.SimpleNamespace(scale=2.0, steps=3, act="relu")

    def f(x, cfg):
        for _ in range(cfg.steps):
            x = x * cfg.scale
        return F.relu(x) if cfg.act == "relu" else x.tanh()

    f = s.root(f)
    s.warm(f, torch.randn(4), config)
    s.hit(f, torch.randn(4), config)
    config.scale = 3.0
    s.miss(f, torch.randn(4), config)
    config.scale = 2.0
    s.hit(f, torch.randn(4), config)
    config.act = "tanh"
    s.miss(f, torch.randn(4), config)


@program(PROGRAMS, "simple namespace made and read in the trace")
def _(s: Session) -> None:
    def f(x, k):
        state = types.SimpleNamespace(h=x, n=0)
        for _ in range(3):
            state.h = state.h * k + 1
            state.n += 1
        return state.h, state.n

    f = s.root(f)
    s.warm(f, torch.randn(4), 2.0)
    s.hit(f, torch.randn(4), 2.0)
    s.miss(f, torch.randn(4), 3.0)


@program(PROGRAMS, "itemgetter and attrgetter as keys")
def _(s: Session) -> None:
    table = {"a": 3, "b": 1, "c": 2}
    specs = [Frozen(3), Frozen(1), Frozen(2, 0.25)]

    def f(x):
        for name, k in sorted(table.items(), key=operator.itemgetter(1)):
            x = x * k + len(name)
        for spec in sorted(specs, key=operator.attrgetter("width")):
            x = x * 2 + spec.bias
        return x

    f = s.root(f)
    s.warm(f, torch.randn(4))
    table["b"] = 7
    s.miss(f, torch.randn(4))
    table["b"] = 1
    s.hit(f, torch.randn(4))
    specs.reverse()
    s.call(f, torch.randn(4))
    specs[0] = Frozen(9)
    s.miss(f, torch.randn(4))


@program(PROGRAMS, "itemgetter called directly")
def _(s: Session) -> None:
    first_and_last = operator.itemgetter(0, -1)
    scale = operator.attrgetter("scale")
    by_name = operator.methodcaller("get", "gain", 1.0)
    gains = {"gain": 2.0}

    def f(xs, options):
        a, b = first_and_last(xs)
        return (a + b) * scale(options) * by_name(gains)

    f = s.root(f)
    options = Options()
    s.warm(f, [torch.ones(2), torch.zeros(2), torch.randn(2)], options)
    options.scale = 5.0
    s.miss(f, [torch.ones(2), torch.zeros(2), torch.randn(2)], options)
    gains["gain"] = 3.0
    s.miss(f, [torch.ones(2), torch.zeros(2), torch.randn(2)], options)


@program(PROGRAMS, "chain, islice, product, accumulate, repeat, cycle")
def _(s: Session) -> None:
    groups = [[1, 2], [3]]

    def f(x):
        for k in itertools.chain.from_iterable(groups):
            x = x * k
        for a, b in itertools.product((1, 2), repeat=2):
            x = x + a * b
        for k in itertools.accumulate(groups[0]):
            x = x + k
        for k, piece in zip(itertools.cycle([1.0, -1.0]), x.unbind(0)):
            x = x + k * piece.sum()
        for i, j in itertools.combinations(range(3), 2):
            x = x + x[i] * x[j]
        for k in itertools.islice(itertools.count(2, 3), 2):
            x = x - k
        for a, b in itertools.zip_longest(groups[0], groups[1], fillvalue=0):
            x = x + a - b
        return torch.stack(list(itertools.repeat(x, 2)))

    f = s.root(f)
    s.warm(f, torch.randn(3))
    groups[1].append(2)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "groupby, starmap, takewhile and pairwise")
def _(s: Session) -> None:
    names = ["a1", "a2", "b1"]

    def f(x):
        for key, group in itertools.groupby(names, key=lambda n: n[0]):
            x = x * len(list(group)) + ord(key)
        for k in itertools.starmap(operator.mul, [(1, 2), (3, 4)]):
            x = x + k
        for k in itertools.takewhile(lambda v: v < 3, range(10)):
            x = x + k
        for a, b in itertools.pairwise([1, 2, 4]):
            x = x * (b - a)
        return x

    f = s.root(f)
    s.warm(f, torch.randn(3))
    names.append("b2")
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "deque from outside is read")
def _(s: Session) -> None:
    history = collections.deque([1.0, 2.0, 3.0], maxlen=3)

    def f(x):
        total = sum(history) / len(history)
        for h in history:
            x = x + h
        return x * total + history[-1]

    f = s.root(f)
    s.warm(f, torch.randn(3))
    history.append(9.0)
    s.miss(f, torch.randn(3))
    s.call(f, torch.randn(3))
    history.rotate(1)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "deque of tensors from outside is read", expect=ANY)
def _(s: Session) -> None:
    history = collections.deque([torch.ones(3), torch.zeros(3)])

    def f(x):
        return torch.stack([*history, x]).mean(0) + history[0]

    f = s.root(f)
    s.warm(f, torch.randn(3))
    history[1] = torch.full((3,), 4.0)
    s.call(f, torch.randn(3))
    history.append(torch.ones(3))
    s.miss(f, torch.randn(3))
    history.pop()
    history[0] = torch.ones(1, 3)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "deque as a queue in the trace")
def _(s: Session) -> None:
    def f(x):
        queue = collections.deque([x])
        total = x * 0
        while queue:
            y = queue.popleft()
            total = total + y
            if y.shape[0] > 1:
                queue.append(y[: y.shape[0] // 2])
                queue.append(y[y.shape[0] // 2 :])
                total = total * 1.5
                total = total[: y.shape[0] // 2]
        return total

    f = s.root(f)
    s.warm(f, torch.randn(4))
    s.call(f, torch.randn(8))


@program(PROGRAMS, "sorted items of a dict")
def _(s: Session) -> None:
    weights = {"b": 2.0, "a": 3.0}

    def f(x):
        for name, w in sorted(weights.items()):
            x = x * w + ord(name)
        for name in sorted(weights, reverse=True):
            x = x - ord(name)
        for name, w in reversed(weights.items()):
            x = x * w
        return x, max(weights.values()), min(weights, key=weights.get)

    f = s.root(f)
    s.warm(f, torch.randn(3))
    weights["a"] = 1.0
    s.miss(f, torch.randn(3))
    weights["c"] = 1.0
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "keys views: membership and set operations")
def _(s: Session) -> None:
    batch = {"x": torch.ones(3), "mask": torch.zeros(3)}
    needed = {"x", "y"}

    def f(batch):
        x = batch["x"]
        if "mask" in batch.keys():
            x = x + batch["mask"]
        for name in sorted(batch.keys() & needed):
            x = x * len(name) * 2
        for name in sorted(needed - batch.keys()):
            x = x + len(name)
        for name in sorted(batch.keys() | {"z"}):
            x = x - len(name)
        if batch.keys() >= {"x", "mask"} and "q" not in batch:
            x = x * 3
        if {"x"} <= batch.keys() and not batch.keys().isdisjoint(needed):
            x = x + 1
        return x

    f = s.root(f)
    s.warm(f, batch)
    del batch["mask"]
    s.miss(f, batch)
    batch["y"] = torch.ones(3)
    s.miss(f, batch)
    needed.add("q")
    s.miss(f, batch)


@program(PROGRAMS, "keys view kept outside")
def _(s: Session) -> None:
    table = {"a": 1, "b": 2}
    keys = table.keys()

    def f(x):
        for name in keys:
            x = x + ord(name)
        return x

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.ones(2))
    table["c"] = 1
    s.call(f, torch.ones(2))


@program(PROGRAMS, "dataclass with a default factory made in the trace")
def _(s: Session) -> None:
    def f(x, scale):
        options = Options(scale=scale)
        options.layers.append(3)
        for k in options.layers:
            x = x * options.scale + k
        out = Output(loss=x.sum(), logits=x)
        out.extras.append(x + 1)
        return out

    f = s.root(f)
    s.warm(f, torch.randn(3), 2.0)
    s.call(f, torch.randn(3), 4.0)


@program(PROGRAMS, "dataclass replace, asdict, astuple and fields")
def _(s: Session) -> None:
    spec = Frozen(3)

    def f(x, spec):
        wider = dataclasses.replace(spec, width=spec.width + 1)
        for field in dataclasses.fields(wider):
            x = x + len(field.name)
        return x * wider.width + wider.bias, dataclasses.is_dataclass(spec)

    f = s.root(f)
    s.warm(f, torch.randn(3), spec)
    s.call(f, torch.randn(3), Frozen(8))
    s.call(f, torch.randn(3), Frozen(3, 1.5))


@program(PROGRAMS, "dataclass asdict of a config")
def _(s: Session) -> None:
    options = Options()

    def f(x):
        for value in dataclasses.asdict(options)["layers"]:
            x = x * value
        return x * dataclasses.asdict(options)["scale"]

    f = s.root(f)
    s.warm(f, torch.randn(3))
    options.layers.append(4)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "slotted dataclass")
def _(s: Session) -> None:
    def f(x, item):
        made = Slotted(x * item.k, item.k + 1)
        return made.x * made.k + item.x

    f = s.root(f)
    s.warm(f, torch.randn(3), Slotted(torch.ones(3), 2.0))
    s.miss(f, torch.randn(3), Slotted(torch.ones(3), 5.0))


@program(PROGRAMS, "slotted dataclass returned")
def _(s: Session) -> None:
    def f(x):
        return Slotted(x * 2, 3.0)

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))


@program(PROGRAMS, "formatting objects by their own methods")
def _(s: Session) -> None:
    class Named:
        def __init__(self, name):
            self.name = name

        def __str__(self):
            return f"<{self.name}>"

        def __format__(self, spec):
            return f"{self.name}:{spec}"

        def __repr__(self):
            return f"Named({self.name!r})"

    named = Named("ab")

    def f(x):
        text = f"{named} {named!r} {named!s} {named:>4}" + str(named) + "%s" % named
        return x * len(text), text + "{}".format(named)

    f = s.root(f)
    s.warm(f, torch.ones(2))
    named.name = "abc"
    s.miss(f, torch.ones(2))


@program(PROGRAMS, "f-strings as keys of tables")
def _(s: Session) -> None:
    weights = {f"layer_{i}.weight": torch.full((2,), float(i)) for i in range(3)}

    def f(x, depth):
        for i in range(depth):
            x = x + weights[f"layer_{i}.weight"] * float(f"{i:.2f}")
        return x, f"{depth:03d}|{1.5:>8.3f}|{'a'!r:^5}"

    f = s.root(f)
    s.warm(f, torch.ones(2), 3)
    s.call(f, torch.ones(2), 2)
    weights["layer_1.weight"] = torch.ones(2)
    s.call(f, torch.ones(2), 3)


@program(PROGRAMS, "regular expressions on names")
def _(s: Session) -> None:
    pattern = re.compile(r"layer\.(\d+)\.(\w+)")
    names = ["layer.0.weight", "layer.12.bias", "head"]

    def f(x):
        for name in names:
            m = pattern.match(name)
            if m is not None:
                x = x * 1.5 + int(m.group(1)) + len(m[2])
            elif re.search("ea", name):
                x = x - 1
        return x, re.sub(r"\.", "_", names[0]), re.split(r"\.", names[0]), pattern.findall(names[1])

    f = s.root(f)
    s.warm(f, torch.randn(3))
    names[2] = "tail"
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "json of a constant config")
def _(s: Session) -> None:
    config = {"layers": [1, 2], "act": "relu"}

    def f(x):
        parsed = json.loads('{"scale": 2.5, "steps": [1, 2]}')
        for k in parsed["steps"]:
            x = x * k + parsed["scale"]
        return x, json.dumps(config, sort_keys=True)

    f = s.root(f)
    s.warm(f, torch.randn(3))
    config["layers"].append(3)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "copy and deepcopy of configs")
def _(s: Session) -> None:
    config = {"scale": 2.0, "layers": [1, 2]}
    options = Options()

    def f(x):
        mine = copy.deepcopy(config)
        mine["layers"].append(5)
        other = copy.copy(options)
        other.scale = 7.0
        shallow = copy.copy(config)
        shallow["scale"] = 1.0
        for k in mine["layers"]:
            x = x * k
        return x * mine["scale"] + other.scale + options.scale + shallow["scale"]

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.watch(config)
    config["layers"][0] = 4
    s.miss(f, torch.randn(3))
    options.scale = 1.0
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "numpy constants in arithmetic")
def _(s: Session) -> None:
    def f(x, n):
        scale = 1.0 / np.sqrt(n)
        y = x * float(scale) + float(np.pi) + np.log(2.0)
        return y * int(np.prod([2, 3])), float(np.float32(0.1))

    f = s.root(f)
    s.warm(f, torch.randn(3), 4)
    s.hit(f, torch.randn(3), 4)
    s.miss(f, torch.randn(3), 9)


@program(PROGRAMS, "numpy schedule made of constants")
def _(s: Session) -> None:
    def f(x):
        betas = np.linspace(0.1, 0.5, 4)
        for b in betas:
            x = x * float(b)
        return x + float(betas.sum()) + int(np.argmax(betas))

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))


@program(PROGRAMS, "numpy array from outside as a table of numbers")
def _(s: Session) -> None:
    table = np.array([1.0, 2.0, 3.0])

    def f(x, i):
        return x * float(table[i])

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.ones(3), 1)
    table[1] = 5.0
    s.call(f, torch.ones(3), 1)


@program(PROGRAMS, "enums: members, values, names and iteration")
def _(s: Session) -> None:
    def f(x, mode, level):
        if mode is Mode.TRAIN:
            x = x * 2
        elif mode == Mode.EVAL:
            x = x * 3
        for member in Mode:
            x = x + len(member.value) + len(member.name)
        x = x * level + int(level) * (level > Level.LOW)
        return x + len(Mode), Mode("eval"), Mode["TRAIN"], level in (Level.LOW,)

    f = s.root(f)
    s.warm(f, torch.randn(3), Mode.TRAIN, Level.HIGH)
    s.miss(f, torch.randn(3), Mode.EVAL, Level.HIGH)
    s.miss(f, torch.randn(3), Mode.TRAIN, Level.LOW)


@program(PROGRAMS, "enum flags")
def _(s: Session) -> None:
    def f(x, flags):
        if flags & Flags.RELU:
            x = F.relu(x)
        if Flags.SCALE in flags:
            x = x * 2
        if flags & (Flags.SHIFT | Flags.SCALE):
            x = x + 1
        return x

    f = s.root(f)
    s.warm(f, torch.randn(3), Flags.RELU | Flags.SCALE)
    s.call(f, torch.randn(3), Flags.RELU)
    s.call(f, torch.randn(3), Flags.SHIFT | Flags.RELU)


@program(PROGRAMS, "match statement over strings, tuples and dicts")
def _(s: Session) -> None:
    def f(x, spec):
        match spec:
            case {"op": "scale", "by": k}:
                return x * k
            case ["shift", k, *rest]:
                return x + k + len(rest)
            case Frozen(width=w) if w > 2:
                return x * w
            case "relu" | "gelu":
                return F.relu(x)
            case _:
                return x - 1

    f = s.root(f)
    s.warm(f, torch.randn(3), {"op": "scale", "by": 2.0})
    s.warm(f, torch.randn(3), ["shift", 1, 2, 3])
    s.warm(f, torch.randn(3), Frozen(4))
    s.warm(f, torch.randn(3), "relu")
    s.call(f, torch.randn(3), {"op": "scale", "by": 3.0})
    s.call(f, torch.randn(3), Frozen(1))
    s.call(f, torch.randn(3), None)


@program(PROGRAMS, "context variable set for a block")
def _(s: Session) -> None:
    gain: contextvars.ContextVar[float] = contextvars.ContextVar("gain_here", default=1.0)

    @contextlib.contextmanager
    def gained(k):
        token = gain.set(k)
        try:
            yield
        finally:
            gain.reset(token)

    def layer(x):
        return x * gain.get()

    def f(x):
        y = layer(x)
        with gained(3.0):
            y = y + layer(x)
        return y + layer(x)

    f = s.root(f)
    s.warm(f, torch.randn(3))
    gain.set(2.0)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "lru_cache, cache and cached_property")
def _(s: Session) -> None:
    @functools.lru_cache(maxsize=None)
    def factor(n, kind="a"):
        return n * 2.0 if kind == "a" else n * 3.0

    class Config:
        def __init__(self, width):
            self.width = width

        @functools.cached_property
        def doubled(self):
            return self.width * 2

        @property
        def halved(self):
            return self.width // 2

    config = Config(4)

    def f(x, n):
        return x * factor(n) + factor(n, kind="b") + config.doubled + config.halved

    f = s.root(f)
    s.call(f, torch.randn(3), 2)
    s.warm(f, torch.randn(3), 2)
    s.miss(f, torch.randn(3), 3)
    config.width = 10
    s.miss(f, torch.randn(3), 2)
    config.doubled = 1
    s.miss(f, torch.randn(3), 2)


@program(PROGRAMS, "cached_property first read in the trace")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3, 3)

        @functools.cached_property
        def scale(self):
            return 1.0 / math.sqrt(self.lin.in_features)

        def forward(self, x):
            return self.lin(x) * self.scale

    model = s.root(Model())
    for _ in range(5):
        s.call(model, torch.randn(2, 3))
    s.warm(model, torch.randn(2, 3))


@program(PROGRAMS, "singledispatch on the type of an argument", expect=ANY)
def _(s: Session) -> None:
    @functools.singledispatch
    def apply(spec, x):
        return x

    @apply.register
    def _(spec: int, x):
        return x * spec

    @apply.register
    def _(spec: str, x):
        return x + len(spec)

    @apply.register(list)
    def _(spec, x):
        for part in spec:
            x = apply(part, x)
        return x

    def f(x, spec):
        return apply(spec, x)

    f = s.root(f)
    s.warm(f, torch.randn(3), [2, "abc", 3])
    s.warm(f, torch.randn(3), 4)
    s.call(f, torch.randn(3), "x")

    @apply.register
    def _(spec: int, x):
        return x - spec

    s.miss(f, torch.randn(3), 4)


@program(PROGRAMS, "partial, partialmethod, reduce and wraps")
def _(s: Session) -> None:
    def logged(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs) + 1

        return wrapper

    class Ops:
        def scale(self, x, k=1.0):
            return x * k

        double = functools.partialmethod(scale, k=2.0)

    ops = Ops()
    gelu = functools.partial(F.gelu, approximate="tanh")

    @logged
    def step(x, k):
        return gelu(x) * k

    def f(xs):
        x = functools.reduce(torch.add, xs)
        x = functools.reduce(lambda a, b: a * b, xs, x)
        return ops.double(step(x, k=3.0))

    f = s.root(f)
    s.warm(f, [torch.randn(3) for _ in range(3)])
    s.miss(f, [torch.randn(3) for _ in range(4)])


@program(PROGRAMS, "contextmanager, ExitStack, suppress, nullcontext and closing")
def _(s: Session) -> None:
    events = s.watch([])

    class Timer:
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return False

    @contextlib.contextmanager
    def scaled(holder, k):
        holder["k"] *= k
        try:
            yield holder
        finally:
            holder["k"] /= k

    def f(x, use_timer):
        holder = {"k": 1.0}
        with scaled(holder, 3.0) as h, Timer(), contextlib.nullcontext(2.0) as two:
            x = x * h["k"] * two
        with contextlib.suppress(KeyError):
            x = x + holder["missing"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(scaled(holder, 2.0))
            if use_timer:
                stack.enter_context(Timer())
            x = x * holder["k"]
        manager = Timer() if use_timer else contextlib.nullcontext()
        with manager:
            x = x + 1
        return x * holder["k"]

    f = s.root(f)
    s.warm(f, torch.randn(3), True)
    s.warm(f, torch.randn(3), False)
    del events


@program(PROGRAMS, "star-unpacking, del, walrus and chained comparison")
def _(s: Session) -> None:
    def f(xs, options):
        first, *middle, last = xs
        merged = {**options, "extra": 1.0}
        values = [*middle, first]
        del values[0]
        table = dict(a=1, b=2)
        del table["a"]
        if (n := len(values)) > 0 and 0 < n <= 5:
            last = last * n
        x = torch.stack([*values, last]).sum(0)
        for k in {**merged}.values():
            x = x * k
        return x, list(table), [y for k in (1, 2) if (y := k * 2) > 2]

    f = s.root(f)
    s.warm(f, [torch.randn(3) for _ in range(4)], {"gain": 2.0})
    s.call(f, [torch.randn(3) for _ in range(3)], {"gain": 2.0})
    s.call(f, [torch.randn(3) for _ in range(4)], {"gain": 3.0})


@program(PROGRAMS, "nonlocal counter made in the trace")
def _(s: Session) -> None:
    def f(x):
        n = 0

        def step(y):
            nonlocal n
            n += 1
            return y * n

        for _ in range(3):
            x = step(x)
        return x, n

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))


@program(PROGRAMS, "generators consumed by builtins")
def _(s: Session) -> None:
    weights = [0.5, 0.25]

    def pieces(x):
        for i, w in enumerate(weights):
            yield x[i] * w

    def f(x):
        total = sum(p.sum() for p in pieces(x))
        if any(w > 0.4 for w in weights) and all(w < 1 for w in weights):
            total = total * 2
        low = min(w * 2 for w in weights)
        best = max((len(str(w)), w) for w in weights)
        joined = ",".join(str(w) for w in weights)
        stacked = torch.stack(tuple(pieces(x)))
        table = dict((str(i), p) for i, p in enumerate(pieces(x)))
        return total * low + best[1], joined, stacked, table, {w for w in weights} == {0.5, 0.25}

    f = s.root(f)
    s.warm(f, torch.randn(3, 2))
    weights[0] = 0.125
    s.miss(f, torch.randn(3, 2))


@program(PROGRAMS, "map, filter, zip and sorted with callbacks")
def _(s: Session) -> None:
    ks = [3, 1, 2]

    def f(xs):
        ys = list(map(torch.relu, xs))
        zs = list(map(lambda a, k: a * k, ys, ks))
        kept = list(filter(lambda a: a.dim() == 1, zs))
        order = sorted(range(3), key=lambda i: -ks[i])
        order.sort(key=ks.__getitem__)
        best = max(ks, key=lambda k: k % 3)
        shapes = tuple(map(len, xs)), list(map(str, ks)), [*map(int, ("1", "2"))]
        return torch.stack([kept[i] for i in order]) * best, shapes

    f = s.root(f)
    s.warm(f, [torch.randn(3) for _ in range(3)])
    ks[0] = 0
    s.miss(f, [torch.randn(3) for _ in range(3)])


@program(PROGRAMS, "zip strict and unzip")
def _(s: Session) -> None:
    def f(xs, ks):
        pairs = [(x * k, k) for x, k in zip(xs, ks, strict=True)]
        ys, scales = zip(*pairs)
        return torch.stack(ys), sum(scales), list(zip(*[[1, 2], [3, 4]]))

    f = s.root(f)
    s.warm(f, [torch.randn(3), torch.randn(3)], [1.0, 2.0])
    s.call(f, [torch.randn(3), torch.randn(3)], [1.0])
    s.call(f, [torch.randn(3), torch.randn(3)], [1.0, 3.0])


@program(PROGRAMS, "logging disabled by level")
def _(s: Session) -> None:
    LOGGER.setLevel(logging.ERROR)
    s.finally_(lambda: LOGGER.setLevel(logging.NOTSET))

    def f(x):
        LOGGER.debug("shape %s", x.shape)
        LOGGER.info(f"mean over {x.shape[0]}")
        if LOGGER.isEnabledFor(logging.DEBUG):
            x = x + 100
        LOGGER.log(logging.INFO, "more")
        LOGGER.warning("careful")
        return x * 2

    f = s.root(f)
    s.warm(f, torch.randn(3))
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    LOGGER.addHandler(logging.NullHandler())
    s.miss(f, torch.randn(3))
    LOGGER.setLevel(logging.ERROR)
    s.hit(f, torch.randn(3))


@program(PROGRAMS, "module level logging functions disabled by level")
def _(s: Session) -> None:
    def f(x):
        logging.debug("quiet")
        logging.getLogger("accel.tests.quiet").debug("quiet")
        return x * 2

    f = s.root(f)
    s.warm(f, torch.randn(3))


@program(PROGRAMS, "reducing a loss by name")
def _(s: Session) -> None:
    def loss(pred, target, reduction="mean", weights=None, **unused):
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {reduction!r}")
        errors = (pred - target).pow(2)
        if weights is not None:
            errors = errors * weights
        return REDUCTIONS[reduction](errors)

    loss = s.root(loss)
    a, b = torch.randn(3), torch.randn(3)
    s.warm(loss, a, b)
    s.warm(loss, a, b, reduction="none")
    s.warm(loss, a, b, "sum", weights=torch.rand(3))
    s.call(loss, a, b, reduction="median")


@program(PROGRAMS, "defaultdict, Counter and ChainMap of statistics")
def _(s: Session) -> None:
    names = ["a", "b", "a"]

    def f(x):
        groups = collections.defaultdict(list)
        for i, name in enumerate(names):
            groups[name].append(x[i])
        counts = collections.Counter(names)
        total = x * 0
        for name, parts in groups.items():
            total = total + torch.stack(parts).sum(0) * counts[name]
        return total, counts.most_common(1)[0][0], dict(counts)

    f = s.root(f)
    s.warm(f, torch.randn(3, 3))
    names[1] = "a"
    s.miss(f, torch.randn(3, 3))


@program(PROGRAMS, "string methods deciding a path")
def _(s: Session) -> None:
    def f(x, pattern):
        left, right = (side.split() for side in pattern.split("->"))
        order = [left.index(name) for name in right]
        x = x.permute(*order)
        for name in right:
            if name.isupper() or name.startswith("b"):
                x = x * 2
        return x, string.ascii_lowercase[: len(left)], " ".join(reversed(right)).strip().title()

    f = s.root(f)
    s.warm(f, torch.randn(2, 3, 4), "a b C -> C a b")
    s.miss(f, torch.randn(2, 3, 4), "a b C -> a C b")


@program(PROGRAMS, "try, except, else and finally with a lookup")
def _(s: Session) -> None:
    table = {"a": 2.0}

    def f(x, name):
        try:
            k = table[name]
        except KeyError as error:
            k = float(len(error.args[0]))
        else:
            x = x + 1
        finally:
            x = x * 3
        try:
            int(name)
        except (ValueError, TypeError):
            x = x - 1
        return x * k

    f = s.root(f)
    s.warm(f, torch.randn(3), "a")
    s.warm(f, torch.randn(3), "long")
    table["long"] = 5.0
    s.miss(f, torch.randn(3), "long")


@program(PROGRAMS, "named tuple made, replaced and unpacked")
def _(s: Session) -> None:
    def f(p):
        q = p._replace(x=p.x * 2)
        x, y, label = q
        r = Point(x + y, y, label=label + "!")
        return r, r._asdict(), Point._fields, r[0] + q.y, Point._make([x, y, "m"])

    f = s.root(f)
    s.warm(f, Point(torch.randn(3), torch.randn(3)))
    s.hit(f, Point(torch.randn(3), torch.randn(3)))
    s.miss(f, Point(torch.randn(3), torch.randn(3), "q"))


@program(PROGRAMS, "typed helpers: cast, get_type_hints free, isinstance of protocols")
def _(s: Session) -> None:
    def f(x, items):
        total = typing.cast(torch.Tensor, x)
        if isinstance(items, collections.abc.Mapping):
            items = list(items.values())
        if isinstance(items, collections.abc.Sequence) and not isinstance(items, str):
            for item in items:
                total = total * item
        if isinstance(total, torch.Tensor) and callable(f):
            total = total + 1
        return total

    f = s.root(f)
    s.warm(f, torch.randn(3), [1.0, 2.0])
    s.warm(f, torch.randn(3), {"a": 2.0})


@program(PROGRAMS, "metadata printed into strings")
def _(s: Session) -> None:
    def f(x):
        text = f"{tuple(x.shape)} {x.dtype} {x.device}" + str(x.shape) + repr(x.dtype)
        return x * len(text), text, list(x.shape), x.size(), "x".join(map(str, x.shape))

    f = s.root(f)
    s.warm(f, torch.randn(3, 2))
    s.miss(f, torch.randn(3, 2).double())


@program(PROGRAMS, "shape arithmetic in Python")
def _(s: Session) -> None:
    def f(x, heads):
        b, t, c = x.shape
        assert c % heads == 0, f"{c} over {heads}"
        d, rest = divmod(c, heads)
        scale = d**-0.5 * math.sqrt(2) / math.log2(8) + math.ceil(c / 3) + math.prod(x.shape)
        pad = (-t) % 4
        x = F.pad(x, (0, 0, 0, pad)) if pad else x
        n = max(b, t, 2) + min((b, t)) + abs(-3) + round(2.6) + int(c * 0.5) + pow(2, 3)
        return x.view(b, -1, heads, d).transpose(1, 2) * scale + n + rest

    f = s.root(f)
    s.warm(f, torch.randn(2, 3, 4), 2)
    s.hit(f, torch.randn(2, 3, 4), 2)
    s.call(f, torch.randn(2, 4, 4), 2)
    s.call(f, torch.randn(2, 4, 4), 3)


@program(PROGRAMS, "class with operators and protocols of its own")
def _(s: Session) -> None:
    class Scale:
        def __init__(self, k):
            self.k = k

        def __mul__(self, x):
            return x * self.k

        def __call__(self, x):
            return x + self.k

        def __getitem__(self, i):
            return self.k + i

        def __len__(self):
            return 3

        def __iter__(self):
            yield from (self.k, self.k + 1)

        def __contains__(self, item):
            return item == self.k

        def __bool__(self):
            return self.k > 0

        def __eq__(self, other):
            return isinstance(other, Scale) and self.k == other.k

        def __hash__(self):
            return hash(self.k)

        def __lt__(self, other):
            return self.k < other.k

        def __float__(self):
            return float(self.k)

        def __index__(self):
            return 1

    one = Scale(2.0)

    def f(x, two):
        y = one * x + one(x) * one[1] + len(one)
        for k in one:
            y = y * k
        if 2.0 in one and one and one != two and one < two:
            y = y - 1
        low, high = sorted([two, one])
        return y + float(low) + high.k

    f = s.root(f)
    s.warm(f, torch.randn(3), Scale(4.0))
    one.k = 3.0
    s.miss(f, torch.randn(3), Scale(4.0))


@program(PROGRAMS, "operators with tensors of one's own, in place and reflected")
def _(s: Session) -> None:
    class Sum:
        def __init__(self, x):
            self.x = x

        def __add__(self, y):
            return Sum(self.x + y)

        def __iadd__(self, y):
            self.x = self.x * 2 + y
            return self

        def __rmul__(self, y):
            return y * self.x - 1

        def __sub__(self, y):
            return self.x - y

    def f(x):
        total = Sum(x)
        total += x
        late = Sum(x) + x
        late -= x
        return total.x, late, x * Sum(x)

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))
    Sum.__iadd__ = lambda self, y: Sum(self.x - y)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "containers that C code takes apart")
def _(s: Session) -> None:
    pairs = [["a", 1.0], ["b", 2.0]]
    groups = [[1, 2], []]

    class Holder:
        gain = 1.0

    holder = Holder()
    table = {"a": [1, 2]}

    def f(x):
        merged = {}
        merged.update(pairs)
        x = x * sum(dict(pairs).values()) + sum(merged.values())
        x = x + len(list(filter(None, groups))) + sum(itertools.starmap(operator.mul, [groups[0]]))
        x = x * sum(map(getattr, [holder], ["gain"])) + len(next(map(table.get, ["a"])))
        ordered = list(groups)
        ordered.sort()
        best = max([holder], key=lambda h: [h.gain, groups])
        return x + len(ordered[0]) + best.gain + sorted(groups, key=len)[0].__len__()

    f = s.root(f)
    s.warm(f, torch.randn(3))
    pairs[0][1] = 5.0
    s.miss(f, torch.randn(3))
    groups[1].append(0)
    s.miss(f, torch.randn(3))
    holder.gain = 3.0
    s.miss(f, torch.randn(3))
    table["a"].append(1)
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "abstract base classes, super and class state")
def _(s: Session) -> None:
    import abc

    class Base(abc.ABC):
        gain = 2.0
        registry: typing.ClassVar[dict[str, float]] = {"x": 1.0}

        @abc.abstractmethod
        def apply(self, x): ...

        @classmethod
        def make(cls, k):
            return cls(k)

        @staticmethod
        def shift(x):
            return x + 1

        def __call__(self, x):
            return self.shift(self.apply(x)) * self.gain

    class Child(Base):
        def __init__(self, k):
            self.k = k

        def apply(self, x):
            return x * self.k + self.registry["x"]

        def __call__(self, x):
            return super().__call__(x) - 1

    def f(x):
        return Child.make(3.0)(x)

    f = s.root(f)
    s.warm(f, torch.randn(3))
    Base.gain = 5.0
    s.miss(f, torch.randn(3))
    Base.registry["x"] = 4.0
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "global counters and flags are read")
def _(s: Session) -> None:
    COUNTER["calls"] = 1

    def f(x):
        if COUNTER.get("calls", 0) > 5:
            return x - 1
        return x * COUNTER["calls"]

    f = s.root(f)
    s.warm(f, torch.randn(3))
    COUNTER["calls"] = 2
    s.miss(f, torch.randn(3))
    COUNTER["calls"] = 9
    s.miss(f, torch.randn(3))


@program(
    PROGRAMS,
    "warnings with a filter",
)
def _(s: Session) -> None:
    def f(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x * 2

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.randn(3))


@program(PROGRAMS, "nested containers taken apart and rebuilt")
def _(s: Session) -> None:
    def mapped(function, tree):
        if isinstance(tree, dict):
            return {k: mapped(function, v) for k, v in tree.items()}
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return type(tree)(*(mapped(function, v) for v in tree))
        if isinstance(tree, (list, tuple)):
            return type(tree)(mapped(function, v) for v in tree)
        return function(tree) if isinstance(tree, torch.Tensor) else tree

    def f(tree):
        return mapped(lambda t: t * 2, tree)

    f = s.root(f)
    tree = {"a": [torch.ones(2), 3], "b": (Point(torch.ones(1), torch.zeros(1)), None)}
    s.warm(f, tree)
    s.call(f, {"a": [torch.ones(2), 4], "b": (Point(torch.ones(1), torch.zeros(1)), None)})


@program(PROGRAMS, "pytree map over nested containers")
def _(s: Session) -> None:
    from torch.utils import _pytree as pytree

    def f(tree):
        return pytree.tree_map(lambda t: t * 2, tree)

    f = s.root(f)
    s.warm(f, {"a": [torch.ones(2)], "b": (torch.zeros(1),)})
    s.call(f, {"a": [torch.ones(2)], "c": (torch.zeros(1),)})


@program(PROGRAMS, "bytes, sets and frozensets of names")
def _(s: Session) -> None:
    skipped = {"a"}
    fixed = frozenset({"b", "c"})

    def f(parts):
        total = 0
        for name in sorted(parts):
            if name in skipped:
                continue
            total = total + parts[name] * (2 if name in fixed else 1)
        if skipped | fixed == {"a", "b", "c"} and not skipped & fixed:
            total = total + 1
        return total, b"ab"[0], len(skipped ^ fixed)

    f = s.root(f)
    parts = {"a": torch.ones(2), "b": torch.randn(2), "d": torch.randn(2)}
    s.warm(f, parts)
    skipped.add("d")
    s.miss(f, parts)


@program(PROGRAMS, "getattr by computed name and vars")
def _(s: Session) -> None:
    options = Options()

    def f(x, act):
        x = getattr(F, act)(x)
        x = getattr(torch, "exp")(x) * getattr(options, "scale", 1.0)
        x = x + getattr(options, "absent", 3.0)
        for name in ("scale", "other"):
            if hasattr(options, name):
                x = x * 1.5
        return x + len(vars(options))

    f = s.root(f)
    s.warm(f, torch.randn(3), "relu")
    s.miss(f, torch.randn(3), "silu")
    options.absent = 1.0
    s.miss(f, torch.randn(3), "relu")


@program(PROGRAMS, "bisect and statistics over numbers")
def _(s: Session) -> None:
    import bisect
    import statistics

    edges = [1.0, 2.0, 4.0]

    def f(x, value):
        i = bisect.bisect_left(edges, value)
        j = bisect.bisect(edges, value + 1)
        return x * i + j + statistics.fmean(edges)

    f = s.root(f)
    s.warm(f, torch.randn(3), 1.5)
    edges[0] = 1.75
    s.miss(f, torch.randn(3), 1.5)


@program(PROGRAMS, "print of constants and timing calls")
def _(s: Session) -> None:
    def f(x, verbose):
        if verbose:
            print("step", 1, x.shape[0], sep="|")
        return x * 2

    f = s.root(f)
    s.warm(f, torch.randn(3), True)
    s.warm(f, torch.randn(3), False)


@program(PROGRAMS, "int and float attributes and methods")
def _(s: Session) -> None:
    def f(x, n, p):
        k = n.bit_length() + p.is_integer() + (3.0).real + (n).numerator + float("inf")
        k = 0.0 if math.isinf(k) else k
        lo, hi = float("-inf"), sys_max()
        return x.clamp(lo, hi) * float.fromhex("0x1.8p0") + k + int("12") + n.__add__(1)

    def sys_max():
        import sys

        return sys.float_info.max / 1e300

    f = s.root(f)
    s.warm(f, torch.randn(3), 5, 2.0)
    s.miss(f, torch.randn(3), 6, 2.0)
