"""Programs that write: to inputs, to state, to the console, to random generators; and that fail."""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import random
import sys
import warnings
import weakref

import numpy
import torch
import torch.nn.functional as F
from harness import ANY, EAGER, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []


class Counter:
    count = 0


@program(PROGRAMS, "append to outer list", expect=ANY)
def _(s: Session) -> None:
    seen = s.watch([])

    def f(x):
        seen.append(x * 2)
        seen.append("mark")
        return x + 1

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "append to list argument", expect=ANY)
def _(s: Session) -> None:
    def f(x, out):
        out.append(x.sum())
        out.append(out)
        return out

    f = s.root(f)
    out = []
    s.warm(f, torch.ones(3), out)
    s.call(f, torch.ones(3), [])


@program(PROGRAMS, "attribute written", expect=ANY)
def _(s: Session) -> None:
    class State:
        count = 0
        last = None

    state = s.watch(State())

    def f(x):
        state.count += 1
        state.last = x * 2
        return x + state.count

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "attribute written and read back")
def _(s: Session) -> None:
    class Model(nn.Module):
        def forward(self, x):
            self.cached = x * 2
            self.doubled = self.cached + 1
            return self.cached * self.doubled

    model = s.watch(Model())
    f = s.root(model)
    s.warm(f, torch.ones(3))
    s.call(f, torch.full((3,), 2.0))


@program(PROGRAMS, "attribute deleted", expect=ANY)
def _(s: Session) -> None:
    class State:
        pass

    state = s.watch(State())

    def f(x):
        if hasattr(state, "tmp"):
            del state.tmp
        else:
            state.tmp = 1
        return x + 1

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "dict written", expect=ANY)
def _(s: Session) -> None:
    cache = s.watch({"n": 0})

    def f(x):
        cache["n"] += 1
        cache[x.shape[0]] = x * 2
        cache.setdefault("first", x + 0)
        return cache["first"] + 1

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.ones(4))


@program(PROGRAMS, "global written", expect=ANY)
def _(s: Session) -> None:
    s.patch(globals(), "COUNTER", 0)

    def f(x):
        global COUNTER
        COUNTER += 1
        return x * COUNTER

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.ones(3))
        s.watch(globals()["COUNTER"])


@program(PROGRAMS, "nonlocal written", expect=ANY)
def _(s: Session) -> None:
    total = torch.zeros(3)
    count = 0

    def f(x):
        nonlocal total, count
        count += 1
        total = total + x
        return total * 2

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.ones(3))
        s.call(lambda: (count, total))


@program(PROGRAMS, "print", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        print("shape", x.shape, x.dtype)
        y = x * 2
        print("done", file=sys.stderr)
        return y

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.ones(4))


@program(PROGRAMS, "print and write to several streams")
def _(s: Session) -> None:
    kept = s.watch(io.StringIO())
    encoded = s.watch(io.TextIOWrapper(io.BytesIO(), "utf-8"))

    def f(x):
        print("one", 1, 2.5, None, sep="|", file=kept)
        print("two", end=";", file=kept)
        print("é", file=encoded, flush=True)
        print("shown")
        sys.stderr.write("error ")
        sys.stderr.flush()
        for i in range(3):
            x = x + 1
            sys.stdout.write(f"step {i}, ")
        return x

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.hit(f, torch.ones(3))
    s.call(lambda: (kept.getvalue(), encoded.buffer.getvalue()))


