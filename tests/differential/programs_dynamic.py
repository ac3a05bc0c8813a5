"""Programs whose sizes change: after the first change, one variant must serve sizes never seen.

`hit` with a size that no earlier call had shows that; `miss` shows that what was compiled for
open sizes knows where it is wrong.
"""

from __future__ import annotations

import collections
import enum
import functools
import itertools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from harness import ANY, EAGER, Program, Session, program

PROGRAMS: list[Program] = []


def opened(s: Session, f: Any, *calls: tuple[Any, ...]) -> None:
    """The first two calls differ in the sizes that are left open from then on; the others,
    with sizes of their own, must be served."""
    with torch.no_grad():
        s.call(f, *calls[0])
        s.call(f, *calls[1])
        s.call(f, *calls[1])
        for call in calls[2:]:
            s.hit(f, *call)


def rows(*counts: int, width: int = 6) -> list[tuple[torch.Tensor]]:
    return [(torch.randn(n, width),) for n in counts]


@program(PROGRAMS, "pointwise over a changing batch")
def _(s: Session) -> None:
    f = s.root(lambda x: F.gelu(x * 2) + 1)
    opened(s, f, *rows(4, 6, 3, 2, 17, 257, 1000))


@program(PROGRAMS, "sizes 0 and 1 have variants of their own")
def _(s: Session) -> None:
    f = s.root(lambda x: torch.relu(x) - x)
    opened(s, f, *rows(4, 6, 9))
    with torch.no_grad():
        for n in (1, 0):
            s.miss(f, torch.randn(n, 6))
            s.miss(f, torch.randn(n, 6))
            s.hit(f, torch.randn(n, 6))
        s.hit(f, torch.randn(5, 6))


@program(PROGRAMS, "softmax along a changing dimension")
def _(s: Session) -> None:
    f = s.root(lambda x: torch.softmax(x, -1))
    opened(s, f, *((torch.randn(3, n),) for n in (4, 6, 2, 17, 33, 100, 1024)))


@program(PROGRAMS, "layer norm, both outer dimensions change")
def _(s: Session) -> None:
    f = s.root(lambda x: F.layer_norm(x, (6,)) * 0.5)
    shapes = [(2, 3), (4, 5), (3, 2), (7, 31), (2, 2), (16, 16)]
    opened(s, f, *((torch.randn(a, b, 6),) for a, b in shapes))


@program(PROGRAMS, "an MLP over changing batches")
def _(s: Session) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 3)
    )
    f = s.root(model)
    opened(s, f, *rows(4, 6, 3, 64, 5))


@program(PROGRAMS, "shape in arithmetic and views")
def _(s: Session) -> None:
    def f(x):
        b, t = x.shape[0], x.size(1)
        return x.view(b * t, -1).reshape(b, t * x.shape[2]), x.reshape(b, -1, 2)

    opened(s, s.root(f), *((torch.randn(a, b, 4),) for a, b in ((2, 3), (3, 5), (4, 2), (9, 7))))


