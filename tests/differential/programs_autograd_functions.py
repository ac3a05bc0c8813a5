"""torch.autograd.Function, custom operations of libraries, and what models by hand do with them."""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from harness import ANY, EAGER, Program, Session, program

PROGRAMS: list[Program] = []


def square() -> type[torch.autograd.Function]:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, k):
            ctx.save_for_backward(x)
            ctx.k = k
            return x * x * k

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return 2 * x * gradient * ctx.k, None

    return Square


@program(PROGRAMS, "an autograd function without gradients")
def _(s: Session) -> None:
    function = square()

    def f(x):
        return function.apply(x + 1, 3) - 1

    f = s.root(f)
    s.warm(f, torch.randn(4))
    s.hit(f, torch.randn(4))
    with torch.no_grad():
        s.warm(f, torch.randn(4, requires_grad=True))


@program(PROGRAMS, "an autograd function whose forward is replaced")
def _(s: Session) -> None:
    function = square()

    def f(x):
        return function.apply(x, 2) + 1

    f, x = s.root(f), torch.randn(4)
    s.warm(f, x)
    s.patch(function, "forward", staticmethod(lambda ctx, x, k: x - k))
    s.miss(f, x)
    s.call(f, x)


@program(PROGRAMS, "an autograd function with gradients", expect=ANY)
def _(s: Session) -> None:
    function = square()

    def f(x):
        y = (x + 1) * 2
        y = function.apply(y, 3)
        return (y * 2 - 1).relu()

    def step(x):
        loss = root(x).sum()
        loss.backward()
        return loss.detach(), x.grad

    root = s.root(f)
    for _ in range(6):
        s.call(step, torch.randn(4).requires_grad_())
    s.call(step, torch.randn(5).requires_grad_())


@program(
    PROGRAMS, "an autograd function that hands its input on", expect=EAGER, reason="Same.apply()"
)
def _(s: Session) -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

    def f(x):
        return Same.apply(x)

    f = s.root(f)
    for _ in range(3):
        s.call(f, torch.randn(4) + 1)


@program(PROGRAMS, "an autograd function that gives a view", expect=ANY)
def _(s: Session) -> None:
    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.t(), x.sum()

    def f(x):
        turned, total = Turned.apply(x * 2)
        return turned + 1, total

    f = s.root(f)
    for _ in range(5):
        s.call(f, torch.randn(3, 4))


@program(PROGRAMS, "an autograd function with setup_context", expect=ANY)
def _(s: Session) -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            return 3 * ctx.saved_tensors[0] ** 2 * gradient

    def f(x):
        return Cube.apply(x + 1) * 2

    f = s.root(f)
    for _ in range(5):
        s.call(f, torch.randn(4))


@program(PROGRAMS, "an autograd function that looks at its context", expect=ANY)
def _(s: Session) -> None:
    class Looking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            ctx.kept = x.sum()
            scale = 2.0 if ctx.needs_input_grad[0] else 3.0
            return x * scale + ctx.kept

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def f(x):
        return Looking.apply(x) + 1

    f = s.root(f)
    for _ in range(4):
        s.call(f, torch.randn(4))
    s.call(f, torch.randn(4, requires_grad=True))
    s.call(f, torch.randn(4))


@program(PROGRAMS, "an autograd function that writes its input", expect=ANY)
def _(s: Session) -> None:
    class Writing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x.add_(1)
            ctx.mark_dirty(x)
            return x

    def f(x):
        return Writing.apply(x) * 2

    f = s.root(f)
    for _ in range(5):
        s.call(f, torch.randn(4))


@program(PROGRAMS, "an autograd function with an effect in its forward", expect=ANY)
def _(s: Session) -> None:
    seen = s.watch([])

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(len(seen))
            return x * 2

    def f(x):
        return Noting.apply(x) + 1

    f = s.root(f)
    for _ in range(5):
        s.call(f, torch.randn(4))


@program(PROGRAMS, "a grouped matrix product")
def _(s: Session) -> None:
    def f(x, weights, ends):
        return F.grouped_mm(x * 2, weights, offs=ends) + 1

    f, weights = s.root(f), torch.randn(2, 8, 4)
    ends = torch.tensor([2, 5], dtype=torch.int32)
    s.warm(f, torch.randn(5, 8), weights, ends)
    s.hit(f, torch.randn(5, 8), weights, torch.tensor([4, 5], dtype=torch.int32))


@program(PROGRAMS, "a grouped matrix product with padded rows")
def _(s: Session) -> None:
    def f(x, weights, ends):
        y = F.grouped_mm(x, weights, offs=ends)
        return y, y.relu()

    weights = torch.randn(2, 5, 8).transpose(1, 2)
    ends = torch.tensor([1, 6], dtype=torch.int32)
    f = s.root(f)
    s.warm(f, torch.randn(6, 8), weights, ends)
    s.hit(f, torch.randn(6, 8), weights, ends)


