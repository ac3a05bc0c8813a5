"""Writes random programs over tensors, as trees of statements that can be made smaller.

In: a seed. Out: a `Case`: the body of a function, what happens between its calls, and the calls.
Invariant: a name is bound before it is used unless an exception is what is wanted; all tensors
that have names are of shape (n, 4). Rules for a new row: it may use `{a}`, `{b}` (tensors), `k`
(an int), and what `PRELUDE` has; it must end, and depend on nothing but its inputs and state.
"""

from __future__ import annotations

import dataclasses
import random
import textwrap
from collections.abc import Iterator

PRELUDE = """
import collections
import contextlib
import dataclasses
import functools
import math
import zlib

import torch
import torch.nn.functional as F

COUNT = 0
TABLE = {"bias": 0.25}
Pair = collections.namedtuple("Pair", "first second")


def helper(v, k=2.0):
    return v * k + 1


def deep(v, depth):
    return v if depth <= 0 else deep(v * 0.5 + 0.1, depth - 1)


def pieces(v, parts=2):
    for i in range(parts):
        yield v + i


def wrapped(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs) + 0.5

    return inner


@wrapped
def decorated(v, *, by=2):
    return v / by


@dataclasses.dataclass
class Box:
    value: object
    note: str = ""

    @property
    def double(self):
        return self.value * 2

    def __add__(self, other):
        return Box(self.value + other, self.note + "+")


class Base:
    factor = 1.5

    def act(self, v):
        return v * self.factor


class Derived(Base):
    def act(self, v):
        return super().act(v) - 1


class State:
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 4, generator=g) * 0.3
        self.buffer = torch.zeros(4)
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(4, 4, generator=g) * 0.3)
            self.linear.bias.zero_()
        self.scale = 0.5
        self.mode = "a"
        self.count = 0
        self.items = [1, 2]
        self.table = {}
        self.maybe = None
        self.last = None
        self.actor = Derived()
        self.box = Box(1.0)
        self.callbacks = [lambda v: v + self.scale]

    def apply(self, v):
        return v * self.scale

    @property
    def half(self):
        return self.scale / 2

    @contextlib.contextmanager
    def scaled(self, by):
        before, self.scale = self.scale, by
        try:
            yield by * 2
        finally:
            self.scale = before
"""