@program(PROGRAMS, "print to a stream that cannot take it", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        try:
            print("é")
        except (ValueError, TypeError) as error:
            return x - 1, str(error)
        return x + 1

    f = s.root(f)

    def written(stream):
        with contextlib.redirect_stdout(stream):
            result = f(torch.ones(3))
        return result

    for _ in range(4):
        s.call(lambda: written(io.TextIOWrapper(io.BytesIO(), "utf-8")))
    s.call(lambda: written(io.TextIOWrapper(io.BytesIO(), "ascii")))
    s.call(lambda: written(None))
    for kind in (io.StringIO, lambda: io.TextIOWrapper(io.BytesIO())):
        for _ in range(4):
            s.call(lambda kind=kind: written(kind()))
        closed = kind()
        closed.close()
        s.call(lambda closed=closed: written(closed))


@program(PROGRAMS, "print to a stream of a Python class", expect=ANY)
def _(s: Session) -> None:
    lines = s.watch([])

    class Tee(io.StringIO):
        def write(self, text):
            lines.append(text)
            if len(lines) > 12:
                raise ValueError("full")
            return len(text)

    class Asking:
        def __init__(self):
            self.count = 0

        def write(self, text):
            self.count += 1

    def f(x, tee, asking):
        try:
            print("text", file=tee)
            print("text", file=asking)
        except ValueError:
            return x - len(lines)
        return x * len(lines) + asking.count

    f = s.root(f)
    tee, asking = Tee(), Asking()
    for _ in range(8):
        s.call(f, torch.ones(3), tee, asking)


@program(PROGRAMS, "print to a stream that turns into another", expect=ANY)
def _(s: Session) -> None:
    lines = s.watch([])

    class Named(io.StringIO):
        pass

    stream = Named()

    def f(x):
        print("text", file=stream)
        return x * (1 + len(lines))

    f = s.root(f)
    s.warm(f, torch.ones(3))
    stream.write = lines.append
    for _ in range(4):
        s.call(f, torch.ones(3))
    del stream.write
    for _ in range(4):
        s.call(f, torch.ones(3))
    s.call(stream.getvalue)


@program(PROGRAMS, "texts come one by one and are flushed in their places")
def _(s: Session) -> None:
    class Order(io.BytesIO):
        pass

    late, lines = io.BytesIO(), io.BytesIO()
    slow = io.TextIOWrapper(late, "utf-8")
    quick = io.TextIOWrapper(lines, "utf-8", line_buffering=True)
    turning = s.watch(io.StringIO(newline=None))

    def f(x):
        print("a", file=slow, flush=True)
        print("b", file=slow)
        print("c", file=quick, end="\n-")
        print("d", file=quick, end="")
        print("50%", end="\r", file=turning)
        print(file=turning)
        return x + 1

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.ones(3))
        s.call(lambda: (late.getvalue(), lines.getvalue(), turning.getvalue()))


@program(PROGRAMS, "print is replaced")
def _(s: Session) -> None:
    counted = s.watch([])
    plain = print

    def f(x):
        plain("text")
        return x + 1

    def replacement(*args, **words):
        counted.append(args)

    f = s.root(f)
    builtins.print = replacement
    try:
        s.warm(f, torch.ones(3))
        s.hit(f, torch.ones(3))
    finally:
        builtins.print = plain


@program(PROGRAMS, "a stream with a finaliser dies", expect=ANY)
def _(s: Session) -> None:
    state, holder = s.watch(Counter()), Counter()

    class Counted(io.StringIO):
        def __del__(self):
            state.count += 1

    def f(x):
        print("bye", file=holder.stream)
        holder.stream = None
        return x * state.count

    f = s.root(f)
    for _ in range(6):
        holder.stream = Counted()
        s.call(f, torch.ones(3))


@program(PROGRAMS, "an object dies and tells", expect=ANY)
def _(s: Session) -> None:
    state, given = s.watch(Counter()), []

    class Scale:
        value = 2

    def tell():
        state.count += 1

    def f(x):
        scale = given.pop()
        x = x * scale.value
        del scale
        return x * state.count

    f = s.root(f)
    for _ in range(8):
        given.append(Scale())
        weakref.finalize(given[0], tell)
        s.call(f, torch.ones(3))


@program(PROGRAMS, "print of tensor values", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        print(y, f"{y.sum().item():.2f}")
        return y

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.full((3,), 2.0))


