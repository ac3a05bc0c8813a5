"""Programs where memory is shared: views, overlapping inputs, parameters returned, dtypes mixed."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []


@program(PROGRAMS, "write to the base, read the view given as another input")
def _(s: Session) -> None:
    def f(base, view):
        base.mul_(2)
        return view + 1, base + 0

    f = s.root(f)
    s.warm(f, torch.ones(4), torch.ones(2))
    base = torch.ones(4)
    s.call(f, base, base[1:3])
    s.call(f, base, base[1:3])
    s.call(f, base, base.view(2, 2)[0])
    s.call(f, torch.ones(4), torch.ones(2))


@program(PROGRAMS, "write to a view made before another read")
def _(s: Session) -> None:
    def f(x):
        left, right = x.chunk(2)
        before = x.sum()
        left.add_(right)
        after = x.sum()
        right.copy_(left)
        return before, after, x.sum(), left

    f = s.root(f)
    s.warm(f, torch.arange(4.0))
    s.call(f, torch.arange(4.0))


@program(PROGRAMS, "write through a transpose and a strided slice")
def _(s: Session) -> None:
    def f(x):
        x.t()[0] = 7
        x[:, ::2].mul_(-1)
        x.diagonal().fill_(5)
        return x * 1

    f = s.root(f)
    s.warm(f, torch.ones(4, 4))
    s.call(f, torch.ones(6, 6)[1:5, 1:5])


@program(PROGRAMS, "swap through a temporary")
def _(s: Session) -> None:
    def f(x, y):
        t = x.clone()
        x.copy_(y)
        y.copy_(t)
        return t, x, y

    f = s.root(f)
    s.warm(f, torch.zeros(3), torch.ones(3))
    s.call(f, torch.zeros(3), torch.ones(3))


@program(PROGRAMS, "one tensor returned under several names")
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        z = y.view(-1)
        return y, y, z, z[1:], {"y": y}

    f = s.root(f)
    result = s.warm(f, torch.ones(2, 2))
    s.call(lambda: result[0].add_(1))
    s.call(lambda: result)


@program(PROGRAMS, "parameter and buffer returned")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
            self.register_buffer("offset", torch.arange(3.0))

        def forward(self, x):
            return x + self.offset, self.weight, self.weight[0], self.offset.view(1, 3)

    model = Model()
    f = s.root(model)
    out = s.warm(f, torch.ones(3))
    s.call(lambda: out[2].fill_(9))
    s.watch(model)
    s.call(f, torch.ones(3))


@program(PROGRAMS, "expanded and overlapping inputs")
def _(s: Session) -> None:
    def f(x, y):
        return (x * 2 + y).relu(), x.sum(0), x.contiguous()

    f = s.root(f)
    s.warm(f, torch.randn(3, 4), torch.randn(3, 4))
    s.call(f, torch.randn(4).expand(3, 4), torch.randn(3, 1).expand(3, 4))
    s.call(f, torch.randn(8).as_strided((3, 4), (1, 1)), torch.randn(3, 4))
    s.call(f, torch.randn(3, 4), torch.randn(3, 4))


@program(PROGRAMS, "strides of results follow the inputs")
def _(s: Session) -> None:
    def f(x, y):
        return x + y, x * 2, x.relu(), torch.cat([x, y]), x.clone(), x.softmax(1), x.sum(1, True)

    f = s.root(f)
    nchw = torch.randn(2, 3, 4, 5)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    s.warm(f, nchw, nchw)
    s.warm(f, nhwc, nhwc)
    s.warm(f, nhwc, nchw)
    s.warm(f, nchw.permute(3, 0, 2, 1), nchw.permute(3, 0, 2, 1))
    s.call(f, nchw[:, :, ::2], nchw[:, :, ::2])


@program(PROGRAMS, "dtype promotion")
def _(s: Session) -> None:
    def f(a, b):
        return a + b, a * 2.5, b * 2, a / b, a > b, torch.where(a > 0, a, b), a + True

    f = s.root(f)
    kinds = [torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.float64, torch.uint8]
    for left in kinds:
        for right in (torch.float32, torch.int32):
            s.call(f, torch.ones(3).to(left), torch.full((3,), 2).to(right))
            s.call(f, torch.ones(3).to(left), torch.full((3,), 2).to(right))
    s.call(f, torch.ones(3), torch.tensor(2, dtype=torch.float64))
    s.call(f, torch.ones(3), torch.tensor(2, dtype=torch.float64))


@program(PROGRAMS, "in-place with another dtype")
def _(s: Session) -> None:
    def f(x, y):
        x.add_(y)
        x.mul_(2)
        return x

    f = s.root(f)
    s.warm(f, torch.ones(3), torch.ones(3))
    s.call(f, torch.ones(3), torch.ones(3, dtype=torch.float64))
    s.call(f, torch.ones(3), torch.ones(3, dtype=torch.float64))
    s.call(f, torch.ones(3, dtype=torch.int64), torch.ones(3))
    s.call(f, torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1 / 3))


@program(PROGRAMS, "key-value cache written in place")
def _(s: Session) -> None:
    cache = s.watch(torch.zeros(1, 8, 4))

    def f(x, position):
        cache[:, position] = x
        return cache[:, : position + 1].sum(1)

    f = s.root(f)
    for position in (0, 1, 2, 2, 2):
        s.call(f, torch.full((1, 4), float(position + 1)), position)


@program(PROGRAMS, "key-value cache written at a tensor position")
def _(s: Session) -> None:
    cache = s.watch(torch.zeros(8, 4))

    def f(x, position):
        cache.index_copy_(0, position, x)
        return cache.mean(0)

    f = s.root(f)
    for position in (0, 3, 5, 3):
        s.call(f, torch.full((1, 4), float(position + 1)), torch.tensor([position]))


@program(PROGRAMS, "running statistics kept by hand", expect=ANY)
def _(s: Session) -> None:
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.steps = 0

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            self.steps += 1
            return x - self.mean

    model = s.watch(Running())
    f = s.root(model)
    for _ in range(5):
        s.call(f, torch.randn(4, 3))


@program(PROGRAMS, "mask cached at the first call")
def _(s: Session) -> None:
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = None

        def forward(self, x):
            n = x.shape[-1]
            if self.mask is None or self.mask.shape[0] < n:
                self.mask = torch.tril(torch.ones(n, n, dtype=torch.bool))
            return x.masked_fill(~self.mask[:n, :n], 0.0)

    model = s.watch(Causal())
    f = s.root(model)
    for n in (3, 3, 3, 3, 5, 5, 4, 3):
        s.call(f, torch.ones(n, n))


@program(PROGRAMS, "storage shared by an input and a parameter")
def _(s: Session) -> None:
    model = nn.Linear(3, 3).requires_grad_(False)

    def f(x):
        x.add_(1)
        return model(x)

    f = s.root(f)
    s.warm(f, torch.randn(3, 3))
    s.call(f, model.weight.data)
    s.call(f, torch.randn(3, 3))


@program(PROGRAMS, "result of one call is the input of the next")
def _(s: Session) -> None:
    def f(x, h):
        h = torch.tanh(x @ x.t() + h)
        return h, h.sum()

    f, h = s.root(f), torch.zeros(3, 3)
    for _ in range(6):
        h, _ = s.call(f, torch.randn(3, 3), h)


@program(PROGRAMS, "detached, cloned and typed aliases")
def _(s: Session) -> None:
    def f(x):
        same, half, base = x.detach(), x.half().float(), x.view_as(x)
        return same, half, base, x.type_as(same), x.expand_as(same), x.reshape(x.shape), x[:]

    f = s.root(f)
    s.warm(f, torch.ones(2, 2))
    s.call(f, torch.randn(2, 3).t())


@program(PROGRAMS, "split, unbind, chunk and stack")
def _(s: Session) -> None:
    def f(x):
        a, b = x.split([1, 3], dim=1)
        q, k = (a.expand(-1, 3) + b).unbind(0)
        return torch.stack([q, k], -1), x.chunk(3, 1), torch.hstack([q, k]), x.tensor_split(2)

    f = s.root(f)
    s.warm(f, torch.randn(2, 4))
    s.call(f, torch.randn(2, 4))


@program(PROGRAMS, "padding, rolling, flipping and repeating")
def _(s: Session) -> None:
    def f(x):
        return (
            F.pad(x, (1, 2)), F.pad(x, (1, 1), value=3.0), x.roll(1, -1), x.flip(0), x.repeat(2, 1),
            x.repeat_interleave(2, 0), x.triu(), x.permute(1, 0),
            x.unfold(1, 2, 1), x.movedim(0, 1),
        )  # fmt: skip

    f = s.root(f)
    s.warm(f, torch.randn(3, 4))
    s.call(f, torch.randn(3, 4))


@program(PROGRAMS, "view of another dtype", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x.view(torch.int32) + 1, x.view(torch.uint8)[..., :2]

    f = s.root(f)
    s.warm(f, torch.randn(3, 4))
    s.call(f, torch.randn(3, 4))


@program(PROGRAMS, "reductions over odd shapes")
def _(s: Session) -> None:
    def f(x):
        return (
            x.sum(), x.sum((0, 2)), x.mean(1), x.amax((1, 2)), x.amin(-1, keepdim=True), x.prod(1),
            x.var(-1), x.std(0, unbiased=False), x.norm(), x.argmin(), x.any(0), x.all(-1),
            x.max(), x.logsumexp((0, 1)), x.cumsum(1), x.count_nonzero(),
        )  # fmt: skip

    f = s.root(f)
    for shape in ((3, 5, 7), (1, 1, 33), (2, 64, 3)):
        s.warm(f, torch.randn(shape))
    for _ in range(3):  # var() of one element gives a warning, which only ATen can give
        s.miss(f, torch.randn(17, 1, 1))
    s.call(f, torch.randn(7, 5, 3).permute(2, 1, 0))
    s.call(f, torch.full((3, 5, 7), float("nan")))


@program(PROGRAMS, "normalizations")
def _(s: Session) -> None:
    def f(x, w, b):
        rms = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        return (
            F.layer_norm(x, (6,), w, b), F.layer_norm(x, (6,)), rms, F.rms_norm(x, (6,), w),
            F.normalize(x, dim=-1), F.group_norm(x, 2), F.batch_norm(x, b, w.abs(), w, b),
            F.log_softmax(x, -1), F.softmax(x, 0), x.softmax(-1, dtype=torch.float64),
        )  # fmt: skip

    f = s.root(f)
    s.warm(f, torch.randn(4, 6), torch.randn(6), torch.randn(6))
    s.call(f, torch.randn(4, 6) * 1e4, torch.randn(6), torch.randn(6))


@program(PROGRAMS, "losses")
def _(s: Session) -> None:
    def f(x, y, labels):
        return (
            F.cross_entropy(x, labels), F.mse_loss(x, y), F.l1_loss(x, y, reduction="sum"),
            F.nll_loss(F.log_softmax(x, -1), labels), F.binary_cross_entropy_with_logits(x, y),
            F.cosine_similarity(x, y), F.smooth_l1_loss(x, y), F.one_hot(labels, 5),
        )  # fmt: skip

    f = s.root(f)
    labels = torch.tensor([1, 4, 0])
    s.warm(f, torch.randn(3, 5), torch.rand(3, 5), labels)
    s.call(f, torch.randn(3, 5), torch.rand(3, 5), labels.flip(0))
    s.call(f, torch.randn(3, 5), torch.rand(3, 5), torch.tensor([1, 5, 0]))


@program(PROGRAMS, "scaled dot product attention")
def _(s: Session) -> None:
    def f(q, k, v, mask):
        return (
            F.scaled_dot_product_attention(q, k, v),
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3),
        )

    f = s.root(f)
    mask = torch.rand(5, 5) > 0.3
    mask[:, 0] = True
    s.warm(f, *[torch.randn(2, 3, 5, 8) for _ in range(3)], mask)
    s.call(f, *[torch.randn(2, 5, 3, 8).transpose(1, 2) for _ in range(3)], mask)


@program(PROGRAMS, "large and odd sizes")
def _(s: Session) -> None:
    def f(x, w):
        return F.gelu(x @ w).sum(-1), (x * 2 + 1).softmax(-1), x.t().contiguous()

    f = s.root(f)
    for rows, columns in ((257, 129), (1, 1000), (1000, 1), (65, 3)):
        s.warm(f, torch.randn(rows, columns), torch.randn(columns, 33) / columns**0.5)


@program(PROGRAMS, "out= that gives its tensor another size")
def _(s: Session) -> None:
    def work_buffer(x, o):
        torch.mul(x, 2, out=o)
        return o + 1

    def joined(x, o):
        y = torch.cat([x, x], out=o) * 2
        return y, o

    def twice(x, o):
        torch.add(x, 1, out=o)
        torch.mul(o, 2, out=o)
        return o

    def shrinks(x, o):
        torch.cat([x, x], out=o)
        y = o * 2
        torch.sum(x, 0, out=o)
        return y, o

    def of_its_own(x, o):
        inner = torch.empty(0)
        torch.add(x, 1, out=inner)
        return inner * 2 + o.sum()

    def several(x, o):
        values, indices = torch.empty(0), torch.empty(0, dtype=torch.int64)
        torch.max(x, 0, out=(values, indices))
        return values + o.sum(), indices

    x = torch.ones(4, 2)
    for function in (work_buffer, joined, twice, shrinks, of_its_own, several):
        f = s.root(function)
        right = (8, 2) if function in (joined, shrinks) else (4, 2)
        for size in ((0,), right, (0,), right, right, right, (2,), (0,), right, (3, 3), right):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                s.call(f, x, s.watch(torch.full(size, -9.0)))
    f = s.root(lambda x, o: torch.cat([x, x], out=o) * 2)
    s.warm(f, x, torch.zeros(8, 2))
    s.hit(f, x + 1, torch.zeros(8, 2))
    buffer = s.watch(torch.empty(0))
    f = s.root(work_buffer)
    for k in range(6):
        s.call(f, torch.full((3,), float(k)), buffer)


@program(PROGRAMS, "an input that changes size after a compiled segment has read it")
def _(s: Session) -> None:
    def f(x, o):
        y = o * x
        z = y.sum().item()
        o.resize_(2)
        o.fill_(z)
        return o + 1, y

    f = s.root(f)
    for size in (4, 4, 4, 2, 4, 2, 2, 4):
        s.call(f, torch.tensor(2.0), s.watch(torch.ones(size)))


@program(PROGRAMS, "the storage of what is scattered into an intermediate")
def _(s: Session) -> None:
    def f(x, n):
        big = torch.sin(x.repeat(4, 1))
        rows = x * 2
        return (
            torch.select_scatter(rows, big.sum(0), 0, 1),
            torch.slice_scatter(rows, big[:n], 0, 0, n),
            torch.diagonal_scatter(rows, big[0]),
            big.mean(),
        )

    f = s.root(f)

    def facts(x):
        results = f(x, 2)
        return results, [(t.storage_offset(), t.untyped_storage().nbytes()) for t in results]

    for size in (20, 20, 30, 30, 50, 20):
        s.call(facts, torch.randn(size, 3))


def _relations(tensors: list[torch.Tensor]) -> list[object]:
    """What autograd knows of tensors on one memory: bases, versions that they share."""
    facts: list[object] = []
    for t in tensors:
        base = next((k for k, other in enumerate(tensors) if t._base is other), None)
        facts.append((t.requires_grad, t._is_view(), base))
    for t in tensors:
        before = [other._version for other in tensors]
        with torch.no_grad():
            try:
                t.detach().add_(0)
            except RuntimeError as error:
                facts.append(str(error)[:40])
        facts.append([o._version - b for o, b in zip(tensors, before, strict=True)])
    return facts


def _severed(x):
    kept = x.detach()
    own = x.data
    return (
        x.detach()[:, 1:], x[1:].detach(), x[1:].detach()[:1], kept, kept.t(), kept[0],
        own, own[1:], own.detach(), own.detach()[0], x.data.view(-1),
    )  # fmt: skip


@program(PROGRAMS, "views of detached aliases and of data")
def _(s: Session) -> None:
    facts = s.watch([])

    def alone(x):
        return _severed(x)

    def beside(x):
        return *_severed(x), x * 2

    def fresh(x):
        h = x.tanh()
        return h.data, h, h.detach()[1:], h.data[0], h[1:]

    def hidden(x):
        h = x.tanh()
        return h.detach()[1:], h.data[0]

    for function in (alone, beside):
        f = s.root(function)
        for _ in range(6):
            w = torch.ones(3, 4, requires_grad=True)
            x = w * 3 if function is alone else w
            out = s.call(f, x)
            facts.append(_relations([x, *out]))
            (x * out[3]).sum().backward()
            facts.append(w.grad.tolist())
            facts.append(_relations([torch.ones(3, 4), *s.call(f, torch.ones(3, 4))]))
    for function in (fresh, hidden):
        f = s.root(function)
        for _ in range(6):
            facts.append(_relations(list(s.call(f, torch.ones(3, 4)))))


@program(PROGRAMS, "a target behind a stop-gradient")
def _(s: Session) -> None:
    def target(h):
        return h.detach()[:, 1:]

    f, grads = s.root(target), s.watch([])
    for k in range(6):
        w = torch.full((2, 3), 1.0 + k, requires_grad=True)
        h = w * 3
        (h[:, :-1] * s.call(f, h)).sum().backward()
        grads.append(w.grad.tolist())


@program(PROGRAMS, "writes to data beside a backward")
def _(s: Session) -> None:
    def f(x):
        return x.data, x * 2

    f, outcomes = s.root(f), s.watch([])
    w = torch.ones(3, requires_grad=True)
    for k in range(6):
        x = torch.full((3,), 2.0 + k)
        d, _ = s.call(f, x)
        y = (w * x).sum()
        d.add_(1)
        y.backward()
        outcomes.append((w.grad.tolist(), x._version, d._version, x.tolist()))
