"""Several results of one call, and what becomes of each one's backward: who frees what, who may
run again, whose versions count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []


def leaf(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, requires_grad=True)


def gradient_or_error(loss: torch.Tensor, w: torch.Tensor) -> torch.Tensor | str | None:
    """Of `w`; or what the backward says, up to where eager names another layout and version."""
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error).partition(": [")[0]
    return w.grad


@program(PROGRAMS, "two losses of one call, each with its backward")
def _(s: Session) -> None:
    def f(x, w, v):
        return x * w, x * v

    f = s.root(f)
    for _ in range(5):
        w, v = leaf(3), leaf(3)

        def both(w=w, v=v):
            a, b = f(torch.randn(3), w, v)
            a.sum().backward()
            b.sum().backward()
            return w.grad, v.grad

        s.call(both)


@program(PROGRAMS, "two networks trained in one step")
def _(s: Session) -> None:
    first, second = s.watch(nn.Linear(4, 1)), s.watch(nn.Linear(4, 1))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (first, second)]

    def step(x, y):
        losses = F.mse_loss(first(x), y), F.mse_loss(second(x), y)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses[0].item(), losses[1].item()

    step = s.root(step)
    for _ in range(6):
        s.call(step, torch.randn(3, 4), torch.randn(3, 1))


@program(PROGRAMS, "an ensemble, member by member")
def _(s: Session) -> None:
    members = s.watch(nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]))

    def ensemble(x):
        return [m(x).tanh() for m in members]

    f = s.root(ensemble)
    for order in ((0, 1, 2), (2, 0), (1,), (0, 2, 1), (2, 1, 0)):

        def backwards(order=order):
            members.zero_grad()
            results = f(torch.randn(2, 4))
            for k in order:
                results[k].sum().backward()
            return [p.grad for p in members.parameters()]

        s.call(backwards)


@program(PROGRAMS, "a head on a detached trunk")
def _(s: Session) -> None:
    trunk, policy, value = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)
    parameters = s.watch([p for m in (trunk, policy, value) for p in m.parameters()])

    def f(x):
        h = trunk(x).relu()
        return policy(h).log_softmax(-1), value(h.detach()), h

    f = s.root(f)
    for turn in range(6):

        def losses(turn=turn):
            for p in parameters:
                p.grad = None
            logits, estimate, h = f(torch.randn(3, 4))
            if turn % 2:
                estimate.pow(2).sum().backward()
                (logits.sum() + h.sum()).backward()
            else:
                logits[:, 0].sum().backward()
                estimate.pow(2).sum().backward()
            return [p.grad for p in parameters]

        s.call(losses)


@program(PROGRAMS, "a backward that nothing frees, twice")
def _(s: Session) -> None:
    p = s.watch(leaf(4))

    def position(x):
        return x + p

    f = s.root(position)
    heads = s.watch([nn.Linear(4, 1), nn.Linear(4, 1)])
    for _ in range(5):

        def both():
            h = f(torch.randn(3, 4))
            for head in heads:
                head(h).sum().backward()
            return p.grad

        s.call(both)


@program(PROGRAMS, "a backward that frees, twice: the error", expect=ANY)
def _(s: Session) -> None:
    w = s.watch(leaf(4, 4))

    def heads(x):
        h = x @ w
        return h.sum(), h * 3

    f = s.root(heads)
    for turn in range(6):

        def both(turn=turn):
            w.grad = None
            a, b = f(torch.randn(3, 4))
            first, then = (a, b.sum()) if turn % 2 else (b.sum(), a)
            first.backward(retain_graph=turn == 4)
            try:
                then.backward()
            except RuntimeError as error:
                return str(error)[:60], w.grad
            return w.grad

        s.call(both)


@program(PROGRAMS, "gradients of one loss and then of another")
def _(s: Session) -> None:
    w, v = s.watch(leaf(4)), s.watch(leaf(4))

    def losses(x):
        return (x * w).sum(), (x * v).exp().sum()

    f = s.root(losses)
    for _ in range(5):

        def grads():
            a, b = f(torch.randn(4))
            (first,) = torch.autograd.grad(a, w)
            (second,) = torch.autograd.grad(b, v)
            return first, second

        s.call(grads)


@program(PROGRAMS, "what only an unused result's backward reads is written")
def _(s: Session) -> None:
    def f(x, w):
        return x + w, x * w

    def shared(x, w):
        h = w.exp()
        return x + h, x * h

    for function in (f, shared):
        g = s.root(function)
        for _ in range(5):

            def first(g=g):
                w, x = leaf(3), torch.rand(3)
                a, _b = g(x, w)
                x.add_(1)
                a.sum().backward()
                return w.grad

            s.call(first)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.policy(h), self.value(h)


@program(PROGRAMS, "hooks on parameters of the head that is not asked")
def _(s: Session) -> None:
    model = s.watch(TwoHeads())
    events = s.watch([])
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: events.append(name) or g.clamp(-0.1, 0.1))
    f = s.root(model)
    for turn in range(8):

        def step(turn=turn):
            events.clear()
            model.zero_grad()
            policy, value = f(torch.randn(5, 4))
            (policy, value, policy.sum() + value)[turn % 3].sum().backward()
            return list(events)

        s.call(step)


class Counted(torch.autograd.Function):
    ran = 0

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        Counted.ran += 1
        return g * 2


@program(PROGRAMS, "what lies behind an input that the loss does not reach")
def _(s: Session) -> None:
    w, u = s.watch(leaf(3)), s.watch(leaf(3))
    optimizer = torch.optim.SGD([w, u], 0.1, weight_decay=0.1)

    def heads(h, e):
        t = h * 2
        return torch.sin(t), torch.cos(t) * e

    f = s.root(heads)
    Counted.ran = 0
    for turn in range(8):

        def step(turn=turn):
            optimizer.zero_grad()
            e = Counted.apply(u)
            a, b = f(w * 1, e)
            (b if turn == 5 else a).sum().backward()
            if turn == 6:
                e.sum().backward()  # its graph was not freed
            optimizer.step()
            return u.grad, Counted.ran

        s.call(step)


@program(PROGRAMS, "hooks on results that the loss does not depend on")
def _(s: Session) -> None:
    w = s.watch(leaf(4, 4))

    def f(x):
        h = x @ w
        return (h * 2).sin(), (h * 3).sin()

    f = s.root(f)
    for _ in range(5):

        def step():
            w.grad = None
            a, b = f(torch.randn(2, 4))
            seen = []
            a.register_hook(lambda g: g * 0.5)
            a.grad_fn.register_prehook(lambda g: seen.append(len(g)))
            b.sum().backward()
            return w.grad, seen, a.grad_fn is b.grad_fn, b.output_nr

        s.call(step)


@program(PROGRAMS, "one head is updated between the two backwards")
def _(s: Session) -> None:
    model = s.watch(TwoHeads())
    optimizer = torch.optim.SGD(model.policy.parameters(), 0.1)
    f = s.root(model)
    for _ in range(6):

        def step():
            model.zero_grad()
            policy, value = f(torch.randn(5, 4))
            policy.square().mean().backward(retain_graph=True)
            optimizer.step()
            value.square().mean().backward()
            return [p.grad for p in model.parameters()]

        s.call(step)


@program(PROGRAMS, "results and inputs are written that this backward does not read")
def _(s: Session) -> None:
    w, v = s.watch(leaf(4, 4)), s.watch(leaf(4))

    def result(x):
        h = (x @ w * 0.1).exp()
        return h, ((h.detach() * 2) * v).sin().sum()

    def given(x):
        return (x * w).sum(), (x.sin() * v).sum()

    def write_result(f):
        h, loss = f(torch.ones(3, 4))
        h.mul_(2)
        loss.backward()

    def write_given(f):
        x = torch.full((4, 4), 0.5)
        a, b = f(x)
        a.backward()
        x.fill_(5.0)
        b.backward()

    for function, use in ((result, write_result), (given, write_given)):
        f = s.root(function)
        for _ in range(5):

            def step(f=f, use=use):
                w.grad = v.grad = None
                use(f)
                return w.grad, v.grad

            s.call(step)


@program(PROGRAMS, "second derivatives where the input is gone")
def _(s: Session) -> None:
    w = s.watch(leaf(300, 300))

    def f(x):
        return x.exp().exp().mean()

    f = s.root(f)
    for _ in range(5):

        def step():
            loss = f(w * 0.5)
            (g,) = torch.autograd.grad(loss, w, create_graph=True)
            w.grad = None
            g.square().sum().backward()
            return w.grad

        s.call(step)


@program(PROGRAMS, "what a written part of a tensor came from is written before the backward")
def _(s: Session) -> None:
    w = s.watch(leaf(3, 2))

    def given(x, y):
        x[:, :2] = y
        return (x[:, :2] * w).sum(), x

    def made(x, y):
        h = x * 1
        h[:, :2] = y
        return (h[:, :2] * w).sum(), h

    def source(y, result):
        y.add_(1)

    def result(y, result):
        result.add_(1)

    for function, change in ((given, source), (given, result), (made, source), (made, result)):
        f = s.root(function)
        for _ in range(5):

            def step(f=f, change=change):
                w.grad = None
                y = torch.ones(3, 2)
                loss, out = f(torch.ones(3, 4), y)
                change(y, out)
                return gradient_or_error(loss, w)

            s.call(step)


def written_inputs(s: Session, *changes) -> None:
    """Calls that write their first argument, which `changes` then write before the backward."""
    w = s.watch(leaf(3, 4))

    def scaled(x, y):
        x.mul_(2)
        return (x * w).sum()

    def sum_only(x, y):  # nothing of x is saved
        x.mul_(2)
        return (x + w).sum()

    def copied(x, y):  # y is saved, not x
        x.copy_(y)
        return (y * w).sum()

    def in_part(x, y):
        x[:, :2] = y[:, :2]
        return (x[:, :2] * w[:, :2]).sum()

    def by_view(x, y):
        x.t().mul_(2)
        return (x[:, 1:] * w[:, 1:]).exp().sum()

    def written_twice(x, y):
        x.relu_()
        loss = (x * w).sum()
        x.add_(1)
        return loss

    for function in (scaled, sum_only, copied, in_part, by_view, written_twice):
        f = s.root(function)
        for change in changes:
            for _ in range(3):

                def step(f=f, change=change):
                    w.grad = None
                    x = torch.ones(3, 4)
                    loss = f(x, torch.full((3, 4), 3.0))
                    change(x)
                    return gradient_or_error(loss, w)

                s.call(step)


@program(PROGRAMS, "inputs that the call writes are written again before the backward")
def _(s: Session) -> None:
    written_inputs(s, lambda x: None, lambda x: x[0].add_(1))


@program(PROGRAMS, "inputs that the call writes are written unseen before the backward")
def _(s: Session) -> None:
    written_inputs(s, lambda x: x.data.add_(1))
