"""Programs as people write them in classes and closures of their own: registries, interpreters,
statistics, iterators, error handling, searches."""

from __future__ import annotations

import abc
import collections
import copy
import enum
import functools
import itertools
import math
import random
import threading

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []
CACHE = {}
CONF = {"depth": 2}


@program(PROGRAMS, "ordered dict stores of every kind", expect=ANY)
def _(s: Session) -> None:
    class Sub(collections.OrderedDict):
        def __setitem__(self, k, v):
            super().__setitem__(k, v)
            self.move_to_end(k)

    class Dflt(collections.defaultdict):
        pass

    a, b, c, d = s.watch([collections.OrderedDict(), Sub(), Dflt(list), collections.Counter()])

    def f(x, k):
        a[k] = x + 1
        b[k] = x + 2
        return a[k] * b[k]

    def g(x, k):
        c[k] = [x]
        d[k] = d[k] + 1
        d.update(k)
        a.setdefault(k, x)
        return x * d[k]

    f, g = s.root(f), s.root(g)
    for k in "aabcab":
        s.call(f, torch.randn(2), k)
        s.call(lambda: (list(a), list(b), list(reversed(a))))
        s.call(g, torch.randn(2), k)
        s.call(lambda: (list(c), list(d), d.most_common()))
    s.call(lambda: a.popitem(last=False))
    s.call(lambda: b.move_to_end("a"))


