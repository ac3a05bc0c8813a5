"""Programs that use the breadth of Python around their tensors."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import math
import typing

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []

CONTEXT: contextvars.ContextVar[float] = contextvars.ContextVar("gain", default=2.0)


@program(PROGRAMS, "arithmetic and comparison operators")
def _(s: Session) -> None:
    def f(x, y):
        a = (x + y) * 2 - y / 3
        b = (a // 2) % 3 + a**2 - (-a) + abs(a) + 2**x + 1 / (y + 10) + (3 - x)
        return a, b, (a > b) & (b <= 4) | ~(x == y), (x != y) ^ (x >= y)

    f = s.root(f)
    s.warm(f, torch.randn(3, 4), torch.randn(4))
    s.call(f, torch.randn(3, 4), torch.randn(4))
    s.call(f, torch.randn(3, 4).double(), torch.randn(4))


@program(PROGRAMS, "indexing")
def _(s: Session) -> None:
    def f(x):
        return x[0], x[..., -1], x[:, None, ::2], x[1:, 1], x[[0, 1]], x[x.shape[0] - 1 :]

    f = s.root(f)
    s.warm(f, torch.randn(3, 4))
    s.call(f, torch.randn(3, 4))
    s.call(f, torch.randn(5, 6))


@program(PROGRAMS, "loops, enumerate, zip and range")
def _(s: Session) -> None:
    def f(x, names):
        total = x * 0
        for i, (name, piece) in enumerate(zip(names, x.unbind(0))):
            if i == 1:
                continue
            total = total + piece * len(name)
        else:
            total = total + 1
        n = 0
        while n < 3:
            total = total * 2
            n += 1
        for k in range(5, 0, -2):
            total = total - k
        return total, n

    f = s.root(f)
    s.warm(f, torch.randn(3, 2), ["a", "bb", "ccc"])
    s.miss(f, torch.randn(3, 2), ["a", "bb", "c"])


@program(PROGRAMS, "closures, nested functions and lambdas")
def _(s: Session) -> None:
    def f(x, k):
        def scaled(y, factor=k):
            def inner(z):
                return z * factor + k

            return inner(y)

        shift = lambda y: y + k
        return scaled(x) + shift(x) + scaled(x, factor=3.0)

    f = s.root(f)
    s.warm(f, torch.ones(3), 2.0)
    s.call(f, torch.ones(3), 5.0)


@program(PROGRAMS, "function returned", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = x * 2

        def later(z):
            return y + z

        return later

    f = s.root(f)
    for _ in range(3):
        later = f(torch.ones(3))
        s.call(later, torch.ones(3))


@program(PROGRAMS, "recursion")
def _(s: Session) -> None:
    def f(x, depth):
        if depth == 0:
            return x
        return f(x * 2 + depth, depth - 1)

    root = s.root(f)
    s.warm(root, torch.ones(3), 4)
    s.call(root, torch.ones(3), 2)
    s.call(root, torch.ones(3), 0)


@program(PROGRAMS, "deep recursion", expect=ANY)
def _(s: Session) -> None:
    def f(x, depth):
        return x if depth == 0 else f(x + 1, depth - 1)

    root = s.root(f)

    def too_deep(x):
        try:
            return root(x, 5000)
        except RecursionError:
            return "too deep"  # how deep exactly depends on who calls

    for _ in range(2):
        s.call(root, torch.ones(3), 300)
    s.call(too_deep, torch.ones(3))
    s.call(root, torch.ones(3), 300)


@program(PROGRAMS, "generator inside", expect=ANY)
def _(s: Session) -> None:
    def pieces(x):
        for i in range(3):
            received = yield x * i
            if received:
                yield received

    def f(x):
        total = 0
        for piece in pieces(x):
            total = total + piece
        g = pieces(x)
        next(g)
        return total, g.send(x + 100), list(itertools.islice(pieces(x), 2))

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "generator function as the root", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        for i in range(3):
            yield x * i

    def consume(x):
        return list(f(x))

    consume = s.root(consume)
    s.warm(consume, torch.ones(3))


@program(PROGRAMS, "generator returned", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        y = x * 2
        return (y * i for i in range(3))

    f = s.root(f)
    for _ in range(3):
        s.call(lambda: [list(f(torch.ones(3)))])


@program(PROGRAMS, "context managers", expect=ANY)
def _(s: Session) -> None:
    log = s.watch([])

    class Scope:
        def __enter__(self):
            log.append("in")
            return 3.0

        def __exit__(self, *error):
            log.append(error[0].__name__ if error[0] else "out")
            return error[0] is RuntimeError

    @contextlib.contextmanager
    def gain(value):
        token = CONTEXT.set(value)
        try:
            yield value
        finally:
            CONTEXT.reset(token)

    def f(x):
        with Scope() as k, gain(4.0):
            y = x * k * CONTEXT.get()
        with Scope():
            y.view(2, 2)
        with contextlib.suppress(RuntimeError):
            y.view(5)
        return y * CONTEXT.get()

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.ones(4))


@program(PROGRAMS, "torch contexts")
def _(s: Session) -> None:
    def f(x):
        with torch.no_grad():
            y = x * 2
        with torch.set_grad_enabled(False):
            z = y + 1
        return y, z, torch.is_grad_enabled()

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "inference mode inside", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        with torch.inference_mode():
            y = x * 2
        with torch.inference_mode(False):
            z = x + 1
        return y, z

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "no_grad as a decorator")
def _(s: Session) -> None:
    model = nn.Linear(3, 3)

    @torch.no_grad()
    def f(x):
        return model(x)

    f, x = s.root(f), torch.ones(2, 3)
    s.warm(f, x)
    model.bias.data.fill_(3)
    s.call(f, x)


@program(PROGRAMS, "autocast inside", expect=ANY)
def _(s: Session) -> None:
    weight = torch.randn(3, 3)

    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ weight
        return y, x @ weight

    s.warm(s.root(f), torch.ones(2, 3))


@program(PROGRAMS, "dataclass result")
def _(s: Session) -> None:
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        loss: torch.Tensor | None = None
        extras: dict = dataclasses.field(default_factory=dict)

    def f(x):
        return Output(x * 2, extras={"x": x})

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.ones(4))


@program(PROGRAMS, "ordered dict subclass result")
def _(s: Session) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def f(x):
        out = BaseModelOutputWithPooling(last_hidden_state=x * 2, pooler_output=x.sum())
        return out

    f = s.root(f)
    s.warm(f, torch.ones(3))
    out = s.call(f, torch.ones(3))
    s.call(lambda: (out[0], out["pooler_output"], out.to_tuple()))


@program(PROGRAMS, "named tuple results of torch")
def _(s: Session) -> None:
    def f(x):
        best = x.max(dim=-1)
        values, indices = x.topk(2)
        return best, best.values + 1, values, indices, x.sort(descending=True).indices

    f = s.root(f)
    s.warm(f, torch.randn(3, 4))
    s.call(f, torch.randn(3, 4))


@program(PROGRAMS, "properties, setters and class methods", expect=ANY)
def _(s: Session) -> None:
    class Box:
        default = 2.0

        def __init__(self):
            self._gain = 1.0

        @property
        def gain(self):
            return self._gain * 2

        @gain.setter
        def gain(self, value):
            self._gain = value + 1

        @classmethod
        def base(cls):
            return cls.default

        @staticmethod
        def twice(x):
            return x * 2

    box = s.watch(Box())

    def f(x):
        y = box.twice(x) * box.gain + Box.base()
        box.gain = 3.0
        return y

    s.warm(s.root(f), torch.ones(3))


@program(PROGRAMS, "inheritance and super")
def _(s: Session) -> None:
    class Base(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.k = k

        def forward(self, x):
            return x * self.k

    class Middle(Base):
        def forward(self, x):
            return super().forward(x) + 1

    class Leaf(Middle):
        def forward(self, x):
            return super(Leaf, self).forward(x) * Base.forward(self, x)

    model = Leaf(3.0)
    f, x = s.root(model), torch.ones(3)
    s.warm(f, x)
    model.k = 4.0
    s.miss(f, x)
    s.patch(Base, "forward", lambda self, x: x - 1)
    s.miss(f, x)


@program(PROGRAMS, "module zoo")
def _(s: Session) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.heads = nn.ModuleDict({"a": nn.Linear(8, 2), "b": nn.Linear(8, 3)})
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(8)) for _ in range(2)])
            self.norm = nn.LayerNorm(8)
            self.register_buffer("offset", torch.arange(8.0))
            self.none = None

        def forward(self, i):
            x = self.embed(i) + self.offset
            for block in self.blocks:
                x = F.gelu(block(self.norm(x))) + x
            for scale in self.scales:
                x = x * scale
            return {name: head(x) for name, head in self.heads.items()}

    model = Net().eval().requires_grad_(False)
    f = s.root(model)
    s.warm(f, torch.tensor([[1, 2, 3]]))
    s.call(f, torch.tensor([[4, 2, 9]]))
    model.offset = torch.ones(8)
    s.call(f, torch.tensor([[4, 2, 9]]))
    model.norm = nn.Identity()
    s.miss(f, torch.tensor([[4, 2, 9]]))


@program(PROGRAMS, "shared submodule and parameter")
def _(s: Session) -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = self.a
            self.c = nn.Linear(3, 3)
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    model = Net().requires_grad_(False)
    f, x = s.root(model), torch.randn(2, 3)
    s.warm(f, x)
    model.b = nn.Linear(3, 3).requires_grad_(False)
    s.call(f, x)


@program(PROGRAMS, "small transformer with a mask")
def _(s: Session) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = model.eval().requires_grad_(False)

    def f(x, padding):
        return model(x, src_key_padding_mask=padding)

    f = s.root(f)
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    for _ in range(4):
        s.call(f, torch.randn(2, 4, 16), padding)


@program(PROGRAMS, "attention by hand")
def _(s: Session) -> None:
    def f(q, k, v, mask):
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(mask == 0, float("-inf"))
        weights = scores.softmax(-1)
        out = (weights @ v).transpose(1, 2).contiguous().view(q.shape[0], q.shape[2], -1)
        return out, weights

    f = s.root(f)
    mask = torch.tril(torch.ones(5, 5))
    s.warm(f, *[torch.randn(2, 3, 5, 4) for _ in range(3)], mask)
    s.call(f, *[torch.randn(2, 3, 5, 4) for _ in range(3)], mask)
    s.miss(f, *[torch.randn(1, 3, 5, 4) for _ in range(3)], mask)


@program(PROGRAMS, "convolutional net")
def _(s: Session) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    model = model.eval().requires_grad_(False)
    f = s.root(model)
    s.warm(f, torch.randn(2, 3, 8, 8))
    s.call(f, torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    s.miss(f, torch.randn(2, 3, 16, 16))


@program(PROGRAMS, "recurrent net", expect=ANY)
def _(s: Session) -> None:
    model = nn.LSTM(3, 4, batch_first=True).requires_grad_(False)
    f = s.root(model)
    s.warm(f, torch.randn(2, 5, 3))
    s.call(f, torch.randn(2, 6, 3))


@program(PROGRAMS, "pointwise, reductions and shapes in one")
def _(s: Session) -> None:
    def f(x, w):
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        y = (x - mean) * torch.rsqrt(var + 1e-5) * w
        z = torch.cat([y, x.flip(-1)], dim=-1)
        return z.softmax(-1), z.amax(0), z.argmax(-1), z.cumsum(0), torch.logsumexp(z, 1), z.std()

    f = s.root(f)
    s.warm(f, torch.randn(4, 6), torch.randn(6))
    s.call(f, torch.randn(4, 6), torch.randn(6))
    s.call(f, torch.full((4, 6), float("nan")), torch.randn(6))
    s.call(f, torch.full((4, 6), float("inf")), torch.randn(6))


@program(PROGRAMS, "special values in pointwise functions")
def _(s: Session) -> None:
    def f(x):
        return (
            x.exp(), x.log(), x.tanh(), x.sigmoid(), F.gelu(x), F.gelu(x, approximate="tanh"),
            F.silu(x), x.sqrt(), x.rsqrt(), x.erf(), x.sin(), x.clamp(-1, 1), x.relu(),
            x.maximum(torch.zeros(())), torch.where(x > 0, x, -x), x.round(), x.floor(), x.sign(),
            x.isnan(), F.softplus(x), x.abs().pow(0.5), x.to(torch.int32), x.reciprocal(),
        )  # fmt: skip

    f = s.root(f)
    values = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e-30, 88.0, -88.0, 100.0, 1e4]
    s.warm(f, torch.tensor(values))
    s.call(f, torch.tensor(values).flip(0))
    specials = torch.tensor([*values[:10], float("inf"), float("-inf"), float("nan")])
    s.call(lambda: f(specials)[:-2])
    s.call(f, torch.randn(13) * 10)


@program(PROGRAMS, "integer and bool arithmetic")
def _(s: Session) -> None:
    def f(i, b):
        return (
            i * 3 - 7, i // 2, i % 3, i / 2, -i, i << 1, i & 6, i == 3, b & (i > 2), b.sum(),
            i.sum(), i.float().mean(), b.to(torch.int64) + i, i.clamp(min=0), i.max(), ~b, i**2,
        )  # fmt: skip

    f = s.root(f)
    s.warm(f, torch.arange(-6, 6), torch.arange(12) % 2 == 0)
    s.call(f, torch.arange(0, 12), torch.arange(12) % 3 == 0)
    s.call(f, torch.arange(0, 12, dtype=torch.int32), torch.arange(12) % 3 == 0)
    s.call(f, torch.full((12,), 2**62), torch.arange(12) % 3 == 0)


@program(PROGRAMS, "reduced precision")
def _(s: Session) -> None:
    def f(x, w):
        return F.layer_norm(x, (8,)) @ w, x.softmax(-1), x.sum(), x * 1.1 + 0.3, x.float() * 2

    f = s.root(f)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        s.warm(f, torch.randn(4, 8, dtype=dtype), torch.randn(8, 3, dtype=dtype))


@program(PROGRAMS, "scalars, zero-dim and empty tensors")
def _(s: Session) -> None:
    def f(x, scalar):
        return x * scalar, x.sum(), x + 1.5, scalar * 2, x.reshape(-1)[:0], x.mean(0)

    f = s.root(f)
    s.warm(f, torch.randn(2, 3), torch.tensor(2.0))
    s.call(f, torch.randn(0, 3), torch.tensor(2.0))
    s.call(f, torch.randn(2, 3), torch.tensor(2))
    s.call(f, torch.randn(2, 3, dtype=torch.bfloat16), torch.tensor(2.0))


@program(PROGRAMS, "factory functions")
def _(s: Session) -> None:
    def f(x):
        n = x.shape[0]
        mask = torch.tril(torch.ones(n, n, dtype=torch.bool))
        positions = torch.arange(n, device=x.device)
        return (
            mask, positions, torch.zeros_like(x), x.new_full((2,), 3.0), torch.eye(n) * x,
            torch.full((n,), -1), torch.linspace(0, 1, n), torch.tensor([1, 2]), torch.empty(n, 0),
        )  # fmt: skip

    f = s.root(f)
    s.warm(f, torch.randn(3))
    s.call(f, torch.randn(4))


@program(PROGRAMS, "constants are not shared between calls")
def _(s: Session) -> None:
    def f(x):
        return torch.ones(3), torch.tensor([1.0, 2.0]), torch.arange(3), x + 1

    f = s.root(f)
    result = s.warm(f, torch.ones(3))
    s.call(lambda: [t.mul_(10) for t in result])
    s.call(f, torch.ones(3))


@program(PROGRAMS, "einsum, matmul broadcasting and batched products")
def _(s: Session) -> None:
    def f(a, b, v):
        return (
            torch.einsum("bij,bjk->bik", a, b), a @ b, torch.bmm(a, b), a @ v, v @ v,
            torch.addmm(torch.ones(2, 4), a[0], b[0]), F.linear(a, b[0].t(), torch.ones(4)),
        )  # fmt: skip

    f = s.root(f)
    s.warm(f, torch.randn(2, 2, 3), torch.randn(2, 3, 4), torch.randn(3))
    s.call(f, torch.randn(2, 2, 3), torch.randn(2, 3, 4), torch.randn(3))


@program(PROGRAMS, "scatter, gather and index writes")
def _(s: Session) -> None:
    def f(x, i):
        y = torch.zeros(5).scatter(0, i, x)
        z = torch.zeros(5).index_add(0, i, x)
        w = torch.zeros(5)
        w[i] = x
        w[w > 100] = 1
        return y, z, w, z.gather(0, i), z.index_select(0, i), torch.take(z, i)

    f = s.root(f)
    s.warm(f, torch.randn(3), torch.tensor([0, 2, 4]))
    s.call(f, torch.randn(3), torch.tensor([0, 1, 2]))
    s.call(f, torch.randn(3), torch.tensor([1, 1, 1]))


@program(PROGRAMS, "complex numbers", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        z = torch.polar(x.abs(), x)
        return z * z, z.real, torch.view_as_real(z), z.conj(), torch.fft.rfft(x)

    f = s.root(f)
    s.warm(f, torch.randn(4))
    s.call(f, torch.randn(4))


@program(PROGRAMS, "sparse, nested and quantized tensors", expect=ANY)
def _(s: Session) -> None:
    def f(x):
        return x.to_sparse() @ x.t()

    def g(x):
        return (x @ torch.ones(3, 2)) + 1

    f, g = s.root(f), s.root(g)
    for _ in range(3):
        s.call(f, torch.eye(3))
        s.call(g, torch.eye(3).to_sparse())


@program(PROGRAMS, "partial, wraps and decorators")
def _(s: Session) -> None:
    def doubled(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs) * 2

        return wrapper

    @doubled
    def f(x, gain=1.0):
        return x * gain

    bound = functools.partial(f, gain=3.0)

    def g(x):
        return bound(x) + f(x)

    s.warm(s.root(g), torch.ones(3))


@program(PROGRAMS, "bound method root")
def _(s: Session) -> None:
    class Model:
        gain = 2.0

        def run(self, x):
            return x * self.gain

    model = Model()
    run = s.root(model.run)
    s.warm(run, torch.ones(3))
    model.gain = 3.0
    s.miss(run, torch.ones(3))


@program(PROGRAMS, "walrus, conditional expressions and chained comparison")
def _(s: Session) -> None:
    def f(x, n):
        if (k := n * 2) > 5 and 0 < n < 10 and not n == 7:
            x = x + k
        y = x if n % 2 else -x
        return y * (n or 1) + (n and 2)

    f = s.root(f)
    s.warm(f, torch.ones(3), 4)
    for n in (0, 3, 7, 12):
        s.call(f, torch.ones(3), n)


@program(PROGRAMS, "match statement")
def _(s: Session) -> None:
    def f(x, command):
        match command:
            case {"op": "scale", "by": float(k)}:
                return x * k
            case ["add", *rest] if rest:
                return x + sum(rest)
            case (a, b):
                return x - a - b
            case _:
                return x

    f = s.root(f)
    for command in ({"op": "scale", "by": 3.0}, ["add", 1, 2], ("p", "q")[:0], (1, 2), None):
        for _ in range(3):
            s.call(f, torch.ones(3), command)


@program(PROGRAMS, "typing, assertions and unused values")
def _(s: Session) -> None:
    def f(x: torch.Tensor, k: int = 3) -> typing.Any:
        assert x.dim() == 1, "one dimension"
        assert isinstance(k, int)
        _ = x.sum()
        y: torch.Tensor = typing.cast(torch.Tensor, x * k)
        return y

    f = s.root(f)
    s.warm(f, torch.ones(3))
    s.call(f, torch.ones(3, 3))


@program(PROGRAMS, "sizes as values")
def _(s: Session) -> None:
    def f(x):
        b, n = x.shape
        size = x.size()
        half = n // 2
        left, right = x.split([half, n - half], dim=1)
        return torch.cat((right, left), 1), size, b * n, x.numel(), x.stride(), size[-1], len(x)

    f = s.root(f)
    s.warm(f, torch.randn(2, 6))
    s.call(f, torch.randn(3, 5))
    s.call(f, torch.randn(2, 6))


@program(PROGRAMS, "nothing of torch at all", expect=ANY)
def _(s: Session) -> None:
    def f(n):
        return sum(i * i for i in range(n)), "x" * n

    f = s.root(f)
    for n in (3, 4, 3):
        s.call(f, n)


@program(PROGRAMS, "returns None, constants and nothing")
def _(s: Session) -> None:
    def f(x):
        x.add_(1)

    def g(x):
        return None, 3, "text", (x,), x + 1, 1.5, torch.float32, x.dtype, x.device

    s.warm(s.root(f), torch.ones(3))
    s.warm(s.root(g), torch.ones(3))


@program(PROGRAMS, "callable object as an argument")
def _(s: Session) -> None:
    class Act:
        def __init__(self, k):
            self.k = k

        def __call__(self, x):
            return x * self.k

    def f(x, act):
        return act(x) + 1

    f, act = s.root(f), Act(2.0)
    s.warm(f, torch.ones(3), act)
    act.k = 3.0
    s.miss(f, torch.ones(3), act)
    s.miss(f, torch.ones(3), torch.relu)
    s.miss(f, torch.ones(3), nn.ReLU())


@program(PROGRAMS, "optimize around optimize", expect=ANY)
def _(s: Session) -> None:
    def inner(x):
        return x * 2

    inner = s.root(inner)

    def outer(x):
        return inner(x) + 1

    outer = s.root(outer)
    s.warm(inner, torch.ones(3))
    s.warm(outer, torch.ones(3))
    s.warm(inner, torch.ones(3))


@program(PROGRAMS, "key-value cache object", expect=ANY)
def _(s: Session) -> None:
    class Cache:
        def __init__(self):
            self.keys = []

        def update(self, k, layer):
            if len(self.keys) <= layer:
                self.keys.append(k)
            else:
                self.keys[layer] = torch.cat([self.keys[layer], k], 1)
            return self.keys[layer]

    def f(x, cache=None):
        cache = Cache() if cache is None else cache
        for layer in range(2):
            x = x + cache.update(x * 2, layer).sum(1, keepdim=True)
        return x, cache

    f = s.root(f)
    _, cache = s.warm(f, torch.ones(1, 1, 2))
    for _ in range(3):
        s.call(f, torch.ones(1, 1, 2), cache)


@program(PROGRAMS, "wraps in the call, of a function from outside")
def _(s: Session) -> None:
    def scaled(x: torch.Tensor, n: int = 2) -> torch.Tensor:
        """Of some size."""
        return x * n

    scaled.factor = 3

    def maybe(function):
        @functools.wraps(function)
        def inner(x, *args):
            return x if x is None else function(x, *args)

        return inner

    def f(x):
        inner = maybe(maybe(scaled))
        extra = getattr(inner, "extra", 0) + len(inner.__name__) + len(inner.__doc__ or "")
        same = inner.__wrapped__.__wrapped__ is scaled
        return inner(x, 4) + inner.factor + extra, inner(None), same, len(inner.__annotations__)

    f, x = s.root(f), torch.randn(4)
    s.warm(f, x)
    scaled.factor = 5
    s.miss(f, x)
    scaled.extra = 7
    s.miss(f, x)
    scaled.__name__ = "other"
    s.miss(f, x)
    scaled.__doc__ = None
    s.miss(f, x)
    scaled.__annotations__ = {}
    s.call(f, x)
    s.warm(f, x)
