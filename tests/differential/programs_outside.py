"""What lies outside and is reached through C code: bound methods, C objects, memoised values, what
callbacks give; and containers and variables from outside that a call writes and reads again."""

from __future__ import annotations

import array
import bisect
import collections
import datetime
import decimal
import fractions
import functools
import heapq
import io
import itertools
import operator
import pathlib
import random
import string
import types

import numpy as np
import torch
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []
LIST = []
TABLE = {"a": 2.0}
NAMES = {"x"}
DQ = collections.deque()
G_APPEND = LIST.append
G_GET = TABLE.get
G_HAS = NAMES.__contains__
G_SET = TABLE.__setitem__
G_ITEM = TABLE.__getitem__


class A:
    log = LIST.append
    look = TABLE.get
    put = TABLE.__setitem__

    def __init__(s, l):
        s.l = l
        s.add = l.append
        s.pop = l.pop


@program(PROGRAMS, "methods of containers bound outside", expect=ANY, runs=21)
def _(s: Session) -> None:
    LIST.clear()
    TABLE.clear()
    TABLE["a"] = 2.0
    NAMES.clear()
    NAMES.add("x")
    DQ.clear()
    s.watch(LIST)
    s.watch(TABLE)
    s.watch(NAMES)
    s.watch(DQ)
    own = s.watch([])
    add = own.append
    cnt = s.watch(collections.Counter())
    upd = cnt.update
    mod = s.watch([0.0])
    a = A(s.watch([]))
    part = functools.partial(own.append, 7)
    tb = {"f": own.append}
    ls = [own.append, own.extend]

    def by_closure(x):
        add(1)
        return x + len(own)

    def by_global(x):
        G_APPEND(2)
        return x * G_GET("a")

    def by_item(x):
        return x * G_ITEM("a")

    def by_slot(x):
        G_SET("a", 5.0)
        return x * TABLE["a"]

    def by_has(x):
        return x + (1 if G_HAS("y") else 0)

    def by_default(x, log=own.append, *, get=TABLE.get):
        log(3)
        return x * get("a", 1)

    def by_attr(x):
        a.add(x)
        return x + 1

    def by_class(x):
        a.log(4)
        A.log(5)
        return x * a.look("a")

    def by_class_slot(x):
        a.put("b", 1.0)
        return x

    def by_partial(x):
        part()
        return x + 1

    def by_dict(x):
        tb["f"](8)
        ls[0](9)
        return x - 1

    def by_arg(x, cb):
        cb(10)
        return x - 1

    def by_map(x):
        list(map(add, [1, 2]))
        return x * sum(map(G_GET, ["a", "a"]))

    def by_key(x):
        return x * len(sorted(["a", "b"], key=G_GET if "b" in TABLE else len))

    def by_self(x):
        G_APPEND.__self__.append(3)
        return x + len(add.__self__)

    def by_method_type(x):
        return x + types.MethodType(list.append, own)(4) if False else x

    def by_counter(x):
        upd("ab")
        return x

    fs = [
        s.root(f)
        for f in (
            by_closure,
            by_global,
            by_item,
            by_slot,
            by_has,
            by_default,
            by_attr,
            by_class,
            by_class_slot,
            by_partial,
            by_dict,
            by_map,
            by_key,
            by_self,
            by_counter,
        )
    ]
    by_arg = s.root(by_arg)
    for r in range(6):
        if r == 3:
            TABLE["a"] = 3.0
            NAMES.add("y")
            own.append(99)
        for f in fs:
            s.call(f, torch.ones(2))
        s.call(by_arg, torch.ones(2), own.append)
        s.call(by_arg, torch.ones(2), add)
        s.call(by_arg, torch.ones(2), LIST.append)
        if r > 3:
            s.call(by_arg, torch.ones(2), own.remove)
            s.call(by_arg, torch.ones(2), DQ.append)
            s.call(by_arg, torch.ones(2), NAMES.add)


