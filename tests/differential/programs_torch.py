"""Programs around the breadth of torch: queries, conversions, indexing, layers, losses."""

from __future__ import annotations

import math
import typing

import torch
import torch.nn.functional as F
from harness import ANY, EAGER, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []


@program(PROGRAMS, "ambient queries")
def _(s: Session) -> None:
    def f(x):
        if torch.is_grad_enabled():
            x = x * 2
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
            x = x - 1
        if torch.cuda.is_available():
            x = x * 0
        y = torch.zeros(3, dtype=torch.get_default_dtype()) + x
        return y, torch.are_deterministic_algorithms_enabled()

    f = s.root(f)
    s.warm(f, torch.randn(3))
    with torch.no_grad():
        s.miss(f, torch.randn(3))
    torch.set_default_dtype(torch.float64)
    s.finally_(lambda: torch.set_default_dtype(torch.float32))
    s.miss(f, torch.randn(3))


@program(PROGRAMS, "finfo and iinfo")
def _(s: Session) -> None:
    def f(scores, mask):
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(mask, low) + torch.finfo(torch.float32).eps
        return scores.softmax(-1) * torch.iinfo(torch.int8).max, torch.finfo(scores.dtype).bits

    f = s.root(f)
    s.warm(f, torch.randn(2, 3), torch.rand(2, 3) > 0.5)
    s.hit(f, torch.randn(2, 3), torch.rand(2, 3) > 0.5)
    s.miss(f, torch.randn(2, 3).double(), torch.rand(2, 3) > 0.5)


@program(PROGRAMS, "tensor properties")
def _(s: Session) -> None:
    def f(x):
        y = x.T @ x.mT.mT + x.mH.mH.sum()
        if x.is_contiguous() and x.stride() == (3, 1) and x.stride(0) == 3:
            y = y * x.numel() + x.dim() + x.ndim + x.nelement() + x.element_size()
        if x.is_floating_point() and not x.is_complex() and not x.is_cuda:
            y = y + x.size(-1) + len(x)
        return y, x.shape, x.dtype, x.device, x.layout, x.type(), x.requires_grad, x.itemsize

    f = s.root(f)
    s.warm(f, torch.randn(2, 3))
    s.miss(f, torch.randn(3, 2).t())


@program(PROGRAMS, "conversions of dtype")
def _(s: Session) -> None:
    def f(x, other):
        a = x.to(torch.float64)
        b = x.to("cpu").to(device="cpu", dtype=torch.bfloat16)
        c = x.to(other) + x.type_as(other) + x.to(other.device, other.dtype)
        d = x.half().float() + x.int() + x.long().bool().byte() + x.type(torch.int16)
        e = x.to(torch.float64, copy=True, non_blocking=True).type("torch.FloatTensor")
        return a, b, c, d, e, x.to(x.dtype) is x, x.float() is x, x.contiguous() is x

    f = s.root(f)
    s.warm(f, torch.randn(3), torch.ones(1, dtype=torch.float64))
    s.hit(f, torch.randn(3), torch.ones(1, dtype=torch.float64))
    s.miss(f, torch.randn(3), torch.ones(1, dtype=torch.int32))


@program(PROGRAMS, "integer division and shifts with numbers on the left")
def _(s: Session) -> None:
    def f(n, b):
        return 7 // n, 7 % n, 2 << n, 64 >> n, b + 1, 5 & n, 6 | n, 3 ^ n, 2**n, -7 // n, n // 2

    f = s.root(f)
    s.warm(f, torch.tensor([1, 2, 3]), torch.tensor([True, False]))
    s.hit(f, torch.tensor([3, 2, 5]), torch.tensor([True, True]))


@program(PROGRAMS, "booleans in arithmetic")
def _(s: Session) -> None:
    def f(m, x):
        return m * x, m + m, m & ~m, m | True, m ^ m, m.sum(), (m == 0), m.float().mean(), m.any()

    f = s.root(f)
    s.warm(f, torch.tensor([True, False]), torch.randn(2))
    s.hit(f, torch.tensor([False, False]), torch.randn(2))


@program(PROGRAMS, "out= of tensors made in the trace and outside")
def _(s: Session) -> None:
    buffer = s.watch(torch.zeros(3))

    def f(x):
        made = torch.empty(3)
        torch.mul(x, 2, out=made)
        torch.add(made, 1, out=buffer)
        return made + buffer

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))


