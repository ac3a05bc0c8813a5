"""Programs as people write them around training: buffers, schedules, caches, tying, writes by hand."""

from __future__ import annotations

import bisect
import collections
import contextlib
import copy
import dataclasses
import functools
import heapq
import io
import logging
import math
import random
import warnings
import weakref

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import Tensor, nn

PROGRAMS: list[Program] = []

# module that mutates module-level registry through global
STEP = 0
REG = {}


def register(name):
    def deco(fn):
        REG[name] = fn
        return fn

    return deco


@register("square")
def _sq(x):
    return x * x


@register("shift")
def _sh(x, by=1.0):
    return x + by


@program(PROGRAMS, "registry dispatch with global step", expect=ANY, runs=2)
def _(s: Session) -> None:
    s.patch(globals(), "STEP", 0)

    def f(x, names):
        global STEP
        STEP += 1
        for n in names:
            fn = REG.get(n)
            if fn is None:
                raise KeyError(f"unknown op {n!r} at step {STEP}")
            x = fn(x)
        return x, STEP

    f = s.root(f)
    for k in range(6):
        s.call(f, torch.randn(3), ["square", "shift"])
    s.call(f, torch.randn(3), ["square", "nope"])
    s.patch(REG, "square", lambda x: x * 3)
    for k in range(3):
        s.call(f, torch.randn(3), ["square", "shift"])
    s.patch(_sh, "__defaults__", (5.0,))
    for k in range(3):
        s.call(f, torch.randn(3), ["shift"])