@program(PROGRAMS, "bound methods of other things", expect=ANY, runs=1)
def _(s: Session) -> None:
    gen = (i for i in range(100))
    nxt = gen.__next__
    it = iter(range(100))
    step = it.__next__
    rng = random.Random(3)
    draw = rng.random
    t = torch.zeros(2)
    acc = t.add_
    fmt = "{:.1f}".format
    join = "-".join
    bits = bytearray()
    bapp = bits.extend

    def f1(x):
        return x + nxt()

    def f2(x):
        return x + step()

    def f3(x):
        return x + draw()

    def f4(x):
        acc(x)
        return x * t

    def f5(x, k):
        return x, fmt(k), join(["a", str(k)])

    def f6(x):
        bapp(b"a")
        return x + len(bits)

    fs = [s.root(f) for f in (f1, f2, f3, f4, f6)]
    f5 = s.root(f5)
    for r in range(5):
        for f in fs:
            s.call(f, torch.ones(2))
        s.call(f5, torch.ones(2), 1.0)
        s.call(lambda: (t.clone(), len(bits)))
        if r == 3:
            t.mul_(2)


@program(PROGRAMS, "objects of C code from outside", expect=ANY, runs=35)
def _(s: Session) -> None:
    TABLE.clear()
    TABLE["a"] = 2.0
    bits = bytearray(b"a")
    arr = array.array("d", [1.0, 2.0])
    mv = memoryview(bits)
    buf = io.StringIO("abc")
    day = [datetime.date(2020, 1, 1)]
    dec = [decimal.Decimal("1.5")]
    frac = [fractions.Fraction(1, 2)]
    path = [pathlib.PurePosixPath("a/b")]
    npa = np.arange(3.0)
    ud = collections.UserDict(a=1)
    ul = collections.UserList([1])
    us = collections.UserString("ab")
    tmpl = string.Template("$a")
    ch = collections.ChainMap({"a": 1}, {"b": 2})
    big = [10**30]
    mp = types.MappingProxyType(TABLE)
    rows = [
        lambda x: x + len(bits),
        lambda x: x + (1 if bits else 2),
        lambda x: x + len(arr),
        lambda x: x + arr[0],
        lambda x: x + sum(arr),
        lambda x: x + len(mv),
        lambda x: x + mv[0],
        lambda x: x + day[0].year,
        lambda x: x + (day[0] > datetime.date(2021, 1, 1)),
        lambda x: x + float(dec[0]),
        lambda x: x + frac[0].numerator,
        lambda x: x + len(path[0].parts),
        lambda x: x + len(npa),
        lambda x: x + npa[0],
        lambda x: x + npa.sum(),
        lambda x: x + ud["a"],
        lambda x: x + len(ud),
        lambda x: x + ul[0] + len(ul),
        lambda x: x + len(us),
        lambda x: x + (2 if us else 3),
        lambda x: x + ch["a"] + len(ch),
        lambda x: x + len(mp) + mp["a"],
        lambda x: x + ("b" in ud) + ("b" in ch),
        lambda x: x + buf.tell(),
        lambda x: x + (bits == b"a"),
        lambda x: x + (1 if dec[0] else 0),
        lambda x: x + int(dec[0] * 2),
        lambda x: x + hash(day[0]) % 7,
        lambda x: x + max(arr),
        lambda x: x + len(list(ud.items())) + sum(ul),
        lambda x: x + (97 in bits) + bits.count(b"a"),
        lambda x: x + len(bytes(bits)),
        lambda x: x + len(set(arr)) + len(sorted(ul)),
        lambda x: x + sorted(arr)[-1],
        lambda x: x + sum(a * b for a, b in zip(arr, [1.0, 2.0])),
        lambda x: x + [*arr][0],
        lambda x: x + len(list(bits)),
        lambda x: x + len({**ud}),
        lambda x: x + min(arr, key=lambda v: -v),
        lambda x: x + dict(enumerate(arr))[0],
        lambda x: x + any(v > 5 for v in arr),
        lambda x: x + torch.tensor(list(arr)).sum(),
        lambda x: x + len("".join(map(str, arr))),
        lambda x: x + len(f"{day[0]}{dec[0]}{path[0]}"),
        lambda x: x + len(str(arr)),
        lambda x: x + (arr[0] if arr[0:1] else 0),
        lambda x: x + torch.tensor(npa.tolist()).sum(),
    ]
    fs = [s.root(f) for f in rows]
    for r in range(5):
        for f in fs:
            s.call(f, torch.ones(2))
        if r == 3:
            mv.release()
            bits.extend(b"bc")
            mv = memoryview(bits)
            arr.append(5.0)
            arr[0] = 7.0
            day[0] = datetime.date(2022, 1, 1)
            dec[0] = decimal.Decimal("2.5")
            frac[0] = fractions.Fraction(3, 2)
            path[0] = pathlib.PurePosixPath("a/b/c")
            npa[0] = 9.0
            ud["a"] = 4
            ud["b"] = 2
            ul[0] = 5
            ul.append(6)
            us.data = ""
            ch["a"] = 9
            ch["c"] = 1
            TABLE["a"] = 8.0
            TABLE["z"] = 1
            buf.read()