@program(PROGRAMS, "user's own stack of frames as an interpreter", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Op(enum.IntEnum):
        PUSH = 0
        ADD = 1
        MUL = 2
        DUP = 3
        JNZ = 4
        DEC = 5

    def run(prog, x, n):
        stack, pc, regs = [], 0, {"n": n}
        while pc < len(prog):
            op, *args = prog[pc]
            pc += 1
            match op:
                case Op.PUSH:
                    stack.append(x if args[0] == "x" else args[0])
                case Op.ADD:
                    b, a = stack.pop(), stack.pop()
                    stack.append(a + b)
                case Op.MUL:
                    stack[-2:] = [stack[-2] * stack[-1]]
                case Op.DUP:
                    stack.append(stack[-1])
                case Op.DEC:
                    regs["n"] -= 1
                case Op.JNZ:
                    if regs["n"]:
                        pc = args[0]
                case _:
                    raise ValueError(op)
        return stack[-1], regs

    f = s.root(run)
    prog = [(Op.PUSH, "x"), (Op.DUP,), (Op.MUL,), (Op.PUSH, 1.0), (Op.ADD,), (Op.DEC,), (Op.JNZ, 1)]
    for n in (2, 2, 2, 2, 3, 1, 2):
        s.call(f, prog, torch.randn(2), n)
    s.call(f, prog + [(99,)], torch.randn(2), 1)
    prog[3] = (Op.PUSH, 2.0)
    for n in (2, 2):
        s.call(f, prog, torch.randn(2), n)


@program(PROGRAMS, "tokenizer class and padding collate", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Vocab:
        def __init__(self):
            self.itos = ["<pad>", "<unk>"]
            self.stoi = {w: i for i, w in enumerate(self.itos)}
            self.frozen = False

        def __call__(self, w):
            if w not in self.stoi:
                if self.frozen:
                    return 1
                self.stoi[w] = len(self.itos)
                self.itos.append(w)
            return self.stoi[w]

        def __len__(self):
            return len(self.itos)

    v = s.watch(Vocab())
    torch.manual_seed(0)
    emb = nn.Embedding(16, 3, padding_idx=0)

    def f(texts):
        ids = [[v(w) for w in t.split()] for t in texts]
        n = max(map(len, ids))
        batch = torch.tensor([r + [0] * (n - len(r)) for r in ids])
        mask = batch.ne(0)
        e = emb(batch)
        return (e * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), len(v)

    f = s.root(f)
    for t in (["a b", "c"], ["a b", "c"], ["a b", "c"], ["d a", "c"], ["a", "b c d"]):
        s.call(f, t)
    v.frozen = True
    for t in (["zz a", "c"], ["a b", "c"], ["a b", "c"]):
        s.call(f, t)


@program(PROGRAMS, "plugin metaclass and abstract methods", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Registry(abc.ABCMeta):
        all: dict = {}

        def __new__(m, name, bases, ns, **kw):
            c = super().__new__(m, name, bases, ns)
            m.all[kw.get("key", name.lower())] = c
            return c

        def __getitem__(cls, k):
            return Registry.all[k]

        def __len__(cls):
            return 42

    class Layer(metaclass=Registry):
        gain = 1.0

        @abc.abstractmethod
        def __call__(self, x): ...
        def __or__(self, other):
            return Chain(self, other)

    class Chain(Layer, key="chain"):
        def __init__(self, *ls):
            self.ls = ls

        def __call__(self, x):
            return functools.reduce(lambda a, l: l(a), self.ls, x)

    class Scale(Layer, key="scale"):
        def __init__(self, k):
            self.k = k

        def __call__(self, x):
            return x * self.k * type(self).gain

    class Shift(Scale, key="shift"):
        def __call__(self, x):
            return super().__call__(x) + self.k

    def f(x, spec):
        net = None
        for name, k in spec:
            l = Layer[name](k)
            net = l if net is None else net | l
        return net(x), isinstance(net, Layer), len(Layer)

    f = s.root(f)
    for k in range(5):
        s.call(f, torch.randn(2), [("scale", 2.0), ("shift", 3.0)])
    Scale.gain = 0.5
    s.call(f, torch.randn(2), [("scale", 2.0), ("shift", 3.0)])
    s.call(f, torch.randn(2), [("shift", 3.0)])
    try:
        pass
    finally:
        s.call(f, torch.randn(2), [("nope", 1)])
    s.call(f, torch.randn(2), [])


@program(PROGRAMS, "descriptor-validated settings", expect=ANY)
def _(s: Session) -> None:
    class Bounded:
        def __init__(self, lo, hi):
            self.lo, self.hi = lo, hi

        def __set_name__(self, o, n):
            self.n = "_" + n

        def __get__(self, o, t=None):
            return self if o is None else getattr(o, self.n, self.lo)

        def __set__(self, o, v):
            if not self.lo <= v <= self.hi:
                raise ValueError(f"{self.n}={v}")
            setattr(o, self.n, v)

    class S:
        rate = Bounded(0.0, 1.0)
        steps = Bounded(1, 5)

        def __init__(self):
            self.rate = 0.5

    o = s.watch(S())

    def f(x, r):
        if r is not None:
            o.rate = r
        for _ in range(o.steps):
            x = x * o.rate
        o.steps = min(o.steps + 1, 3)
        return x, o.rate

    f = s.root(f)
    for r in (None, None, None, None, 0.25, 0.25, 2.0, None, 0.75, 0.8, 0.9):
        s.call(f, torch.randn(2), r)


@program(PROGRAMS, "copy-on-write state dict and deepcopy snapshots", expect=ANY, runs=2)
def _(s: Session) -> None:
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    best = s.watch({"loss": math.inf, "state": None, "at": -1})
    s.watch(net)

    def f(x, step):
        loss = net(x).pow(2).mean()
        if loss < best["loss"]:
            best.update(loss=loss.item(), state=copy.deepcopy(net.state_dict()), at=step)
        elif step - best["at"] > 2:
            net.load_state_dict(best["state"])
            best["at"] = step
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)
        return loss.detach()

    f = s.root(f)
    for k in range(10):
        s.call(f, torch.ones(2, 2), k)


@program(PROGRAMS, "aliasing: same list and tensor passed under two names", expect=ANY, runs=2)
def _(s: Session) -> None:
    def f(xs, ys, k):
        xs[0] = xs[0] + 1
        ys[0].mul_(k)
        xs.append(ys[0])
        return xs[0] is ys[0], xs[-1] is ys[0], sum(x.sum() for x in xs)

    f = s.root(f)
    for k in range(4):
        s.call(f, [torch.ones(2)], [torch.ones(2)], 2.0)
    for k in range(3):
        t = torch.ones(2)
        a = [t]
        s.call(f, a, a, 2.0)
    for k in range(3):
        t = torch.ones(2)
        s.call(f, [t], [t], 2.0)
    t = torch.ones(4)
    s.call(f, [t[:2]], [t[1:3]], 2.0)
    s.call(f, [t[:2]], [t[1:3]], 2.0)
    for k in range(3):
        s.call(f, [torch.ones(2)], [torch.ones(2)], 2.0)


@program(PROGRAMS, "star arguments and kwargs forwarded through wrappers", expect=ANY)
def _(s: Session) -> None:
    def traced(fn):
        calls = []

        @functools.wraps(fn)
        def w(*a, **kw):
            calls.append((len(a), tuple(kw)))
            r = fn(*a, **kw)
            w.last = r
            return r

        w.calls = calls
        return w

    @traced
    def core(x, *rest, scale=1.0, bias=None, **extra):
        for r in rest:
            x = x + r
        x = x * scale
        if bias is not None:
            x = x + bias
        return x, sorted(extra)

    s.watch(core.calls)

    def f(*a, **k):
        first, *mid, last = a
        return core(first, *mid, **{**k, "bias": last})

    f = s.root(f)
    for k in range(4):
        s.call(f, torch.ones(2), torch.ones(2), torch.randn(2))
    s.call(f, torch.ones(2), torch.randn(2), scale=2.0, tag=1)
    s.call(f, torch.ones(2), torch.randn(2), scale=2.0, tag=1)
    s.call(f, torch.ones(2))
    s.call(f, torch.ones(2), 3, torch.randn(2))
    s.call(f, torch.ones(2), torch.randn(2), bias=1)


@program(PROGRAMS, "early-exit cascade with confidence", expect=ANY, runs=5)
def _(s: Session) -> None:
    torch.manual_seed(0)
    stages = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
    used = s.watch([])

    def f(x, threshold):
        for i, st in enumerate(stages):
            x = torch.tanh(st(x))
            conf = x.softmax(-1).amax(-1).min()
            if conf > threshold and i:
                used.append(i)
                return x, i
        used.append(-1)
        return x, None

    f = s.root(f)
    with torch.no_grad():
        for k in range(12):
            s.call(f, torch.randn(2, 3) * (k % 4), 0.45)


@program(PROGRAMS, "gumbel, bernoulli, normal, shuffle streams with seeds", expect=ANY, runs=1)
def _(s: Session) -> None:
    g = torch.Generator().manual_seed(3)

    def f(x, tau, hard):
        y = F.gumbel_softmax(x, tau=tau, hard=hard)
        m = torch.bernoulli(torch.full_like(x, 0.5))
        n = torch.normal(0.0, 1.0, x.shape, generator=g)
        idx = list(range(x.size(0)))
        random.shuffle(idx)
        r = torch.rand_like(x)[idx] if len(idx) > 1 else x
        u = x.clone().uniform_()
        e = F.dropout(u, 0.5)
        return y, m * n + r, e, idx

    f = s.root(f)
    for k in range(8):
        s.call(f, torch.randn(3, 2), 1.0 if k < 5 else 0.5, k % 3 == 2)


@program(PROGRAMS, "contrastive loss with mask from ids", expect=ANY)
def _(s: Session) -> None:
    def f(pair, temp):
        z, ids = pair
        z = F.normalize(z, dim=-1)
        sim = z @ z.T / temp
        eye = torch.eye(len(ids), dtype=torch.bool)
        same = torch.tensor([[a == b for b in ids] for a in ids]) & ~eye
        sim = sim.masked_fill(eye, float("-inf"))
        lp = sim.log_softmax(-1)
        per = -(lp.masked_fill(~same, 0)).sum(1) / same.sum(1).clamp(min=1)
        return per[same.any(1)].mean()

    f = s.root(f)
    for ids in ("aabb", "aabb", "aabb", "abab", "aab", "abcd", "aabb"):
        z = torch.randn(len(ids), 3, requires_grad=True)
        l = s.call(f, (z, ids), 0.5)
        s.call(lambda: (l.backward(), z.grad)[1])


@program(PROGRAMS, "hessian-vector and double backward in a root", expect=ANY, runs=3)
def _(s: Session) -> None:
    def f(x, v):
        x = x.detach().requires_grad_()
        y = (x**3).sum() + torch.sin(x).prod()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        (h,) = torch.autograd.grad(g @ v, x)
        return g.detach(), h

    f = s.root(f)
    for k in range(6):
        s.call(f, torch.randn(3), torch.randn(3))


@program(PROGRAMS, "gradient hooks, retain_grad, checkpoint", expect=ANY, runs=1)
def _(s: Session) -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.3), nn.Linear(3, 1))
    norms = s.watch([])

    def f(x):
        h = checkpoint(net, x, use_reentrant=False)
        h.retain_grad()
        h.register_hook(lambda g: norms.append(g.shape) or g * 2)
        l = h.pow(2).sum()
        l.backward()
        return h.grad, [p.grad.clone() for p in net.parameters()]

    f = s.root(f)
    for k in range(6):
        net.zero_grad()
        s.call(f, torch.randn(2, 3))