@program(PROGRAMS, "index_put, masked and scattered writes")
def _(s: Session) -> None:
    def f(x, index, mask):
        y = x.clone()
        y[index] = 1.0
        y[mask] = -1.0
        y.index_put_((index,), torch.ones_like(y[index]), accumulate=True)
        y.masked_fill_(mask, 2.0)
        y = y.index_add(0, index, torch.ones(2, 4)).index_fill(1, torch.tensor([0]), 3.0)
        y.scatter_(0, index[None].expand(1, 2).repeat(1, 2), 5.0)
        y = y.scatter_add(1, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
        y[1:, ::2] += 1
        y[..., 0] *= 2
        y[0, [1, 2]] = torch.tensor([7.0, 8.0])
        return y, torch.where(mask, x, y), x.gather(1, torch.zeros(3, 2, dtype=torch.long))

    f = s.root(f)
    s.warm(f, torch.randn(3, 4), torch.tensor([0, 2]), torch.rand(3, 4) > 0.5)
    s.hit(f, torch.randn(3, 4), torch.tensor([1, 1]), torch.rand(3, 4) > 0.5)


@program(PROGRAMS, "advanced indexing reads")
def _(s: Session) -> None:
    def f(x, i, j):
        rows = torch.arange(x.shape[0])
        return x[i], x[i, j], x[rows, j], x[:, i], x[i][:, None], x[None, ..., -1], x[i[:1]]

    f = s.root(f)
    s.warm(f, torch.randn(3, 3), torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2]))
    s.hit(f, torch.randn(3, 3), torch.tensor([2, 2, 1]), torch.tensor([0, 0, 2]))


@program(PROGRAMS, "complex numbers and the FFT")
def _(s: Session) -> None:
    def f(x, freqs):
        z = torch.view_as_complex(x.reshape(2, 3, 2)) * torch.polar(torch.ones(3), freqs)
        y = torch.view_as_real(z).flatten(1)
        spectrum = torch.fft.rfft(x)
        back = torch.fft.irfft(spectrum * torch.polar(torch.ones(1), torch.ones(1)), n=x.shape[-1])
        return y, z.abs(), z.angle(), z.real + z.imag, back

    f = s.root(f)
    s.warm(f, torch.randn(2, 6), torch.randn(3))
    s.hit(f, torch.randn(2, 6), torch.randn(3))


@program(PROGRAMS, "rotary embedding as complex numbers")
def _(s: Session) -> None:
    def table(dim, length, theta=10000.0):
        freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
        t = torch.arange(length, device=freqs.device)
        return torch.polar(torch.ones(length, dim // 2), torch.outer(t, freqs).float())

    def f(q):
        b, t, h, d = q.shape
        pairs = torch.view_as_complex(q.float().reshape(*q.shape[:-1], -1, 2))
        turned = pairs * table(d, t).view(1, t, 1, d // 2)
        return torch.view_as_real(turned).flatten(3).type_as(q)

    f = s.root(f)
    s.warm(f, torch.randn(1, 3, 2, 4))
    s.hit(f, torch.randn(1, 3, 2, 4))


@program(PROGRAMS, "normal distribution: rsample, log_prob, kl")
def _(s: Session) -> None:
    def f(mu, log_std):
        dist = torch.distributions.Normal(mu, log_std.exp(), validate_args=False)
        z = dist.rsample()
        prior = torch.distributions.Normal(
            torch.zeros_like(mu), torch.ones_like(mu), validate_args=False
        )
        kl = torch.distributions.kl_divergence(dist, prior).sum(-1)
        return z, dist.log_prob(z).sum(), kl, dist.entropy(), dist.mean

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.randn(3), torch.randn(3))
    s.hit(f, torch.randn(3), torch.randn(3))


@program(PROGRAMS, "categorical distribution in a policy")
def _(s: Session) -> None:
    def f(logits, actions):
        dist = torch.distributions.Categorical(logits=logits, validate_args=False)
        return dist.log_prob(actions), dist.entropy().mean(), dist.probs

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.randn(3, 4), torch.tensor([0, 1, 3]))
    s.hit(f, torch.randn(3, 4), torch.tensor([2, 1, 3]))


@program(PROGRAMS, "parameters listed, counted and named")
def _(s: Session) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def f(x):
        penalty = sum(p.pow(2).sum() for p in model.parameters())
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                penalty = penalty + p.abs().sum()
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        norms = torch.stack([p.norm() for p in list(model.parameters())])
        for name, child in model.named_children():
            if isinstance(child, nn.Linear):
                penalty = penalty + child.in_features + len(name)
        device = next(model.parameters()).device
        return model(x.to(device)).sum() + penalty * count, norms

    f = s.root(f)
    with torch.no_grad():
        s.warm(f, torch.randn(2, 3))
        with torch.no_grad():
            model[0].bias.add_(1)
        s.hit(f, torch.randn(2, 3))
        model.append(nn.Linear(2, 2))
        s.miss(f, torch.randn(2, 3))


@program(PROGRAMS, "modules listed and buffers read")
def _(s: Session) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.eval()

    def f(x):
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d):
                x = x - m.running_mean
        for name, b in model.named_buffers():
            if b.dtype.is_floating_point:
                x = x + b.sum() * len(name)
        return model(x) + len(list(model.children()))

    f = s.root(f)
    with torch.no_grad():
        s.warm(f, torch.randn(2, 3))
        model[1].running_mean.add_(1)
        s.hit(f, torch.randn(2, 3))
        model.train()
        s.miss(f, torch.randn(2, 3))