@program(PROGRAMS, "logging", expect=ANY)
def _(s: Session) -> None:
    logger = logging.getLogger("accel.test.program")
    records = s.watch([])

    class Keep(logging.Handler):
        def emit(self, record):
            records.append([record.levelname, record.getMessage(), record.lineno, record.funcName])

    handler = Keep()
    logger.addHandler(handler)
    s.finally_(lambda: logger.removeHandler(handler))
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def f(x):
        logger.debug("hidden %s", x)
        logger.info("shape %s", tuple(x.shape))
        return x + 1

    f = s.root(f)
    s.warm(f, torch.ones(3))
    logger.setLevel(logging.DEBUG)
    s.call(f, torch.ones(3))


@program(PROGRAMS, "warnings", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        warnings.warn("careful", stacklevel=1)
        return x + 1

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "in-place on an input")
def _(s: Session) -> None:
    def f(x):
        x.mul_(2)
        x[0] = 5
        x += 1
        return x.sum()

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.full((3,), 7.0))


@program(PROGRAMS, "in-place on an input, returned")
def _(s: Session) -> None:
    def f(x):
        before = x + 0
        x.add_(1).relu_()
        return x, before, x

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.call(f, torch.randn(3))


@program(PROGRAMS, "in-place on a view of an input")
def _(s: Session) -> None:
    def f(x):
        row = x[0]
        row.fill_(9)
        x[:, 1].add_(1)
        return x.sum(0), row

    f = s.root(f)
    s.warm(f, torch.ones(2, 3))
    s.call(f, torch.zeros(2, 3))


@program(PROGRAMS, "in-place on an intermediate")
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        view = y[1:]
        y.add_(1)
        view.mul_(3)
        y[0] = 0
        return y, view

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.zeros(3))


@program(PROGRAMS, "out= and copy_")
def _(s: Session) -> None:
    def f(x, out):
        torch.add(x, 1, out=out)
        out.copy_(out * 2)
        return out

    f, out = s.root(f), torch.zeros(3)
    s.warm(f, torch.ones(3), out)
    s.call(f, torch.ones(3), out)


@program(PROGRAMS, "resize of an input", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        x.resize_(2)
        return x + 1

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.ones(4))


@program(PROGRAMS, "set_ and .data of an input", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        x.data = x.data * 2
        return x + 1

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.ones(4))


@program(PROGRAMS, "buffer updated (batch norm in training)", expect=ANY)
def _(s: Session) -> None:
    model = s.watch(nn.BatchNorm1d(3).train().requires_grad_(False))
    f = s.root(model)
    s.warm(f, torch.randn(4, 3))
    s.call(f, torch.randn(4, 3))


@program(PROGRAMS, "views returned")
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        return x.t(), x[0], y[:, 1:], y.view(-1), y.unsqueeze(0), x.expand(2, 2, 3)

    f, x = s.root(f), torch.ones(2, 3)
    s.warm(f, x)
    views = s.call(f, x)
    s.call(lambda: views[0].add_(1))
    s.watch(x)
    s.call(lambda: views[2].add_(1))


@program(PROGRAMS, "detach, contiguous and to that return the input")
def _(s: Session) -> None:
    def f(x):
        return x.contiguous(), x.to(torch.float32), x.detach(), x.clone(), x.float(), +x

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.randn(3, 4).t())
    s.call(f, torch.randn(3).double())


@program(PROGRAMS, "identity of returned inputs and containers")
def _(s: Session) -> None:
    shared = s.watch([1, 2])

    def f(x, items):
        y = x * 2
        pair = [y, y]
        return {"x": x, "items": items, "pair": pair, "again": pair, "shared": shared, "y": y}

    f = s.root(f)
    s.warm(f, torch.ones(3), [torch.ones(2)])
    s.call(f, torch.ones(3), [torch.ones(2)])


@program(PROGRAMS, "the same list returned twice is not the same")
def _(s: Session) -> None:
    def f(x):
        return [x * 2], {"a": (x, [1])}

    f = s.root(f)
    first = s.warm(f, torch.ones(3))
    s.call(first[0].append, 1)
    s.call(f, torch.ones(3))