@program(PROGRAMS, "mixed int, bool, half arithmetic and casts", expect=ANY, runs=1)
def _(s: Session) -> None:
    def f(x, n, h):
        q = torch.clamp((x / 0.1).round(), -128, 127).to(torch.int8)
        b = q > n
        a = torch.where(b, h, h.new_tensor(n))
        r = q.float() * 0.1 + a + b
        bits = (q.to(torch.uint8) >> 2) & 3
        return (
            q,
            r,
            r.dtype,
            bits,
            a.half() + n,
            torch.arange(n) ** 2 // 3 % 5,
            (q.long() << n).sum(),
        )

    f = s.root(f)
    for k in range(8):
        s.call(f, torch.randn(4), 3 + k % 3, torch.randn(4).bfloat16())


@program(PROGRAMS, "strided views, as_strided, unfold, expand writes", expect=ANY, runs=1)
def _(s: Session) -> None:
    def f(x, k):
        w = x.unfold(0, k, 1)
        e = x[None].expand(2, -1)
        d = torch.diagonal(x[:4].view(2, 2))
        d.add_(1)
        st = x.as_strided((2,), (2,), 1)
        st.mul_(2)
        return w.sum(1), e, w, x.view(-1, 1).squeeze(1).data_ptr() == x.data_ptr()

    f = s.root(f)
    for k in range(7):
        base = torch.arange(12.0)
        s.call(f, base[k % 2 * 2 : k % 2 * 2 + 6], 2 + k // 5)


@program(PROGRAMS, "lock-guarded shared statistics and threads", expect=ANY, runs=6)
def _(s: Session) -> None:
    class Stats:
        def __init__(self):
            self.lock = threading.Lock()
            self.n = 0
            self.mean = torch.zeros(2)

        def add(self, x):
            with self.lock:
                self.n += 1
                self.mean += (x - self.mean) / self.n
            return self.mean.clone()

    st = Stats()
    f = s.root(st.add)
    for k in range(6):
        s.call(f, torch.randn(2))
    out = s.watch([])

    def work():
        for _ in range(3):
            f(torch.ones(2))

    ts = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in ts]
    [t.join() for t in ts]
    out.append(st.n)
    s.call(f, torch.ones(2))