@program(PROGRAMS, "parameters and modules that become one object")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model = Model()

    def count(x):
        return model(x) * sum(p.numel() for p in model.parameters()) + len(list(model.modules()))

    count = s.root(count)
    with torch.no_grad():
        s.warm(count, torch.randn(2, 3))
        model.b.weight = model.a.weight
        s.miss(count, torch.randn(2, 3))
        model.b = model.a
        s.miss(count, torch.randn(2, 3))


@program(PROGRAMS, "state_dict read in the trace", expect=ANY)
def _(s: Session) -> None:
    model = nn.Linear(3, 3)

    def f(x):
        return x @ model.state_dict()["weight"].t()

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.randn(2, 3))
    with torch.no_grad():
        model.weight.mul_(2)
    s.call(f, torch.randn(2, 3))


@program(PROGRAMS, "exponential moving average of weights")
def _(s: Session) -> None:
    model, shadow = nn.Linear(3, 3), nn.Linear(3, 3)
    s.watch([p.data for p in shadow.parameters()])

    @torch.no_grad()
    def update(decay):
        for p, q in zip(model.parameters(), shadow.parameters()):
            q.mul_(decay).add_(p, alpha=1 - decay)

    update = s.root(update)
    s.warm(update, 0.9)
    s.hit(update, 0.9)
    s.miss(update, 0.5)


@program(PROGRAMS, "weight norm and spectral norm")
def _(s: Session) -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    ).eval()
    model = s.root(model)
    with torch.no_grad():
        s.warm(model, torch.randn(2, 3))
        s.hit(model, torch.randn(2, 3))


@program(PROGRAMS, "old weight norm")
def _(s: Session) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.Conv1d(3, 4, 2)).eval()
    model = s.root(model)
    with torch.no_grad():
        for _ in range(3):
            s.call(model, torch.randn(2, 3, 5))


@program(PROGRAMS, "a parametrisation of one's own")
def _(s: Session) -> None:
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).transpose(-1, -2)

    layer = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
    model = s.root(nn.Sequential(layer, nn.ReLU()))
    with torch.no_grad():
        s.warm(model, torch.randn(2, 3))
        layer.parametrizations.weight.original.add_(1)
        s.hit(model, torch.randn(2, 3))


@program(PROGRAMS, "ModuleDict, ParameterList and ParameterDict")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])
            self.table = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(2))})
            self.blocks = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])

        def forward(self, x, which="a"):
            for i, block in enumerate(self.blocks):
                x = torch.relu(block(x)) + i
            out = {name: head(x) for name, head in self.heads.items()}
            for scale in self.scales:
                out = {k: v * scale for k, v in out.items()}
            y = out[which] + self.table["shift"] + self.scales[0] + len(self.scales)
            if "b" in self.heads:
                y = y + self.heads["b"](x) + self.blocks[-1](x).sum()
            return y, list(self.heads.keys())

    model = Model()
    root = s.root(model)
    with torch.no_grad():
        s.warm(root, torch.randn(2, 3))
        s.miss(root, torch.randn(2, 3), "b")
        del model.heads["b"]
        s.call(root, torch.randn(2, 3))


@program(PROGRAMS, "lazy layers")
def _(s: Session) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    root = s.root(model)
    with torch.no_grad():
        for _ in range(6):
            s.call(root, torch.randn(2, 3))
        s.warm(root, torch.randn(2, 3))


@program(PROGRAMS, "LSTM, GRU and RNN")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(8, 4, batch_first=True)
            self.rnn = nn.RNN(4, 3)

        def forward(self, x, state=None):
            y, (h, c) = self.lstm(x, state)
            z, n = self.gru(y)
            w, _ = self.rnn(z)
            return w, h, c, n

    model = s.root(Model())
    with torch.no_grad():
        s.warm(model, torch.randn(2, 5, 3))
        s.hit(model, torch.randn(2, 5, 3))
        s.call(model, torch.randn(2, 5, 3), (torch.zeros(4, 2, 4), torch.zeros(4, 2, 4)))


@program(PROGRAMS, "recurrent cells in a loop")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.gru = nn.LSTMCell(3, 4), nn.GRUCell(4, 4)

        def forward(self, xs):
            h = c = xs.new_zeros(xs.shape[1], 4)
            g = torch.zeros_like(h)
            outs = []
            for x in xs:
                h, c = self.cell(x, (h, c))
                g = self.gru(h, g)
                outs.append(g)
            return torch.stack(outs)

    model = s.root(Model())
    with torch.no_grad():
        s.warm(model, torch.randn(3, 2, 3))
        s.hit(model, torch.randn(3, 2, 3))