@program(PROGRAMS, "replay buffer and DQN target update", expect=ANY, runs=6)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class Buffer:
        def __init__(self, cap):
            self.data = collections.deque(maxlen=cap)
            self.rng = random.Random(0)

        def add(self, *item):
            self.data.append(item)

        def sample(self, n):
            items = self.rng.sample(self.data, n)
            return tuple(torch.stack(t) for t in zip(*items))

    q, tgt = nn.Linear(3, 2), nn.Linear(3, 2)
    tgt.load_state_dict(q.state_dict())
    opt = torch.optim.SGD(q.parameters(), 0.1, momentum=0.9)
    buf = Buffer(8)
    s.watch(q)
    s.watch(tgt)
    state = {"t": 0}
    s.watch(state)

    def learn(obs, act, rew, nxt, gamma=0.9, tau=0.1):
        buf.add(obs, act, rew, nxt)
        state["t"] += 1
        if len(buf.data) < 4:
            return None
        o, a, r, n = buf.sample(4)
        with torch.no_grad():
            target = r + gamma * tgt(n).max(-1).values
        loss = F.smooth_l1_loss(q(o).gather(-1, a[:, None]).squeeze(-1), target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if state["t"] % 3 == 0:
            with torch.no_grad():
                for p, t in zip(q.parameters(), tgt.parameters()):
                    t.lerp_(p, tau)
        return loss.item()

    f = s.root(learn)
    for k in range(14):
        s.call(f, torch.randn(3), torch.tensor(k % 2), torch.randn(()), torch.randn(3))


# The rows of `h` share memory and require grad: Python makes them, and few calls remain to serve.
@program(PROGRAMS, "RNN with packed lists and early stop per row", expect=ANY, runs=3)
def _(s: Session) -> None:
    torch.manual_seed(0)
    cell = nn.LSTMCell(3, 4)

    def f(xs, lengths):
        b = xs.size(0)
        h = xs.new_zeros(b, 4)
        c = torch.zeros_like(h)
        outs = []
        for t in range(max(lengths)):
            live = torch.tensor([n > t for n in lengths])
            h2, c2 = cell(xs[:, t], (h, c))
            h = torch.where(live[:, None], h2, h)
            c = torch.where(live[:, None], c2, c)
            outs.append(h)
        return torch.stack(outs, 1), [o[i] for i, o in enumerate(torch.unbind(h))]

    f = s.root(f)
    for L in ([3, 2], [3, 2], [3, 2], [1, 4], [2, 2], [3, 2], [4, 4, 1]):
        s.call(f, torch.randn(len(L), 4, 3), L)
    with torch.no_grad():
        for L in ([3, 2], [3, 2], [3, 2], [4, 1], [4, 1], [3, 2]):
            s.call(f, torch.randn(len(L), 4, 3), L)


@program(PROGRAMS, "config dataclass hierarchy with post init and property", expect=ANY, runs=1)
def _(s: Session) -> None:
    @dataclasses.dataclass
    class Base:
        dim: int = 4
        scale: float | None = None

        def __post_init__(self):
            if self.scale is None:
                self.scale = self.dim**-0.5

    @dataclasses.dataclass
    class Cfg(Base):
        act: str = "relu"
        flags: dict = dataclasses.field(default_factory=dict)

        @property
        def fn(self):
            return getattr(F, self.act)

        def __getattr__(self, n):
            try:
                return self.__dict__["flags"][n]
            except KeyError:
                raise AttributeError(n) from None

    cfg = Cfg(flags={"bias": 0.5})

    def f(x, c):
        local = dataclasses.replace(c, dim=c.dim + 1, scale=None)
        y = c.fn(x * c.scale) + getattr(c, "bias", 0) + local.scale
        if hasattr(c, "extra"):
            y = y * c.extra
        return y, local.dim, dataclasses.asdict(local)["scale"]

    f = s.root(f)
    for k in range(4):
        s.call(f, torch.randn(3), cfg)
    cfg.flags["extra"] = 2.0
    s.call(f, torch.randn(3), cfg)
    s.call(f, torch.randn(3), cfg)
    cfg.act = "silu"
    s.call(f, torch.randn(3), cfg)
    del cfg.flags["bias"]
    s.call(f, torch.randn(3), cfg)
    for k in range(3):
        s.call(f, torch.randn(3), Cfg(dim=3 + k))


@program(PROGRAMS, "nested closures with nonlocal counters and callbacks", expect=ANY, runs=1)
def _(s: Session) -> None:
    def make(momentum):
        velocity = None
        count = 0

        def update(g, on_reset=None):
            nonlocal velocity, count
            count += 1
            if velocity is None or velocity.shape != g.shape:
                velocity = torch.zeros_like(g)
                if on_reset is not None:
                    on_reset(count)
            velocity = momentum * velocity + g

            def norm(p=2):
                return velocity.norm(p) / count

            return norm() + norm(1), velocity

        return update, lambda: (velocity, count)

    u, peek = make(0.9)
    resets = s.watch([])
    u = s.root(u)
    for k in range(9):
        s.call(u, torch.randn(3 if k < 6 else 4), resets.append)
    s.call(lambda: peek())


@program(PROGRAMS, "sparse top-k router with capacity and python ints", expect=ANY, runs=5)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class MoE(nn.Module):
        def __init__(self, n=3, d=4, k=2):
            super().__init__()
            self.gate = nn.Linear(d, n)
            self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(n))
            self.k = k
            self.register_buffer("load", torch.zeros(n))

        def forward(self, x):
            w, idx = self.gate(x).softmax(-1).topk(self.k, -1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                rows, slot = torch.where(idx == e)
                self.load[e] += rows.numel()
                if rows.numel() == 0:
                    continue
                out.index_add_(0, rows, expert(x[rows]) * w[rows, slot, None])
            return out

    m = s.watch(MoE())
    f = s.root(m)
    with torch.no_grad():
        for k in range(24):
            s.call(f, torch.randn(5 + k % 2, 4))
    for k in range(3):
        s.call(f, torch.randn(5, 4))


@program(PROGRAMS, "masks and indexing with ints computed by Python", expect=ANY)
def _(s: Session) -> None:
    def spans(text):
        out, start = [], 0
        for w in text.split():
            at = text.index(w, start)
            out.append((at, at + len(w)))
            start = at + len(w)
        return out

    def f(x, text):
        pooled = [x[a:b].mean(0) for a, b in spans(text)]
        mask = torch.zeros(x.size(0), dtype=torch.bool)
        for a, b in spans(text):
            mask[a] = True
            mask[b - 1] = True
        return torch.stack(pooled), x[mask], x.masked_fill(~mask[:, None], 0.0)

    f = s.root(f)
    for t in ("ab cde f", "ab cde f", "ab cde f", "abc de f", "a b c d e", "ab cde f"):
        s.call(f, torch.randn(9, 2), t)


@program(PROGRAMS, "lazy linear and deepcopy of a module in forward", expect=ANY, runs=2)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(3)
            self.teacher = None

        def forward(self, x):
            y = self.head(x)
            if self.teacher is None:
                self.teacher = copy.deepcopy(self.head).requires_grad_(False)
            with torch.no_grad():
                z = self.teacher(x)
            return F.mse_loss(y, z) + y.mean()

    n = Net()
    f = s.root(n)
    for k in range(5):
        s.call(f, torch.randn(2, 4))
    with torch.no_grad():
        n.head.weight.add_(1.0)
    s.call(f, torch.randn(2, 4))
    n.teacher = None
    s.call(f, torch.randn(2, 4))
    s.call(f, torch.randn(2, 4))
    s.call(f, torch.randn(2, 4))


@program(PROGRAMS, "weight tying and parametrization with cached context", expect=ANY, runs=3)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class Sym(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).transpose(-1, -2)

    lin = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(lin, "weight", Sym())
    emb = nn.Embedding(6, 4)
    out = nn.Linear(4, 6, bias=False)
    out.weight = emb.weight

    def f(ids, cached):
        ctx = nn.utils.parametrize.cached() if cached else contextlib.nullcontext()
        with ctx:
            h = lin(emb(ids))
            h = lin(h)
        return out(h).logsumexp(-1).mean()

    f = s.root(f)
    for k in range(5):
        s.call(f, torch.randint(0, 6, (3,)), False)
    for k in range(4):
        s.call(f, torch.randint(0, 6, (3,)), True)
    out.weight = nn.Parameter(torch.zeros(6, 4))
    s.call(f, torch.randint(0, 6, (3,)), False)


@program(PROGRAMS, "vmap of grad per-sample inside a root", expect=ANY)
def _(s: Session) -> None:
    from torch.func import functional_call, grad, vmap

    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    params = dict(net.named_parameters())

    def loss(p, x, y):
        return (functional_call(net, p, (x[None],)) - y).pow(2).sum()

    def f(batch):
        x, y = batch
        g = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
        return {k: v.norm() for k, v in g.items()}, x.sum()

    f = s.root(f)
    for k in range(6):
        s.call(f, (torch.randn(4, 3), torch.randn(4)))


@program(PROGRAMS, "autocast inside with float master weights", expect=ANY)
def _(s: Session) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    def f(batch, enabled):
        x, y = batch
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            o = net(x)
            loss = F.cross_entropy(o, y)
        return loss, o.dtype

    f = s.root(f)
    for k in range(9):
        s.call(f, (torch.randn(3, 4), torch.randint(0, 2, (3,))), k % 4 != 3)


@program(PROGRAMS, "complex signal: fft filter and phase", expect=ANY)
def _(s: Session) -> None:
    def f(x, cutoff):
        z = torch.fft.rfft(x)
        z[..., cutoff:] = 0
        mag, ph = z.abs(), z.angle()
        y = torch.fft.irfft(torch.polar(mag, ph), n=x.shape[-1])
        return y, z.real, torch.view_as_real(z).sum(-1), z.conj() @ z

    f = s.root(f)
    for k in range(8):
        s.call(f, torch.randn(8), 2 + k % 3)


@program(PROGRAMS, "heap-based priority, Counter and bisect bookkeeping", expect=ANY)
def _(s: Session) -> None:
    counts = s.watch(collections.Counter())
    heap = s.watch([])
    cuts = [0.3, 0.6]

    def f(x, name):
        counts[name] += 1
        heapq.heappush(heap, (counts[name], name))
        k = bisect.bisect(cuts, counts[name] / 5)
        y = x * (k + 1)
        top = counts.most_common(1)[0]
        return y.sum(), top, heap[0]

    f = s.root(f)
    for n in "aabacabba":
        s.call(f, torch.randn(3), n)


@program(PROGRAMS, "OrderedDict LRU cache of computed tensors", expect=ANY, runs=1)
def _(s: Session) -> None:
    class LRU:
        def __init__(self, n):
            self.n = n
            self.d = collections.OrderedDict()
            self.hits = 0

        def get(self, k, make):
            if k in self.d:
                self.d.move_to_end(k)
                self.hits += 1
                return self.d[k]
            v = self.d[k] = make(k)
            while len(self.d) > self.n:
                self.d.popitem(last=False)
            return v

    lru = s.watch(LRU(2))

    def f(x):
        n = x.size(-1)
        pos = lru.get(n, lambda n: torch.arange(n) / n)
        return x * pos + lru.hits

    f = s.root(f)
    for n in (3, 3, 3, 4, 4, 5, 3, 5, 5, 5):
        s.call(f, torch.randn(2, n))


@program(PROGRAMS, "singledispatch collate with custom batch types", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Batch(dict):
        def __getattr__(self, k):
            try:
                return self[k]
            except KeyError as e:
                raise AttributeError(k) from e

        def map(self, fn):
            return type(self)({k: fn(v) for k, v in self.items()})

    @functools.singledispatch
    def collate(v):
        raise TypeError(f"cannot collate {type(v).__name__}")

    @collate.register
    def _(v: torch.Tensor):
        return v.float()

    @collate.register(list)
    def _(v):
        return torch.stack([collate(e) for e in v])

    @collate.register
    def _(v: dict):
        return Batch({k: collate(e) for k, e in v.items()})

    def f(sample):
        b = collate(sample)
        b = b.map(lambda t: t / 2)
        return b.x.sum() + b.y.sum(), b, b.get("z")

    f = s.root(f)
    for k in range(5):
        s.call(f, {"x": [torch.ones(2), torch.randn(2)], "y": torch.arange(3)})
    s.call(f, {"x": [torch.ones(2)], "y": 5})
    s.call(f, {"x": [torch.ones(2)]})
    s.call(f, {"x": [torch.ones(2)], "y": torch.arange(3)})


@program(PROGRAMS, "weakref cache and finalize", expect=ANY, runs=1)
def _(s: Session) -> None:
    cache = weakref.WeakKeyDictionary()

    class Key:
        pass

    dead = s.watch([])

    def f(x, key):
        if key not in cache:
            cache[key] = x.sum()
        return x + cache[key]

    f = s.root(f)
    key = Key()
    for k in range(5):
        s.call(f, torch.randn(3), key)
    key = Key()
    for k in range(3):
        s.call(f, torch.randn(3), key)


@program(PROGRAMS, "logging with lazy args and levels, warnings once", expect=ANY)
def _(s: Session) -> None:
    log = logging.getLogger("accel.tests.realistic")
    stream = io.StringIO()
    h = logging.StreamHandler(stream)
    h.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.addHandler(h)
    log.setLevel(logging.INFO)
    log.propagate = False
    s.finally_(lambda: log.removeHandler(h))

    class Out:
        def __init__(self):
            self.text = ""

    rec = s.watch(Out())

    def f(x, step):
        log.debug("x=%s", x)
        y = x.tanh()
        if step % 3 == 0:
            log.info("step %d loss %.3f", step, y.sum())
        if step == 4:
            warnings.warn(f"step {step} is odd", stacklevel=2)
        z = y * 2
        log.info("shape %s", tuple(z.shape))
        return z

    f = s.root(f)
    for k in range(9):
        if k == 6:
            log.setLevel(logging.DEBUG)
        s.call(f, torch.ones(3) * k, k)
        rec.text = stream.getvalue()


@program(PROGRAMS, "grad and data writes by hand", expect=ANY, runs=6)
def _(s: Session) -> None:
    torch.manual_seed(0)
    p = s.watch(nn.Parameter(torch.randn(3)))
    q = s.watch(nn.Parameter(torch.randn(3)))

    def f(x, lr, clear):
        loss = (p * x).sum() + (q * q).sum()
        gp, gq = torch.autograd.grad(loss, [p, q])
        if clear:
            p.grad = None
        p.grad = gp if p.grad is None else p.grad + gp
        q.grad = gq.clamp(-1, 1)
        with torch.no_grad():
            for t in (p, q):
                t.sub_(t.grad, alpha=lr)
        p.data = p.data.clamp(-2, 2)
        q.data.mul_(0.9)
        return loss.detach()

    f = s.root(f)
    for k in range(8):
        s.call(f, torch.randn(3), 0.1 if k < 5 else 0.2, k % 3 == 0)


@program(PROGRAMS, "custom op with mutation and autograd", expect=ANY, runs=1)
def _(s: Session) -> None:
    @torch.library.custom_op("realistic::scale_add", mutates_args=("acc",))
    def scale_add(acc: Tensor, x: Tensor, k: float) -> None:
        acc.add_(x, alpha=k)

    @torch.library.custom_op("realistic::cube", mutates_args=())
    def cube(x: Tensor) -> Tensor:
        return x**3

    @cube.register_fake
    def _(x):
        return torch.empty_like(x)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x * x

    cube.register_autograd(backward, setup_context=setup)
    acc = s.watch(torch.zeros(3))

    def f(x, k):
        scale_add(acc, x.detach(), k)
        return (cube(x) + acc).sum()

    f = s.root(f)
    for k in range(6):
        x = torch.randn(3, requires_grad=True)
        y = s.call(f, x, 0.5)
        s.call(lambda: (y.backward(), x.grad)[1])


@program(PROGRAMS, "fractional schedulers: cosine warmup computed by math", expect=ANY, runs=3)
def _(s: Session) -> None:
    class Sched:
        def __init__(self, base, warm, total):
            self.base, self.warm, self.total, self.t = base, warm, total, 0

        def __call__(self):
            self.t += 1
            if self.t <= self.warm:
                return self.base * self.t / self.warm
            r = (self.t - self.warm) / (self.total - self.warm)
            return self.base * 0.5 * (1 + math.cos(math.pi * min(r, 1.0)))

    sch = s.watch(Sched(0.1, 3, 12))
    w = s.watch(torch.ones(3))

    def f(g):
        lr = sch()
        w.sub_(g * lr)
        return w.norm(), lr

    f = s.root(f)
    for k in range(16):
        s.call(f, torch.randn(3))


@program(PROGRAMS, "loss balancing with running history list", expect=ANY, runs=2)
def _(s: Session) -> None:
    history = s.watch([])

    def f(a, b):
        l1, l2 = a.pow(2).mean(), b.abs().mean()
        history.append((l1.detach(), l2.detach()))
        if len(history) > 3:
            history.pop(0)
        w1 = torch.stack([h[0] for h in history]).mean()
        w2 = torch.stack([h[1] for h in history]).mean()
        return l1 / w1 + l2 / w2

    f = s.root(f)
    for k in range(10):
        s.call(f, torch.randn(3), torch.randn(3))


@program(PROGRAMS, "data-dependent loop with tensors as conditions", expect=ANY, runs=3)
def _(s: Session) -> None:
    def f(x, tol, most):
        n = 0
        while (err := (x - x.mean()).abs().max()) > tol:
            x = x * 0.5
            n += 1
            if n >= most:
                break
        else:
            return x, n, "converged"
        return x, n, err

    f = s.root(f)
    for k in range(14):
        s.call(f, torch.arange(4.0) * (k % 4), 0.2, 5)


@program(PROGRAMS, "exceptions with cleanup in finally and context", expect=ANY, runs=1)
def _(s: Session) -> None:
    log = s.watch([])

    class Guard:
        def __init__(self, n, eat=()):
            self.n, self.eat = n, eat

        def __enter__(self):
            log.append(("in", self.n))
            return self

        def __exit__(self, t, v, tb):
            log.append(("out", self.n, t and t.__name__))
            return t is not None and issubclass(t, self.eat)

    def f(x, mode):
        try:
            with Guard("a"), Guard("b", (ZeroDivisionError,)):
                y = x * 2
                if mode == 1:
                    1 / 0
                if mode == 2:
                    raise ValueError("bad", x.shape)
                if mode == 3:
                    x @ torch.ones(5, 5)
                y = y + 1
        except ValueError as e:
            raise RuntimeError(f"mode {mode}") from e
        finally:
            log.append(len(log))
            del log[:-3]
        return y

    f = s.root(f)
    for m in (0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 0, 1, 2):
        s.call(f, torch.randn(2), m)


@program(PROGRAMS, "named modules surgery between calls", expect=ANY, runs=1)
def _(s: Session) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})

    def f(x, order):
        for name in order.split("-"):
            if name in net:
                x = net[name](x)
        return x, [n for n, _ in net.named_children()]

    f = s.root(f)
    for k in range(4):
        s.call(f, torch.randn(2, 3), "a-b")
    net["c"] = nn.ReLU()
    s.call(f, torch.randn(2, 3), "a-b")
    s.call(f, torch.randn(2, 3), "a-c-b")
    net.pop("b")
    s.call(f, torch.randn(2, 3), "a-b")
    s.call(f, torch.randn(2, 3), "a-b")
    net["a"].weight.requires_grad_(False)
    s.call(f, torch.randn(2, 3), "a-b")
    net["a"].bias = None
    s.call(f, torch.randn(2, 3), "a-b")
    net.double()
    s.call(f, torch.randn(2, 3).double(), "a-b")
    s.call(f, torch.randn(2, 3), "a-b")