@program(PROGRAMS, "iterator protocol dataset with StopIteration and islice", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Stream:
        def __init__(self, xs):
            self.xs = xs
            self.i = 0

        def __iter__(self):
            self.i = 0
            return self

        def __next__(self):
            if self.i >= len(self.xs):
                raise StopIteration
            self.i += 1
            return self.xs[self.i - 1] * self.i

    def f(st, n):
        total = 0
        for a, b in zip(st, itertools.count(1)):
            total = total + a / b
        it = iter(st)
        head = list(itertools.islice(it, n))
        rest = next(it, None)
        return total, head, rest, st.i

    f = s.root(f)
    st = s.watch(Stream([torch.ones(2), torch.randn(2), torch.randn(2)]))
    for n in (1, 1, 1, 2, 3, 4, 1):
        s.call(f, st, n)
    st.xs.append(torch.zeros(2))
    s.call(f, st, 1)
    s.call(f, st, 1)


@program(PROGRAMS, "chained exceptions through two layers with logging", expect=ANY, runs=2)
def _(s: Session) -> None:
    class ConfigError(Exception):
        def __init__(self, key, hint=None):
            super().__init__(key)
            self.key, self.hint = key, hint

        def __str__(self):
            return f"bad {self.key}" + (f" ({self.hint})" if self.hint else "")

    def pick(table, key):
        try:
            return table[key]
        except KeyError as e:
            raise ConfigError(key, hint=f"one of {sorted(table)}") from e

    def f(x, table, key):
        try:
            k = pick(table, key)
        except ConfigError as e:
            print("warn:", e)
            k = 1.0
            if e.hint and "strict" in table:
                raise
        else:
            k = k * 2
        return x * k

    f = s.root(f)
    for key in "aaaabbbacb":
        s.call(f, torch.randn(2), {"a": 2.0}, key)
    for key in "aabb":
        s.call(f, torch.randn(2), {"a": 2.0, "strict": 1}, key)


@program(PROGRAMS, "in-place relu chains on activations list reused", expect=ANY, runs=2)
def _(s: Session) -> None:
    torch.manual_seed(0)
    acts = s.watch([torch.zeros(2, 3) for _ in range(3)])
    ws = [torch.randn(3, 3) for _ in range(3)]

    def f(x):
        for a, w in zip(acts, ws):
            torch.matmul(x, w, out=a)
            a.relu_()
            x = a
        acts[0], acts[-1] = acts[-1], acts[0]
        return x, acts[0].sum()

    f = s.root(f)
    for k in range(8):
        s.call(f, torch.randn(2, 3))


@program(PROGRAMS, "walrus, chained comparisons, conditional kwargs", expect=ANY, runs=1)
def _(s: Session) -> None:
    def f(x, lo=None, hi=None, **kw):
        if (n := x.numel()) > 4 and (lo is not None or hi is not None):
            x = x.clamp(**{k: v for k, v in (("min", lo), ("max", hi)) if v is not None})
        y = x.mean(**({"dim": kw["dim"]} if "dim" in kw else {}))
        return y if 0 < n <= 6 else y * 2

    f = s.root(f)
    for k in range(4):
        s.call(f, torch.randn(2, 3), lo=-1.0)
    s.call(f, torch.randn(2, 3), hi=0.5)
    s.call(f, torch.randn(2, 3), lo=-1, hi=1, dim=1)
    s.call(f, torch.randn(2, 3), dim=0)
    s.call(f, torch.randn(2, 4), lo=-1.0)
    s.call(f, torch.randn(2, 3), lo=-0.5)
    s.call(f, torch.randn(2, 3), lo=torch.tensor(0.0))
    s.call(f, torch.randn(2, 3), dim=5)


@program(PROGRAMS, "module with state counters, buffers and train/eval", expect=ANY, runs=1)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class Norm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.register_buffer("mean", torch.zeros(d))
            self.register_buffer("n", torch.tensor(0))
            self.calls = 0
            self.seen = set()

        def forward(self, x):
            self.calls += 1
            self.seen.add(tuple(x.shape))
            if self.training:
                self.n += 1
                self.mean = self.mean + (x.detach().mean(0) - self.mean) / self.n
            elif self.n == 0:
                return x
            return x - self.mean

    m = s.watch(Norm(3))
    f = s.root(m)
    for k in range(12):
        m.train(k % 5 != 4)
        s.call(f, torch.randn(2 + (k > 8), 3))


@program(PROGRAMS, "speculative decoding with draft and accept", expect=ANY, runs=1)
def _(s: Session) -> None:
    torch.manual_seed(0)
    T = torch.randn(7, 7)
    D = T + 0.3 * torch.randn(7, 7)

    @torch.no_grad()
    def gen(start, n, k):
        toks = [start]
        accepted = rejected = 0
        while len(toks) < n:
            cur, draft = toks[-1], []
            for _ in range(k):
                cur = int(D[cur].argmax())
                draft.append(cur)
            target = T[torch.tensor([toks[-1], *draft[:-1]])].argmax(-1).tolist()
            for d, t in zip(draft, target):
                toks.append(t)
                if d != t:
                    rejected += 1
                    break
                accepted += 1
        return toks[:n], accepted / max(1, accepted + rejected)

    g = s.root(gen)
    for k in range(7):
        s.call(g, k, 6, 2 + k % 2)


@program(PROGRAMS, "k-means until converged with empty clusters", expect=ANY)
def _(s: Session) -> None:
    def kmeans(x, k, iters=6, tol=1e-4):
        c = x[:k].clone()
        hist = []
        for it in range(iters):
            a = torch.cdist(x, c).argmin(1)
            new = torch.stack([x[a == j].mean(0) if (a == j).any() else c[j] for j in range(k)])
            shift = (new - c).norm().item()
            hist.append(round(shift, 3))
            c = new
            if shift < tol:
                break
        return c, a, hist

    f = s.root(kmeans)
    for k in range(5):
        s.call(f, torch.randn(8, 2), 2 + k % 2)


@program(PROGRAMS, "viterbi with python back pointers", expect=ANY, runs=1)
def _(s: Session) -> None:
    def viterbi(em, tr):
        score, back = em[0], []
        for e in em[1:]:
            total = score[:, None] + tr + e[None]
            score, idx = total.max(0)
            back.append(idx)
        best = int(score.argmax())
        path = [best]
        for idx in reversed(back):
            path.append(int(idx[path[-1]]))
        return score.max(), path[::-1]

    f = s.root(viterbi)
    for k in range(7):
        s.call(f, torch.randn(4 + k // 5, 3), torch.randn(3, 3))