@program(PROGRAMS, "LSTM in training")
def _(s: Session) -> None:
    model = nn.LSTM(3, 4, batch_first=True)
    root = s.root(lambda x: model(x)[0].sum())

    def step(x):
        loss = root(x)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return loss.detach(), grads

    s.call(step, torch.randn(2, 3, 3))
    s.call(step, torch.randn(2, 3, 3))
    s.hit(step, torch.randn(2, 3, 3))


@program(PROGRAMS, "multi-head attention")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)

        def forward(self, x, mask=None, padding=None, weights=False):
            y, w = self.attn(
                x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=weights
            )
            return (y, w) if weights else y

    model = s.root(Model())
    with torch.no_grad():
        s.warm(model, torch.randn(2, 3, 8))
        s.warm(model, torch.randn(2, 3, 8), weights=True)
        s.warm(model, torch.randn(2, 3, 8), mask=torch.ones(3, 3, dtype=torch.bool).triu(1))
        s.warm(model, torch.randn(2, 3, 8), padding=torch.tensor([[False, False, True]] * 2))


@program(PROGRAMS, "multi-head attention in eval")
def _(s: Session) -> None:
    attention = nn.MultiheadAttention(8, 2).eval()

    def f(q, k):
        return attention(q, k, k)

    f = s.root(f)
    with torch.no_grad():
        s.warm(f, torch.randn(3, 2, 8), torch.randn(4, 2, 8))
        s.hit(f, torch.randn(3, 2, 8), torch.randn(4, 2, 8))


@program(PROGRAMS, "transformer encoder in training mode")
def _(s: Session) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    root = s.root(lambda x: model(x, mask=torch.ones(3, 3, dtype=torch.bool).triu(1)).sum())

    def step(x):
        root(x).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return grads

    s.warm(step, torch.randn(2, 3, 8))
    s.hit(step, torch.randn(2, 3, 8))


@program(PROGRAMS, "transformer encoder in eval")
def _(s: Session) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    model = s.root(nn.TransformerEncoder(layer, 2).eval())
    with torch.no_grad():
        s.warm(model, torch.randn(2, 3, 8))
        s.hit(model, torch.randn(2, 3, 8))


@program(PROGRAMS, "whole transformer with masks")
def _(s: Session) -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    def f(src, tgt):
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return model(src, tgt, tgt_mask=mask)

    f = s.root(f)
    with torch.no_grad():
        s.warm(f, torch.randn(2, 4, 8), torch.randn(2, 3, 8))
        s.call(f, torch.randn(2, 4, 8), torch.randn(2, 5, 8))


@program(PROGRAMS, "embeddings and bags")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4, padding_idx=0)
            self.bag = nn.EmbeddingBag(10, 4, mode="mean")
            self.positions = nn.Embedding(8, 4)

        def forward(self, ids, offsets):
            t = ids.shape[-1]
            x = self.words(ids) + self.positions(torch.arange(t, device=ids.device))
            return x, self.bag(ids.flatten(), offsets), F.one_hot(ids, 10).float()

    model = s.root(Model())
    with torch.no_grad():
        s.warm(model, torch.tensor([[1, 2, 0]]), torch.tensor([0, 2]))
        s.hit(model, torch.tensor([[4, 9, 1]]), torch.tensor([0, 1]))


@program(PROGRAMS, "a reshape by a parsed pattern")
def _(s: Session) -> None:
    def rearrange(x, pattern, **sizes):
        left, right = (side.strip() for side in pattern.split("->"))
        groups, group = [], None
        for token in left.replace("(", " ( ").replace(")", " ) ").split():
            if token == "(":
                group = []
            elif token == ")":
                groups.append(group)
                group = None
            elif group is not None:
                group.append(token)
            else:
                groups.append([token])
        known = dict(sizes)
        for axis, names in zip(x.shape, groups):
            missing = [n for n in names if n not in known]
            if missing:
                known[missing[0]] = axis // math.prod(known[n] for n in names if n in known)
        order = [n for names in groups for n in names]
        x = x.reshape([known[n] for n in order])
        target = right.replace("(", " ( ").replace(")", " ) ").split()
        flat = [t for t in target if t not in "()"]
        x = x.permute([order.index(n) for n in flat])
        shape, inside = [], None
        for token in target:
            if token == "(":
                inside = 1
            elif token == ")":
                shape.append(inside)
                inside = None
            elif inside is not None:
                inside *= known[token]
            else:
                shape.append(known[token])
        return x.reshape(shape)

    def f(x):
        y = rearrange(x, "b t (h d) -> b h t d", h=2)
        return rearrange(y * 2, "b h t d -> b t (h d)"), y

    f = s.root(f)
    s.warm(f, torch.randn(2, 3, 4))
    s.hit(f, torch.randn(2, 3, 4))
    s.call(f, torch.randn(2, 5, 4))