@program(PROGRAMS, "lru caches of several kinds, cleared", expect=ANY, runs=24)
def _(s: Session) -> None:
    cfg = {"m": 2.0}

    @functools.lru_cache
    def a(k):
        return k * cfg["m"]

    @functools.cache
    def b(k, j):
        return torch.full((2,), float(k * j)) * cfg["m"]

    @functools.lru_cache(maxsize=1)
    def c(k):
        return [k * cfg["m"]]

    @functools.lru_cache(maxsize=0)
    def d(k):
        return k * cfg["m"]

    @functools.lru_cache(typed=True)
    def e(k):
        return k * cfg["m"]

    class M:
        @functools.lru_cache
        def g(self, k):
            return k * cfg["m"]

        @functools.lru_cache
        def h(self):
            return cfg["m"]

    m = M()

    @functools.cache
    def z():
        return cfg["m"]

    @functools.cache
    def none():
        return None

    rows = [
        lambda x: x + a(2),
        lambda x: x + b(2, 3),
        lambda x: x + c(2)[0],
        lambda x: x + d(2),
        lambda x: x + e(2),
        lambda x: x + m.g(2) + m.h(),
        lambda x: x + z(),
        lambda x: x + a(k=2),
        lambda x: x * 2 if none() is None else x + 1,
        lambda x: x + a(k=3) + e(k=2.0),
        lambda x: x + a(1.5) + a("a" * 2).__len__() if False else x + a(1.5),
    ]
    fs = [s.root(f) for f in rows]
    for r in range(10):
        for f in fs:
            s.call(f, torch.ones(2))
        if r == 4:
            cfg["m"] = 5.0
        if r == 6:
            for f in (a, b, c, d, e, M.g, M.h, z):
                f.cache_clear()
        if r == 7:
            c(9)
            cfg["m"] = 7.0
        if r == 8:
            a.cache_clear()
            a(2)


class S:
    def __init__(s, w, b):
        s.w = w
        s.b = b

    def __lt__(s, o):
        return s.w < o.w

    def __eq__(s, o):
        return s.w == o.w

    def __hash__(s):
        return hash(s.w)

    def __len__(s):
        return s.w

    def __bool__(s):
        return s.w > 2

    def __index__(s):
        return s.w

    def __float__(s):
        return float(s.w)

    def __contains__(s, v):
        return v == s.w


COMPARED = {
    "sorted key": lambda ss, x: x * sorted(ss, key=lambda s: s.w)[0].b,
    "sort key": lambda ss, x: (lambda l: (l.sort(key=lambda s: s.w), x * l[0].b)[1])(list(ss)),
    "attrgetter": lambda ss, x: x * sorted(ss, key=operator.attrgetter("w"))[0].b,
    "key tuple": lambda ss, x: x * sorted(ss, key=lambda s: (s.w, s.b))[0].b,
    "min key": lambda ss, x: x * min(ss, key=lambda s: s.w).b,
    "max gen": lambda ss, x: x * max(s.w for s in ss),
    "min map": lambda ss, x: x * min(map(lambda s: s.w, ss)),
    "sorted gen": lambda ss, x: x * sorted(s.w for s in ss)[0],
    "sorted lt": lambda ss, x: x * sorted(ss)[0].b,
    "filter": lambda ss, x: x * (1 + len(list(filter(lambda s: s.w - 3, ss)))),
    "filter bool": lambda ss, x: x * (1 + len(list(filter(None, ss)))),
    "takewhile": lambda ss, x: x * (1 + len(list(itertools.takewhile(lambda s: s.w > 2, ss)))),
    "takewhile num": lambda ss, x: x * (1 + len(list(itertools.takewhile(lambda s: s.w - 3, ss)))),
    "dropwhile": lambda ss, x: x * (1 + len(list(itertools.dropwhile(lambda s: s.w > 2, ss)))),
    "groupby": lambda ss, x: x * len(list(itertools.groupby(ss, key=lambda s: s.w))),
    "groupby plain": lambda ss, x: x * len(list(itertools.groupby(s.w for s in ss))),
    "set gen": lambda ss, x: x * len(set(s.w for s in ss)),
    "in gen": lambda ss, x: x * (1 + (3 in (s.w for s in ss))),
    "heap": lambda ss, x: (lambda h: (heapq.heapify(h), x * heapq.heappop(h)[0])[1])(
        [(s.w, i) for i, s in enumerate(ss)]
    ),
    "bisect key": lambda ss, x: x * (1 + bisect.bisect(ss, 3, key=lambda s: s.w)),
    "compress": lambda ss, x: x * (1 + len(list(itertools.compress("ab", (s.w - 3 for s in ss))))),
    "iter sent": lambda ss, x: x * (1 + len(list(itertools.islice(iter(lambda: ss[0].w, 9), 2)))),
    "getattr": lambda ss, x: x * sorted(ss, key=lambda s: getattr(s, "w"))[0].b,
    "vars": lambda ss, x: x * sorted(ss, key=lambda s: vars(s)["w"])[0].b,
    "dictget": lambda ss, x: x * sorted(ss, key=lambda s: vars(s).get("w"))[0].b,
    "cmp": lambda ss, x: x * sorted(ss, key=functools.cmp_to_key(lambda a, b: a.w - b.w))[0].b,
}


