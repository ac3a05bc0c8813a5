"""Changes of lists, deques, dicts and sets from outside, in the middle of compiled code."""

from __future__ import annotations

import collections
import types

import torch
from harness import ANY, Program, Session, program

PROGRAMS: list[Program] = []


def repeat(s, change, make):
    """`change(x, container)` in compiled code (a break would be an error), on new containers."""
    f = s.root(lambda x, c: change(x, c), fullgraph=True)
    x = torch.arange(3.0)
    for _ in range(3):
        s.call(f, x, s.watch(make()))
    s.hit(f, x + 1, s.watch(make()))


def tensors(n=3):
    return [torch.full((3,), float(k)) for k in range(n)]


LISTS = {
    "append": lambda c, v: c.append(v),
    "two appends": lambda c, v: (c.append(v), c.append(v + 1)),
    "extend": lambda c, v: c.extend([v, v + 1]),
    "extend with a tuple": lambda c, v: c.extend((v, 7)),
    "plus": lambda c, v: c.__iadd__([v]),
    "pop": lambda c, v: c.pop(),
    "pop first": lambda c, v: c.pop(0),
    "pop second last": lambda c, v: c.pop(-2),
    "append, pop first": lambda c, v: (c.append(v), c.pop(0)),
    "pop, then read": lambda c, v: (c.pop(0), c[0], c[-1], len(c)),
    "pop what was appended": lambda c, v: (c.append(v), c.pop()),
    "insert": lambda c, v: c.insert(1, v),
    "insert at the end, and far behind": lambda c, v: (c.insert(-1, v), c.insert(99, v + 1)),
    "insert before the start": lambda c, v: (c.insert(-99, v), c[0], c[1]),
    "clear": lambda c, v: c.clear(),
    "clear and fill": lambda c, v: (c.clear(), c.append(v), len(c), c[0]),
    "pop and clear": lambda c, v: (c.pop(), c.clear(), len(c)),
    "append and clear": lambda c, v: (c.append(v), c.clear(), len(c)),
    "reverse": lambda c, v: (c.reverse(), c[0]),
    "delete": lambda c, v: c.__delitem__(1),
    "store after pop": lambda c, v: (c.pop(0), c.__setitem__(0, v), c[0], c[1]),
    "sum after": lambda c, v: (c.append(v), c.pop(0), sum(c[1:], c[0])),
    "loop after": lambda c, v: (c.insert(0, v), [part * 2 for part in c]),
    "loop before": lambda c, v: ([part * 2 for part in c], c.pop()),
}


@program(PROGRAMS, "lists from outside, changed by every method")
def _(s: Session) -> None:
    for change in LISTS.values():
        repeat(s, lambda x, c, change=change: (x * 2, change(c, x + 1), len(c)), tensors)


@program(PROGRAMS, "lists of numbers and words from outside, changed by every method")
def _(s: Session) -> None:
    for name, change in LISTS.items():
        if name == "sum after":
            continue
        for parts in ([1, 2, 3], ["a", "b", "c"]):
            repeat(
                s,
                lambda x, c, change=change: (x * 2, change(c, x + 1), len(c)),
                lambda parts=parts: list(parts),
            )


@program(PROGRAMS, "statements that change lists from outside")
def _(s: Session) -> None:
    def deletes(x, c):
        del c[0]
        c += [x]
        c += (x + 1,)
        return x * 2 + c[0]

    repeat(s, deletes, tensors)

    class Stack(list):
        def top(self):
            return self[-1]

    def of_subclass(x, c):
        c.append(x * 2)
        c += [x]
        del c[0]
        c[0] = x * 3
        return c.top() + c.pop(0), len(c)

    repeat(s, of_subclass, lambda: Stack(tensors()))


@program(PROGRAMS, "methods that a class of the program has put over those of list and dict")
def _(s: Session) -> None:
    class Loud(list):
        def pop(self, index=-1):
            print("pop", index)
            return super().pop(index)

        def __delitem__(self, index):
            print("del", index)
            super().__delitem__(index)

        def __iadd__(self, other):
            print("plus")
            self.extend(other)
            return self

    class Counted(collections.OrderedDict):
        removed = 0

        def pop(self, key, *default):
            self.removed += 1
            return dict.pop(self, key, *default)

        def update(self, other):
            super().update({key: value for key, value in other.items() if key != "b"})

    def of_list(x, c):
        y = c.pop(0) + x
        del c[0]
        c += [x, y]
        return y, len(c)

    def of_dict(x, c):
        y = c.pop("a", 0) + x
        c.update({"b": 5, "z": y})
        return y, c.removed, list(c.items())

    f, g = s.root(of_list), s.root(of_dict)
    for k in range(5):
        s.call(f, torch.full((3,), float(k)), s.watch(Loud(tensors())))
        s.call(g, torch.full((3,), float(k)), s.watch(Counted(a=1, b=torch.ones(3))))