@program(PROGRAMS, "einsum, tensordot, bmm and baddbmm")
def _(s: Session) -> None:
    def f(a, b):
        x = torch.einsum("bij,bjk->bik", a, b)
        y = torch.einsum("b i j, b j k -> i k", [a, b])
        z = torch.tensordot(a, b, dims=([2], [1]))
        w = torch.baddbmm(x, a, b, beta=0.5, alpha=2.0) + torch.bmm(a, b)
        return x, y, z, w, torch.outer(a[0, 0], b[0, 0]), torch.kron(a[0], b[0]).sum()

    f = s.root(f)
    s.warm(f, torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    s.hit(f, torch.randn(2, 3, 4), torch.randn(2, 4, 5))


@program(PROGRAMS, "losses of the library")
def _(s: Session) -> None:
    ce = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=-100)

    def f(logits, target, x, y):
        total = ce(logits, target) + F.mse_loss(x, y) + F.l1_loss(x, y) + F.smooth_l1_loss(x, y)
        total = total + F.binary_cross_entropy_with_logits(x, y.sigmoid())
        total = total + F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean")
        total = total + F.nll_loss(logits.log_softmax(-1), target) + F.huber_loss(x, y)
        total = total + F.cosine_embedding_loss(x, y, torch.ones(x.shape[0]))
        total = total + F.triplet_margin_loss(x, y, x + 1) + F.gaussian_nll_loss(x, y, y.exp())
        return total, F.cosine_similarity(x, y), F.pairwise_distance(x, y), torch.cdist(x, y)

    f = s.root(f)
    args = (torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.randn(3, 4), torch.randn(3, 4))
    s.warm(f, *args)
    s.hit(f, -args[0], args[1], -args[2], -args[3])


@program(PROGRAMS, "convolutions, pools and norms")
def _(s: Session) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.InstanceNorm2d(4),
        nn.AvgPool2d(2),
        nn.PixelShuffle(2),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(1),
        nn.RMSNorm(1),
    ).eval()
    model = s.root(model)
    with torch.no_grad():
        s.warm(model, torch.randn(2, 3, 8, 8))
        s.hit(model, torch.randn(2, 3, 8, 8))


@program(PROGRAMS, "interpolation, padding, grids and unfolding")
def _(s: Session) -> None:
    def f(x):
        up = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        down = F.interpolate(up, size=x.shape[-2:], mode="area")
        theta = torch.eye(2, 3).unsqueeze(0).repeat(x.shape[0], 1, 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, align_corners=False)
        patches = F.unfold(x, 2, stride=2)
        back = F.fold(patches, x.shape[-2:], 2, stride=2)
        return down, moved, back, F.pad(x, (1, 1, 1, 1), mode="replicate"), x.unfold(2, 2, 1)

    f = s.root(f)
    s.warm(f, torch.randn(1, 2, 4, 4))
    s.hit(f, torch.randn(1, 2, 4, 4))


@program(PROGRAMS, "sorting, top-k and searching")
def _(s: Session) -> None:
    def f(x):
        values, indices = x.topk(2, dim=-1)
        ordered = torch.sort(x, dim=-1, descending=True)
        low = x.min(dim=0)
        return (
            values, indices, ordered.values, ordered.indices, low.values, x.argmax(-1), x.argsort(),
            torch.searchsorted(torch.arange(3.0), x), x.kthvalue(1).values, x.median(-1)[0],
            torch.bucketize(x, torch.tensor([0.0, 1.0])), x.cumsum(-1), x.cummax(-1)[0],
            torch.quantile(x, 0.5), x.mode(-1).values, x.diff(), x.flip(0), x.roll(1, -1),
        )  # fmt: skip

    f = s.root(f)
    s.warm(f, torch.randn(3, 4))
    s.hit(f, torch.randn(3, 4))


@program(PROGRAMS, "top-p sampling")
def _(s: Session) -> None:
    def f(logits, p, temperature):
        logits = logits / temperature
        ordered, index = torch.sort(logits, descending=True)
        total = ordered.softmax(-1).cumsum(-1)
        drop = total > p
        drop[..., 1:] = drop[..., :-1].clone()
        drop[..., 0] = False
        logits = logits.masked_fill(drop.scatter(-1, index, drop), float("-inf"))
        return torch.multinomial(logits.softmax(-1), 1)

    f = s.root(f)
    s.warm(f, torch.randn(2, 5), 0.9, 0.7)
    s.hit(f, torch.randn(2, 5), 0.9, 0.7)
    s.miss(f, torch.randn(2, 5), 0.5, 0.7)


@program(PROGRAMS, "noise and dropout with eager's stream")
def _(s: Session) -> None:
    def f(x):
        a = torch.randn_like(x) + torch.rand(x.shape) + torch.randn(2, 3) * x.std()
        b = F.dropout(x, 0.5, training=True) + torch.bernoulli(torch.full_like(x, 0.5))
        c = torch.randint(0, 5, (2, 3)) + torch.randperm(3) + x.new_empty(2, 3).uniform_(-1, 1)
        return a, b, c

    f = s.root(f)
    s.warm(f, torch.randn(2, 3))
    s.hit(f, torch.randn(2, 3))


