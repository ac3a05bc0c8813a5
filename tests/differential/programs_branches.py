"""Programs in which tensors decide where control goes, one way now and another way then.

Each asserts from the counters that both sides of the branch run compiled in the end.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from harness import ANY, Program, Session, program
from torch import nn

from accel import driver

PROGRAMS: list[Program] = []


def _alternate(s: Session, f: Any, arguments: list[tuple[Any, ...]], rounds: int = 14) -> None:
    """Calls with each of these arguments in turn, so often that accel must have made up its mind."""
    for _ in range(rounds):
        for args in arguments:
            s.call(f, *args)


def _both_ways(s: Session, f: Any, *arguments: tuple[Any, ...], segments: int = 2) -> None:
    """After alternating, each way must be served by at least so many segments."""
    _alternate(s, f, list(arguments))
    for args in arguments:
        s.split(f, *args, segments=segments, calls=0)


X = torch.linspace(-1, 2, 6)


@program(PROGRAMS, "a flipping branch in straight code", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        x = torch.tanh(x) + 1
        if x.sum() > 6:
            x = torch.sin(x) * 2
        else:
            x = torch.cos(x) - 1
        return x * 2 + 1

    f = s.root(f)
    _both_ways(s, f, (X,), (-X,))


@program(PROGRAMS, "a steady branch stays assumed, a rare one gets a variant")
def _(s: Session) -> None:
    def f(x):
        x = torch.tanh(x) + 1
        if x.isnan().any():
            x = torch.zeros_like(x)
        return x * 2 + 1

    f = s.root(f)
    bad = X * float("nan")
    for k in range(60):
        s.call(f, bad if k % 20 == 9 else X)
    s.hit(f, X)
    s.hit(f, bad)
    s.hit(f, X)


@program(PROGRAMS, "a branch that flips under fullgraph has a variant for each way")
def _(s: Session) -> None:
    def f(x):
        if x.sum() > 0:
            return torch.sin(x) * 2
        return torch.cos(x) - 1

    f = s.root(f, fullgraph=True)
    _alternate(s, f, [(X,), (-X,)])
    s.hit(f, X)
    s.hit(f, -X)


@program(PROGRAMS, "two branches, all four ways", expect=ANY)
def _(s: Session) -> None:
    def f(x, y):
        x = torch.tanh(x) + 1
        if x.mean() > 1:
            x = torch.sin(x) * 2
        y = torch.cos(y) * 2
        if not (y > 0).all():
            y = y - x
        return x * 2 + y

    f = s.root(f)
    ways = [(X, X / 2), (-X, X / 2), (X, X * 2), (-X, X * 2)]
    _both_ways(s, f, *ways)


@program(PROGRAMS, "early exit from a loop over layers", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(8)]

    def f(x):
        depth = 0
        for layer in layers:
            x = torch.relu(layer(x)) + x
            depth += 1
            if x.max() > 3:
                break
        else:
            x = x - 1
        return torch.tanh(x) * 2, depth

    f = s.root(f)
    with torch.no_grad():
        _both_ways(s, f, (X,), (X * 0.7,), (X * 2,), (X * 0.01,))


@program(PROGRAMS, "early exit inside a module's forward", expect=ANY)
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x)) + x
                if x.max() > 3:
                    x = x / x.max()
            return torch.tanh(x) * 2

    torch.manual_seed(0)
    model = s.root(s.watch(Model().eval()))
    with torch.no_grad():
        _both_ways(s, model, (X,), (X * 0.3,), (X * 3,))


@program(PROGRAMS, "Newton's iteration, as long as it takes", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = torch.ones_like(x)
        rounds = 0
        while (y * y - x).abs().max() > 1e-3 * x.max():
            y = 0.5 * (y + x / y)
            rounds += 1
        return y * 2 + 1, rounds

    f = s.root(f)
    positive = X.abs() + 0.1
    _both_ways(s, f, *((positive * 10.0**k,) for k in range(5)))


@program(PROGRAMS, "power iteration that returns from the loop", expect=ANY)
def _(s: Session) -> None:
    def f(a, v):
        for k in range(60):
            w = a @ v
            w = w / w.norm()
            if (w - v).abs().max() < 1e-3:
                return w, k
            v = w
        return v, None

    f = s.root(f)
    torch.manual_seed(1)
    ways = []
    for spread in (1.0, 0.5, 0.3, 3.0):
        a = torch.randn(6, 6) * 0.05
        ways.append((a + torch.diag(torch.linspace(1, 1 + spread, 6)), torch.ones(6)))
    _both_ways(s, f, *ways)


@program(PROGRAMS, "Sinkhorn with a tolerance", expect=ANY)
def _(s: Session) -> None:
    def f(cost, tolerance):
        k = torch.exp(-cost * 2)
        u = torch.ones(cost.shape[0])
        while True:
            v = 1.0 / (k.t() @ u)
            new = 1.0 / (k @ v)
            error = (new - u).abs().max()
            u = new
            if error < tolerance:
                break
        return u[:, None] * k * v[None]

    f = s.root(f)
    torch.manual_seed(2)
    _both_ways(s, f, *((torch.rand(5, 5) * scale, 1e-3) for scale in (0.2, 1.0, 2.0)))


@program(PROGRAMS, "a branch in an inlined function, which gets its own turn", expect=ANY)
def _(s: Session) -> None:
    def inner(x):
        x = torch.sin(x) * 2
        if x.sum() > 0:
            x = x + 1
        else:
            x = x - 1
        return torch.cos(x) * 2

    def f(x):
        x = torch.tanh(x) + 1
        x = inner(x - 1)
        return torch.sin(x) * 2

    s.finally_(lambda code=inner.__code__: setattr(inner, "__code__", code))
    f = s.root(f)
    _both_ways(s, f, (X,), (-X,), segments=4)


@program(PROGRAMS, "greedy decoding until the end token", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(3)
    embedding, cell, head = nn.Embedding(10, 8), nn.GRUCell(8, 8), nn.Linear(8, 10)

    def f(h, end):
        token = torch.zeros(1, dtype=torch.long)
        tokens = []
        for _ in range(12):
            h = cell(embedding(token), h)
            token = head(h).argmax(-1)
            tokens.append(token)
            if token.item() == end:
                break
        return torch.stack(tokens), h * 2

    f = s.root(f)
    with torch.no_grad():
        starts = [torch.randn(1, 8) for _ in range(4)]
        _both_ways(s, f, *((h, 3) for h in starts), segments=4)


@program(PROGRAMS, "decoding a batch until every row is done", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(4)
    embedding, cell, head = nn.Embedding(6, 8), nn.GRUCell(8, 8), nn.Linear(8, 6)

    def f(h, bound):
        token = torch.zeros(3, dtype=torch.long)
        done = torch.zeros(3, dtype=torch.bool)
        rows = []
        while not done.all() and len(rows) < 9:
            h = cell(embedding(token), h)
            scores = head(h).softmax(-1)
            token = torch.where(done, 0, scores.argmax(-1))
            done = done | (scores.amax(-1) > bound)
            rows.append(token)
        return torch.stack(rows, 1), done

    f = s.root(f)
    with torch.no_grad():
        starts = [torch.randn(3, 8) * 2 for _ in range(4)]
        bounds = [torch.tensor(bound) for bound in (0.2, 0.25, 0.3, 0.35)]
        _both_ways(s, f, *zip(starts, bounds, strict=True))


def _experts() -> Any:
    torch.manual_seed(5)
    return nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)


@program(PROGRAMS, "mixture of experts by nonzero", expect=ANY)
def _(s: Session) -> None:
    experts, gate = _experts()

    def f(x):
        weights = gate(x).softmax(-1)
        top = weights.argmax(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(experts):
            rows = (top == e).nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            y[rows] = torch.relu(expert(x[rows])) * weights[rows, e : e + 1]
        return y * 2 + 1

    f = s.root(f)
    with torch.no_grad():
        batches = [torch.randn(5, 6) * 2 for _ in range(4)]
        _both_ways(s, f, *((x,) for x in batches), segments=3)


@program(PROGRAMS, "mixture of experts by tolist and masks", expect=ANY)
def _(s: Session) -> None:
    experts, gate = _experts()

    def f(x):
        top = gate(x).argmax(-1)
        counts = torch.bincount(top, minlength=3).tolist()
        y = torch.zeros_like(x)
        for e, n in enumerate(counts):
            if n:
                mask = top == e
                y[mask] = torch.tanh(experts[e](x[mask])) * 2
        return y * 2 + x, counts

    f = s.root(f)
    with torch.no_grad():
        batches = [torch.randn(5, 6) * 2 for _ in range(4)]
        _both_ways(s, f, *((x,) for x in batches), segments=2)


@program(PROGRAMS, "boolean indexing gives another size at each call", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        x = torch.tanh(x) + 0.1
        kept = x[x > 0]
        return torch.sin(kept) * 2, kept.numel()

    f = s.root(f)
    for k in range(12):
        s.call(f, X + k / 4)
    s.split(f, X, segments=1)
    s.split(f, X, segments=1, calls=0)


@program(PROGRAMS, "gradients on both sides of a branch", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(torch.linspace(-1, 1, 6).requires_grad_())

    def f(x):
        y = torch.tanh(x * w) * 2
        if y.sum() > 0:
            y = torch.sin(y) + w
        else:
            y = torch.cos(y) * w
        return (y * y).sum()

    f = s.root(f)
    ways = (X.clone(), -X)
    for _ in range(14):
        for x in ways:
            s.call(f, x).backward()
    for x in ways:
        s.split(f, x, calls=0)


@program(PROGRAMS, "effects on both sides of a branch", expect=ANY)
def _(s: Session) -> None:
    class Holder:
        def __init__(self):
            self.steps = 0
            self.last = torch.zeros(6)

    holder, seen, buffer = s.watch(Holder()), s.watch([]), s.watch(torch.zeros(6))

    def f(x):
        y = torch.tanh(x) + torch.rand(6)
        buffer.add_(y)
        if y.sum() > 3:
            holder.last = y * 2
            seen.append(y.shape[0])
        else:
            holder.steps += 1
            buffer.mul_(0.5)
            if len(seen) > 3:
                seen.pop()
        return y + holder.last

    f = s.root(f)
    _alternate(s, f, [(X,), (-X,), (-X,), (X,)])


@program(PROGRAMS, "branches in expressions, conditions and asserts", expect=ANY)
def _(s: Session) -> None:
    def f(x, parts):
        x = torch.tanh(x) + 1
        scale = 2 if x.sum() > 6 else 3
        chosen = [p * scale if p.sum() > 0 else p - scale for p in parts]
        if x.max() > 1.5 and x.min() < 0.5 or not parts:
            x = x * 2
        assert (x < 50).all(), "too large"
        return x, chosen

    f = s.root(f)
    _alternate(s, f, [(X, [X, -X]), (-X, [-X, X]), (X, [X, X]), (-X, [])])
    s.call(f, X * 0 + 100, [X])


@program(PROGRAMS, "an assertion that fails now and then", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = torch.tanh(x) + 1
        assert y.sum() > 6, f"sum of {x.shape}"
        return torch.sin(y) * 2

    f = s.root(f)
    _alternate(s, f, [(X,), (-X,)])


@program(PROGRAMS, "numbers that are others at each visit", expect=ANY)
def _(s: Session) -> None:
    def f(batches):
        total, n, best = 0.0, 0, 1e9
        for x in batches:
            loss = (torch.tanh(x) ** 2).mean()
            total += loss.item()
            n += 1
            y = torch.sin(x) * 2 + 1
            z = torch.cos(y) * n
            if total > 100:
                break
            best = min(best, total)
            zlib.crc32(b"exit")
        return total / n, y, z, best

    f = s.root(f)
    torch.manual_seed(6)
    for _ in range(9):
        s.call(f, [torch.randn(6) for _ in range(5)])
    s.split(f, [torch.randn(6) for _ in range(5)], segments=8)


@program(PROGRAMS, "layers by index, more of them than variants", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(7)
    layers = [nn.Linear(6, 6) for _ in range(12)]

    def f(x):
        for i in range(len(layers)):
            x = torch.relu(layers[i](x)) + x
            zlib.crc32(b"exit")
            x = x / 2
        return x

    f = s.root(f)
    with torch.no_grad():
        s.split(f, X, segments=12, calls=14)


@program(PROGRAMS, "branches are assumed again after a reset")
def _(s: Session) -> None:
    def f(x):
        if x.sum() > 0:
            return torch.sin(x) * 2
        return torch.cos(x) - 1

    f = s.root(f)
    for k in range(28):
        s.call(f, -X if k % 2 else X)
    if driver.current is not None:
        driver.current.reset()
    s.warm(f, X)