@program(PROGRAMS, "a window over the last results")
def _(s: Session) -> None:
    class Window(torch.nn.Module):
        def __init__(self, history):
            super().__init__()
            self.history = history
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, x):
            y = self.linear(x)
            self.history.append(y.detach())
            if len(self.history) > 3:
                if isinstance(self.history, list):
                    self.history.pop(0)
                else:
                    self.history.popleft()
            return y + torch.stack(list(self.history)).mean(0)

    for kind in (list, collections.deque):
        model = Window(s.watch(kind()))
        f = s.root(model)
        for k in range(6):
            s.call(f, torch.full((2, 3), float(k)))
        s.hit(f, torch.ones(2, 3))
        s.hit(f, torch.zeros(2, 3))


DEQUES = {
    "append": lambda c, v: c.append(v),
    "append left": lambda c, v: (c.appendleft(v), c[0], c[1], c[-1]),
    "extend": lambda c, v: (c.extend([v, v + 1]), len(c)),
    "plus": lambda c, v: c.__iadd__([v]),
    "pop": lambda c, v: c.pop(),
    "pop left": lambda c, v: (c.popleft(), c[0], bool(c)),
    "ring": lambda c, v: (c.append(v), c.popleft(), list(c)),
    "insert": lambda c, v: (c.insert(1, v), c[1]),
    "clear": lambda c, v: (c.clear(), len(c), bool(c)),
    "reverse": lambda c, v: (c.reverse(), list(c)),
    "loop": lambda c, v: ([part * 2 for part in c], c.append(v)),
}


@program(PROGRAMS, "deques from outside, changed by every method")
def _(s: Session) -> None:
    for change in DEQUES.values():
        repeat(
            s,
            lambda x, c, change=change: (x * 2, change(c, x + 1)),
            lambda: collections.deque(tensors()),
        )


@program(PROGRAMS, "items of deques from outside")
def _(s: Session) -> None:
    f = s.root(lambda x, c: (x * c[0] + c[-1], len(c), [v * 2 for v in c]))
    x = torch.ones(3)
    s.warm(f, x, collections.deque([1.5, torch.ones(3)]))
    s.miss(f, x, collections.deque([2.5, torch.ones(3)]))
    s.miss(f, x, collections.deque([1.5, torch.ones(3), 4.0]))
    s.hit(f, x, collections.deque([1.5, torch.ones(3)]))
    bounded = s.root(lambda x, c: (x * 2, c.append(x)))
    for size in (0, 1, 2, 2, 3, 2, 1):
        s.call(bounded, x, s.watch(collections.deque(tensors(size), 3)))
        s.call(bounded, x, s.watch(collections.deque(tensors(size), 2)))
        s.call(bounded, x, s.watch(collections.deque(tensors(size))))


DICTS = {
    "pop": lambda c, v: (c.pop("a"), "a" in c, c.get("a"), len(c)),
    "pop with a default": lambda c, v: (c.pop("a", 5), c.pop("zz", 7), c.pop("a", 9)),
    "pop and store": lambda c, v: (c.pop("a"), c.__setitem__("a", v), list(c), c["a"]),
    "store and pop": lambda c, v: (c.__setitem__("new", v), c.pop("new"), list(c)),
    "update": lambda c, v: c.update({"a": v, "z": v + 1}),
    "update with keywords": lambda c, v: (c.update(a=v, z=3), c["a"], c["z"]),
    "update with both": lambda c, v: c.update({"y": v}, z=v),
    "or": lambda c, v: c.__ior__({"a": v, "z": 1}),
    "setdefault": lambda c, v: (c.setdefault("a", v), c.setdefault("z", v), c["z"]),
    "setdefault twice": lambda c, v: (c.setdefault("z", v), c.setdefault("z", v + 1)),
    "clear": lambda c, v: (c.clear(), "a" in c, len(c)),
    "clear and fill": lambda c, v: (c.clear(), c.__setitem__("b", v), list(c), c["b"]),
    "delete": lambda c, v: (c.__delitem__("a"), list(c.items())),
    "loop after": lambda c, v: (c.pop("a"), {k: part for k, part in c.items()}),
}