@program(PROGRAMS, "diffusion step with a schedule")
def _(s: Session) -> None:
    betas = torch.linspace(1e-4, 0.02, 10)
    alphas = torch.cumprod(1 - betas, 0)

    def f(x, t):
        a = alphas[t].view(-1, 1)
        noise = torch.randn_like(x)
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        half = 4 // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        emb = t[:, None].float() * freqs[None]
        return noisy, torch.cat([emb.sin(), emb.cos()], dim=-1)

    f = s.root(f)
    s.warm(f, torch.randn(2, 3), torch.tensor([1, 5]))
    s.hit(f, torch.randn(2, 3), torch.tensor([9, 0]))


@program(PROGRAMS, "a branch on a reduced condition")
def _(s: Session) -> None:
    def f(x, limit):
        if torch.isnan(x).any():
            return torch.zeros_like(x)
        norm = x.norm()
        if norm > limit:
            x = x * (limit / norm)
        return x

    f = s.root(f)
    s.warm(f, torch.ones(3), 1.0)
    s.call(f, torch.ones(3) * 0.1, 1.0)
    s.call(f, torch.full((3,), float("nan")), 1.0)
    s.call(f, torch.ones(3), 1.0)


@program(PROGRAMS, "clipping gradients by hand")
def _(s: Session) -> None:
    def f(grads, limit):
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        scale = torch.clamp(limit / (total + 1e-6), max=1.0)
        for g in grads:
            g.mul_(scale)
        return total

    f = s.root(f)
    s.warm(f, [torch.randn(3), torch.randn(2)], 1.0)
    s.hit(f, [torch.randn(3), torch.randn(2)], 1.0)


@program(PROGRAMS, "foreach operations")
def _(s: Session) -> None:
    def f(xs, ys):
        zs = torch._foreach_mul(xs, 2.0)
        zs = torch._foreach_add(zs, ys, alpha=0.5)
        torch._foreach_add_(zs, 1.0)
        return zs

    f = s.root(f)
    s.warm(f, [torch.randn(3), torch.randn(2)], [torch.randn(3), torch.randn(2)])
    s.hit(f, [torch.randn(3), torch.randn(2)], [torch.randn(3), torch.randn(2)])


@program(PROGRAMS, "grad modes inside")
def _(s: Session) -> None:
    weight = nn.Parameter(torch.randn(3))

    def f(x):
        with torch.no_grad():
            target = (x * weight).detach()
            with torch.enable_grad():
                inner = x * weight
        with torch.set_grad_enabled(False):
            shift = weight.sum()
        return ((x * weight - target) ** 2).sum() + shift, inner.requires_grad

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))


@program(PROGRAMS, "autocast inside")
def _(s: Session) -> None:
    linear = nn.Linear(4, 4)

    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(x)
        return y.float() + x

    f = s.root(f)
    with torch.no_grad():
        for _ in range(4):
            s.call(f, torch.randn(2, 4))


@program(PROGRAMS, "vmap stays eager", expect=EAGER, reason="")
def _(s: Session) -> None:
    def f(x):
        return torch.func.vmap(lambda row: row * 2 + row.sum())(x)

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.randn(2, 3))


@program(PROGRAMS, "functional grad stays eager", expect=EAGER, reason="")
def _(s: Session) -> None:
    def f(x):
        return torch.func.grad(lambda v: (v**2).sum())(x)

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.randn(3))


@program(
    PROGRAMS, "functional_call with other parameters", expect=EAGER, reason="membership of tensors"
)
def _(s: Session) -> None:
    linear = nn.Linear(3, 3)

    def f(x, params):
        return torch.func.functional_call(linear, params, (x,))

    f = s.root(f)
    params = {"weight": torch.randn(3, 3), "bias": torch.zeros(3)}
    with torch.no_grad():
        for _ in range(3):
            s.call(f, torch.randn(2, 3), params)


@program(PROGRAMS, "a custom operator of a library")
def _(s: Session) -> None:
    if not hasattr(torch.ops.accel_tests_torch, "scaled"):
        library = torch.library.Library("accel_tests_torch", "DEF")
        library.define("scaled(Tensor x, float k) -> Tensor")
        library.impl("scaled", lambda x, k: x * k, "CPU")
        library.impl("scaled", lambda x, k: torch.empty_like(x), "Meta")
        globals()["_LIBRARY"] = library

    def f(x):
        return torch.ops.accel_tests_torch.scaled(x, 2.0) + 1

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.randn(3))


@program(PROGRAMS, "scaled dot product attention with a mask")
def _(s: Session) -> None:
    def f(q, k, v, mask):
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
        return causal, masked

    f = s.root(f)
    q = torch.randn(2, 2, 3, 4)
    s.warm(f, q, q, q, torch.ones(3, 3, dtype=torch.bool).tril())
    q = torch.randn(2, 2, 3, 4)
    s.hit(f, q, q, q, torch.ones(3, 3, dtype=torch.bool).tril())