@program(PROGRAMS, "slices whose bounds are tensors", expect=ANY)
def _(s: Session) -> None:
    data = torch.arange(100.0)

    def f(n):
        at = torch.randint(len(data) - n, (4,))
        x = torch.stack([data[i : i + n] for i in at])
        y = torch.stack([data[i + 1 : i + 1 + n] for i in at])
        return (x * 2 + y).relu().sum(0)

    f = s.root(f)
    s.split(f, 8, segments=1)
    s.call(f, 5)


@program(PROGRAMS, "a sliding mask of positions in attention")
def _(s: Session) -> None:
    def f(scores, values):
        n = scores.size(-1)
        q = (torch.arange(n) + 0)[None, None, :, None]
        k = (torch.arange(n) + 0)[None, None, None, :]
        near = q.new_ones((), dtype=torch.bool) & (k > q - 4) & (k <= q)
        mask = torch.where(near.expand(2, -1, n, n), torch.zeros(()), -1e30)
        capped = torch.tanh(scores / 16 / 50) * 50
        return torch.softmax(capped + mask, -1) @ values

    f = s.root(f)
    s.warm(f, torch.randn(2, 4, 7, 7), torch.randn(2, 4, 7, 8))
    s.hit(f, torch.randn(2, 4, 7, 7), torch.randn(2, 4, 7, 8))


@program(PROGRAMS, "a call without keywords of a hint to Dynamo, sizes open")
def _(s: Session) -> None:
    cache = torch.zeros(4, 4)

    def f(x):
        torch._dynamo.mark_static_address(cache)
        return x + cache[: x.size(0)]

    f = s.root(f, dynamic=True)
    s.warm(f, torch.randn(3, 4))
    s.call(f, torch.randn(2, 4))


@program(PROGRAMS, "running statistics are written behind autograd's back")
def _(s: Session) -> None:
    norm = torch.nn.BatchNorm1d(4)
    running = s.watch([])

    def f(x):
        return norm(x).relu() * 2

    def step(x, y, together):
        first = root(x)
        second = f(y) if together else root(y)  # a history of eager's beside one of ours
        (first.sum() - second.sum()).backward()
        gradient = norm.weight.grad
        norm.zero_grad()
        running.append(norm.running_mean._version)
        return gradient, x.grad

    root = s.root(lambda x: norm(x).relu() * 2)
    for together in (False, False, False, True, False):
        x, y = (torch.randn(3, 4).requires_grad_() for _ in range(2))
        (s.call if together else s.hit if len(running) > 1 else s.call)(step, x, y, together)
    with torch.no_grad():
        for _ in range(4):
            s.call(root, torch.randn(3, 4))
            running.append(norm.running_mean._version)


@program(PROGRAMS, "a history of eager's is unwound after compiled calls", expect=ANY)
def _(s: Session) -> None:
    norm = torch.nn.BatchNorm1d(4)

    def f(x):
        return norm(x) + 1

    root = s.root(f)
    early = f(torch.randn(3, 4).requires_grad_())
    for _ in range(4):
        s.call(root, torch.randn(3, 4).requires_grad_())

    def unwind():
        early.sum().backward()
        return norm.weight.grad

    s.call(unwind)


@program(PROGRAMS, "a generator is advanced beside an exit in an `and`", expect=ANY)
def _(s: Session) -> None:
    def pieces(v, count):
        for i in range(count):
            yield v + i

    def f(x):
        a, seen = x, 0
        for v in pieces(a, 4):
            seen += 1
            assert seen < 5
            a.tolist() and zlib.crc32(b"more")
            a = a + v
        return a - x.detach()

    f = s.root(f)
    for _ in range(7):
        s.call(f, torch.rand(3, 4))
    for _ in range(5):
        s.call(f, torch.rand(3, 4).requires_grad_())


@program(PROGRAMS, "a gradient at one output, of a state that the call has written", expect=ANY)
def _(s: Session) -> None:
    state = s.watch(torch.ones(4))

    def f(x, z):
        state.add_(1)
        return x * state, x * 2 * state + z

    def step(x, z):
        root(x, z)[0].sum().backward()
        return x.grad, z.grad

    root = s.root(f)
    for _ in range(6):
        s.call(step, torch.rand(4).requires_grad_(), torch.rand(4).requires_grad_())


@program(PROGRAMS, "a gradient at one output, of an input written since", expect=ANY)
def _(s: Session) -> None:
    def f(x, y, z):
        return x + y, x * 2, z * 3

    def step(x, y, z):
        first, second, _ = root(x, y, z)
        y.mul_(0.5)
        (first if len(x) == 4 else second).sum().backward()
        return x.grad, z.grad

    root = s.root(f)
    for n in (4, 4, 4, 4, 5, 5, 5):
        s.call(step, torch.rand(n).requires_grad_(), torch.rand(n), torch.rand(n).requires_grad_())
