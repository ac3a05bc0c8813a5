"""Expressions whose torch operations hide from a recorder: in dunders, callbacks from C,
descriptors, generators. One row is one program: several calls, then other sizes and dtypes.

A row says COMPILED where the work is plain enough that falling back would be a loss; everywhere
else either way of serving is right, and only the behaviour is compared.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from harness import ANY, COMPILED, Program, Session


def add1(x):
    return x + 1


class Everything:
    """Does tensor work in every dunder."""

    def __init__(self, x):
        self.x = x

    @property
    def doubled(self):
        return self.x * 2

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.x * 3

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)

    def __add__(self, other):
        return Everything(self.x + other.x)

    def __iadd__(self, other):
        return Everything(self.x + other)

    def __neg__(self):
        return Everything(-self.x)

    def __matmul__(self, other):
        return self.x @ other.x

    def __lt__(self, other):
        return self.x.shape[0] + (self.x * 1).shape[0] < other.x.shape[0]

    def __eq__(self, other):
        return (self.x + 1).dim() == 1

    __hash__ = object.__hash__

    def __len__(self):
        return (self.x + 1).shape[0]

    def __bool__(self):
        return (self.x + 1).dim() > 0

    def __getitem__(self, index):
        return self.x[index] + 1

    def __contains__(self, item):
        return (self.x + 1).dim() == item

    def __iter__(self):
        return iter([self.x + 1, self.x + 2])

    def __format__(self, spec):
        return str((self.x + 1).dim())

    def __call__(self, y):
        return self.x + y

    def __enter__(self):
        return self.x + 1

    def __exit__(self, *error):
        self.x + 1
        return False


class Method:
    def f(self, x):
        return x + 5


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@dataclasses.dataclass
class Derived:
    x: torch.Tensor

    def __post_init__(self):
        self.y = self.x + 1


class Twice:
    def __init__(self, x):
        self.x = x
        self.i = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.i += 1
        if self.i > 2:
            raise StopIteration
        return self.x + self.i


@functools.lru_cache
def cached(n):
    return torch.ones(n) + 1


class PlusSeven:
    def __get__(self, instance, owner):
        return instance.x + 7


class WithDescriptor:
    d = PlusSeven()

    def __init__(self, x):
        self.x = x


@contextlib.contextmanager
def adding(x):
    yield x + 1


def sort_in_place(x):
    items = [x, x]
    items.sort(key=lambda t: (t * 1).dim())
    return items[0]


def add_in_place(x):
    e = Everything(x)
    e += x
    return e.x


def with_manager(x):
    with adding(x) as y:
        return y * 2


def with_object(x):
    with Everything(x) as y:
        return y * 2


def with_stack(x):
    with contextlib.ExitStack() as stack:
        return stack.enter_context(Everything(x))


def unpacked(x):
    a, b = Everything(x)
    return a + b


E = Everything

ROWS: list[tuple[str, Callable[[torch.Tensor], Any], str]] = [
    ("map", lambda x: list(map(add1, [x, x]))[0], ANY),
    ("map of a lambda", lambda x: list(map(lambda y: y * 2, [x, x]))[0], ANY),
    ("sorted key", lambda x: sorted([x, x], key=lambda t: (t + 1).dim())[0], ANY),
    ("max key", lambda x: max([x, x + 1], key=lambda t: (t + 1).dim()), ANY),
    ("list.sort key", sort_in_place, ANY),
    ("reduce", lambda x: functools.reduce(lambda a, b: a + b, [x, x, x]), ANY),
    ("partial", lambda x: functools.partial(add1, x)(), ANY),
    ("property", lambda x: E(x).doubled, COMPILED),
    ("__getattr__", lambda x: E(x).missing, ANY),
    ("__add__", lambda x: (E(x) + E(x)).x, ANY),
    ("__iadd__", add_in_place, ANY),
    ("__neg__", lambda x: (-E(x)).x, ANY),
    ("__matmul__", lambda x: E(x) @ E(x), ANY),
    ("__lt__", lambda x: E(x) < E(x), ANY),
    ("__eq__", lambda x: E(x) == E(x), ANY),
    ("__len__", lambda x: len(E(x)), ANY),
    ("__bool__", lambda x: 1 if E(x) else 2, ANY),
    ("__getitem__", lambda x: E(x)[0], ANY),
    ("__contains__", lambda x: 1 in E(x), ANY),
    ("__iter__", lambda x: [y for y in E(x)], ANY),
    ("__iter__ unpacked", unpacked, ANY),
    ("__iter__ under a star", lambda x: (lambda a, b: a + b)(*E(x)), ANY),
    ("__format__", lambda x: f"{E(x)}", ANY),
    ("__call__", lambda x: E(x)(x), COMPILED),
    ("list equality", lambda x: [E(x)] == [E(x)], ANY),
    ("dict key", lambda x: {E(x): 1}.get(E(x)), ANY),
    ("in a list", lambda x: E(x) in [E(x)], ANY),
    ("min of objects", lambda x: min([E(x), E(x)]), ANY),
    ("autograd function", lambda x: Doubling.apply(x), ANY),
    ("dataclass __post_init__", lambda x: Derived(x).y, ANY),
    ("dataclass returned", lambda x: Derived(x), ANY),
    ("custom iterator", lambda x: [y for y in Twice(x)], ANY),
    ("next", lambda x: next(Twice(x)), ANY),
    ("zip of iterators", lambda x: [a + b for a, b in zip(Twice(x), Twice(x), strict=True)], ANY),
    ("sum of a generator", lambda x: sum(y + 1 for y in [x, x]), ANY),
    ("tuple of a generator", lambda x: tuple(y + 1 for y in (x, x)), ANY),
    ("any of a generator", lambda x: any((y + 1).dim() == 3 for y in [x]), ANY),
    ("join of a generator", lambda x: ",".join(str((y + 1).dim()) for y in [x]), ANY),
    ("lru_cache", lambda x: cached(3) + x, ANY),
    ("descriptor", lambda x: WithDescriptor(x).d, ANY),
    ("bound method as callback", lambda x: list(map(Method().f, [x])), ANY),
    ("defaultdict factory", lambda x: collections.defaultdict(lambda: x + 1)["a"], ANY),
    ("starmap", lambda x: list(itertools.starmap(lambda a, b: a + b, [(x, x)])), ANY),
    ("vmap", lambda x: torch.vmap(lambda y: y + 1)(x), ANY),
    ("tree_map", lambda x: pytree.tree_map(lambda y: y + 1, [x, {"a": x}]), ANY),
    ("attrgetter", lambda x: operator.attrgetter("doubled")(E(x)), ANY),
    ("methodcaller", lambda x: operator.methodcaller("f", x)(Method()), ANY),
    ("itemgetter", lambda x: operator.itemgetter(0)(E(x)), ANY),
    (
        "checkpoint",
        lambda x: torch.utils.checkpoint.checkpoint(add1, x, use_reentrant=False),
        ANY,
    ),
    ("ExitStack", with_stack, ANY),
    ("contextmanager", with_manager, ANY),
    ("context object", with_object, ANY),
    ("immediately called lambda", lambda x: (lambda y: y * 2 + 1)(x), COMPILED),
    ("list comprehension", lambda x: [x * i for i in range(3)], COMPILED),
    ("dict comprehension", lambda x: {str(i): x * i for i in range(3)}, COMPILED),
    ("set of dims", lambda x: {y.dim() for y in (x, x[None])}, ANY),
]


def _program(row: tuple[str, Callable[[torch.Tensor], Any], str]) -> Program:
    name, function, expect = row

    def body(s: Session) -> None:
        root = s.root(function)
        s.warm(root, torch.randn(3))
        s.call(root, torch.randn(3))
        s.call(root, torch.randn(4))
        s.call(root, torch.ones(3, dtype=torch.float64))
        s.call(root, torch.randn(2, 2))
        s.call(root, torch.randn(3))

    return Program(name, body, expect)


PROGRAMS = [_program(row) for row in ROWS]