UNARY = (
    "torch.relu({a})",
    "torch.tanh({a})",
    "torch.sigmoid({a})",
    "F.gelu({a})",
    "F.silu({a})",
    "torch.exp({a}.clamp(-3, 3))",
    "({a}.abs() + 0.1).sqrt()",
    "-{a}",
    "{a} * 0.5 + 1",
    "{a} * k",
    "torch.softmax({a}, -1)",
    "F.layer_norm({a}, {a}.shape[-1:])",
    "{a}.sum(-1, keepdim=True) + {a}",
    "{a}.mean(0) + {a}",
    "{a} - {a}.detach()",
    "{a}.transpose(0, 1).contiguous().transpose(0, 1)",
    "{a}.reshape(-1).view({a}.shape)",
    "{a}.view(-1, 2, 2).flatten(1)",
    "torch.cat([{a}, {a}], 0)[: {a}.shape[0]]",
    "{a}.clone().add_(1)",
    "{a}.masked_fill({a} > 0.5, 0.0)",
    "torch.where({a} > 0, {a}, -{a})",
    "{a}.cumsum(0)",
    "{a}.flip(0)",
    "{a}[:, [1, 0, 3, 2]]",
    "{a}.expand(2, -1, -1)[1] * 1",
    "{a}.to(torch.float64).to(torch.float32)",
    "({a} > 0).float() + {a}",
    "({a} * 4).round().to(torch.int64) % 5 + {a}",
    "{a} @ s.weight",
    "s.linear({a})",
    "{a}.max(-1, keepdim=True).values + {a}",
    "{a}.sort(-1)[0]",
    "{a}.topk(4, -1).values",
    "helper({a}, s.scale)",
    "helper({a}, k=s.half)",
    "helper(**{{'v': {a}, 'k': 0.5}})",
    "helper(*[{a}])",
    "deep({a}, k % 3)",
    "decorated({a}, by=4)",
    "functools.partial(helper, k=3.0)({a})",
    "s.apply({a})",
    "s.actor.act({a})",
    "s.callbacks[0]({a})",
    "(Box({a}) + 1).double",
    "Pair({a}, 1).first",
    "next(pieces({a}))",
    "list(map(helper, [{a}]))[0]",
    "[v for v in pieces({a}, 3)][-1]",
    "sum([{a}, {a}])",
    "max([{a}], key=lambda t: t.dim())",
    "(lambda v, w={a}: v + w)({a})",
    "{a} if flag else {a} * 3",
    "{a} + TABLE['bias']",
    "{a} + COUNT",
    "{a} + len(s.items)",
    "{a} + s.buffer",
    "F.dropout({a}, 0.5, training=flag)",
    "{a} + torch.rand({a}.shape) * 0.1",
    "F.embedding(({a} > 0).long().sum(-1), s.weight.repeat(2, 1))",
    "{a}[torch.arange({a}.shape[0])]",
    "torch.zeros_like({a}).index_add_(0, torch.arange({a}.shape[0]), {a})",
    "torch.stack([{a}, {a} + 1]).unbind(0)[1]",
    "torch.split({a}, 2, dim=1)[0].repeat(1, 2)",
    "torch.full_like({a}, s.scale) + {a}",
    "{a} + torch.arange(4.0)",
    "{a} + math.sqrt(k + 1)",
    "{a}.T.T",
)
BINARY = (
    "{a} + {b}",
    "{a} * {b}",
    "{a} - {b}",
    "torch.maximum({a}, {b})",
    "{a} / (1 + {b}.abs())",
    "torch.lerp({a}, {b}, 0.3)",
    "torch.where({a} > {b}, {a}, {b})",
    "torch.addcmul({a}, {b}, {a}, value=0.1)",
    "[{a}, {b}][k % 2]",
    "({a}, {b})[-1]",
    "{{'p': {a}, 'q': {b}}}['pq'[k % 2]]",
    "torch.cat([{a}, {b}], -1)[:, ::2]",
    "sum(v * w for v, w in zip([{a}, {b}], [{b}, {a}]))",
    "functools.reduce(torch.add, [{a}, {b}, {a}])",
)
CONDITIONS = (
    "flag",
    "not flag",
    "k > 2",
    "k % 2 == 0",
    "s.mode == 'a'",
    "s.count > 1",
    "COUNT > 2",
    "{a}.sum() > 0.0137",  # not 0: a layer norm's sum is nothing but rounding
    "({a} > 10).any()",
    "bool(({a} < 10).all()) and flag",
    "{a}.mean().item() > 0.2",
    "len(s.items) > 2",
    "'k' in s.table",
    "{a}.shape[0] > 3",
    "{a}.requires_grad",
    "torch.is_grad_enabled()",
    "s.maybe is None",
    "{a} is x",
    "{a} is {b}",
    "isinstance({a}, torch.Tensor)",
    "hasattr(s, 'late')",
    "s.items[-1] in (1, 2)",
    "extra is None",
    "s.linear.training",
)
# Statements of one line or more that are no blocks.
EFFECTS = (
    "s.count += 1",
    "s.last = {a}",
    "s.late = {a}.detach()",
    "s.items.append(k)",
    "s.items[0] = k + 1",
    "s.table['k'] = {a}.shape[0]",
    "s.table[s.mode] = s.table.get(s.mode, 0) + 1",
    "s.mode = 'b' if s.mode == 'a' else 'a'",
    "s.buffer.add_(1)",
    "s.buffer = s.buffer + 1",
    "s.buffer.copy_({a}.detach().mean(0))",
    "s.box.value = k",
    "s.box = Box({a}.detach(), 'made')",
    "s.actor.factor = s.scale",
    "d = {{'x': {a}, 'n': {a}.dim()}}\nb = d['x'] * d['n']",
    "print('step', s.mode, k)",
    "k += 1",
    "k = {a}.shape[0]",
    "k = (k * 3 + 1) % 5",
    "COUNT += 1",
    "TABLE['bias'] = s.scale",
    "TABLE['n'] = k",
    "a, b = b, a",
    "a, (b, c) = {a}, ({b}, {a} * 2)",
    "*rest, a = (x, {a}, b)",
    "c = b",
    "a += {b}",
    "a *= 0.5",
    "c = s.norm({a})",
    # Writes to tensors: of this call, of views, of the caller.
    "{a}.add_(1)",
    "{a}.mul_({b})",
    "{a}[0] = 0.5",
    "{a}[:, 1:3] *= 2",
    "{a}[{a} > 0.5] = 0.25",
    "v = {a}[1:]\nv.add_(1)",
    "v = {a}.view(-1)\nv[0] = 2.0",
    "v = {a}.t()\nv.mul_(0.5)\nb = v.t()",
    "torch.add(x, 1, out={a})",
    "F.relu({a}, inplace=True)",
    "if extra is not None:\n    extra.append({a} * 2)",
    "if extra:\n    a = a + extra[0]",
    # Functions and cells.
    "def g(v, m={a}):\n    return v * m + k\nb = g({b})",
    "def bump():\n    nonlocal k\n    k += 1\n    return k\nb = {a} * bump()",
    "late = lambda: a + k\nk += 1\nc = late()",
    "makers = [lambda v, i=i: v + i for i in range(3)]\nb = makers[k % 3]({a})",
    "a = s.scale * {a}\ndel b\nb = a",
    # Only Python can run these: the function is split there.
    "s.table['n'] = int(({a} > 0).sum().item())",
    "s.items.extend([len(s.items) % 3])",
    "zlib.crc32(b'opaque')",
    "{a}.tolist() and zlib.crc32(b'more')",
    "print('value %.2f' % {a}.sum().item())",
    "k = int({a}.abs().sum().item()) % 4",
    "b = {a}[{a}[:, 0] > -5]",
    "c = torch.tensor([[float(k)] * 4]) + {a}",
)
# Heads of blocks; what is in brackets is one or more blocks of statements.
BLOCKS = (
    ("if {condition}:",),
    ("if {condition}:", "else:"),
    ("if {condition}:", "elif {condition}:", "else:"),
    ("for i in range({few}):",),
    ("for i, v in enumerate([{a}, {b}]):",),
    ("for v in pieces({a}, {few}):",),
    ("for name in ['a', 'k']:", "else:"),
    ("while k < {few}:\n    k += 1",),
    ("with s.scaled(0.25) as q:",),
    ("with torch.no_grad():",),
    ("with contextlib.suppress(KeyError):",),
    ("try:", "finally:"),
    ("try:", "except (KeyError, RuntimeError) as error:\n    print(type(error).__name__)", "else:"),
)
# Only inside blocks; the second kind only inside loops.
LEAVING = (
    "return a",
    "return a, {b}",
    "s.table['missing']",
    "raise RuntimeError('asked for')",
    "raise KeyError(k)",
)
LEAVING_LOOPS = ("break", "continue")
# What the rest of the program does between two calls.
BETWEEN = (
    "s.mode = 'b'",
    "s.scale = 0.75",
    "s.scale = 2",
    "s.count = 5",
    "s.items.clear(); s.items.extend([7, 8, 9])",
    "s.items = [3]",
    "s.table.pop('k', None)",
    "s.maybe = 1",
    "s.weight = torch.eye(4)",
    "s.weight.mul_(0.5)",
    "s.weight = s.weight.t()",
    "s.linear.weight.data.mul_(0.5)",
    "s.linear.requires_grad_(False)",
    "s.linear.eval()",
    "s.norm.eval()",
    "s.callbacks[0] = lambda v: v * 3",
    "s.apply = lambda v: v - 1",
    "s.actor = Base()",
    "Base.factor = 0.5",
    "Derived.act = lambda self, v: v",
    "State.half = property(lambda self: 9.0)",
    "s.box = Box(torch.ones(4))",
    "helper.__defaults__ = (3.0,)",
    "globals().__setitem__('helper', lambda v, k=1: v - k)",
    "globals().__setitem__('COUNT', 9)",
    "TABLE['bias'] = -1.0",
    "torch.manual_seed(5)",
)
SHAPES = ((3, 4), (3, 4), (3, 4), (5, 4), (1, 4), (2, 4))