@program(PROGRAMS, "mutable constant returned", expect=ANY)
def _(s: Session) -> None:
    def f(x, options={}):
        options["seen"] = options.get("seen", 0) + 1
        return x + 1, options

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "results are resizable, own their storage, and can be written")
def _(s: Session) -> None:
    def f(x):
        return x * 2, x.sum(), x + 1

    f = s.root(f)
    s.warm(f, torch.ones(3))
    a, b, c = s.call(f, torch.ones(3))
    s.call(lambda: (a.resize_(10).zero_(), b.add_(1), c.zero_()) and None)
    s.call(f, torch.ones(3))


@program(PROGRAMS, "exception from torch")
def _(s: Session) -> None:
    def f(x, y):
        z = x * 2
        return z @ y

    f = s.root(f)
    s.warm(f, torch.ones(2, 3), torch.ones(3, 2))
    s.call(f, torch.ones(2, 3), torch.ones(4, 2))
    s.call(f, torch.ones(2, 3), torch.ones(3, 2))
    s.call(f, torch.ones(2, 3), "text")


@program(PROGRAMS, "exception raised by the program", expect=ANY)
def _(s: Session) -> None:
    seen = s.watch([])

    class Refused(ValueError):
        pass

    def inner(x):
        if x.shape[0] > 3:
            raise Refused("too long", x.shape[0])
        return x * 2

    def f(x):
        seen.append(x.shape[0])
        return inner(x) + 1

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.ones(4))
    s.call(f, torch.ones(4))
    s.call(f, torch.ones(3))


@program(PROGRAMS, "exception at a bad index of an embedding")
def _(s: Session) -> None:
    table = nn.Embedding(5, 3).requires_grad_(False)

    def f(i):
        return table(i) + 1

    f = s.root(f)
    s.warm(f, torch.tensor([0, 4]))
    s.call(f, torch.tensor([0, 5]))
    s.call(f, torch.tensor([-1, 2]))
    s.call(f, torch.tensor([3, 2]))


@program(PROGRAMS, "exception at a bad gather and index", expect=ANY)
def _(s: Session) -> None:
    def f(x, i):
        return x.gather(0, i), x[i] + 1

    f, x = s.root(f), torch.randn(5)
    s.warm(f, x, torch.tensor([0, 4]))
    s.call(f, x, torch.tensor([0, 5]))
    s.call(f, x, torch.tensor([0, -1]))
    s.call(lambda: f(x, torch.tensor([1, 2])))


@program(
    PROGRAMS,
    "exception caught inside",
    expect=EAGER,
    reason="an operation raised an exception, which was caught",
)
def _(s: Session) -> None:
    def f(x):
        try:
            y = x.view(2, 2)
        except RuntimeError as error:
            y = x * len(str(error).split()[0])
        finally:
            z = x + 1
        return y.sum() + z.sum()

    f = s.root(f)
    s.call(f, torch.ones(3))
    s.call(f, torch.ones(3))
    s.call(f, torch.ones(3))
    s.call(f, torch.ones(4))


@program(PROGRAMS, "exception after a write to an input", expect=ANY)
def _(s: Session) -> None:
    def f(x, fail):
        x.add_(1)
        if fail:
            raise KeyError("late")
        return x * 2

    f, x = s.root(f), torch.ones(3)
    s.warm(f, x, False)
    s.call(f, x, True)
    s.call(f, x, True)
    s.call(f, x, False)


@program(PROGRAMS, "try/finally and re-raise", expect=ANY)
def _(s: Session) -> None:
    log = s.watch([])

    def f(x):
        try:
            return x.reshape(2, -1).sum(0)
        except RuntimeError as error:
            log.append("failed")
            raise TypeError("bad input") from error
        finally:
            log.append("finally")

    f = s.root(f)
    s.warm(f, torch.ones(4))
    s.call(f, torch.ones(3))
    s.call(f, torch.ones(4))