@program(PROGRAMS, "dicts from outside, changed by every method")
def _(s: Session) -> None:
    for kind in (dict, collections.OrderedDict, lambda d: collections.defaultdict(list, d)):
        for change in DICTS.values():
            repeat(
                s,
                lambda x, c, change=change: (x * 2, change(c, x + 1)),
                lambda kind=kind: kind({"a": torch.ones(3), "b": 2, "c": torch.zeros(3)}),
            )


@program(PROGRAMS, "statements that change dicts from outside")
def _(s: Session) -> None:
    def changes(x, c):
        del c["a"]
        c |= {"b": x}
        c["d"] = x * 2
        del c["d"]
        return x + c["b"], list(c)

    repeat(s, changes, lambda: {"a": torch.ones(3), "b": 2})

    def of_namespace(x, c):
        y = x * c.n
        del vars(c)["n"]
        return y, hasattr(c, "n")

    f = s.root(of_namespace)
    for _ in range(4):
        s.call(f, torch.ones(3), types.SimpleNamespace(n=3))


SETS = {
    "add": lambda c, v: (c.add("z"), "z" in c, len(c)),
    "add what is there": lambda c, v: (c.add("a"), len(c)),
    "discard": lambda c, v: (c.discard("a"), c.discard("zz"), "a" in c),
    "remove": lambda c, v: (c.remove("a"), "a" in c),
    "update": lambda c, v: (c.update(["y", "z"], ("a",)), len(c), c == {"a", "b", "y", "z"}),
    "or": lambda c, v: (c.__ior__({"y"}), "y" in c),
    "clear": lambda c, v: (c.clear(), len(c), not c),
    "add and discard": lambda c, v: (c.add("z"), c.discard("z"), len(c)),
}


@program(PROGRAMS, "sets from outside, changed by every method")
def _(s: Session) -> None:
    for change in SETS.values():
        repeat(s, lambda x, c, change=change: (x * 2, change(c, x)), lambda: {"a", "b"})


@program(PROGRAMS, "changes that raise leave what came before them")
def _(s: Session) -> None:
    def caught(change):
        def f(x, c):
            y = x * 2
            try:
                change(c)
            except (IndexError, KeyError, TypeError, AttributeError) as error:
                return y, type(error).__name__, str(error)
            return y, c

        return f

    for change, make in (
        (lambda c: (c.append(1), c.pop(5)), lambda: [1, 2]),
        (lambda c: (c.clear(), c.pop()), lambda: [1, 2]),
        (lambda c: c.pop(1, 2), lambda: [1, 2]),
        (lambda c: c.pop("1"), lambda: [1, 2]),
        (lambda c: c.append(), lambda: [1, 2]),
        (lambda c: c.extend(5), lambda: [1, 2]),
        (lambda c: c.insert("a", 5), lambda: [1, 2]),
        (lambda c: (c.popleft(), c.popleft(), c.popleft()), lambda: collections.deque([1, 2])),
        (lambda c: (c.pop("a"), c.pop("a")), lambda: {"a": 1}),
        (lambda c: c.__delitem__("b"), lambda: {"a": 1}),
        (lambda c: c.update(5), lambda: {"a": 1}),
        (lambda c: c.update({[]: 5}), lambda: {"a": 1}),
        (lambda c: c.remove("b"), lambda: {"a"}),
        (lambda c: c.__ior__(["b"]), lambda: {"a"}),
        (lambda c: c.update(["b", []]), lambda: {"a"}),
        (lambda c: c.add([]), lambda: {"a"}),
    ):
        f = s.root(caught(change))
        for _ in range(4):
            s.call(f, torch.ones(3), s.watch(make()))


@program(PROGRAMS, "one container under two names, changed under one of them")
def _(s: Session) -> None:
    def lists(x, a, b):
        a.append(x)
        a.pop(0)
        return x * 2, b[0], len(b)

    def dicts(x, a, b):
        a.pop("k")
        a.update(z=x)
        return x * 2, b.get("k"), len(b)

    def sets(x, a, b):
        a.add("z")
        return x * 2, "z" in b, len(b)

    def deques(x, a, b):
        a.appendleft(x)
        return x * 2, b[0], len(b)

    x = torch.ones(3)
    for f, make in (
        (lists, tensors),
        (dicts, lambda: {"k": torch.ones(3)}),
        (sets, lambda: {"a"}),
        (deques, lambda: collections.deque(tensors())),
    ):
        for first_together in (False, True):
            f = s.root(types.FunctionType(f.__code__, f.__globals__))
            for together in (first_together, not first_together, first_together):
                for _ in range(3):
                    one = s.watch(make())
                    s.call(f, x, one, one if together else s.watch(make()))