@dataclasses.dataclass
class Statement:
    """One statement: its lines, or heads of blocks with what is indented below each."""

    parts: list[tuple[str, list[Statement] | None]]

    def lines(self) -> Iterator[str]:
        for head, below in self.parts:
            yield from head.split("\n")
            if below is not None:
                inside = [line for s in below for line in s.lines()]
                yield from (f"    {line}" for line in inside or ["pass"])


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: how its arguments look, and what happens before it."""

    shape: tuple[int, int]
    flag: bool
    k: int
    sign: float
    extra: bool
    alias: str  # of y: "" own, "same" as x, "view" of x, "turned": another layout
    before: str


@dataclasses.dataclass
class Case:
    seed: int
    body: list[Statement]
    calls: list[Call]
    grad: bool
    dynamic: bool | None
    native: bool

    def source(self) -> str:
        lines = [line for s in self.body for line in s.lines()]
        inside = textwrap.indent("\n".join(lines), "    ")
        return (
            f"{PRELUDE}\n\ndef f(s, x, y, flag, k, extra):\n    global COUNT\n"
            f"    a = b = c = x\n{inside}\n    return a, b, [c], k\n"
        )

    def text(self) -> str:
        """For people: the function and its calls."""
        function = self.source().removeprefix(PRELUDE).strip()
        calls = "\n".join(f"# {call}" for call in self.calls)
        return (
            f"# seed {self.seed}, grad {self.grad}, dynamic {self.dynamic}, native {self.native}\n"
            f"{function}\n{calls}"
        )


class Writer:
    """Writes one random program."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.grad = False

    def case(self) -> Case:
        rng = self.rng
        self.grad = rng.random() < 0.35
        body = [Statement([("a = x + y", None)])]
        body += [self.statement(0, False) for _ in range(rng.randint(2, 8))]
        flags = [rng.random() < 0.7 for _ in range(8)]
        calls = [
            Call(
                (3, 4) if i < 3 else rng.choice(SHAPES),
                flags[0] if i < 3 else flags[i],
                2 if i < 3 else rng.choice([2, 2, 2, 3, 0]),
                1.0 if i < 3 else rng.choice([1.0, 1.0, -1.0]),
                rng.random() < 0.2,
                rng.choice(["same", "view", "turned"]) if rng.random() < 0.15 else "",
                rng.choice(BETWEEN) if i >= 3 and rng.random() < 0.35 else "",
            )
            for i in range(8)
        ]
        dynamic = rng.choice([None, None, None, True, False])
        return Case(self.seed, body, calls, self.grad, dynamic, rng.random() < 0.4)

    def fill(self, template: str) -> str:
        rng = self.rng
        return template.format(
            a=rng.choice("aaabcxy"),
            b=rng.choice("aabcxy"),
            few=rng.randint(1, 4),
            condition=rng.choice(CONDITIONS).format(a=rng.choice("abcx"), b=rng.choice("abcx"))
            if "{condition}" in template
            else "",
        )

    def statement(self, depth: int, in_loop: bool) -> Statement:
        rng = self.rng
        kind = rng.random()
        if depth and kind < 0.06:
            return Statement([(self.fill(rng.choice(LEAVING)), None)])
        if in_loop and kind < 0.12:
            return Statement([(rng.choice(LEAVING_LOOPS), None)])
        if kind < 0.5:
            table = BINARY if rng.random() < 0.25 else UNARY
            return Statement([(f"{rng.choice('aaabc')} = {self.fill(rng.choice(table))}", None)])
        if kind < 0.75 or depth >= 3:
            return Statement([(self.fill(rng.choice(EFFECTS)), None)])
        heads = rng.choice(BLOCKS)
        parts: list[tuple[str, list[Statement] | None]] = []
        for index, head in enumerate(heads):
            loops = head.startswith(("for", "while")) or (
                in_loop and not head.startswith("finally")
            )
            if index and heads[0].startswith(("for", "while")):
                loops = in_loop
            count = rng.randint(1, 3)
            parts.append(
                (self.fill(head), [self.statement(depth + 1, loops) for _ in range(count)])
            )
        return Statement(parts)


