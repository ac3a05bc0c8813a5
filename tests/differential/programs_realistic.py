"""Programs as people write them around their models: decoding, sampling, metrics, hooks, containers.

Each is called with other inputs, sizes and flags, its state changed between calls.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import enum
import functools
import math
import random
import threading
import typing

import numpy as np
import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import Tensor, nn

PROGRAMS: list[Program] = []


# 1. beam search
@program(PROGRAMS, "beam search", expect=ANY, runs=15)
def _(s: Session) -> None:
    torch.manual_seed(0)
    emb = nn.Embedding(11, 8)
    head = nn.Linear(8, 11)
    gru = nn.GRUCell(8, 8)

    @dataclasses.dataclass(order=True)
    class Hyp:
        score: float
        tokens: list = dataclasses.field(compare=False)
        h: Tensor = dataclasses.field(compare=False)

    def search(h0, width, steps):
        beams = [Hyp(0.0, [1], h0)]
        done = []
        for t in range(steps):
            cand = []
            for b in beams:
                with torch.no_grad():
                    h = gru(emb(torch.tensor([b.tokens[-1]])), b.h)
                    lp = F.log_softmax(head(h), -1)[0]
                v, i = lp.topk(width)
                for sc, tok in zip(v.tolist(), i.tolist()):
                    cand.append(Hyp(b.score + sc, b.tokens + [tok], h))
            cand.sort(reverse=True)
            beams = []
            for c in cand[:width]:
                if c.tokens[-1] == 2:
                    done.append(c)
                else:
                    beams.append(c)
            if not beams or len(done) >= width:
                break
        best = max(done or beams)
        return best.tokens, best.score, best.h

    search = s.root(search)
    for k in range(9):
        torch.manual_seed(k)
        s.call(search, torch.randn(1, 8), 2 + k % 2, 4 + k % 3)


# 2. EMA with buffers, state dict
@program(PROGRAMS, "ema helper with shadow dict", expect=ANY, runs=2)
def _(s: Session) -> None:
    class EMA:
        def __init__(self, model, decay):
            self.decay = decay
            self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}
            self.backup = {}
            self.n = 0

        @torch.no_grad()
        def update(self, model):
            self.n += 1
            d = min(self.decay, (1 + self.n) / (10 + self.n))
            for n, p in model.named_parameters():
                self.shadow[n].mul_(d).add_(p, alpha=1 - d)

        @contextlib.contextmanager
        def applied(self, model):
            self.backup = {n: p.data for n, p in model.named_parameters()}
            for n, p in model.named_parameters():
                p.data = self.shadow[n]
            try:
                yield model
            finally:
                for n, p in model.named_parameters():
                    p.data = self.backup[n]
                self.backup = {}

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ema = s.watch(EMA(model, 0.99))
    upd = s.root(ema.update)

    def evaluate(x):
        with ema.applied(model) as m, torch.no_grad():
            return m(x).argmax(-1)

    ev = s.root(evaluate)
    for k in range(8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * k)
        s.call(upd, model)
        s.call(ev, torch.randn(3 + k % 2, 4))


# 3. gradient accumulation trainer
@program(PROGRAMS, "trainer: accumulation, clip, scheduler, early stop", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Trainer:
        def __init__(self, model, lr=0.1, accumulate=2, patience=3):
            self.model = model
            self.opt = torch.optim.AdamW(model.parameters(), lr=lr)
            self.sched = torch.optim.lr_scheduler.LambdaLR(self.opt, lambda t: 1 / (1 + t))
            self.accumulate, self.patience = accumulate, patience
            self.step_no = 0
            self.best, self.bad = math.inf, 0
            self.history = collections.deque(maxlen=4)

        def loss(self, batch):
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def train_step(self, batch):
            loss = self.loss(batch) / self.accumulate
            loss.backward()
            self.step_no += 1
            if self.step_no % self.accumulate == 0:
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.opt.step()
                self.sched.step()
                self.opt.zero_grad(set_to_none=True)
                self.history.append((self.step_no, norm.item()))
            value = loss.item() * self.accumulate
            if value < self.best - 1e-3:
                self.best, self.bad = value, 0
            else:
                self.bad += 1
            return self.bad >= self.patience, value

    torch.manual_seed(0)
    tr = Trainer(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, 3)))
    s.watch(tr.history)
    s.watch(tr.model)
    step = s.root(tr.train_step)
    for k in range(12):
        n = 4 if k != 7 else 3
        s.call(step, (torch.randn(n, 5), torch.randint(0, 3, (n,))))


# 4. sampler: top-k, top-p, repetition penalty
@program(PROGRAMS, "sampling loop with repetition penalty and stop tokens", expect=ANY)
def _(s: Session) -> None:
    @dataclasses.dataclass(frozen=True)
    class Cfg:
        temperature: float = 1.0
        top_k: int = 0
        top_p: float = 1.0
        penalty: float = 1.0
        stop: frozenset = frozenset({0})
        max_new: int = 6

    torch.manual_seed(0)
    table = torch.randn(13, 13)

    def filter_logits(logits, cfg):
        if cfg.temperature != 1.0:
            logits = logits / cfg.temperature
        if cfg.top_k:
            kth = logits.topk(min(cfg.top_k, logits.size(-1))).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if cfg.top_p < 1.0:
            srt, idx = logits.sort(descending=True)
            cum = srt.softmax(-1).cumsum(-1)
            drop = cum - srt.softmax(-1) > cfg.top_p
            srt = srt.masked_fill(drop, float("-inf"))
            logits = torch.empty_like(logits).scatter_(-1, idx, srt)
        return logits

    @torch.inference_mode()
    def generate(prompt: list[int], cfg):
        out = list(prompt)
        while len(out) - len(prompt) < cfg.max_new:
            logits = table[out[-1]].clone()
            if cfg.penalty != 1.0:
                seen = torch.tensor(sorted(set(out)))
                v = logits[seen]
                logits[seen] = torch.where(v > 0, v / cfg.penalty, v * cfg.penalty)
            probs = filter_logits(logits, cfg).softmax(-1)
            nxt = torch.multinomial(probs, 1).item()
            out.append(nxt)
            if nxt in cfg.stop:
                break
        return out

    g = s.root(generate)
    base = Cfg(top_k=5)
    for k, cfg in enumerate(
        [
            base,
            base,
            base,
            base,
            dataclasses.replace(base, top_p=0.8),
            dataclasses.replace(base, temperature=0.7),
            dataclasses.replace(base, penalty=1.3, top_k=0),
            base,
        ]
    ):
        s.call(g, [1, 2 + k], cfg)


# 5. metrics
@program(PROGRAMS, "metric collection with item and reset", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Metric:
        registry: typing.ClassVar[dict] = {}

        def __init_subclass__(cls, **kw):
            super().__init_subclass__(**kw)
            Metric.registry[cls.__name__.lower()] = cls

        def __init__(self):
            self.reset()

        def __iadd__(self, batch):
            self.update(*batch)
            return self

    class Accuracy(Metric):
        def reset(self):
            self.hits = 0
            self.total = 0

        def update(self, logits, y):
            self.hits += (logits.argmax(-1) == y).sum().item()
            self.total += y.numel()

        def compute(self):
            return self.hits / max(self.total, 1)

    class MeanLoss(Metric):
        def reset(self):
            self.sum = torch.zeros(())
            self.total = 0

        def update(self, logits, y):
            self.sum = self.sum + F.cross_entropy(logits, y, reduction="sum")
            self.total += len(y)

        def compute(self):
            return (self.sum / max(self.total, 1)).item()

    class Confusion(Metric):
        def reset(self):
            self.m = torch.zeros(3, 3, dtype=torch.long)

        def update(self, logits, y):
            idx = y * 3 + logits.argmax(-1)
            self.m += torch.bincount(idx, minlength=9).view(3, 3)

        def compute(self):
            return self.m.diagonal() / self.m.sum(1).clamp(min=1)

    metrics = {k: c() for k, c in Metric.registry.items()}
    s.watch(metrics)

    def step(logits, y):
        for m in metrics.values():
            m += (logits, y)
        return {k: m.compute() for k, m in metrics.items()}

    step = s.root(step)
    for k in range(9):
        if k == 6:
            for m in metrics.values():
                m.reset()
        n = 4 + (k % 4 == 3)
        s.call(step, torch.randn(n, 3), torch.randint(0, 3, (n,)))


# 6. state machine / enum-driven scheduler
@program(PROGRAMS, "state machine over phases", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Phase(enum.Enum):
        WARM = enum.auto()
        MAIN = enum.auto()
        COOL = enum.auto()

        @property
        def factor(self):
            return {Phase.WARM: 0.1, Phase.MAIN: 1.0, Phase.COOL: 0.5}[self]

    class Machine:
        def __init__(self):
            self.phase = Phase.WARM
            self.t = 0
            self.log = []

        def advance(self):
            match self.phase, self.t:
                case Phase.WARM, t if t >= 3:
                    self.phase = Phase.MAIN
                case Phase.MAIN, t if t >= 6:
                    self.phase = Phase.COOL
                case _:
                    return
            self.log.append((self.t, self.phase.name))

        def step(self, x):
            self.t += 1
            self.advance()
            y = x * self.phase.factor
            if self.phase is Phase.COOL:
                y = y.clamp(-0.1, 0.1)
            return y.sum(), self.phase

    m = s.watch(Machine())
    f = s.root(m.step)
    for k in range(11):
        s.call(f, torch.randn(3))


# 7. retry with error handling
@program(PROGRAMS, "retry decorator, flaky worker", expect=ANY)
def _(s: Session) -> None:
    log = s.watch([])

    class Transient(RuntimeError):
        pass

    def retry(times, exc):
        def deco(fn):
            @functools.wraps(fn)
            def inner(*a, **k):
                last = None
                try:
                    for attempt in range(times):
                        try:
                            return fn(*a, attempt=attempt, **k)
                        except exc as e:
                            log.append(f"{fn.__name__} attempt {attempt}: {e}")
                            last = e
                    raise RuntimeError("gave up") from last
                finally:
                    last = None

            return inner

        return deco

    @retry(3, (Transient, ValueError))
    def solve(a, limit, attempt=0):
        y = a @ a.T + attempt * torch.eye(a.size(0))
        if attempt < limit:
            raise Transient(f"size {tuple(a.shape)}")
        return torch.linalg.cholesky(y + torch.eye(a.size(0)))

    f = s.root(lambda a, limit: solve(a, limit))
    for k in [0, 0, 0, 1, 1, 1, 2, 3, 3, 0, 5]:
        s.call(f, torch.randn(3, 3 + k % 2), k)


# 8. kv-cache decode class with lists
@program(PROGRAMS, "decode with growing kv cache, early stop", expect=ANY, runs=1)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class Attn(nn.Module):
        def __init__(self, d=8, heads=2):
            super().__init__()
            self.q = nn.Linear(d, d)
            self.kv = nn.Linear(d, 2 * d)
            self.o = nn.Linear(d, d)
            self.h = heads

        def forward(self, x, past=None):
            b, t, d = x.shape
            q = self.q(x).view(b, t, self.h, -1).transpose(1, 2)
            k, v = self.kv(x).view(b, t, 2, self.h, -1).unbind(2)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            if past is not None:
                k = torch.cat([past[0], k], 2)
                v = torch.cat([past[1], v], 2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
            return self.o(y.transpose(1, 2).reshape(b, t, d)), (k, v)

    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList(Attn() for _ in range(2))
            self.ln = nn.LayerNorm(8)

        def forward(self, ids, cache=None):
            x = self.emb(ids)
            new = []
            for i, b in enumerate(self.blocks):
                y, kv = b(self.ln(x), None if cache is None else cache[i])
                x = x + y
                new.append(kv)
            return self.ln(x) @ self.emb.weight.T, new

    lm = LM().eval()

    @torch.no_grad()
    def generate(ids, n, eos=3):
        cache = None
        cur = ids
        alive = torch.ones(ids.size(0), dtype=torch.bool)
        out = [ids]
        for _ in range(n):
            logits, cache = lm(cur, cache)
            nxt = logits[:, -1].argmax(-1)
            nxt = torch.where(alive, nxt, torch.full_like(nxt, eos))
            alive = alive & (nxt != eos)
            cur = nxt[:, None]
            out.append(cur)
            if not alive.any():
                break
        return torch.cat(out, 1)

    g = s.root(generate)
    for k in range(6):
        s.call(g, torch.randint(4, 10, (1 + k % 3, 2 + k % 2)), 5)


# 9. hook feature extractor
@program(PROGRAMS, "feature extractor context manager with hooks", expect=ANY, runs=1)
def _(s: Session) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        collections.OrderedDict(a=nn.Linear(4, 4), act=nn.ReLU(), b=nn.Linear(4, 2))
    )

    class Features(contextlib.AbstractContextManager):
        def __init__(self, model, names):
            self.model, self.names, self.out, self.handles = model, names, {}, []

        def __enter__(self):
            for n, m in self.model.named_modules():
                if n in self.names:
                    self.handles.append(m.register_forward_hook(functools.partial(self._hook, n)))
            return self

        def _hook(self, name, mod, inp, out):
            self.out[name] = out.detach()

        def __exit__(self, *exc):
            while self.handles:
                self.handles.pop().remove()
            return False

    def f(x, names):
        with Features(net, names) as fe:
            y = net(x)
        return y, fe.out

    f = s.root(f)
    for k in range(6):
        s.call(f, torch.randn(2, 4), ("a",) if k < 4 else ("a", "b"))

    def g(x):
        return net(x) * 2

    g = s.root(g)
    seen = s.watch([])
    for k in range(8):
        if k == 3:
            h = net.b.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        if k == 5:
            h.remove()
            h2 = net.a.register_forward_pre_hook(lambda m, i: (i[0] + 1,))
        if k == 7:
            h2.remove()
        s.call(g, torch.randn(2, 4))


# 10. custom container
@program(PROGRAMS, "ring buffer container with dunders", expect=ANY, runs=1)
def _(s: Session) -> None:
    class Ring:
        def __init__(self, n):
            self.n = n
            self.items = [None] * n
            self.head = 0
            self.size = 0

        def push(self, x):
            self.items[self.head] = x
            self.head = (self.head + 1) % self.n
            self.size = min(self.size + 1, self.n)

        def __len__(self):
            return self.size

        def __iter__(self):
            for k in range(self.size):
                yield self.items[(self.head - self.size + k) % self.n]

        def __getitem__(self, i):
            if isinstance(i, slice):
                return [self[j] for j in range(*i.indices(len(self)))]
            if i < 0:
                i += self.size
            if not 0 <= i < self.size:
                raise IndexError(i)
            return self.items[(self.head - self.size + i) % self.n]

        def __contains__(self, x):
            return any(x is y for y in self)

        def __bool__(self):
            return self.size > 0

    r = s.watch(Ring(3))

    def step(x):
        if r:
            x = x + r[-1] * 0.5
        r.push(x)
        older = sum(r) if len(r) > 1 else x
        try:
            far = r[2]
        except IndexError:
            far = x * 0
        return older, far, x in r, r[:2]

    f = s.root(step)
    for k in range(9):
        s.call(f, torch.randn(3))


# 11. generator pipeline
@program(PROGRAMS, "generator pipeline with send and close", expect=ANY)
def _(s: Session) -> None:
    closed = s.watch([])

    def batches(x, n):
        try:
            for part in x.split(n):
                yield part
        finally:
            closed.append(len(closed))

    def scaled(src, k):
        for p in src:
            yield p * k

    def averager():
        total, n, avg = 0, 0, None
        while True:
            v = yield avg
            total, n = total + v, n + 1
            avg = total / n

    def f(x, n):
        av = averager()
        next(av)
        out = None
        for p in scaled(batches(x, n), 2.0):
            out = av.send(p.mean())
            if out.shape != ():
                break
        it = batches(x, n)
        first = next(it)
        it.close()
        a, *rest = batches(x, n)
        return out, first, a, rest

    f = s.root(f)
    for k in range(7):
        s.call(f, torch.randn(6), 2 + k // 4)


# 12. threading.local + contextvars
@program(PROGRAMS, "threading.local stack and contextvar settings", expect=ANY, runs=3)
def _(s: Session) -> None:
    tls = threading.local()
    var = contextvars.ContextVar("scale", default=1.0)

    def stack():
        if not hasattr(tls, "stack"):
            tls.stack = []
        return tls.stack

    @contextlib.contextmanager
    def scaling(k):
        token = var.set(k)
        stack().append(k)
        try:
            yield
        finally:
            stack().pop()
            var.reset(token)

    def body(x):
        return x * var.get() + len(stack())

    def f(x, ks):
        with contextlib.ExitStack() as es:
            for k in ks:
                es.enter_context(scaling(k))
            y = body(x)
        return y + body(x)

    f = s.root(f)
    for k in range(7):
        s.call(f, torch.randn(3), [2.0, 3.0] if k < 5 else [4.0])
    tok = var.set(7.0)
    s.call(f, torch.randn(3), [2.0])
    s.call(f, torch.randn(3), [])
    var.reset(tok)
    s.call(f, torch.randn(3), [])


# 13. input mutation, views and aliases
@program(PROGRAMS, "in-place preprocessing of caller's batch and views", expect=ANY, runs=1)
def _(s: Session) -> None:
    def f(batch, mean, std):
        x = batch["x"]
        x.sub_(mean).div_(std)
        left, right = x[:, :2], x[:, 2:]
        left += 1
        batch["left"] = left
        batch.setdefault("n", 0)
        batch["n"] += 1
        right.t()[0].zero_()
        batch["flat"] = x.view(-1)
        return x, right

    f = s.root(f)
    shared = {"x": torch.randn(2, 4)}
    s.watch(shared)
    for k in range(5):
        s.call(f, shared, torch.zeros(4), torch.ones(4))
    for k in range(3):
        s.call(f, {"x": torch.randn(3, 4)}, torch.zeros(4), torch.ones(4) * 2)
    base = torch.randn(4, 4)
    s.call(f, {"x": base[::2]}, base[1], torch.ones(4))
    s.call(f, {"x": base}, base[0], base[1])


# 14. numpy interop
@program(PROGRAMS, "numpy augmentation inside a step", expect=ANY, runs=1)
def _(s: Session) -> None:
    rng = np.random.default_rng(0)

    def f(x, p):
        a = x.numpy()
        mask = np.random.rand(*a.shape) < p
        a2 = np.where(mask, 0, a).astype(np.float32)
        y = torch.from_numpy(a2) * 2
        w = torch.as_tensor(np.linspace(0, 1, x.shape[-1]), dtype=x.dtype)
        return y @ w, float(a2.mean()), int(mask.sum())

    f = s.root(f)
    for k in range(7):
        s.call(f, torch.randn(3, 4 + k % 2), 0.3)


# 15. dropout/random stream
@program(PROGRAMS, "mixup and stochastic depth with python and torch rng", expect=ANY, runs=1)
def _(s: Session) -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.p = p
            self.drop = nn.Dropout(0.2)

        def forward(self, x):
            if self.training and random.random() < self.p:
                return x
            return x + self.drop(torch.tanh(self.lin(x)))

    net = nn.Sequential(*[Block(0.3) for _ in range(3)])

    def f(x, y):
        lam = random.betavariate(0.4, 0.4)
        perm = torch.randperm(x.size(0))
        x = lam * x + (1 - lam) * x[perm]
        return net(x), y, y[perm], lam

    f = s.root(f)
    for k in range(7):
        if k == 4:
            net.eval()
        s.call(f, torch.randn(4, 4), torch.arange(4))
    net.train()
    s.call(f, torch.randn(4, 4), torch.arange(4))
