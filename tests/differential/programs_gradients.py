"""Programs that differentiate: what backward gives, when it fails, and what it leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import ANY, EAGER, Program, Session, program
from snapshots import Tolerance
from torch import nn
from torch.utils.checkpoint import checkpoint

PROGRAMS: list[Program] = []


def grown(*sizes: int, to: tuple[int, ...]) -> torch.Tensor:
    """A leaf of which elements share their places."""
    return torch.randn(*sizes).expand(to).detach().requires_grad_()


LOOSE = Tolerance(1e-4, 1e-5)


def descend(
    s: Session,
    f: Callable[..., Any],
    *args: Any,
    loss_of: Callable[[Any], Any] = lambda y: y.square().sum(),
    steps: int = 4,
) -> None:
    """Calls and backwards; the last must be served compiled."""

    def step() -> Any:
        out = f(*args)
        loss_of(out).backward()
        return out

    for _ in range(steps - 1):
        s.call(step)
    s.hit(step)


def leaf(*sizes: int, **options: Any) -> torch.Tensor:
    return torch.randn(sizes, **options).requires_grad_()


@program(PROGRAMS, "linear layer")
def _(s: Session) -> None:
    model = s.watch(nn.Linear(3, 4))
    descend(s, s.root(model), torch.randn(5, 3))


@program(PROGRAMS, "layers, gradients accumulate", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU()))
    descend(s, s.root(model), torch.randn(5, 3), steps=6)


@program(PROGRAMS, "optimizer between the steps", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    f = s.root(model)
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))

    def step() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(f(x), y)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(6):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "zero_grad that keeps tensors", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Linear(3, 2))
    f, x = s.root(model), torch.randn(4, 3)

    def step() -> Any:
        model.zero_grad(set_to_none=False)
        f(x).sum().backward()
        return [p.grad for p in model.parameters()]

    for _ in range(3):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "batch norm in training", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    descend(s, s.root(model), torch.randn(3, 2, 6, 6), loss_of=lambda y: y.square().mean())


@program(PROGRAMS, "batch norm 1d, evaluated, with gradients", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval())
    descend(s, s.root(model), torch.randn(3, 3))


@program(PROGRAMS, "convolution net", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.AvgPool2d(1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )
    descend(s, s.root(model), torch.randn(4, 1, 8, 8), loss_of=lambda y: y.square().mean())


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(self.before(x)).split(d, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.after(x))


@program(PROGRAMS, "transformer block", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(Block(8, 2))
    descend(s, s.root(model), torch.randn(2, 5, 8), loss_of=lambda y: y.square().mean())


@program(PROGRAMS, "language model with a tied embedding", tolerance=LOOSE)
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.position = nn.Parameter(torch.randn(6, 8))
            self.block, self.norm = Block(8, 2), nn.LayerNorm(8)

        def forward(self, tokens, targets):
            x = self.embed(tokens) + self.position[: tokens.shape[1]]
            x = self.norm(self.block(x)) @ self.embed.weight.T
            return x, F.cross_entropy(x.flatten(0, 1), targets.flatten())

    model = s.watch(Model())
    tokens, targets = torch.randint(0, 11, (2, 6)), torch.randint(0, 11, (2, 6))
    descend(s, s.root(model), tokens, targets, loss_of=lambda y: y[1], steps=6)


LOSSES = {
    "mse": lambda x, y: F.mse_loss(x, y),
    "mse, summed": lambda x, y: F.mse_loss(x, y, reduction="sum"),
    "smooth l1": lambda x, y: F.smooth_l1_loss(x, y),
    "huber": lambda x, y: F.huber_loss(x, y),
    "bce with logits": lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()),
    "bce": lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
    "kl": lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
    "cosine": lambda x, y: 1 - F.cosine_similarity(x, y).mean(),
    "cross entropy, smoothed": lambda x, y: F.cross_entropy(x, y.argmax(1), label_smoothing=0.1),
    "cross entropy, probabilities": lambda x, y: F.cross_entropy(x, y.softmax(1)),
    "cross entropy, ignored": lambda x, y: F.cross_entropy(
        x, y.argmax(1), ignore_index=1, weight=torch.linspace(0.5, 1.5, 4)
    ),
    "norm": lambda x, y: (x - y).norm(),
    "logsumexp": lambda x, y: (x - y).logsumexp(1).sum(),
}
for _name, _loss in LOSSES.items():

    @program(PROGRAMS, f"loss: {_name}", expect=ANY, tolerance=LOOSE)
    def _(s: Session, loss: Any = _loss) -> None:
        def f(x, y):
            return loss(x, y)

        x, y = s.watch(leaf(5, 4)), torch.randn(5, 4)
        descend(s, s.root(f), x, y, loss_of=lambda value: value)


OPERATIONS = {
    "broadcast": lambda x: (x * x.sum(0) + x[:, :1]) / (1 + x.square()),
    "index": lambda x: x[[0, 2, 2]] * x[1],
    "slices": lambda x: torch.cat([x[1:], x[:1] * 2], 0),
    "gather": lambda x: x.gather(1, torch.tensor([[0, 0, 1, 2]])),
    "stack and unbind": lambda x: torch.stack([r * i for i, r in enumerate(x.unbind(0))]),
    "where": lambda x: torch.where(x > 0, x.exp(), x.sin()),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0),
    "max and min": lambda x: x.max(1).values + x.amin(1) + torch.maximum(x, -x).sum(1),
    "cumsum": lambda x: x.cumsum(1) * x.prod(1, keepdim=True),
    "sort": lambda x: x.sort(1).values * torch.arange(4.0),
    "softmax": lambda x: x.softmax(0) * x.log_softmax(1),
    "matmul": lambda x: x @ x.T @ torch.einsum("ij,ik->jk", x, x)[:3],
    "norms": lambda x: F.layer_norm(x, (4,)) + F.normalize(x, dim=1) + x.var(1, keepdim=True),
    "activations": lambda x: F.silu(x) + F.elu(x) + F.leaky_relu(x) + F.softplus(x) + F.mish(x),
    "hard activations": lambda x: F.hardswish(x) + F.hardtanh(x) + F.relu6(x) + F.hardsigmoid(x),
    "powers": lambda x: x**3 + x.abs() ** 0.5 + 2**x + x.square().sqrt() + x.abs().rsqrt(),
    "trigonometry": lambda x: x.sin() * x.cos() + x.tanh().atan() + torch.sigmoid(x).log(),
    "pad, roll, flip": lambda x: F.pad(x, (1, 2)).roll(1, 0).flip(1),
    "masked": lambda x: x.masked_fill(x < 0, -2.0) + x.tril() + x.triu(1),
    "strides": lambda x: x.T.contiguous().view(-1)[::2].reshape(2, 3) * 2,
    "expand": lambda x: x.sum(1, keepdim=True).expand(3, 4).reshape(-1),
    "rounding": lambda x: x.round() + x.floor() * x + x.sign() * x,
    "unused part": lambda x: x[:2] * 2,
    "pooling": lambda x: F.avg_pool1d(x[None], 2)[0] + F.max_pool1d(x[None], 2)[0],
    "interpolate": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="nearest")[0, 0],
    "group norm": lambda x: F.group_norm(x[None].transpose(1, 2), 2),
    "index_add": lambda x: torch.zeros(3, 4).index_add(0, torch.tensor([0, 0, 1]), x),
    "scatter_add": lambda x: torch.zeros(3, 4).scatter_add(1, torch.tensor([[0, 1, 2, 0]] * 3), x),
    "in place on an intermediate": lambda x: (x * 2).add_(x).mul_(x).relu_(),
    "in place on a view": lambda x: _write_row(x * 2, x),
    "in place copy": lambda x: torch.zeros(3, 4).copy_(x) * x,
    "std and mean": lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5),
}


def _write_row(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y[0] = x[1] * 3
    y[1:].mul_(2)
    return y * x


for _name, _operation in OPERATIONS.items():

    @program(PROGRAMS, f"operations: {_name}", expect=ANY, tolerance=LOOSE)
    def _(s: Session, operation: Any = _operation) -> None:
        def f(x):
            return operation(x)

        x = s.watch(leaf(3, 4))
        descend(s, s.root(f), x)


@program(PROGRAMS, "gradcheck in float64")
def _(s: Session) -> None:
    def f(x, w, b):
        return F.gelu(F.linear(x, w, b)).softmax(1) * x.sum()

    f = s.root(f)
    args = [leaf(3, 4, dtype=torch.float64), leaf(5, 4, dtype=torch.float64)]
    args.append(leaf(5, dtype=torch.float64))
    descend(s, f, *args)
    s.hit(torch.autograd.gradcheck, f, args)


@program(PROGRAMS, "frozen parameters")
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    model[0].requires_grad_(False)
    f, x = s.root(model), torch.randn(5, 3)
    descend(s, f, x)
    model[0].requires_grad_(True)
    s.miss(lambda: f(x).sum().backward())
    s.call(lambda: f(x).sum().backward())
    s.call(lambda: f(x).sum().backward())


@program(PROGRAMS, "gradients of inputs, leaf and not")
def _(s: Session) -> None:
    def f(x, y):
        return (x * y).tanh()

    f = s.root(f)
    x, z = s.watch(leaf(3)), s.watch(leaf(3))
    descend(s, f, x, z)
    s.call(lambda: f(x, z * 2).sum().backward())
    s.call(lambda: f(x * x, x * z).sum().backward())
    with torch.no_grad():
        s.miss(f, x, z)


@program(PROGRAMS, "the same tensor twice")
def _(s: Session) -> None:
    def f(x, y):
        return x * y + x

    f, x = s.root(f), s.watch(leaf(3))
    descend(s, f, x, x)


@program(PROGRAMS, "shared parameter")
def _(s: Session) -> None:
    layer = nn.Linear(3, 3)
    model = s.watch(nn.Sequential(layer, nn.Tanh(), layer))
    descend(s, s.root(model), torch.randn(2, 3))


@program(PROGRAMS, "retain_graph")
def _(s: Session) -> None:
    model = s.watch(nn.Linear(3, 2))
    f, x = s.root(model), torch.randn(4, 3)
    descend(s, f, x)

    def twice() -> Any:
        loss = f(x).tanh().sum()
        loss.backward(retain_graph=True)
        loss.backward()

    s.hit(twice)


@program(PROGRAMS, "backward twice is an error")
def _(s: Session) -> None:
    def f(x):
        return x.exp()

    f, x = s.root(f), s.watch(leaf(3))
    descend(s, f, x)
    y = s.hit(f, x)
    grad = torch.ones(3)
    s.call(lambda: y.backward(grad))
    try:
        y.backward(grad)
    except RuntimeError as error:
        s.call(lambda: "second time" in str(error))


@program(PROGRAMS, "output written before backward")
def _(s: Session) -> None:
    def f(x, w):
        return F.linear(x, w), x.exp()

    f, x, w = s.root(f), leaf(2, 3), leaf(2, 3)
    descend(s, f, x, w, loss_of=lambda y: y[0].sum() + y[1].sum())

    def unsaved() -> Any:
        y, _z = f(x, w)
        y.mul_(2)  # eager's linear does not need its result
        y.sum().backward()
        return x.grad, w.grad

    def saved() -> str:
        _y, z = f(x, w)
        z.mul_(2)
        try:
            z.sum().backward()
        except RuntimeError as error:
            return "modified by an inplace operation" in str(error)

    for _ in range(3):
        s.call(unsaved)
    s.call(saved)


@program(PROGRAMS, "weight written before backward")
def _(s: Session) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    f, x = s.root(model), torch.randn(2, 3)
    descend(s, f, x)

    def weight() -> str:
        y = f(x)
        with torch.no_grad():
            model[1].weight.mul_(2)
        try:
            y.sum().backward()
        except RuntimeError as error:
            return "modified by an inplace operation" in str(error)

    def bias() -> Any:
        y = f(x)
        with torch.no_grad():
            model[1].bias.mul_(2)
            model[0].weight.mul_(2)
        y.sum().backward()
        return [p.grad for p in model.parameters()]

    s.hit(weight)
    s.hit(bias)


@program(PROGRAMS, "static input overwritten before backward")
def _(s: Session) -> None:
    def f(x, w):
        return torch.sin(x * 2) * w

    f, x, w = s.root(f), torch.randn(3), s.watch(leaf(3))
    descend(s, f, x, w)

    def overwrite() -> Any:
        y = f(x, w)
        x.copy_(torch.ones(3))  # eager needs x * 2's sine, not x
        y.sum().backward()

    s.hit(overwrite)


@program(PROGRAMS, "outputs that get no gradient")
def _(s: Session) -> None:
    def f(x, y):
        return x.exp(), y.sin(), (x * y).cos()

    f, x, y = s.root(f), s.watch(leaf(3)), s.watch(leaf(3))
    descend(s, f, x, y, loss_of=lambda out: sum(o.sum() for o in out))
    for pick in (0, 1, 2, 0, 1, 2):
        s.call(lambda pick=pick: f(x, y)[pick].sum().backward())
        x.grad = y.grad = None
    s.call(lambda: torch.autograd.grad(f(x, y)[0].sum(), [x, y], allow_unused=True))


@program(PROGRAMS, "outputs without a gradient do not poison")
def _(s: Session) -> None:
    def f(x):
        return x * 2, x.sqrt()

    f, x = s.root(f), s.watch(torch.zeros(3, requires_grad=True))
    for _ in range(6):
        s.call(lambda: f(x)[0].sum().backward())


@program(PROGRAMS, "unused parameter")
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    model = s.watch(Model())
    descend(s, s.root(model), torch.randn(3, 2))


@program(PROGRAMS, "detached and no_grad parts")
def _(s: Session) -> None:
    def f(x, w):
        with torch.no_grad():
            scale = (x * w).abs().mean()
            again = w * 2
        with torch.no_grad(), torch.enable_grad():
            y = x * w
        return y * scale + y.detach() * w + again, scale, y.detach()

    f, x, w = s.root(f), s.watch(leaf(3)), s.watch(leaf(3))
    descend(s, f, x, w, loss_of=lambda out: out[0].sum())


@program(PROGRAMS, "outputs that are inputs, their views, and aliases")
def _(s: Session) -> None:
    def f(x, c):
        return x, x.detach(), c, c[1:], x * 2

    f, x, c = s.root(f), s.watch(leaf(2, 3)), torch.randn(4)
    descend(s, f, x, c, loss_of=lambda out: out[0].sum() + out[4].sum())


@program(PROGRAMS, "differentiable views of inputs")
def _(s: Session) -> None:
    def f(x):
        return x.view(-1), x * 2, x[:, 1:]

    f, x = s.root(f), s.watch(leaf(2, 3))

    def step() -> Any:
        a, b, c = f(x)
        (a.sum() + b.sum() + c.exp().sum()).backward()
        return a._base is x, c._base is x

    for _ in range(3):
        s.call(step)
    s.hit(step)
    z = s.watch(leaf(2, 3))
    for _ in range(3):
        s.call(lambda: f(z * 2)[0].add_(1).sum().backward())


@program(PROGRAMS, "view of a result")
def _(s: Session) -> None:
    def f(x):
        return (x * 2).view(3, 2).transpose(0, 1)

    f, x = s.root(f), s.watch(leaf(2, 3))
    descend(s, f, x)
    s.hit(lambda: f(x).add_(1).sum().backward())


@program(PROGRAMS, "results that share memory", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        return y, y[0], y.chunk(2)

    f, x = s.root(f), s.watch(leaf(2, 3))
    descend(s, f, x, loss_of=lambda out: out[0].sum() + out[1].sum() + out[2][1].sum())


@program(PROGRAMS, "hooks on tensors")
def _(s: Session) -> None:
    def f(x, w):
        return x * w

    f, x, w = s.root(f), s.watch(leaf(3)), s.watch(leaf(3))
    seen = s.watch([])
    x.register_hook(lambda g: seen.append(g) or g * 2)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    descend(s, f, x, w)

    def outer() -> Any:
        h = x * 3
        h.register_hook(lambda g: seen.append(g.clone()))
        h.retain_grad()
        y = f(h, w)
        y.register_hook(lambda g: g * 10)
        y.retain_grad()
        y.sum().backward()
        return h.grad, y.grad

    for _ in range(3):
        s.call(outer)


@program(PROGRAMS, "hook on an intermediate", expect=ANY)
def _(s: Session) -> None:
    seen = s.watch([])

    def f(x):
        y = x * 2
        y.register_hook(lambda g: seen.append(g.clone()))
        return y.sin()

    descend(s, s.root(f), s.watch(leaf(3)))


@program(PROGRAMS, "backward hook on a module", expect=ANY)
def _(s: Session) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    s.watch(list(model.parameters()))
    seen = s.watch([])
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
    descend(s, s.root(model), torch.randn(2, 3))


@program(PROGRAMS, "second derivatives", expect=ANY)
def _(s: Session) -> None:
    def f(x, w):
        return (x * w).tanh().sum()

    f, x, w = s.root(f), s.watch(leaf(3)), s.watch(leaf(3))
    for _ in range(3):
        s.call(lambda: f(x, w).backward())

    def penalty() -> Any:
        (g,) = torch.autograd.grad(f(x, w), [x], create_graph=True)
        g.square().sum().backward()
        return g

    for _ in range(4):
        s.call(penalty)
    s.call(lambda: f(x, x * 2).backward())


@program(PROGRAMS, "second derivatives after batch norm", expect=ANY, tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()))
    f, x = s.root(model), s.watch(leaf(4, 3))
    for _ in range(3):
        s.call(lambda: f(x).sum().backward())

    def penalty() -> Any:
        (g,) = torch.autograd.grad(f(x).square().sum(), [x], create_graph=True)
        g.square().sum().backward()
        return g

    for _ in range(3):
        s.call(penalty)


@program(PROGRAMS, "gradients of some inputs")
def _(s: Session) -> None:
    def f(x, w):
        return (x @ w).relu()

    f, x, w = s.root(f), s.watch(leaf(2, 3)), s.watch(leaf(3, 2))
    descend(s, f, x, w)
    s.hit(lambda: torch.autograd.grad(f(x, w).sum(), [w]))
    s.hit(lambda: torch.autograd.grad(f(x, w).sum(), [x])[0].sum())


@program(PROGRAMS, "gradients that arrive in other layouts")
def _(s: Session) -> None:
    def f(x):
        return x.exp() * 2

    f, x = s.root(f), s.watch(leaf(2, 3))
    descend(s, f, x)
    for grad in (torch.randn(3, 2).T, torch.ones(1).expand(2, 3), torch.randn(4, 6)[::2, ::2]):
        s.hit(lambda grad=grad: f(x).backward(grad))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0]


@program(PROGRAMS, "custom function", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return _Double.apply(x.sin()).cos()

    descend(s, s.root(f), s.watch(leaf(3)))


@program(PROGRAMS, "activation checkpointing", expect=ANY)
def _(s: Session) -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    def f(x):
        return checkpoint(layers, x, use_reentrant=False).sin()

    s.watch(layers)
    descend(s, s.root(f), s.watch(leaf(2, 3)))
    s.root(layers)
    descend(s, f, leaf(2, 3))


@program(PROGRAMS, "results that are not differentiable")
def _(s: Session) -> None:
    def f(x):
        values, indices = x.max(1)
        return {"values": values, "indices": indices, "count": (x > 0).sum(), "sign": x.sign()}

    f, x = s.root(f), s.watch(leaf(3, 4))
    descend(s, f, x, loss_of=lambda out: out["values"].sum())


@program(PROGRAMS, "a branch on values")
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        if y.sum() > 0:
            return y.sin()
        return y.cos()

    f = s.root(f)
    up, down = (
        s.watch(torch.ones(3, requires_grad=True)),
        s.watch((-torch.ones(3)).requires_grad_()),
    )
    descend(s, f, up)
    for x in (down, up, down, up, down):
        s.call(lambda x=x: f(x).sum().backward())


@program(PROGRAMS, "dropout", tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.1)))
    f, x = s.root(model), torch.randn(4, 3)
    descend(s, f, x, steps=6)
    with torch.no_grad():
        s.warm(f, x)
    model.eval()
    s.call(f, x)


@program(PROGRAMS, "dropout of images and of attention", expect=ANY, tolerance=LOOSE)
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(0.5), nn.Dropout(0.3)))
    x = torch.randn(2, 1, 6, 6)
    descend(s, s.root(model), x)
    descend(s, model, x.to(memory_format=torch.channels_last))

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    attend = s.root(attend)
    q, k, v = (s.watch(leaf(2, 2, 5, 4)) for _ in range(3))
    descend(s, attend, q, k, v)


@program(PROGRAMS, "random numbers and gradients at some outputs", tolerance=LOOSE)
def _(s: Session) -> None:
    def f(x):
        y = F.dropout(x, 0.5) * torch.rand(3)
        return y.sin(), (x + torch.randn(3)).cos(), torch.randint(0, 9, (2,))

    f, x = s.root(f), s.watch(leaf(3))
    descend(s, f, x, loss_of=lambda out: out[0].sum() + out[1].sum())
    for pick in (0, 0, 0, 1, 1, 1):
        s.call(lambda pick=pick: f(x)[pick].sum().backward())
    s.call(lambda: torch.autograd.grad(f(x)[0].sum(), [x], create_graph=True))


@program(PROGRAMS, "random numbers before a branch that changes")
def _(s: Session) -> None:
    def f(x):
        y = x * torch.rand(3)
        if x.sum() > 0:
            return y + torch.rand(3)
        return y - 1

    f = s.root(f)
    s.warm(f, torch.ones(3))
    for sign in (-1, 1, -1, -1, -1, 1):
        s.call(f, torch.ones(3) * sign)


@program(PROGRAMS, "a buffer follows the weights", tolerance=LOOSE)
def _(s: Session) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x):
            y = self.layer(x)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
            return y - self.mean

    model = s.watch(Model())
    descend(s, s.root(model), torch.randn(4, 3), steps=5)


@program(PROGRAMS, "an input that requires grad is written", expect=ANY)
def _(s: Session) -> None:
    def f(x, w):
        x.mul_(w)
        return x.sin()

    f, x, w = s.root(f), s.watch(leaf(3)), s.watch(leaf(3))
    for _ in range(4):
        s.call(lambda: f(x * 1, w).sum().backward())


@program(PROGRAMS, "a plain input gets a history", expect=ANY)
def _(s: Session) -> None:
    def f(x, w):
        x.mul_(w)
        return x.sin()

    f, w = s.root(f), s.watch(leaf(3))
    for _ in range(4):
        s.call(lambda: f(torch.ones(3), w).sum().backward())


@program(PROGRAMS, "anomaly mode and saved tensor hooks", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return (x * x).sqrt()

    f, x = s.root(f), s.watch(leaf(3))
    packed = s.watch([])
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        for _ in range(3):
            s.call(lambda: f(x).sum().backward())

    def pack(t):
        packed.append(t.detach().clone())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for _ in range(3):
            s.call(lambda: f(x).sum().backward())


@program(PROGRAMS, "the layout of the gradient of a 1x1 weight, for images by channels")
def _(s: Session) -> None:
    layer = s.watch(nn.Conv2d(6, 4, 1))
    f, x = s.root(lambda x: layer(x.sin().permute(0, 3, 1, 2))), torch.randn(2, 5, 5, 6)

    def step() -> Any:
        layer.zero_grad()
        f(x).square().mean().backward()
        return layer.weight.grad.stride()

    for _ in range(4):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "autocast with gradients", tolerance=Tolerance(2e-2, 2e-2))
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)))
    f, x = s.root(model), torch.randn(5, 3)

    def step() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = f(x)
            loss = y.float().square().mean()
        loss.backward()
        return y

    for _ in range(3):
        s.call(step)
    s.hit(step)
    s.call(lambda: f(x).sum().backward())


@program(PROGRAMS, "autocast without gradients", tolerance=Tolerance(2e-2, 2e-2))
def _(s: Session) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    f, x = s.root(model), torch.randn(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s.warm(f, x)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        s.miss(f, x)
    s.miss(f, x)


@program(
    PROGRAMS,
    "autocast, one layer twice, and gradients at some outputs",
    tolerance=Tolerance(3e-2, 3e-2),
)
def _(s: Session) -> None:
    layer = s.watch(nn.Linear(3, 3))

    def f(x):
        y = layer(x)
        return layer(y.relu()), y

    f, x = s.root(f), torch.randn(5, 3)

    def step() -> Any:
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = f(x)[0]
        y.float().sum().backward()
        return y

    for _ in range(5):
        s.call(step)


@program(PROGRAMS, "bfloat16 layers", tolerance=Tolerance(2e-2, 2e-2))
def _(s: Session) -> None:
    model = s.watch(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16())
    descend(s, s.root(model), torch.randn(4, 8, dtype=torch.bfloat16))


@program(PROGRAMS, "scalars and empty tensors")
def _(s: Session) -> None:
    def f(x, w, e):
        return x * w + e.sum(), e * w

    f = s.root(f)
    x, w, e = leaf(3), s.watch(leaf()), s.watch(leaf(0, 3))
    descend(s, f, x, w, e, loss_of=lambda out: out[0].sum() + out[1].sum())


@program(PROGRAMS, "history of tensors is read", expect=EAGER, reason="attribute")
def _(s: Session) -> None:
    def f(x):
        return x * 2 if x.is_leaf else x * 3

    f, x = s.root(f), s.watch(leaf(3))
    for _ in range(3):
        s.call(lambda: f(x).sum().backward())
        s.call(lambda: f(x * 1).sum().backward())


@program(PROGRAMS, "functions one after the other", tolerance=LOOSE)
def _(s: Session) -> None:
    def encode(x, w):
        return (x @ w).tanh()

    def decode(h, w):
        return h @ w.T

    encode, decode = s.root(encode), s.root(decode)
    x, w = torch.randn(4, 3), s.watch(leaf(3, 2))

    def step() -> Any:
        y = decode(encode(x, w), w)
        (y - x).square().mean().backward()
        return y

    for _ in range(4):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "results printed")
def _(s: Session) -> None:
    def f(x):
        return F.softplus(x * 2)

    f, x = s.root(f), torch.ones(2, requires_grad=True)
    for _ in range(3):
        s.call(lambda: print(f(x)))
    s.hit(lambda: print(f(x)))


@program(PROGRAMS, "intermediates die")
def _(s: Session) -> None:
    def f(x):
        return x.exp().sum()

    f, w = s.root(f), s.watch(leaf(3))
    for _ in range(4):
        s.call(lambda: f(w * torch.ones(3)).backward())
    s.hit(lambda: f(w * 2).backward())


@program(PROGRAMS, "results that are views of each other", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(torch.randn(4, 4, requires_grad=True))

    def states(x):
        out = torch.tanh(x @ w)
        return out * 2, out, out[:, -1]

    def halves(x):
        return torch.tanh(x @ w).chunk(2, -1)

    for function in (states, halves):
        f = s.root(function)
        s.split(f, torch.randn(3, 4), segments=1)
        for _ in range(3):
            results = s.call(f, torch.randn(3, 4))
            sum((r * r).sum() for r in results).backward()
            w.grad = None


@program(PROGRAMS, "a view of a result is written by the caller", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(torch.randn(4, 4, requires_grad=True))

    def f(x):
        out = torch.sin(x @ w) * 2
        return out, out.view(-1)[:3]

    f = s.root(f)
    for _ in range(7):
        out, part = s.call(f, torch.randn(2, 4))
        part.mul_(3)
        (out * out).sum().backward()
        w.grad = None


@program(PROGRAMS, "a write by way of .data between forward and backward")
def _(s: Session) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(4))

    def clip(net):
        for p in net.parameters():
            p.data.clamp_(-0.5, 0.5)

    def both(net):
        with torch.no_grad():
            net.p.data.mul_(2)
            net.p.mul_(0.5)

    def detached(net):
        net.p.detach().mul_(2)

    for change in (clip, both, detached):
        f = s.root(change)

        def step(f=f):
            net = Net()
            x = leaf(4)
            loss = (net.p * x).pow(2).sum()
            f(net)
            try:
                loss.backward()
            except RuntimeError as error:
                return str(error)[:60], net.p._version
            return x.grad, net.p, net.p._version

        for _ in range(5):
            s.call(step)


@program(PROGRAMS, "a view of a leaf that overlaps itself is returned", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x * 2, x.unflatten(1, (-1, 1))

    f = s.root(f)
    for _ in range(4):
        x = grown(1, 2, 3, to=(4, 2, 3))

        def step(x=x):
            doubled, view = f(x)
            scale = torch.arange(24.0)
            ((doubled.flatten() + view.flatten()) * scale).sum().backward()
            return x.grad

        s.call(step)
