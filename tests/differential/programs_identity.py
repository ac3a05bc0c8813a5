"""Programs in which it is a fact of the answer which object something is: what is hashed, compared,
copied or kept on a class, and the names that objects are given."""

from __future__ import annotations

import copy
import functools

import torch
from harness import Program, Session, program

PROGRAMS: list[Program] = []


class Named:
    def __init__(self, value):
        self.value = value

    def scaled(self, v):
        return v * self.value


class ByValue(Named):
    def __hash__(self):
        return self.value

    def __eq__(self, other):
        return self.value == other.value


def anonymous(k):
    return lambda v: v * k


def local(k):
    def scaled(v):
        return v * k

    return scaled


def each_pair(s, f, one, other, *rest):
    """All ways in which two arguments are one object or two, after a start with each of them."""
    x = torch.ones(3)
    for a, b in ((one, one), (other, one)):
        for _ in range(3):
            s.call(f, x, a, b, *rest)
    s.call(f, x, one, other, *rest)
    s.hit(f, x, one, one, *rest)
    s.call(f, x, other, other, *rest)
    s.hit(f, x, other, one, *rest)


@program(PROGRAMS, "a function on a class that is also an argument")
def _(s: Session) -> None:
    for make in (anonymous, local):
        one, other = make(2), make(3)

        class Holder:
            static = staticmethod(one)
            held = (one,)

        def f(x, fn, holder=Holder):
            return fn(x) + holder.static(x) + holder.held[0](x)

        f = s.root(f)
        x = torch.ones(3)
        s.warm(f, x, one)
        for fn in (other, one, make(2)):
            s.call(f, x, fn)
            s.call(f, x, fn)


@program(PROGRAMS, "an object on a class that is also an argument, and changes")
def _(s: Session) -> None:
    one = Named(1)

    class Holder:
        config = one

    @functools.lru_cache
    def cached(k):
        return one

    for read in (lambda: Holder.config.value, lambda: cached(1).value):
        f = s.root(lambda x, config, read=read: x + config.value * 10 + read())
        x = torch.ones(3)
        one.value = 1
        s.warm(f, x, one)
        s.call(f, x, Named(2))
        s.call(f, x, Named(1))
        s.call(f, x, Named(1))
        one.value = 7
        s.call(f, x, Named(1))
        s.call(f, x, Named(1))


class Hashes:
    """Numbers that differ from run to run, where nobody compares them."""

    of: tuple[int, ...] = ()


@program(PROGRAMS, "hashes of functions, objects, methods and bound functions of C")
def _(s: Session) -> None:
    def hashed(x, value):
        return x * 2, [hash(value) == h for h in Hashes.of]

    def hashed_method(x, value):
        return x * 2, [hash(value.scaled) == h for h in Hashes.of]

    s.patch(Hashes, "of", ())
    x, first, second = torch.ones(3), [1], [1]
    pairs = [(anonymous(2), anonymous(2)), (local(2), local(2)), (Named(1), Named(1))]
    pairs += [(first.append, second.append), (Named(1).scaled, Named(1).scaled)]
    pairs += [((Named(1), 2), (Named(1), 2)), (torch.ones(2), torch.ones(2))]
    for one, other in pairs:
        Hashes.of = hash(one), hash(other)
        f = s.root(lambda x, value: hashed(x, value))
        for value in (one,) * 4 + (other,) * 3 + (one,):
            s.call(f, x, value)
    one, other = Named(1), Named(1)
    Hashes.of = hash(one.scaled), hash(other.scaled)
    f = s.root(hashed_method)
    for value in (one,) * 4 + (other,) * 3 + (one,):
        s.call(f, x, value)


def builds(x, a, b):
    added, keyed = set(), {}
    added.add(a)
    added.add(b)
    keyed[a] = 1
    keyed[b] = 2
    updated = {a}
    updated.update((b,))
    merged = {a: 1}
    merged.update({b: 2})
    defaulted = {a: 1}
    defaulted.setdefault(b, 2)
    made = (
        {a, b}, {a: 1, b: 2}, {k for k in (a, b)}, {k: 1 for k in (a, b)}, set([a, b]),
        frozenset(map(lambda v: v, (a, b))), dict.fromkeys([a, b]), dict(zip((a, b), (1, 2))),
        dict([(a, 1), (b, 2)]), {(a, 1), (b, 1)}, {*[a], *[b]}, {**{a: 1}, **{b: 1}},
        {a}.union([b]), {a} & {b}, added, keyed, updated, merged, defaulted,
    )  # fmt: skip
    return x * 2, [len(parts) for parts in made]


def looks_up(x, a, b):
    return x * 2, {a: 1}.get(b, 3), a in {b}, a in {b: 1}, {(a, 1): 2}.get((b, 1), 4)


def compares(x, a, b):
    return x * 2, (a, 1) == (b, 1), [a] == [b], [b, a].index(a), (a, b).count(a), [a] != [b], a == b