def add(name, compared):
    @program(PROGRAMS, f"changing numbers that C code compares: {name}", expect=ANY)
    def _(s: Session) -> None:
        ss = [S(3, 0.5), S(1, 0.25)]

        def f(x):
            return compared(ss, x)

        f = s.root(f)
        for a, b in ((3, 1), (3, 1), (4, 2), (5, 2), (6, 3), (1, 9), (9, 1), (3, 3), (9, 9)):
            ss[0].w, ss[1].w = a, b
            s.call(f, torch.ones(2))


for name, compared in COMPARED.items():
    add(name, compared)


class Keep:
    def __init__(self):
        self.d, self.l, self.counts, self.steps = {"c": 0}, [], [0], 0


def keep_by_get(n, x):
    n.d["c"] = n.d.get("c", 0) + 1
    return x * n.d["c"]


def keep_by_getattr(n, x):
    setattr(n, "steps", getattr(n, "steps", 0) + 1)
    return x * n.steps


def keep_in_a_list(n, x):
    n.counts[-1] += 1
    return x * n.counts[0] + len(n.counts)


def keep_in_new_keys(n, x):
    for q in range(3):
        n.d[q] = n.d.get(q, 0.0) + q
    return x + n.d[2] + len(n.d) + sum(n.d.values())


def overwrite_unread(n, x):
    n.d["c"] = x.size(0)
    n.counts[0] = 7
    return x + sum(n.counts) + max(n.d.values())


COUNTING = (keep_by_get, keep_by_getattr, keep_in_a_list, keep_in_new_keys, overwrite_unread)


def add_counting(step):
    @program(PROGRAMS, f"numbers kept in containers: {step.__name__}")
    def _(s: Session) -> None:
        n = s.watch(Keep())
        f = s.root(lambda x: step(n, x))
        for _ in range(6):
            s.call(f, torch.randn(2))
        s.hit(f, torch.randn(2))
        n.d.clear()
        n.counts.append(5)
        for _ in range(3):
            s.call(f, torch.randn(2))


for step in COUNTING:
    add_counting(step)


def append_then_len(n, x):
    n.l.append(x.sum())
    return x * 2 if len(n.l) > 100 else x + 1


def len_then_append(n, x):
    y = x * 2 if len(n.l) > 100 else x + 1
    n.l.append(y.sum())
    return y


def last_three(n, x):
    n.l.append(x.sum())
    return x + torch.stack(n.l[-3:]).mean()


def under_its_number(n, x):
    n.d[len(n.d)] = x * 2
    return x + 1


GROWING = (append_then_len, len_then_append, last_three, under_its_number)


def add_growing(step):
    @program(PROGRAMS, f"a container that grows at each call: {step.__name__}", expect=ANY, runs=3)
    def _(s: Session) -> None:
        n = s.watch(Keep())

        def f(x):
            y = x.tanh() * 2
            y = step(n, y)
            return y.sin() + 1

        f = s.root(f)
        for _ in range(16):
            s.call(f, torch.randn(2))


for step in GROWING:
    add_growing(step)