@program(PROGRAMS, "dropout in train mode", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return F.dropout(x * 2, 0.5, training=True) + 1

    f = s.root(f)
    s.warm(f, torch.ones(50))
    s.call(f, torch.ones(50))


@program(PROGRAMS, "random operations", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x + torch.rand(3) + torch.randn_like(x), torch.randperm(5), x.bernoulli(0.5)

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "python and numpy randomness", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x * random.random() + float(numpy.random.rand())

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "own generator and manual_seed", expect=ANY)
def _(s: Session) -> None:
    generator = torch.Generator().manual_seed(3)

    def f(x, reseed):
        if reseed:
            torch.manual_seed(7)
        return x + torch.rand(3, generator=generator) + torch.rand(3)

    f = s.root(f)
    s.warm(f, torch.ones(3), False)
    s.call(f, torch.ones(3), True)
    s.call(f, torch.ones(3), True)


@program(PROGRAMS, "item and tolist", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        n = int(x.sum().item())
        return x * n, x.tolist(), float(x[0])

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.full((3,), 2.0))


@program(PROGRAMS, "data-dependent sizes", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        kept = x[x > 0]
        return kept * 2, torch.nonzero(x), x.unique()

    f = s.root(f)
    s.warm(f, torch.tensor([1.0, -1.0, 2.0]))
    s.call(f, torch.tensor([1.0, 1.0, 2.0]))
    s.call(f, torch.tensor([-1.0, -1.0, -2.0]))


@program(PROGRAMS, "branch on a tensor that flips")
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        if y.sum() > 0:
            return y + 1
        return y - 1

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, -torch.ones(3))
    s.call(f, torch.ones(3))
    for sign in (-1, 1, -1, 1):
        s.call(f, sign * torch.ones(3))


@program(PROGRAMS, "branch on a mask, with a write before it")
def _(s: Session) -> None:
    state = s.watch([torch.zeros(3)])

    def f(x, mask):
        state[0].add_(x)
        if mask.all():
            return x * 2
        return x.masked_fill(~mask, -1.0)

    f = s.root(f)
    full, part = torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])
    for mask in (full, full, full, part, part, full):
        s.call(f, torch.ones(3), mask)


@program(PROGRAMS, "assert, while and any on tensors", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        assert (x > 0).all(), "must be positive"
        n = 0
        while x.sum() < 20:
            x = x * 2
            n += 1
        return x, n, bool((x > 30).any())

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.full((3,), 5.0))
    s.call(f, torch.full((3,), -5.0))
    s.call(f, torch.full((3,), 50.0))


@program(PROGRAMS, "numpy in the middle", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        array = (x * 2).numpy()
        array[0] = 100
        return torch.from_numpy(array) + 1, array.sum()

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.zeros(3))


@program(PROGRAMS, "data pointers and version counters", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = x[1:]
        x.add_(1)
        return y.data_ptr() - x.data_ptr(), x._version - x._version, y + 1

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "autograd through code after the root")
def _(s: Session) -> None:
    weight = torch.randn(3, requires_grad=True)
    s.watch(weight)

    def f(x):
        return x.relu() * 2

    f, x = s.root(f), torch.randn(3)
    s.warm(f, x)
    s.call(lambda: (f(x) * weight).sum().backward())
    s.call(lambda: f(x * weight).sum().backward())


@program(PROGRAMS, "training step", expect=ANY)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = s.root(step)
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    for _ in range(5):
        s.call(step, x, y)


@program(PROGRAMS, "object with __del__", expect=ANY)
def _(s: Session) -> None:
    deaths = s.watch([])

    class Mortal:
        def __init__(self, n):
            self.n = n

        def __del__(self):
            deaths.append(self.n)

    def f(x):
        m = Mortal(x.shape[0])
        y = x * m.n
        del m
        return y + len(deaths)

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.ones(4))