@program(PROGRAMS, "out= and preallocated workspace", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Workspace:
        def __init__(self):
            self.bufs = {}

        def get(self, name, like, *shape):
            key = (name, shape, like.dtype)
            if key not in self.bufs:
                self.bufs[key] = torch.empty(shape, dtype=like.dtype)
            return self.bufs[key]

    ws = s.watch(Workspace())

    def f(a, b):
        out = ws.get("mm", a, a.size(0), b.size(1))
        torch.mm(a, b, out=out)
        tmp = ws.get("row", a, a.size(0))
        torch.sum(out, 1, out=tmp)
        return torch.add(out, tmp[:, None]), out

    f = s.root(f)
    for k in range(8):
        s.call(f, torch.randn(2 + k // 5, 3), torch.randn(3, 4))


@program(PROGRAMS, "threshold by quantile with sorted python list", expect=ANY)
def _(s: Session) -> None:
    def f(xs, q):
        flat = torch.cat([x.flatten() for x in xs])
        k = max(1, int(q * flat.numel()))
        thr = flat.abs().kthvalue(k).values
        pruned = [torch.where(x.abs() > thr, x, torch.zeros_like(x)) for x in xs]
        kept = sum(int((p != 0).sum()) for p in pruned)
        ranked = sorted(range(len(xs)), key=lambda i: float(xs[i].norm()))
        return pruned, kept / flat.numel(), ranked

    f = s.root(f)
    for k in range(8):
        s.call(f, [torch.randn(3, 2), torch.randn(4)], 0.3 if k < 6 else 0.6)


@program(PROGRAMS, "mixed precision loss scaler class", expect=ANY, runs=5)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class Scaler:
        def __init__(self):
            self.scale, self.good = 8.0, 0

        def step(self, params, lr):
            finite = all(torch.isfinite(p.grad).all() for p in params)
            if not finite:
                self.scale /= 2
                self.good = 0
                return False
            with torch.no_grad():
                for p in params:
                    p -= lr * p.grad / self.scale
            self.good += 1
            if self.good % 3 == 0:
                self.scale *= 2
            return True

    sc = s.watch(Scaler())
    w = s.watch(nn.Parameter(torch.ones(3)))

    def f(x):
        w.grad = None
        loss = (w * x).pow(2).mean()
        (loss * sc.scale).backward()
        return sc.step([w], 0.1), loss.detach()

    f = s.root(f)
    for k in range(12):
        s.call(f, torch.randn(3) * (float("inf") if k in (5, 8) else 1))