def smaller_bodies(body: list[Statement]) -> Iterator[list[Statement]]:
    """Bodies with one thing less: a statement, a block around statements, one of its branches."""
    for i, statement in enumerate(body):
        yield [*body[:i], *body[i + 1 :]]
        for p, (head, below) in enumerate(statement.parts):
            if below is None:
                continue
            yield [*body[:i], *below, *body[i + 1 :]]
            if p and len(statement.parts) > 1 and not head.startswith(("except", "finally")):
                fewer = Statement([*statement.parts[:p], *statement.parts[p + 1 :]])
                yield [*body[:i], fewer, *body[i + 1 :]]
            for inner in smaller_bodies(below):
                parts = [*statement.parts[:p], (head, inner), *statement.parts[p + 1 :]]
                yield [*body[:i], Statement(parts), *body[i + 1 :]]


def smaller_cases(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    for i in range(len(case.calls)):
        if len(case.calls) > 1:
            yield dataclasses.replace(case, calls=[*case.calls[:i], *case.calls[i + 1 :]])
    for body in smaller_bodies(case.body):
        yield dataclasses.replace(case, body=body)
    for i, call in enumerate(case.calls):
        plain = dataclasses.replace(call, before="", extra=False, alias="")
        if plain != call:
            yield dataclasses.replace(case, calls=[*case.calls[:i], plain, *case.calls[i + 1 :]])
    if case.grad:
        yield dataclasses.replace(case, grad=False)
    if case.native:
        yield dataclasses.replace(case, native=False)