@program(PROGRAMS, "numbers that are returned")
def _(s: Session) -> None:
    def f(x):
        n = x.shape[0]
        return x * n, n, x.shape, {"half": n // 2, "all": x.numel()}, (n - 1, -n, n % 4, len(x))

    opened(s, s.root(f), *rows(4, 6, 5, 300, 2))


@program(PROGRAMS, "a branch on a size")
def _(s: Session) -> None:
    def f(x):
        return x + 1 if x.shape[0] > 4 else x - 1

    f = s.root(f)
    opened(s, f, *rows(6, 8, 5, 9))
    with torch.no_grad():
        for n in (4, 2):
            s.call(f, torch.randn(n, 6))
        for n in (3, 7, 2, 100):
            s.hit(f, torch.randn(n, 6))


@program(PROGRAMS, "truth of a size")
def _(s: Session) -> None:
    def f(x):
        return x * 2 if x.shape[0] - 5 else x * 3

    f = s.root(f)
    opened(s, f, *rows(4, 6, 9))
    with torch.no_grad():
        s.miss(f, torch.randn(5, 6))


@program(PROGRAMS, "a loop over a size unrolls, so it is one size")
def _(s: Session) -> None:
    def f(x):
        return [x[i] * i for i in range(x.shape[0])]

    f = s.root(f)
    with torch.no_grad():
        for n in (4, 6, 6):
            s.call(f, torch.randn(n, 3))
        s.hit(f, torch.randn(6, 3))
        s.miss(f, torch.randn(7, 3))
        s.miss(f, torch.randn(5, 3))


@program(PROGRAMS, "iteration over a tensor is one size")
def _(s: Session) -> None:
    def f(x):
        total = 0
        for row in x:
            total = total * 2 + row
        return total

    f = s.root(f)
    with torch.no_grad():
        for n in (4, 6, 6, 6, 6, 6):
            s.call(f, torch.randn(n, 3))
        s.hit(f, torch.randn(6, 3))
        s.miss(f, torch.randn(7, 3))


@program(PROGRAMS, "equal dimensions that later differ")
def _(s: Session) -> None:
    def f(x):
        return x @ x.transpose(0, 1), x.sum(0), x.shape[0] * x.shape[1]

    opened(s, s.root(f), *((torch.randn(a, b),) for a, b in ((4, 4), (6, 6), (5, 7), (7, 5))))


@program(PROGRAMS, "two inputs of equal batch, by chance")
def _(s: Session) -> None:
    def f(x, y):
        return torch.cat([x, y], 0)

    pairs = [(4, 4), (6, 6), (5, 7), (7, 2), (3, 3)]
    opened(s, s.root(f), *((torch.randn(a, 3), torch.randn(b, 3)) for a, b in pairs))


@program(PROGRAMS, "two inputs of equal batch, by need")
def _(s: Session) -> None:
    f = s.root(lambda x, y: x * y + x)
    opened(s, f, *((torch.randn(n, 3), torch.randn(n, 3)) for n in (4, 6, 5, 9)))
    with torch.no_grad():
        s.miss(f, torch.randn(5, 3), torch.randn(6, 3))  # raises, as eager does


@program(PROGRAMS, "broadcast between an open size and 1")
def _(s: Session) -> None:
    f = s.root(lambda x, y: x + y)
    opened(s, f, *((torch.randn(n, 3), torch.randn(1, 3)) for n in (4, 6, 5, 9)))
    with torch.no_grad():
        s.miss(f, torch.randn(5, 3), torch.randn(5, 3))
        s.call(f, torch.randn(1, 3), torch.randn(7, 3))
        s.call(f, torch.randn(1, 3), torch.randn(8, 3))


@program(PROGRAMS, "expand to another tensor's size")
def _(s: Session) -> None:
    def f(x, y):
        return y.unsqueeze(0).expand(x.shape[0], -1) * 2, y.expand_as(x) + x

    opened(s, s.root(f), *((torch.randn(n, 3), torch.randn(3)) for n in (4, 6, 5, 9)))


@program(PROGRAMS, "slices at sizes")
def _(s: Session) -> None:
    def f(x):
        n = x.shape[0]
        return x[: n // 2], x[n // 2 :], x[n - 1], x[1:-1], x[:, : n - 1]

    opened(s, s.root(f), *((torch.randn(n, 100),) for n in (4, 6, 8, 50)))


@program(PROGRAMS, "min, max, abs and divmod of sizes")
def _(s: Session) -> None:
    def f(x):
        n = x.shape[0]
        whole, rest = divmod(n, 3)
        return x[: min(n, 4)], max(n, 100), abs(n - 200), whole, rest, x * whole

    f = s.root(f)
    opened(s, f, *rows(5, 6, 9, 50))
    with torch.no_grad():
        for n in (3, 2):
            s.call(f, torch.randn(n, 6))
        s.call(f, torch.randn(150, 6))
        s.call(f, torch.randn(250, 6))


@program(PROGRAMS, "modulo as a condition")
def _(s: Session) -> None:
    def f(x):
        if x.shape[0] % 2 == 0:
            return x.view(2, -1)
        return x.view(-1)

    f = s.root(f)
    opened(s, f, *rows(4, 6, 10, 100))
    with torch.no_grad():
        s.miss(f, torch.randn(5, 6))
        s.call(f, torch.randn(7, 6))
        s.hit(f, torch.randn(9, 6))
        s.hit(f, torch.randn(12, 6))


@program(PROGRAMS, "strides of inputs that are not contiguous")
def _(s: Session) -> None:
    f = s.root(lambda x: torch.softmax(x * 2, -1).sum(0))
    opened(s, f, *((torch.randn(5, n).t(),) for n in (4, 6, 9)))
    with torch.no_grad():
        s.miss(f, torch.randn(9, 5))  # contiguous now
        s.call(f, torch.randn(8, 5))
        s.call(f, torch.randn(20, 5)[::2])
        s.call(f, torch.randn(5, 1).expand(5, 5))


@program(PROGRAMS, "is_contiguous decides")
def _(s: Session) -> None:
    def f(x):
        return x + 1 if x.is_contiguous() else x - 1

    f = s.root(f)
    opened(s, f, *rows(4, 6, 9))
    with torch.no_grad():
        s.miss(f, torch.randn(6, 9).t())
        s.call(f, torch.randn(6, 5).t())
        s.call(f, torch.randn(7, 6))


@program(PROGRAMS, "stride in arithmetic")
def _(s: Session) -> None:
    f = s.root(lambda x: (x * x.stride(0), x.stride(), x.stride(-1)))
    opened(s, f, *((torch.randn(3, n),) for n in (4, 6, 9)))


@program(PROGRAMS, "arange, full and masks of open sizes")
def _(s: Session) -> None:
    def f(x):
        t = x.shape[1]
        positions = torch.arange(t)
        mask = positions[None, :] <= positions[:, None]
        scores = (x.transpose(1, 2) @ x).sum() + torch.full((t, t), -1.0)
        return scores.masked_fill(~mask, float("-inf")), torch.ones(t, 2).tril()

    opened(s, s.root(f), *((torch.randn(2, n, 3),) for n in (4, 6, 9, 40)))


@program(PROGRAMS, "attention over a growing sequence")
def _(s: Session) -> None:
    q, k, v = (torch.nn.Linear(8, 8) for _ in range(3))

    def f(x):
        b, t, _ = x.shape
        heads = [m(x).view(b, t, 2, 4).transpose(1, 2) for m in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(4)
        y = torch.softmax(scores, -1) @ heads[2]
        z = F.scaled_dot_product_attention(*heads, is_causal=True)
        return (y + z).transpose(1, 2).reshape(b, t, 8)

    shapes = [(2, 4), (3, 6), (2, 7), (5, 33), (2, 2)]
    opened(s, s.root(f), *((torch.randn(a, b, 8),) for a, b in shapes))


@program(PROGRAMS, "reductions over open sizes")
def _(s: Session) -> None:
    def f(x):
        return x.mean(0), x.sum(), x.amax(1), x.var(0), x.std(0, unbiased=False), x.argmax(0)

    opened(s, s.root(f), *rows(4, 6, 9, 2, 600))


@program(PROGRAMS, "cat and stack and pad of open sizes")
def _(s: Session) -> None:
    def f(x):
        both = torch.cat([x, x[:2], x * 2], 0)
        return both, torch.stack([x, x], 1), F.pad(x, (1, 2)), F.pad(x, (0, 0, 1, 0))

    opened(s, s.root(f), *rows(4, 6, 9, 3))


@program(PROGRAMS, "a convolution over changing images")
def _(s: Session) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    )
    f = s.root(model)
    shapes = [(2, 8, 8), (3, 10, 12), (4, 9, 7), (2, 16, 16)]
    opened(s, f, *((torch.randn(b, 3, h, w),) for b, h, w in shapes))


@program(PROGRAMS, "an input of open size is written")
def _(s: Session) -> None:
    def f(x):
        x.add_(1)
        return x * x.shape[0]

    opened(s, s.root(f), *rows(4, 6, 9, 3))


@program(PROGRAMS, "part of an input of open size is written")
def _(s: Session) -> None:
    def f(x):
        x[x.shape[0] - 1] = 0
        x[:, 1:3] *= 2
        return x.sum()

    opened(s, s.root(f), *rows(4, 6, 9, 3))


@program(PROGRAMS, "views of inputs come back as views")
def _(s: Session) -> None:
    def f(x):
        return x[1:], x.t(), x.view(-1), x

    opened(s, s.root(f), *rows(4, 6, 9, 3))


@program(PROGRAMS, "sizes stored in objects")
def _(s: Session) -> None:
    class Box:
        def __init__(self, n, y):
            self.n, self.y = n, y

    class State:
        last = 0

    state = s.watch(State())

    def f(x):
        state.last = x.shape[0] + 1
        box = Box(x.shape[0], x * 2)
        return box.y * box.n, [box.n], state.last

    opened(s, s.root(f), *rows(4, 6, 9, 3))


@program(PROGRAMS, "a cache that grows")
def _(s: Session) -> None:
    class Cache:
        def __init__(self):
            self.keys = torch.randn(2, 3, 4)

        def append(self, x):
            self.keys = torch.cat([self.keys, x], 1)
            return self.keys

        def __len__(self):
            return self.keys.shape[1]

    cache = Cache()

    def f(x):
        seen = cache.keys.shape[1]
        keys = cache.append(x)
        return (keys @ x.transpose(1, 2)).sum(-1), torch.arange(seen, seen + x.shape[1])

    f = s.root(f)
    with torch.no_grad():
        for _ in range(3):
            s.call(f, torch.randn(2, 1, 4))
        for _ in range(6):
            s.hit(f, torch.randn(2, 1, 4))


@program(PROGRAMS, "the length of an object is a size")
def _(s: Session) -> None:
    class Rows:
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return self.x.shape[0]

        def __bool__(self):
            return self.x.shape[0] > 5

        def __eq__(self, other):
            return self.x.shape[0] == other

        __hash__ = None

    def f(x):
        r = Rows(x)
        return x * len(r), bool(r), r == 9, 1 if r else 2

    f = s.root(f)
    with torch.no_grad():
        for n in (4, 6, 6, 7, 9, 5, 4, 100, 9):
            s.call(f, torch.randn(n, 3))


@program(PROGRAMS, "C code looks at sizes")
def _(s: Session) -> None:
    def f(x):
        n = x.shape[0]
        table = {n: "own", 6: "six"}
        letters = "abcdefghijklmnop"
        return (
            x * len(table),
            f"{n} rows",
            "%d" % n,
            letters[n],
            n in (5, 6),
            table.get(6),
            sorted([n, 7, 5]),
            [0] * n,
            str(n),
            float(n),
            hash(n),
            (n, 7) < (7, n),
            math.sqrt(n),
            n / 2,
            n**2,
            n & 3,
            round(n),
            list(range(n)),
            {n, 6, 7} == {6, 7},
            n.bit_length(),
        )

    f = s.root(f)
    with torch.no_grad():
        for n in (4, 6, 6, 7, 5, 4, 9, 6, 7):
            s.call(f, torch.randn(n, 3))


@program(PROGRAMS, "C code computes with sizes that it hands on elsewhere")
def _(s: Session) -> None:
    class Kind(enum.Enum):
        FOUR, SIX, SEVEN = 4, 6, 7

    class Number(int):
        pass

    class Even(type):
        def __instancecheck__(cls, value):
            return value % 2 == 0

    class EvenNumber(metaclass=Even):
        pass

    def f(x):
        n = x.shape[0]
        counted = [i for i, _ in enumerate("ab", n)]
        own = int.__new__(Number, n)
        called = iter([2, 4, 6, 7, 2].copy().pop, n)
        return (
            x * counted[1],
            Kind(n).name,
            own + 1,
            int("12", n + 3),
            isinstance(n, EvenNumber),
            slice(0, n).indices(100),
            [4, 6, 7].index(n),
            list(called) if n == 2 else None,
        )

    f = s.root(f)
    with torch.no_grad():
        for n in (4, 6, 6, 7, 4, 7, 6):
            s.call(f, torch.randn(n, 3))


# What C code makes of sizes that functions and iterators give it while it runs, or later.
SEEN_BY_C: dict[str, Any] = {
    "sorted, with a lambda": lambda xs: sorted(xs, key=lambda t: t.shape[0])[0],
    "sorted, with len": lambda xs: sorted(xs, key=len)[0],
    "sorted, with a getter": lambda xs: sorted(xs, key=operator.attrgetter("shape"))[0],
    "sorted, of a generator": lambda xs: xs[0] * sorted(t.shape[0] for t in xs)[0],
    "max, with len": lambda xs: max(xs, key=len),
    "max, of a generator": lambda xs: xs[0] * max(t.shape[0] for t in xs),
    "min, of a map": lambda xs: xs[0] * min(map(len, xs)),
    "sort, with a lambda": lambda xs: _sorted_in_place(xs)[0],
    "filter, with a lambda": lambda xs: [t * 2 for t in filter(lambda t: t.shape[0] - 5, xs)],
    "filter, of a generator": lambda xs: xs[0] * len(list(filter(None, (len(t) - 5 for t in xs)))),
    "a set of a generator": lambda xs: xs[0] * len({*(len(t) for t in xs)}),
    "a set": lambda xs: xs[0] * len(set(len(t) for t in xs)),  # noqa: C401
    "a dict of a generator": lambda xs: xs[0] * len(dict((len(t), 1) for t in xs)),  # noqa: C402
    "in a generator": lambda xs: xs[0] * (6 in (len(t) for t in xs)),
    "takewhile": lambda xs: list(itertools.takewhile(lambda t: t.shape[0] - 5, xs)),
    "dropwhile": lambda xs: list(itertools.dropwhile(lambda t: t.shape[0] - 5, xs)),
    "filterfalse": lambda xs: list(itertools.filterfalse(lambda t: t.shape[0] - 5, xs)),
    "compress": lambda xs: list(itertools.compress(xs, (len(t) - 5 for t in xs))),
    "groupby": lambda xs: [len(list(g)) * xs[0] for _, g in itertools.groupby(xs, len)],
    "until a sentinel": lambda xs: xs[0] * len(list(iter([len(t) for t in xs].pop, 6))),
    "text of a generator": lambda xs: (xs[0] * 2, ",".join(str(len(t)) for t in xs)),
    "any and all": lambda xs: xs[0] * any(len(t) > 5 for t in xs) * all(len(t) > 4 for t in xs),
    "a length method": lambda xs: xs[0] * len(_Rows(xs[1])),
    "a truth method": lambda xs: xs[0] * (2 if _Rows(xs[1]) else 3),
    "an index method": lambda xs: (xs[0], list(range(9))[_Rows(xs[1])]),
    "floor division of a size": lambda xs: xs[0].shape[0] // (xs[1].abs() + 1),
}


class _Rows:
    """What C code asks of an object with a tensor."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return self.x.shape[0] - 4

    def __index__(self) -> int:
        return self.x.shape[0] - 4


def _sorted_in_place(xs: list[torch.Tensor]) -> list[torch.Tensor]:
    xs = list(xs)
    xs.sort(key=lambda t: t.shape[0])
    return xs


def _seen_by_c(name: str) -> None:
    @program(PROGRAMS, f"sizes seen by C code: {name}", expect=ANY)
    def _(s: Session) -> None:
        compute = SEEN_BY_C[name]

        class Pair:
            """Holds tensors that nothing has read before the C code runs."""

            xs: list[torch.Tensor]

        pair = Pair()

        def direct(x, y):
            return compute([x, y])

        def late():
            return compute(pair.xs)

        direct, late = s.root(direct), s.root(late)
        with torch.no_grad():
            for a, b in ((4, 4), (7, 8), (7, 8), (8, 7), (6, 9), (9, 6), (5, 6), (6, 5), (4, 4)):
                s.call(direct, torch.randn(a, 3), torch.randn(b, 3))
                pair.xs = [torch.randn(a, 3), torch.randn(b, 3)]
                s.call(late)


for _name in SEEN_BY_C:
    _seen_by_c(_name)


@program(
    PROGRAMS,
    "sizes through map, zip, sum, reduce and prod",
    expect=EAGER,
    reason="C code reads a generator that may give sizes",
)
def _(s: Session) -> None:
    def f(x):
        shape = x.shape
        doubled = list(map(lambda n: n * 2, shape))
        pairs = [a + b for a, b in zip(shape, doubled, strict=True)]
        largest = max(n for n in shape)
        total = functools.reduce(operator.mul, shape, 1)
        return x * total, pairs, sum(shape), math.prod(shape), largest, shape.numel()

    f = s.root(f)
    with torch.no_grad():
        for a, b in ((4, 3), (6, 3), (7, 3), (2, 3), (9, 8), (7, 3)):
            s.call(f, torch.randn(a, b))


@program(PROGRAMS, "shapes are compared")
def _(s: Session) -> None:
    def f(x, y):
        if x.shape == y.shape:
            return x + y
        if x.shape[:-1] != y.shape[:-1]:
            return x.sum()
        return x.mean() + y.mean()

    f = s.root(f)
    pairs = [((4, 3), (4, 3)), ((6, 3), (6, 3)), ((7, 3), (7, 3))]
    opened(s, f, *((torch.randn(a), torch.randn(b)) for a, b in pairs))
    with torch.no_grad():
        for a, b in (((7, 3), (6, 3)), ((8, 3), (9, 3)), ((6, 3), (6, 4)), ((8, 3), (8, 2))):
            s.call(f, torch.randn(a), torch.randn(b))


@program(PROGRAMS, "identity of small sizes")
def _(s: Session) -> None:
    def f(x, y):
        n = x.shape[0]
        return x * 2, n is y.shape[0], n is not None

    f = s.root(f)
    with torch.no_grad():
        for a, b in ((4, 4), (6, 6), (7, 7), (7, 8), (8, 8), (5, 9)):
            for _ in range(3):
                s.call(f, torch.randn(a, 2), torch.randn(b, 2))


@program(PROGRAMS, "named tuples, slices and default dicts of sizes")
def _(s: Session) -> None:
    Pair = collections.namedtuple("Pair", "n y")

    def f(x):
        n = x.shape[0]
        pair = Pair(n, x[slice(0, n - 1)])
        groups = collections.defaultdict(list)
        groups["n"].append(n)
        return pair, dict(groups), pair.y * pair.n

    opened(s, s.root(f), *rows(4, 6, 9, 3))


@program(PROGRAMS, "dynamic=True opens at once")
def _(s: Session) -> None:
    f = s.root(lambda x: torch.softmax(x, -1) * x.shape[0], dynamic=True)
    with torch.no_grad():
        s.call(f, torch.randn(4, 6))
        for a, b in ((5, 7), (9, 2), (3, 40)):
            s.hit(f, torch.randn(a, b))


@program(PROGRAMS, "dynamic=False never opens")
def _(s: Session) -> None:
    f = s.root(lambda x: x * 2, dynamic=False)
    with torch.no_grad():
        for n in (4, 5, 6):
            s.miss(f, torch.randn(n, 6))
            s.call(f, torch.randn(n, 6))
            s.hit(f, torch.randn(n, 6))


@program(PROGRAMS, "mark_dynamic and mark_static")
def _(s: Session) -> None:
    import accel

    f, g = s.root(lambda x: x * x.shape[0]), s.root(lambda x: x + x.shape[0])
    marked, fixed = torch.randn(4, 6), torch.randn(4, 6)
    accel.mark_dynamic(marked, 0)
    accel.mark_static(fixed)
    with torch.no_grad():
        s.call(f, marked)
        s.hit(f, torch.randn(9, 6))
        s.miss(f, torch.randn(9, 7))
        for n in (4, 5, 6):
            x = torch.randn(n, 6)
            accel.mark_static(x, 0)
            s.miss(g, x)


@program(PROGRAMS, "a changing batch while gradients are recorded")
def _(s: Session) -> None:
    model = torch.nn.Linear(6, 3)
    f = s.root(lambda x: model(x).relu().sum())
    for n in (4, 6, 9, 4, 6, 9):
        s.call(f, torch.randn(n, 6)).backward()
    with torch.no_grad():
        for n in (5, 7):
            s.call(f, torch.randn(n, 6))
        s.hit(f, torch.randn(8, 6))


@program(PROGRAMS, "random numbers of an open size", expect=ANY)
def _(s: Session) -> None:
    f = s.root(lambda x: F.dropout(x, 0.5) + torch.rand(x.shape[0], 1))
    with torch.no_grad():
        for n in (4, 6, 9, 3):
            s.call(f, torch.randn(n, 6))


@program(PROGRAMS, "bfloat16 and integers of an open size")
def _(s: Session) -> None:
    def f(x, i):
        n = i.shape[0]
        return (x.bfloat16() * n).float(), i * n + n, i // 2, i.float() / n, i[:n] == n

    calls = ((torch.randn(n, 6), torch.randint(0, 9, (n,))) for n in (4, 6, 9, 300))
    opened(s, s.root(f), *calls)


@program(PROGRAMS, "an embedding and gather over changing lengths")
def _(s: Session) -> None:
    table = torch.nn.Embedding(50, 8)

    def f(ids):
        h = table(ids) + torch.arange(ids.shape[1]).unsqueeze(-1)
        return h, torch.gather(h, 1, torch.zeros(ids.shape[0], 1, 8, dtype=torch.int64))

    shapes = [(2, 4), (3, 6), (2, 7), (5, 33)]
    opened(s, s.root(f), *((torch.randint(0, 50, shape),) for shape in shapes))


@program(PROGRAMS, "einsum, chunk and repeat of open sizes")
def _(s: Session) -> None:
    def f(x):
        a, b = x.chunk(2, dim=-1)
        both = torch.einsum("bi,bj->bij", a, b)
        return both, x.repeat(2, 1), x.unsqueeze(1).repeat(1, x.shape[0], 1), x.split(4, 1)

    opened(s, s.root(f), *rows(4, 6, 9, 3, width=8))


@program(PROGRAMS, "chunks of an open size are as many as there were", expect=ANY)
def _(s: Session) -> None:
    f = s.root(lambda x: [c * 2 for c in x.split(2)] + list(x.chunk(3)))
    with torch.no_grad():
        for n in (4, 6, 7, 9, 3, 2, 5, 6):
            s.call(f, torch.randn(n, 3))


@program(PROGRAMS, "a squeeze of what may be one")
def _(s: Session) -> None:
    f = s.root(lambda x: (x[: x.shape[0] // 2].squeeze(0), x[1:].squeeze(0) + 1))
    with torch.no_grad():
        for n in (4, 6, 8, 3, 2, 9, 1, 3):
            s.call(f, torch.randn(n, 3))


@program(PROGRAMS, "sizes that become empty")
def _(s: Session) -> None:
    def f(x):
        rest = x[4:]
        return rest.sum(), rest * 2, torch.cat([rest, x]), rest.shape[0]

    f = s.root(f)
    with torch.no_grad():
        for n in (7, 6, 9, 4, 5, 3, 2, 100):
            s.call(f, torch.randn(n, 3))


@program(PROGRAMS, "BERT over growing sentences")
def _(s: Session) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    f = s.root(BertModel(config).eval())
    opened(s, f, *((torch.randint(0, 50, (2, n)),) for n in (5, 8, 9, 2, 40)))


@program(PROGRAMS, "GPT-2 over growing texts and batches")
def _(s: Session) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)).eval()
    f = s.root(model)
    with torch.no_grad():
        for b, n in ((2, 5), (3, 8), (3, 8)):
            s.call(f, torch.randint(0, 50, (b, n)), use_cache=False)
        for b, n in ((4, 9), (2, 2), (5, 40)):
            s.hit(f, torch.randint(0, 50, (b, n)), use_cache=False)


@program(PROGRAMS, "Llama decodes with a growing cache")
def _(s: Session) -> None:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = s.root(LlamaForCausalLM(config).eval())

    def step(ids, cache):
        return model(ids, past_key_values=cache).logits

    cache = DynamicCache(config=config)
    with torch.no_grad():
        s.call(step, torch.randint(0, 50, (2, 6)), cache)
        for _ in range(5):
            s.call(step, torch.randint(0, 50, (2, 1)), cache)
        for _ in range(6):
            s.hit(step, torch.randint(0, 50, (2, 1)), cache)


@program(PROGRAMS, "sizes in containers that hold each other and themselves", expect=ANY)
def _(s: Session) -> None:
    def f(x, shared):
        n = x.shape[0]
        parts = [n, shared]
        for _ in range(30):
            parts = [parts, parts]
        ring = [n]
        ring += [ring, ring]
        return torch.relu(x) * n, len(ring), len(parts), "%d" % len(ring)

    f = s.root(f)
    shared: list[object] = [1]
    shared += [shared, shared]
    for rows in (3, 3, 4, 5, 4, 6):
        s.call(f, torch.linspace(-1, 1, rows), shared)


@program(PROGRAMS, "roll over changing lengths")
def _(s: Session) -> None:
    def f(x):
        return x.roll(1, 0) + x.roll(-2, 0) * 2

    f = s.root(f)
    for n in (5, 6):
        s.call(f, torch.randn(n, 3))
        s.call(f, torch.randn(n, 3))
    s.call(f, torch.randn(7, 3))
    s.hit(f, torch.randn(9, 3))
    s.hit(f, torch.randn(12, 3))
    for n in (2, 1, 0):
        s.call(f, torch.randn(n, 3))


@program(PROGRAMS, "sizes that the graph's own rules make equal: results are no views")
def _(s: Session) -> None:
    def f(x, i):
        return x.gather(0, i), torch.take_along_dim(x, i, 1), x + i

    f = s.root(f)

    def facts(x, i):
        results = f(x, i)
        return results, [(t._base is None, t._is_view(), t.storage_offset()) for t in results]

    with torch.no_grad():
        for n in (4, 5, 4, 5, 6, 7, 9):
            for _ in range(2):
                s.call(facts, torch.randn(n, n), torch.randint(0, n, (n, n)))