@program(PROGRAMS, "constructors and shapes")
def _(s: Session) -> None:
    def f(x):
        n = x.shape[0]
        a = torch.full((n, 2), 1.5, dtype=x.dtype) + torch.arange(n * 2).view(n, 2)
        b = torch.tensor([1.0, 2.0]) * torch.tensor(3) + torch.as_tensor([0.5, 0.5])
        c = torch.eye(2) + torch.ones(2, 2).tril(-1) + torch.zeros_like(a[:2])
        d = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")[0]
        e = torch.linspace(0, 1, 3) + torch.logspace(0, 1, 3) + torch.empty(3).fill_(2)
        g = torch.cat([a, a]).chunk(2)[0].squeeze().unsqueeze(0).expand(3, -1, -1).repeat(1, 1, 2)
        return a, b, c, d, e, g, torch.stack([x, x], -1).split([1, 1], -1)[0], x.view(-1, 1).T

    f = s.root(f)
    s.warm(f, torch.randn(2))
    s.hit(f, torch.randn(2))
    s.call(f, torch.randn(3))


@program(PROGRAMS, "linear algebra")
def _(s: Session) -> None:
    def f(a, b):
        spd = a @ a.mT + 3 * torch.eye(a.shape[-1])
        chol = torch.linalg.cholesky(spd)
        solved = torch.linalg.solve(spd, b)
        values, vectors = torch.linalg.eigh(spd)
        q, r = torch.linalg.qr(a)
        return chol, solved, values, torch.linalg.det(spd), torch.linalg.inv(spd), q @ r, a.norm()

    f = s.root(f)
    s.warm(f, torch.eye(3) * 2, torch.randn(3))
    s.hit(f, torch.eye(3) * 3, torch.randn(3))


@program(PROGRAMS, "hooks and buffers updated in forward")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

        def forward(self, x):
            x = self.linear(x)
            self.mean.lerp_(x.mean(0), 0.1)
            self.steps += 1
            return x - self.mean

    model = Model()
    s.watch(model.mean)
    s.watch(model.steps)
    seen = []
    model.linear.register_forward_hook(lambda m, args, out: out * 2)
    model.linear.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    root = s.root(model)
    with torch.no_grad():
        s.warm(root, torch.randn(2, 3))
        s.hit(root, torch.randn(2, 3))
        model.linear.register_forward_hook(lambda m, args, out: seen.append(1))
        s.miss(root, torch.randn(2, 3))


@program(PROGRAMS, "checks of arguments as libraries write them")
def _(s: Session) -> None:
    class Shape(typing.NamedTuple):
        batch: int
        width: int

    def f(x, mask=None):
        torch._assert(x.dim() == 2, "two dimensions")
        if not torch.is_tensor(x) or x.size()[1:] != torch.Size([3]):
            raise ValueError(f"expected (n, 3), got {tuple(x.shape)}")
        shape = Shape(*x.size())
        mask = x.new_ones(shape.batch, dtype=torch.bool) if mask is None else mask
        torch._check(mask.dtype == torch.bool)
        return x * mask[:, None] / torch.clamp(mask.sum(), min=1), shape

    f = s.root(f)
    s.warm(f, torch.randn(2, 3))
    s.call(f, torch.randn(2, 4))
    s.warm(f, torch.randn(2, 3), torch.tensor([True, False]))


@program(PROGRAMS, "conjugated and negated views are operands")
def _(s: Session) -> None:
    def f(z, w):
        real = z.conj().imag  # a negated view
        flat = torch.view_as_complex(torch.stack([real, z.real], -1))
        return z.conj() @ w, z * z.conj(), (real + 1) * 2, flat.conj().t().sum(), z.mH.clone()

    f = s.root(f)
    s.warm(f, torch.randn(3, 3, dtype=torch.cfloat), torch.randn(3, 3, dtype=torch.cfloat))
    s.hit(f, torch.randn(3, 3, dtype=torch.cfloat), torch.randn(3, 3, dtype=torch.cfloat))


@program(PROGRAMS, "rotary embedding with complex numbers")
def _(s: Session) -> None:
    def rotate(x, angles):
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turned = torch.view_as_real(z * angles.conj()).flatten(-2)
        return turned.type_as(x)

    angles = torch.polar(torch.ones(5, 4), torch.arange(20.0).view(5, 4))
    rotate = s.root(rotate)
    s.warm(rotate, torch.randn(2, 5, 8), angles)
    s.hit(rotate, torch.randn(2, 5, 8), angles)


@program(PROGRAMS, "writes into complex tensors")
def _(s: Session) -> None:
    def f(x):
        z = torch.zeros(4, 3, dtype=torch.cfloat)
        z[1] = torch.view_as_complex(torch.stack([x, x * 2], -1))
        z[2] = x
        z[3].copy_(z[1].conj())
        wide = torch.zeros(2, 3, dtype=torch.cdouble)
        wide[:, 1] = z[1:3, 0]
        return (
            z,
            torch.view_as_real(z).sum(),
            wide,
            torch.stft(x.repeat(8), 8, window=torch.ones(8), return_complex=True),
        )

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.hit(f, torch.randn(3))