@program(PROGRAMS, "changed between and after compiled segments")
def _(s: Session) -> None:
    def f(x, queue, seen, table):
        y = x * 2
        queue.append(y)
        seen.add("first")
        print("between")
        queue.pop(0)
        table.update(last=y + 1)
        table.pop("old", None)
        return y + queue[0] + table["last"], len(seen)

    f = s.root(f)
    for _ in range(3):
        queue, seen, table = s.watch(tensors()), s.watch({"a"}), s.watch({"old": 1})
        for k in range(4):
            s.call(f, torch.full((3,), float(k)), queue, seen, table)


@program(PROGRAMS, "numbers that change, in containers that change", expect=ANY)
def _(s: Session) -> None:
    def f(x, state):
        state["steps"].append(state["n"])
        state.update(n=state["n"] + 1)
        if len(state["steps"]) > 2:
            state["steps"].pop(0)
        return x * state["n"]

    f = s.root(f)
    state = s.watch({"n": 1, "steps": []})
    for _ in range(9):
        s.call(f, torch.ones(3), state)


@program(PROGRAMS, "changes by classes with ways of their own")
def _(s: Session) -> None:
    class Short(list):
        def __len__(self):
            return 2

    class Full(set):
        def __contains__(self, value):
            return True

    class Filtered(collections.OrderedDict):
        def __setitem__(self, key, value):
            if not key.startswith("_"):
                super().__setitem__(key, value)

    def of_short(x, c):
        c[-1] = 7
        return x * 2, c.pop(), c[-1]

    def of_filtered(x, c):
        c.setdefault("_z", 1)
        c.update(_y=2, z=3)
        return x * 2

    ordered = collections.OrderedDict
    for change, make in (
        (of_short, lambda k: Short([1, 2, k])),
        (lambda x, c: (x * 2, c.add("z")), lambda k: Full("a")),
        (of_filtered, lambda k: Filtered(q=k)),
        (lambda x, c: (x * 2, c.pop("k", default=None)), lambda k: ordered(k=k)),
        (lambda x, c: (x * 2, c.pop(key="k")), lambda k: ordered(k=k)),
        (lambda x, c: (x * 2, c.setdefault("k", default=5)), lambda k: ordered(z=k)),
        (lambda x, c: (x * 2, c.update(state=x, obj=1, method=2)), lambda k: {"z": k}),
        (
            lambda x, c: (x * 2, c.pop("a"), dict.__setitem__(c, "a", 1)),
            lambda k: ordered(a=k, b=2),
        ),
    ):
        f = s.root(lambda x, c, change=change: change(x, c))
        for k in (3, 3, 3, 3, 4, 5, 4):
            s.call(f, torch.ones(2), s.watch(make(k)))


@program(PROGRAMS, "what is removed may have a finaliser")
def _(s: Session) -> None:
    class Dying:
        def __init__(self, log):
            self.log = log

        def __del__(self):
            self.log.append("del")

    def clears(x, c, log):
        y = x * 2
        c.clear()
        return y * len(log)

    def stores(x, c, log):
        y = x * 2
        c[0] = None
        return y * len(log)

    def pops(x, c, log):
        y = x * 2
        c.pop(0)
        log.append("after")
        return y * len(log)

    for change, kind in ((clears, list), (stores, list), (pops, list), (clears, collections.deque)):
        f = s.root(types.FunctionType(change.__code__, change.__globals__))
        for _ in range(4):
            s.call(f, torch.ones(2), kind([1]), [])
        for _ in range(2):
            log = s.watch([])
            s.call(f, torch.ones(2), kind([Dying(log)]), log)


@program(PROGRAMS, "an object and its attributes under two names")
def _(s: Session) -> None:
    def writes(x, o, d):
        o.n = x * 2
        return d["n"] * 1.0

    f = s.root(writes)
    x = torch.ones(2)
    for _ in range(4):
        s.call(f, x, types.SimpleNamespace(n=x), {"n": x})
    for _ in range(3):
        o = types.SimpleNamespace(n=x)
        s.call(f, x, o, vars(o))


@program(PROGRAMS, "a NaN as a key")
def _(s: Session) -> None:
    nan = float("nan")
    for change, make in (
        (lambda x, c, k: (x * 2, c.pop(k, None)), lambda: {nan: 1}),
        (lambda x, c, k: (x * 2, c.__setitem__(k, 5), len(c), k in c), lambda: {nan: 1}),
        (lambda x, c, k: (x * 2, c.add(k), len(c)), lambda: {nan}),
    ):
        f = s.root(lambda x, c, k, change=change: change(x, c, k))
        for key in (nan,) * 4 + (float("nan"),) * 2:
            s.call(f, torch.ones(2), make(), key)
