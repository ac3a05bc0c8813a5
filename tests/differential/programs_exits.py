"""Programs with exits: what only Python can run, in every control structure, resumed in the middle.

The full product of EXITS and STRUCTURES is made from text, so that each exit stands in the
function's own code. Each program asserts from the counters that compiled segments ran before and
behind its exits.
"""

from __future__ import annotations

import itertools
import linecache
import logging
import os
import sys
import textwrap
import types
import zlib
from collections.abc import Callable
from typing import Any

import torch
from harness import ANY, HERE, Program, Session, program
from torch import nn

import accel

PROGRAMS: list[Program] = []

# The exit's statements; they may use x, w, outer and set x.
EXITS = {
    "print": "print('value', (x > 0).tolist())",
    "c call": "x = x + zlib.crc32(b'some bytes') % 7",
    "item": "x = x + x.mean().item()",
    "float": "scale = float(x.mean())\nx = x * scale",
    "caught": "try:\n    zlib.decompress(b'no')\nexcept zlib.error as problem:\n    x = x + len(str(problem))",
    "branch": "if x.sum().item() > 0:\n    x = x + 1\nelse:\n    x = x - 1",
    "logging": "LOGGER.error('shape %s', x.shape)",
    "generator": "x = x + next(outer)",
    "open": "with open(os.devnull) as file:\n    x = x + len(file.read())",
    "backward": "w.grad = None\n(x.detach() * w).sum().backward()\nx = x + w.grad",
    "numpy": "x = x + torch.from_numpy(x.numpy().copy())",
    "method argument": "SEEN.append(int(x.sum() > 0))",
}

STRUCTURES = {
    "straight": """
        x = torch.tanh(x) + 1
        {exit}
        x = torch.sin(x) * 2
        return x + 1
        """,
    "for": """
        for i in range(3):
            x = torch.tanh(x) + i
            {exit}
            x = torch.sin(x) * 2
        return x * 2 + 1
        """,
    "for over a list": """
        parts = [x, x + 1]
        total = x * 0
        for i, part in enumerate(parts):
            x = torch.tanh(part) + 1
            {exit}
            total = total + x * 2
            parts[i] = total
        return total, parts
        """,
    "while": """
        i = 0
        while i < 3:
            x = torch.tanh(x) + 1
            i += 1
            {exit}
            if i == 2:
                continue
            x = torch.sin(x) * 2
        return x * 2, i
        """,
    "with": """
        x = torch.tanh(x) + 1
        with MANAGER as m:
            x = torch.sin(x) * m
            {exit}
            x = torch.cos(x) + 1
        return x * 2 + 1
        """,
    "no_grad": """
        x = torch.tanh(x) + 1
        with torch.no_grad():
            x = torch.sin(x) * 2
            with torch.enable_grad():
                {exit}
            x = torch.cos(x) + 1
        return x * 2 + 1
        """,
    "try": """
        try:
            x = torch.tanh(x) + 1
            {exit}
            x = torch.sin(x) * 2
            fail(x)
            x = x + 100
        except ValueError as error:
            x = x * 3 + len(error.args)
        return x + 1
        """,
    "except": """
        x = torch.tanh(x) + 1
        try:
            fail(x)
        except ValueError as error:
            x = torch.sin(x) * 2
            {exit}
            x = torch.cos(x) + len(error.args)
        return x * 2 + 1
        """,
    "finally": """
        try:
            x = torch.tanh(x) + 1
            y = x * 2
        finally:
            x = torch.sin(x) * 2
            {exit}
            x = torch.cos(x) + 1
        return x + y
        """,
    "comprehensions": """
        x = torch.tanh(x) + 1
        parts = [x * k for k in range(3)]
        {exit}
        parts = [torch.sin(x) + p for p in parts]
        total = sum(parts, start=x)
        {exit}
        return torch.cos(total) * 2, [p + x for p in parts]
        """,
    "closures": """
        scale = 2.0
        kept = []
        def add(v):
            nonlocal scale
            scale = scale + 1.0
            kept.append(v * scale)
            return kept[-1] + x
        x = torch.tanh(x) + 1
        y = add(x)
        {exit}
        x = torch.sin(x) * scale
        y = add(y) + scale
        scale = 0.5
        {exit}
        return torch.cos(add(y)) * scale + x, scale, kept
        """,
    "inlined call": """
        x = torch.tanh(x) + 1
        x = helper(x, w, outer)
        return torch.cos(x) * 2 + 1
        """,
    "loop in with in try": """
        total = x * 0
        try:
            with MANAGER as m:
                for i in range(2):
                    x = torch.tanh(x) + m
                    {exit}
                    total = total + x * 2
                fail(total)
        except ValueError:
            total = torch.cos(total) + 1
        return total * 2, x
        """,
}
HELPER = """
    x = torch.sin(x) * 2
    {exit}
    x = torch.cos(x) + 1
    return x
    """