@program(PROGRAMS, "a lazily conjugated result is the operation's own", expect=ANY)
def _(s: Session) -> None:
    def f(x, z):
        x = torch.tanh(x) + 1
        return torch.fft.ifft(x), torch.sin(x) * 2, z.conj()

    f = s.root(f)
    for _ in range(6):
        s.call(f, torch.randn(4), torch.randn(4, dtype=torch.cfloat))


@program(PROGRAMS, "lazily conjugated arguments", expect=ANY)
def _(s: Session) -> None:
    def f(z, w):
        return z * 2 + w, z.imag * 3

    f = s.root(f)
    z = torch.randn(3, 4, dtype=torch.cfloat)
    for _ in range(3):
        s.call(f, z, z)
        s.call(f, z.conj(), z)
        s.call(f, z, z.conj())
        s.call(f, z.mT.conj().mT, z.conj())


@program(PROGRAMS, "likelihoods check their variances")
def _(s: Session) -> None:
    def f(x, y, variance):
        return F.gaussian_nll_loss(x, y, variance) + 1

    f = s.root(f)
    s.warm(f, torch.randn(3), torch.randn(3), torch.rand(3) + 0.1)
    s.hit(f, torch.randn(3), torch.randn(3), torch.rand(3) + 0.1)
    s.call(f, torch.randn(3), torch.randn(3), torch.tensor([1.0, -1.0, 1.0]))


@program(PROGRAMS, "numbers beside tensors that only ATen computes with")
def _(s: Session) -> None:
    def f(z, x):
        whole = torch.div(x, 3, rounding_mode="trunc"), x // 0.7, 5.0 // x
        return z * 2 + 1.5, z * 1j, 1 / z, z.clone().fill_(2j), torch.full((2,), 1j) + z[:2], whole

    f = s.root(f)
    for dtype in (torch.bfloat16, torch.float16):
        s.warm(f, torch.randn(4, dtype=torch.cfloat), (torch.randn(600) * 30).to(dtype))
        s.hit(f, torch.randn(4, dtype=torch.cfloat), (torch.randn(600) * 30).to(dtype))


@program(PROGRAMS, "tensors of literals")
def _(s: Session) -> None:
    def f(x):
        mean = torch.tensor([0.5, 0.25, 1.0], device=x.device, requires_grad=False)
        turn = torch.tensor([1j, 2.0, 0.5 - 1j], dtype=torch.cfloat) * torch.tensor(1j)
        return (x - mean) / torch.tensor(2.0, dtype=x.dtype), turn * x, torch.tensor([[True]])

    f = s.root(f)
    s.warm(f, torch.randn(2, 3))
    s.hit(f, torch.randn(2, 3))


@program(PROGRAMS, "tuples are compared as values")
def _(s: Session) -> None:
    nan = float("nan")

    def f(x, sizes, pair):
        y = x * 2 if x.stride() == (3, 1) and tuple(x.shape) == sizes else x - 1
        return y + 1 if (pair == (1.5, nan)) else y - 1, (1.0, nan) == pair

    f = s.root(f)
    s.warm(f, torch.randn(2, 3), (2, 3), (1.5, 2.0))
    s.hit(f, torch.randn(2, 3), (2, 3), (1.5, 2.0))
    s.call(f, torch.randn(2, 3), (2, 4), (1.5, 2.0))
    for pair in ((1.5, nan), (1.5, float("nan")), (1.0, nan)):
        for _ in range(3):
            s.call(f, torch.randn(2, 3), (2, 3), pair)


@program(PROGRAMS, "strides of dimensions of one element")
def _(s: Session) -> None:
    def f(x, q):
        y = torch.quantile(x, q, dim=0, keepdim=True)
        return y, y.stride(), x[:1].t() * 2, torch.as_tensor(x.sum(1, keepdim=True)).mT + 1

    f = s.root(f)
    s.warm(f, torch.randn(3, 2), torch.tensor([0.2]))
    s.hit(f, torch.randn(3, 2), torch.tensor([0.7]))


@program(PROGRAMS, "16-bit numbers where float's answer is another")
def _(s: Session) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, -0.0, float("-inf"), 4.0], dtype=dtype)
        f = s.root(lambda x, y: (torch.nextafter(x, y), (x * 1) ** 0.5, (x * 1) ** -0.5))
        s.warm(f, x, torch.full((4,), 2.0, dtype=dtype))
        f = s.root(lambda x, dtype=dtype: ((x * 1).sum(dtype=dtype), (x * 1).prod(dtype=dtype)))
        s.warm(f, torch.tensor([70000.0, -70001.0, 1.0]))
