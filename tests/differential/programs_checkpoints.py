"""Programs with torch.utils.checkpoint, whose backward runs a part of the forward again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from snapshots import Tolerance
from torch import nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    set_checkpoint_early_stop,
)

from accel import checkpoints

PROGRAMS: list[Program] = []
LOOSE = Tolerance(1e-4, 1e-5)


class Block(nn.Module):
    def __init__(self, size: int = 6, rate: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)
        self.drop = nn.Dropout(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


def rows(count: int, size: int = 6) -> torch.Tensor:
    return torch.arange(float(count * size)).sin().view(count, size)


def serving(s: Session) -> None:
    checkpoints.install()
    s.finally_(checkpoints.uninstall)


def gradients(module: nn.Module) -> list[Any]:
    found = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


@program(PROGRAMS, "blocks", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    blocks = s.watch(nn.ModuleList([Block() for _ in range(3)]))
    for block in blocks:
        s.root(block)
    x = torch.randn(4, 6)

    def step() -> Any:
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        y.square().sum().backward()
        return y, gradients(blocks)

    for _ in range(8):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "dropout draws its masks again", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block(rate=0.4))
    root = s.root(block)

    def step() -> Any:
        y = checkpoint(root, rows(3), use_reentrant=False)
        drawn = torch.rand(2)
        y.sum().backward()
        return y, drawn, torch.rand(2), gradients(block)

    for _ in range(5):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "dropout whose masks are others the second time", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block(rate=0.4))
    root = s.root(block)

    def step() -> Any:
        y = checkpoint(root, rows(3), use_reentrant=False, preserve_rng_state=False)
        y.sum().backward()
        return y, torch.rand(2), gradients(block)

    for _ in range(6):
        s.call(step)


@program(PROGRAMS, "no random numbers, none preserved", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())
    root = s.root(block)

    def step() -> Any:
        y = checkpoint(root, rows(3), use_reentrant=False, preserve_rng_state=False)
        y.sum().backward()
        return y, torch.rand(2), gradients(block)

    for _ in range(5):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "several results, keywords, no check of determinism")
def _(s: Session) -> None:
    serving(s)
    w = s.watch(torch.randn(3, requires_grad=True))

    def part(x, *, scale, bias=None):
        y = (x * w).sigmoid() * scale
        return {"y": y, "z": (y.exp(), bias), "n": 3}

    root = s.root(part)

    def step() -> Any:
        x = torch.randn(2, 3, requires_grad=True)
        found = checkpoint(
            root, x, scale=2.0, bias="b", use_reentrant=False, determinism_check="none"
        )
        (found["y"].sum() + found["z"][0].square().sum()).backward()
        grad, w.grad = w.grad, None
        return found, x.grad, grad

    for _ in range(5):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "two functions, one after another, and one of them twice")
def _(s: Session) -> None:
    serving(s)

    def first(x):
        return x.sin().exp()

    def second(x):
        return x.cos() * x

    first, second = s.root(first), s.root(second)

    def part(x):
        return first(second(first(x)))

    def step() -> Any:
        x = torch.randn(5, requires_grad=True)
        checkpoint(part, x, use_reentrant=False).sum().backward()
        return x.grad

    for _ in range(8):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "a branch that one of two functions takes")
def _(s: Session) -> None:
    serving(s)

    def up(x):
        return x.exp() * 2

    def down(x):
        return (x * x).tanh()

    up, down = s.root(up), s.root(down)

    def part(x, k):
        x = up(x) if k % 2 else down(x)
        return down(x) if k % 3 else x.sin()

    def step(k) -> Any:
        x = torch.randn(5, requires_grad=True)
        checkpoint(part, x, k, use_reentrant=False).sum().backward()
        return x.grad

    for k in range(12):
        s.call(step, k)
    s.hit(step, 1)


@program(PROGRAMS, "two backwards of one graph")
def _(s: Session) -> None:
    serving(s)

    def part(x):
        return (x.exp() * x).sin()

    root = s.root(part)

    def step() -> Any:
        x = torch.randn(5, requires_grad=True)
        y = checkpoint(root, x, use_reentrant=False)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        return x.grad

    for _ in range(5):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "a third backward of one graph fails", expect=ANY)
def _(s: Session) -> None:
    serving(s)

    def part(x):
        return (x.exp() * x).sin()

    root = s.root(part)

    def step() -> Any:
        x = torch.randn(5, requires_grad=True)
        y = checkpoint(root, x, use_reentrant=False)
        y.sum().backward()
        y.sum().backward()

    for _ in range(6):
        s.call(step)


@program(PROGRAMS, "second derivatives", expect=ANY)
def _(s: Session) -> None:
    serving(s)

    def part(x, y):
        return (x.exp() * y).sin()

    root = s.root(part)

    def step() -> Any:
        x, y = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
        z = checkpoint(root, x.sin(), y * 2, use_reentrant=False)
        (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        g.square().sum().backward()
        return x.grad, y.grad, g.detach()

    for _ in range(6):
        s.call(step)


@program(PROGRAMS, "gradients at some inputs only")
def _(s: Session) -> None:
    serving(s)

    def part(x, y):
        z = x.exp() * y
        return z.sin(), z.cos() * 2

    root = s.root(part)

    def step(which) -> Any:
        x, y = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
        outs = checkpoint(root, x, y, use_reentrant=False)
        return torch.autograd.grad(outs[which].sum(), [y] if which else [x, y])

    for k in range(8):
        s.call(step, k % 2)
    s.hit(step, 0)


@program(PROGRAMS, "an inner result whose gradient is asked for", expect=ANY)
def _(s: Session) -> None:
    serving(s)

    def part(x):
        y = x.exp()
        return y, (y * y).sum()

    root = s.root(part)

    def step() -> Any:
        x = torch.randn(5, requires_grad=True)
        y, total = checkpoint(root, x, use_reentrant=False)
        y.retain_grad()
        total.backward()
        return y.grad, x.grad

    for _ in range(6):
        s.call(step)


@program(PROGRAMS, "checkpoints in a checkpoint", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    blocks = s.watch(nn.ModuleList([Block(rate=0.2) for _ in range(4)]))
    for block in blocks:
        s.root(block)

    def pair(x, k):
        x = checkpoint(blocks[k], x, use_reentrant=False)
        return checkpoint(blocks[k + 1], x.tanh(), use_reentrant=False)

    def step() -> Any:
        y = rows(3)
        for k in (0, 2):
            y = checkpoint(pair, y, k, use_reentrant=False)
        y.square().sum().backward()
        return y, torch.rand(1), gradients(blocks)

    for _ in range(7):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "one kind of checkpoint in the other", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block(rate=0.2))
    root = s.root(block)

    def step(outer, inner) -> Any:
        x = rows(3).requires_grad_()

        def part(x):
            return checkpoint(root, x.sin(), use_reentrant=inner)

        checkpoint(part, x, use_reentrant=outer).square().sum().backward()
        return x.grad, torch.rand(1), gradients(block)

    for outer, inner in [(True, False), (False, True)] * 5:
        s.call(step, outer, inner)
    s.hit(step, True, False)


@program(PROGRAMS, "second runs to their ends", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())
    root = s.root(block)
    ended = s.watch([])

    def part(x):
        y = root(x)
        ended.append(len(ended))
        return y

    def step(early) -> Any:
        with set_checkpoint_early_stop(early):
            y = checkpoint(part, rows(3), use_reentrant=False)
        y.sum().backward()
        return gradients(block)

    for k in range(8):
        s.call(step, bool(k % 2))
    s.hit(step, True)
    s.hit(step, False)


@program(PROGRAMS, "what is counted is counted twice", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)

    class Counting(Block):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    block = s.watch(Counting())
    root = s.root(block)

    def step() -> Any:
        y = checkpoint(root, rows(3), use_reentrant=False)
        y.sum().backward()
        return y, block.calls, gradients(block)

    for _ in range(8):
        s.call(step)


@program(PROGRAMS, "statistics that move twice", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)
    net = s.watch(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU(inplace=True)))
    root = s.root(net)

    def step() -> Any:
        x = torch.randn(4, 2, 5, requires_grad=True)
        checkpoint(root, x, use_reentrant=False).square().sum().backward()
        return x.grad, gradients(net), net[1].running_mean.clone()

    for _ in range(8):
        s.call(step)


@program(PROGRAMS, "a print in between", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.block(x).sin()
            print(float(y.detach().sum()) > 0)
            return self.block(y)

    root = s.root(Loud())

    def step() -> Any:
        checkpoint(root, rows(3), use_reentrant=False).square().sum().backward()
        return gradients(block)

    for _ in range(10):
        s.call(step)


@program(PROGRAMS, "a step as one function", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    blocks = s.watch(nn.ModuleList([Block(rate=0.1) for _ in range(2)]))
    optimizer = torch.optim.SGD(blocks.parameters(), 0.01)

    def step(x) -> Any:
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        loss = y.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = s.root(step)
    for _ in range(8):
        s.call(step, rows(3))
    s.hit(step, rows(3))


@program(PROGRAMS, "a function that only runs backwards", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())
    root = s.root(block)

    def descend(y, scale):
        loss = (y * scale).square().sum()
        loss.backward()
        return loss.detach() * 2

    descend = s.root(descend)

    def step() -> Any:
        y = checkpoint(root, rows(3), use_reentrant=False)
        return descend(y, 0.5), gradients(block)

    for _ in range(8):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "a backward within", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)

    def energy(x):
        return (x.sin() * x).sum()

    root = s.root(energy)

    def part(x):
        inner = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(root(inner), inner)
        return force + root(x)

    def step(early) -> Any:
        x = torch.randn(5, requires_grad=True)
        with set_checkpoint_early_stop(early):
            y = checkpoint(part, x, use_reentrant=False)
        y.sum().backward()
        return x.grad

    for k in range(8):
        s.call(step, k % 2 == 0)


@program(PROGRAMS, "hooks of the program's own inside and outside", expect=ANY)
def _(s: Session) -> None:
    serving(s)

    def part(x):
        return (x.exp() * x).sin()

    root = s.root(part)
    seen = s.watch([])

    def pack(t):
        seen.append(tuple(t.shape))
        return t

    def kept():
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

    def within(x):
        with kept():
            return root(x)

    def step(inside) -> Any:
        x = torch.randn(5, requires_grad=True)
        if inside:
            y = checkpoint(within, x, use_reentrant=False)
        else:
            with kept():
                y = checkpoint(root, x, use_reentrant=False)
        y.sum().backward()
        return x.grad

    for k in range(10):
        s.call(step, bool(k % 2))


@program(PROGRAMS, "segments of a sequence", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    net = s.watch(nn.Sequential(*(Block(rate=0.1) for _ in range(4))))
    for block in net:
        s.root(block)

    def step() -> Any:
        x = rows(3)
        checkpoint_sequential(net, 2, x, use_reentrant=False).square().sum().backward()
        return gradients(net)

    for _ in range(7):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "bfloat16 by autocast", tolerance=Tolerance(5e-2, 5e-2))
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block(16))
    root = s.root(block)

    def step() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(root, rows(3, 16), use_reentrant=False)
        y.float().square().sum().backward()
        return gradients(block)

    for _ in range(6):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "frozen layers, and an input without gradient", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    net = s.watch(nn.Sequential(Block(), Block()))
    net[0].requires_grad_(False)
    root = s.root(net)

    def step() -> Any:
        y = checkpoint(root, rows(3), use_reentrant=False)
        y.square().sum().backward()
        return gradients(net)

    for _ in range(6):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "without gradients", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())
    root = s.root(block)

    def step() -> Any:
        with torch.no_grad():
            return checkpoint(root, rows(3), use_reentrant=False)

    for _ in range(6):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "sizes that change", tolerance=LOOSE)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())
    root = s.root(block)

    def step(n) -> Any:
        checkpoint(root, rows(n), use_reentrant=False).square().sum().backward()
        return gradients(block)

    for n in (3, 3, 3, 3, 5, 5, 5, 5, 3, 5, 3):
        s.call(step, n)
    s.hit(step, 3)


@program(PROGRAMS, "weights written before the backward", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())
    root = s.root(block)

    def step() -> Any:
        y = checkpoint(root, rows(3), use_reentrant=False)
        with torch.no_grad():
            block.up.weight.mul_(0.5)
        y.square().sum().backward()
        return gradients(block)

    for _ in range(8):
        s.call(step)


@program(PROGRAMS, "a block dies before its backward", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)

    def step() -> Any:
        block = s.root(Block())
        x = rows(3).requires_grad_()
        for _ in range(4):
            y = checkpoint(block, x, use_reentrant=False)
            y.square().sum().backward()
        y = checkpoint(block, x, use_reentrant=False)
        del block
        y.square().sum().backward()
        return x.grad

    s.call(step)


@program(PROGRAMS, "an error in the second run", tolerance=LOOSE, expect=ANY)
def _(s: Session) -> None:
    serving(s)
    block = s.watch(Block())
    root = s.root(block)
    fails = [False]

    def part(x):
        y = root(x)
        if fails[0]:
            raise ValueError("the second time")
        return root(y)

    def step() -> Any:
        fails[0] = False
        y = checkpoint(part, rows(3), use_reentrant=False)
        fails[0] = True
        y.square().sum().backward()

    for _ in range(6):
        s.call(step)