LOGGER = logging.getLogger("accel.tests.exits")
LOGGER.propagate = False
LOGGER.addHandler(logging.NullHandler())


class _Manager:
    def __enter__(self) -> int:
        return 2

    def __exit__(self, *_: object) -> None:
        SEEN.append(7)


SEEN: list[int] = []
MANAGER = _Manager()


def _fail(x: torch.Tensor) -> None:
    zlib.crc32(b"opaque")
    raise ValueError("on purpose")


def _body(template: str, statements: str) -> str:
    lines = []
    for line in textwrap.dedent(template).strip().splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        shown = statements.splitlines() if line.strip() == "{exit}" else [line.strip()]
        lines += [f"    {indent}{text}" for text in shown]
    return "\n".join(lines)


def make(structure: str, exit_kind: str) -> Callable[..., Any]:
    """The function of one cell of the product."""
    statements = EXITS[exit_kind]
    text = f"def helper(x, w, outer):\n{_body(HELPER, statements)}\n\n"
    text += f"def f(x, w, outer):\n{_body(STRUCTURES[structure], statements)}\n"
    name = f"exits {structure} {exit_kind}".replace(" ", "_")
    path = os.path.join(HERE, f"{name}.py")
    linecache.cache[path] = (len(text), None, text.splitlines(True), path)
    names = {
        "torch": torch, "zlib": zlib, "os": os, "LOGGER": LOGGER, "SEEN": SEEN,
        "MANAGER": MANAGER, "fail": _fail, "__name__": name,
    }  # fmt: skip
    exec(compile(text, path, "exec", dont_inherit=True), names)
    return names["f"]  # type: ignore[return-value]


def _add(structure: str, exit_kind: str) -> None:
    @program(PROGRAMS, f"{exit_kind} in {structure}", expect=ANY)
    def _(s: Session) -> None:
        SEEN.clear()
        s.watch(SEEN)
        w = s.watch(torch.linspace(-1, 1, 6).requires_grad_())
        outer = itertools.repeat(2)
        f = make(structure, exit_kind)
        helper = f.__globals__["helper"]
        assert isinstance(helper, types.FunctionType)
        f = s.root(f)
        x = torch.linspace(-2, 2, 6)
        w.grad = None
        s.split(f, x, w, outer)
        s.call(f, -x, w, outer)
        s.call(f, x.double(), w, outer)
        s.call(f, torch.ones(6), w, outer)
        s.split(f, x * 2, w, outer, calls=1)


for _structure in STRUCTURES:
    for _exit in EXITS:
        _add(_structure, _exit)


# ---------------------------------------------------------------- by hand