@program(PROGRAMS, "the newest three of a bounded history")
def _(s: Session) -> None:
    history = s.watch([torch.zeros(()), torch.zeros(())])

    def f(x):
        recent = [*history, x.mean()]
        history[0], history[1] = history[1], x.mean()
        return x - torch.stack(recent).mean(), len(history), history[0] is history[-1]

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))
    history.append(torch.ones(()))
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "a list is written, read whole and compared")
def _(s: Session) -> None:
    marks, table = s.watch([1, 2, 3]), s.watch({"a": 1.0, "b": 2.0})

    def f(x):
        marks[1] = 5
        marks.append(7)
        table["b"] = 4.0
        table["c"] = 6.0
        y = x * sum(marks) + marks.index(7) + (5 in marks) + (marks == [1, 5, 3, 7])
        del_last = marks[:-1]
        return y + len(del_last) + sum(table.values()) + list(table).index("c") + (marks[-1] == 7)

    f = s.root(f)
    for _ in range(2):
        s.call(f, torch.ones(2))
        marks[:], table["b"] = [1, 2, 3], 2.0
        table.pop("c")
    s.hit(f, torch.ones(2))
    s.miss(f, torch.ones(2))
    marks[:] = [1, 9, 3]
    s.call(f, torch.ones(2))
    marks[:] = [2, 9, 3]
    table.pop("a")
    s.miss(f, torch.ones(2))


@program(PROGRAMS, "a bounded deque made in the trace")
def _(s: Session) -> None:
    def f(x, n):
        recent = collections.deque((x * k for k in range(4)), maxlen=n)
        recent.append(x)
        return recent, sum(recent)

    f = s.root(f)
    s.warm(f, torch.randn(2), 2)
    s.hit(f, torch.randn(2), 2)
    s.call(f, torch.randn(2), 3)


COUNT, LATEST = 0, None


@program(PROGRAMS, "variables of the module and of enclosing functions are written")
def _(s: Session) -> None:
    s.patch(globals(), "COUNT", 0)
    s.patch(globals(), "LATEST", None)
    total, best = 0, None

    def count(x):
        global COUNT, LATEST
        COUNT += 1
        LATEST = x * COUNT
        return LATEST + COUNT

    def keep(x):
        nonlocal total, best
        total += 2
        best = x if best is None else torch.maximum(best, x)
        return best * total

    state = s.watch([])
    count, both = s.root(count), s.root(lambda x: keep(x) + keep(x * 2))
    for k in range(9):
        s.call(count, torch.randn(2))
        s.call(both, torch.randn(2))
        state[:] = [COUNT, LATEST, total, best]
        if k == 5:
            globals()["COUNT"], best = 100, torch.zeros(2)
    s.hit(count, torch.randn(2))
    s.hit(both, torch.randn(2))


def shared_and_not():
    level = 1.0

    def up(x):
        nonlocal level
        level = level * 2
        return x * level

    def read(x):
        return x + level

    return up, read


@program(
    PROGRAMS,
    "one function writes a variable that another one reads, or another's",
    expect=ANY,
    runs=4,
)
def _(s: Session) -> None:
    def f(up, read, x):
        y = read(x)
        y = up(y)
        return read(y), y

    f = s.root(f)
    (up, read), (other_up, other_read) = shared_and_not(), shared_and_not()
    for k in range(12):
        pair = [(up, read), (up, other_read), (other_up, read)][k // 4]
        s.call(f, *pair, torch.ones(2))


@program(PROGRAMS, "a pattern takes a changing number apart", runs=3, expect=ANY)
def _(s: Session) -> None:
    class Machine:
        def __init__(self):
            self.t, self.phase = 0, "warm"

        def step(self, x):
            self.t += 1
            match self.phase, self.t:
                case "warm", t if t >= 3:
                    self.phase = "main"
                case "main", int(t) if t > 6:
                    x = x + t
            return x * self.t

    m = s.watch(Machine())
    f = s.root(m.step)
    for _ in range(14):
        s.call(f, torch.randn(3))


@program(PROGRAMS, "an average of weights whose decay depends on the step", runs=5, expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 3)
    shadow = s.watch({n: p.detach().clone() for n, p in net.named_parameters()})
    state = s.watch({"n": 0})

    @torch.no_grad()
    def update():
        state["n"] += 1
        d = min(0.99, (1 + state["n"]) / (10 + state["n"]))
        for n, p in net.named_parameters():
            shadow[n].mul_(d).add_(p, alpha=1 - d)

    update = s.root(update)
    for _ in range(11):
        s.call(update)