@program(PROGRAMS, "sets, dicts and comparisons of objects from outside")
def _(s: Session) -> None:
    x = torch.ones(3)
    for f in (builds, looks_up, compares):
        for one, other in (
            (Named(1), Named(1)),
            (anonymous(1), anonymous(1)),
            (local(1), local(1)),
            (torch.nn.ReLU(), torch.nn.ReLU()),
        ):
            each_pair(s, s.root(lambda x, a, b, f=f: f(x, a, b)), one, other)
    each_pair(s, s.root(looks_up), ByValue(1), ByValue(1))
    each_pair(s, s.root(builds), ByValue(1), ByValue(2))
    f = s.root(lambda x, a, b: (x * 2, len({a, b}), {a: 1}.get(b, 3), len(set([a, b]))))
    each_pair(s, f, torch.ones(2), torch.ones(2))
    each_pair(s, f, [1].append, [1].append)
    f = s.root(lambda x, a, b: (x * 2, len({a.scaled, b.scaled}), {a.scaled: 1}.get(b.scaled, 3)))
    each_pair(s, f, Named(1), Named(1))
    each_pair(s, s.root(lambda x, a, b: (a(x), len({a, b}))), Named(1).scaled, Named(1).scaled)
    s.warm(f, x, Named(3), Named(4))


@program(PROGRAMS, "sets of what lists and iterators give")
def _(s: Session) -> None:
    f = s.root(lambda x, parts: (x * 2, len(set(parts)), len(set(iter(parts))), parts[0](x)))
    x = torch.ones(3)
    one, other = anonymous(2), anonymous(2)
    s.warm(f, x, [one, one])
    for parts in ([one, other], [other, other], [other, one]):
        s.call(f, x, parts)
        s.call(f, x, parts)
    s.hit(f, x, [one, one])


@program(PROGRAMS, "the order of a set of objects")
def _(s: Session) -> None:
    orders = []  # they differ from run to run

    def f(x, parts):
        for part in set(parts):
            x = x * part.value
            orders.append(part.value)
        for part in frozenset(parts):
            orders.append(part.value)
        return x

    f = s.root(f)
    x, parts = torch.ones(3), [Named(k) for k in range(1, 9)]
    for now in [parts] * 4 + [parts[::-1]] * 3 + [[copy.copy(part) for part in parts]] * 3:
        orders.clear()
        s.call(f, x, now)
        assert orders == [part.value for kind in (set, frozenset) for part in kind(now)]
    s.hit(f, x, parts)


@program(PROGRAMS, "deep copies of lists whose items are one object, or two")
def _(s: Session) -> None:
    def f(x, a, b):
        one, other = copy.deepcopy([a, b])
        one.append(2)
        return x * len(one) + len(other)

    each_pair(s, s.root(f), [1], [1])

    def g(x, a, b):
        one, other = copy.deepcopy((a, b))
        one.value = 5
        return x * one.value + other.value

    each_pair(s, s.root(g), Named(1), Named(1))


@program(PROGRAMS, "names and documentation that are assigned")
def _(s: Session) -> None:
    class Renamed(Named):
        pass

    def of_function(x, fn, thing):
        return fn(x), fn.__name__, fn.__qualname__, fn.__doc__, fn.__module__

    def of_class(x, fn, thing):
        words = thing.scaled.__name__, thing.scaled.__doc__
        return thing.scaled(x), words, type(thing).__name__, thing.__class__.__qualname__

    x, thing, one, other = torch.ones(3), Renamed(2), local(2), local(2)
    other.__name__ = "other"
    names = ("__name__", "__qualname__", "__doc__")
    places = [(one, name) for name in (*names, "__module__")]
    for f, places in (
        (of_function, places),
        (of_class, [(Renamed, name) for name in names[:2]]),
        (of_class, [(Named.scaled, name) for name in ("__name__", "__doc__")]),
    ):
        f = s.root(f)
        s.warm(f, x, one, thing)
        for owner, name in places:
            before = getattr(owner, name)
            setattr(owner, name, f"another {name}")
            s.miss(f, x, one, thing)
            s.call(f, x, one, thing)
            setattr(owner, name, before)
            s.hit(f, x, one, thing)
        s.call(f, x, other, thing)


@program(PROGRAMS, "a bound function of C on a class that is also an argument")
def _(s: Session) -> None:
    first, second = s.watch([]), s.watch([])

    class Holder:
        push = first.append

    def f(x, push):
        push(1)
        Holder.push(2)
        return x * 2

    f = s.root(f)
    x = torch.ones(3)
    for push in (first.append,) * 3 + (second.append,) * 3 + (first.append,) * 2:
        s.call(f, x, push)


@program(PROGRAMS, "equal sets in different orders")
def _(s: Session) -> None:
    def loops(x, parts):
        for k in parts:
            x = x * 2 + k
        return x, list(parts)

    def contains(x, parts):
        return x * 2, 8 in parts, parts == {0, 8}, len(parts)

    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    x = torch.ones(3)
    for kind in (set, frozenset):
        f = s.root(lambda x, parts: loops(x, parts))
        s.warm(f, x, kind(one))
        s.miss(f, x, kind(other))
        s.call(f, x, kind(other))
        s.hit(f, x, kind(one))
        f = s.root(lambda x, parts: contains(x, parts))
        s.warm(f, x, kind(one))
        s.hit(f, x, kind(other))

    def pops(x, a, b):
        parts = {a, b}
        return x * parts.pop().value

    def of_locals(x, k):
        return x, [v for v in {k, 0}]

    f = s.root(pops)
    few = [Named(k) for k in range(2, 8)]
    for _ in range(2):
        for a in few[:2]:
            for b in few[2:]:
                order = [v.value for v in {a, b}]
                result = f(x, a, b)
                assert (result == order[0]).all()
    f = s.root(of_locals)
    for k in (8, 8, 8, 16, 24, 1, 0, 8):
        s.call(f, x, k)