@program(PROGRAMS, "training step with prints", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(3)
    model = s.watch(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def epoch(batches):
        losses = []
        for i, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            print(i, round(losses[-1], 3))
        return losses

    epoch = s.root(epoch)
    s.split(epoch, [(torch.randn(5, 4), torch.randn(5, 1)) for _ in range(3)])


@program(PROGRAMS, "locals that are unbound, deleted and aliased", expect=ANY)
def _(s: Session) -> None:
    def f(x, flag):
        if flag:
            y = x * 2
        print(x)
        z = x + 1
        kept = [z, z]
        if flag:
            z = z + y
            del y
        print(z)
        kept.append(z)
        w = torch.sin(z) * 2
        return kept, kept[0] is kept[1], kept[2] is z, w

    f = s.root(f)
    x = torch.linspace(-1, 1, 5)
    s.split(f, x, True)
    s.split(f, x, False)
    s.call(f, x, True)


@program(PROGRAMS, "an unbound local after an exit raises as eager does", expect=ANY)
def _(s: Session) -> None:
    def f(x, flag):
        if flag:
            y = x * 2
        x = torch.tanh(x) * 2
        print(x)
        x = x + 1
        return x + y

    f = s.root(f)
    x = torch.linspace(-1, 1, 5)
    s.split(f, x, True)
    s.call(f, x, False)
    s.call(f, x, True)


@program(PROGRAMS, "state changed by the exit", expect=ANY)
def _(s: Session) -> None:
    class Holder:
        def __init__(self):
            self.scale = 2.0
            self.parts = [torch.ones(4)]

    holder = s.watch(Holder())

    def change(step):
        holder.scale += step
        holder.parts.append(torch.full((4,), float(zlib.crc32(b"x") % 5)))

    def f(x, step):
        y = x * holder.scale + holder.parts[-1]
        change(step)
        z = torch.sin(y) * holder.scale + holder.parts[-1]
        holder.scale = 1.5
        print(z)
        return z + holder.scale, len(holder.parts)

    f = s.root(f)
    for step in (1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0):
        s.call(f, torch.ones(4), step)


@program(PROGRAMS, "writes of tensors and containers around exits", expect=ANY)
def _(s: Session) -> None:
    buffer = s.watch(torch.zeros(4))
    seen = s.watch([])
    table = s.watch({})

    def f(x):
        buffer.add_(x)
        seen.append(x.shape[0])
        table["last"] = x * 2
        print(buffer)
        buffer.mul_(2)
        y = buffer + table["last"]
        seen.append(len(seen))
        print(seen)
        return torch.sin(y) + buffer

    f = s.root(f)
    for k in range(7):
        s.call(f, torch.full((4,), float(k)))


@program(PROGRAMS, "random numbers on both sides", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = x + torch.rand(4)
        print(y)
        z = torch.dropout(y, 0.5, True) + torch.randn(4)
        print(torch.rand(1))
        return z * 2 + torch.rand(4)

    f = s.root(f)
    for _ in range(7):
        s.call(f, torch.ones(4))


@program(PROGRAMS, "gradients through segments", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(torch.linspace(-1, 1, 5).requires_grad_())

    def f(x):
        y = torch.tanh(x * w) * 2
        print(y.shape, y.requires_grad, [y.grad_fn is None])
        z = torch.sin(y) + w
        print(z)
        return (z * z).sum()

    f = s.root(f)
    x = torch.linspace(-2, 2, 5)
    for _ in range(7):
        loss = s.call(f, x)
        loss.backward()
    s.split(f, x)


@program(PROGRAMS, "an error in the middle has eager's traceback", expect=ANY)
def _(s: Session) -> None:
    def f(x, n):
        y = torch.tanh(x) + 1
        print(y)
        z = torch.sin(y) * 2
        print(z)
        return z + torch.ones(n)

    f = s.root(f)
    x = torch.linspace(-1, 1, 5)
    s.split(f, x, 5)
    s.call(f, x, 4)
    s.split(f, x, 5, calls=1)


@program(PROGRAMS, "recursion with an exit", expect=ANY)
def _(s: Session) -> None:
    def f(x, n):
        x = torch.tanh(x) + 1
        print(n, x)
        if n > 0:
            x = f(x, n - 1) * 2
        return torch.sin(x) + n

    g = s.root(f)
    x = torch.linspace(-1, 1, 5)
    for _ in range(8):
        s.call(g, x, 2)


@program(PROGRAMS, "a method of a module with an exit", expect=ANY)
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.steps = 0

        def forward(self, x):
            x = torch.tanh(self.first(x))
            self.steps += 1
            if self.training:
                print("norm", x.norm().item() > 0)
            return torch.sin(self.second(x)) * 2

    torch.manual_seed(0)
    model = s.watch(Model())
    model = s.root(model)
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    with torch.no_grad():
        for _ in range(8):
            s.call(model, x)
        model.eval()
        for _ in range(3):
            s.call(model, x)


@program(PROGRAMS, "an inner function of this call, or of another one", expect=ANY)
def _(s: Session) -> None:
    kept = []

    def f(x, which):
        scale = float(which + 2)

        def grow(v):
            return v * scale

        kept.append(grow)
        inner = kept[which]
        x = torch.tanh(x) + 1
        print([which])
        x = inner(x) + 1
        scale = scale + 1.0
        return torch.sin(inner(x)) * 2

    f = s.root(f)
    x = torch.linspace(-1, 1, 5)
    for _ in range(6):
        s.call(f, x, -1)
    for which in (0, -1, 1, -1, 0):
        s.call(f, x, which)


@program(PROGRAMS, "a generator and a lambda that hold a local variable", expect=ANY)
def _(s: Session) -> None:
    def f(x, n):
        total = sum(x.sum().item() > k for k in range(n))
        y = torch.tanh(x) + total
        double = lambda: y * n
        print([total])
        z = double() + 1
        y = torch.cos(z)
        print([n])
        return double() + y

    f = s.root(f)
    x = torch.linspace(0, 1, 5)
    s.split(f, x, 2)
    s.call(f, x * 3, 3)
    s.call(f, x, 2)


@program(PROGRAMS, "accel.graph_break between two halves")
def _(s: Session) -> None:
    def f(x):
        x = torch.tanh(x) + 1
        accel.graph_break()
        return torch.sin(x) * 2

    f = s.root(f)
    x = torch.linspace(-1, 1, 5)
    s.split(f, x)
    s.call(f, x * 2)


@program(PROGRAMS, "a disabled function runs as Python between two halves")
def _(s: Session) -> None:
    seen = []

    def outside(x):
        seen.append(sys._getframe(1).f_code.co_name)
        return x * 2

    accel.disable(outside)

    def f(x):
        x = torch.tanh(x) + 1
        x = outside(x)
        return torch.sin(x) * 2

    f = s.root(f)
    s.split(f, torch.linspace(-1, 1, 5))
    s.call(f, torch.linspace(-1, 1, 5))


@program(PROGRAMS, "disabled after it was recorded as a part, and optimized again", expect=ANY)
def _(s: Session) -> None:
    def part(x):
        return x * 3 + 1

    def f(x):
        x = torch.tanh(x) + 1
        x = part(x)
        return torch.sin(x) * 2

    f = s.root(f)
    x = torch.linspace(-1, 1, 5)
    for _ in range(4):
        s.call(f, x)
    accel.disable(part)
    s.split(f, x)
    accel.optimize(part)
    for _ in range(3):
        s.call(f, x)


@program(PROGRAMS, "equal code that was compiled again has closures of its own", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(torch.linspace(-1, 1, 6).requires_grad_())
    x = torch.linspace(-2, 2, 6)
    for exit_kind in ("item", "item", "c call"):
        f = s.root(make("closures", exit_kind))
        s.split(f, x, w, itertools.repeat(2))


@program(PROGRAMS, "functions that are defined before an exit", expect=ANY)
def _(s: Session) -> None:
    def f(x, n):
        total = x * 0

        def plain(v, scale=2.0, *, shift: float = 1.0) -> torch.Tensor:
            return v * scale + shift

        x = torch.tanh(x) + 1

        def wrapped(v, *args, **kwargs):
            nonlocal total
            total = total + v
            return plain(v + n, *args, **kwargs)

        twice = lambda v: wrapped(v) * 2
        x = torch.sin(twice(x)) * wrapped(x, 3.0, shift=0.5)
        zlib.crc32(b"opaque")
        x = plain(x) + twice(x)
        zlib.crc32(b"opaque")
        return torch.cos(wrapped(x)), total, plain.__defaults__, twice(total)

    f = s.root(f)
    s.split(f, torch.randn(4), 2, segments=3)
    s.call(f, torch.randn(4), 3)
    s.split(f, torch.randn(4), 2.5, segments=3)


@program(PROGRAMS, "functions that are defined in a loop with an exit", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        kept = []
        for i in range(3):
            x = torch.tanh(x) + i

            def later(v, i=i):
                return v * i + x

            kept.append(later)
            zlib.crc32(b"opaque")
            x = later(x) + 1
        return x, [k(x) for k in kept]

    f = s.root(f)
    s.split(f, torch.randn(4), segments=2)
    s.split(f, torch.randn(4), segments=2)


@program(PROGRAMS, "exits inside literals that are built in steps")
def _(s: Session) -> None:
    def literals(n):
        items = ", ".join("x.sum().item()" if k in (5, n - 3) else f"x + {k}" for k in range(n))
        return [
            "[*xs, (x + 1).sum().item(), x * 2]",
            "(*xs, x + 1, x.sum().item(), x + 2, x.sum().item(), x + 3)",
            "[*xs, x.sum().item(), *xs, x.sum().item(), *xs]",
            "{**d, 'a': x + 1, 'b': x.sum().item(), **d, 'c': x + 2, 'd': x.sum().item(), **d}",
            "{*ks, (x + 1).sum().item(), 5, (x + 2).sum().item()}",
            "dict(**d, a=x + 1, b=x.sum().item(), **{'c': x * 2})",
            "max(*ks, x.sum().item(), 3, (x - 9).sum().item())",
            "[[x + 1, x.sum().item()], *xs, [x.sum().item(), *xs]]",
            f"({items})",
            f"[{items}]",
        ]

    for text in literals(33):
        namespace: dict = {}
        exec(f"def f(x, xs, ks, d):\n    return {text}", namespace)
        f = s.root(namespace["f"])
        for k in range(9):
            x = torch.full((3,), float(k))
            s.call(f, x, [x * 7, x * 8], [1.0, float(k)], {"p": x, "q": 2})
        x = torch.ones(3)
        s.split(f, x, [x * 7, x * 8], [1.0, 2.0], {"p": x, "q": 2}, segments=1)


@program(PROGRAMS, "locals that a stretch writes on some ways only")
def _(s: Session) -> None:
    def by_size(x, scale=1.0):
        total = x.sum().item()
        y = x * 2
        if x.shape[0] == 3:
            scale = y.sum()
        y = y + 1
        largest = y.max().item()
        return y * 2, scale, total + largest

    f = s.root(by_size)
    parts = [torch.ones(1)]
    for scale in (1.0, 1.0, 1.0, 1.0, 2.0, "auto", None, 1, parts, parts, torch.ones(1), 1.0):
        s.call(f, torch.ones(4), scale)
    s.call(f, torch.ones(3), 5.0)

    def unbinds(x, flags):
        y = x * 2
        for flag in flags:
            y.max().item()
            y = y + 1
            if flag:
                w = y * 3
            y.max().item()
            y = y * 2
        return y, w

    g = s.root(unbinds)
    for flags in [[0, 0, 1]] * 5 + [[1, 0, 0]] * 2 + [[0, 0, 0], [1, 1, 0], [0, 1, 0]]:
        s.call(g, torch.ones(4), flags)

    def best(x, start, flags):
        found = start
        error = "none"
        for flag in flags:
            y = x * 2
            if flag:
                found = y
            try:
                if flag == 2:
                    raise KeyError(flag)
            except KeyError as caught:
                error = str(caught)
            y.max().item()
            y = y + 1
            y.min().item()
        later = lambda: found
        return later(), error, y

    h = s.root(best)
    for start in (1.5, 1.5, 1.5, 1.5, "a", 2.5, None, [1], torch.ones(2), True):
        for flags in ([0, 0], [0, 1], [2, 0], [1, 0]):
            s.call(h, torch.ones(4), start, flags)


@program(PROGRAMS, "names and modules that are missing, and come later")
def _(s: Session) -> None:
    import sys
    import types

    namespace = {"torch": torch}
    exec(
        "def f(x):\n"
        "    try:\n        r = LATER\n    except NameError:\n        r = None\n"
        "    try:\n        import a_module_of_this_program as m\n"
        "    except ImportError:\n        m = None\n"
        "    return x * 2 + 1, r, m is None\n",
        namespace,
    )
    f = s.root(namespace["f"])
    for _ in range(4):
        s.call(f, torch.ones(2))
    namespace["LATER"] = "set"
    for _ in range(3):
        s.call(f, torch.ones(2))
    s.patch(sys.modules, "a_module_of_this_program", types.ModuleType("a_module_of_this_program"))
    for _ in range(3):
        s.call(f, torch.ones(2))
