"""`torch.autocast` begun and ended in the recorded function."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from harness import ANY, Program, Session, program
from snapshots import Tolerance
from torch import nn

PROGRAMS: list[Program] = []
ROUGH = Tolerance(3e-2, 3e-2)


def model(s: Session) -> nn.Module:
    return s.watch(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6)))


@program(PROGRAMS, "off around a part, as rotary embeddings have it")
def _(s: Session) -> None:
    frequencies = torch.linspace(0, 1, 4)

    def f(x, position):
        with torch.no_grad(), torch.autocast(device_type=x.device.type, enabled=False):
            angle = position.float()[:, None] * frequencies
            factors = torch.cos(angle), torch.sin(angle)
        return x * factors[0].to(x.dtype) + factors[1].to(x.dtype)

    f, x, position = s.root(f), torch.randn(5, 4), torch.arange(5)
    s.warm(f, x, position)
    with torch.autocast("cpu", torch.bfloat16):
        s.warm(f, x, position)
    s.warm(f, x, position)


@program(PROGRAMS, "on around a part, and off inside it", tolerance=ROUGH)
def _(s: Session) -> None:
    w = torch.randn(6, 6)

    def f(x):
        before = x @ w
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = x @ w
            with torch.autocast("cpu", enabled=False):
                off = inside.float() @ w
            again = inside @ w
            kind = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return before, inside, off, again, again.float() @ w, kind

    f, x = s.root(f), torch.randn(5, 6)
    s.warm(f, x)
    with torch.autocast("cpu", torch.bfloat16):
        s.warm(f, x)
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        s.warm(f, x)
    s.warm(f, x)


@program(PROGRAMS, "a training step", tolerance=ROUGH)
def _(s: Session) -> None:
    net = model(s)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step(x):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
            loss = nn.functional.mse_loss(y, x.to(y.dtype))
        loss.backward()
        optimizer.step()
        return loss.detach()

    step, x = s.root(step), torch.randn(5, 6)
    for _ in range(6):
        s.call(step, x)


@program(PROGRAMS, "a forward and its loss, backward outside", tolerance=ROUGH)
def _(s: Session) -> None:
    net = model(s)

    def losses(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
            with torch.autocast("cpu", enabled=False):
                return (y.float() - x).square().mean()

    losses, x = s.root(losses), torch.randn(5, 6)

    def step() -> Any:
        net.zero_grad()
        loss = losses(x)
        loss.backward()
        return loss.detach()

    for _ in range(4):
        s.call(step)
    s.hit(step)


@program(PROGRAMS, "one weight twice, its cast remembered or not", tolerance=ROUGH)
def _(s: Session) -> None:
    layer = s.watch(nn.Linear(6, 6))

    def f(x, caches):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=caches):
            return layer(layer(x)).float().sum()

    f, x = s.root(f), torch.randn(5, 6)

    def step(caches) -> Any:
        layer.zero_grad()
        loss = f(x, caches)
        loss.backward()
        return loss.detach()

    for caches in (True, False):
        for _ in range(4):
            s.call(step, caches)
        s.hit(step, caches)


@program(PROGRAMS, "as a decorator, and in a module's forward", tolerance=ROUGH)
def _(s: Session) -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        @torch.autocast("cpu", dtype=torch.bfloat16)
        def scores(self, x):
            return self.inner(x)

        def forward(self, x):
            return self.scores(x).softmax(-1) + x

    f, x = s.root(s.watch(Block()).requires_grad_(False)), torch.randn(5, 6)
    s.warm(f, x)


@program(PROGRAMS, "left by return, by an error and by a loop's break", tolerance=ROUGH)
def _(s: Session) -> None:
    w = torch.randn(6, 6)

    def f(x, how):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = x @ w
                if how == "return":
                    return y
                if how == "error":
                    raise ValueError("inside")
                if how == "break":
                    break
        return y @ y.T, torch.is_autocast_enabled("cpu")

    f, x = s.root(f), torch.randn(5, 6)
    for how in ("return", "break", ""):
        s.warm(f, x, how)
    for _ in range(3):
        s.call(f, x, "error")
        s.call(lambda: torch.is_autocast_enabled("cpu"))


@program(PROGRAMS, "an error that is caught around it", tolerance=ROUGH)
def _(s: Session) -> None:
    w = torch.randn(6, 6)

    def f(x):
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = x @ w
                raise ValueError("inside")
        except ValueError:
            return y, x @ w

    f, x = s.root(f), torch.randn(5, 6)
    for _ in range(5):
        s.call(f, x)


@program(PROGRAMS, "what Python has to run in the middle", tolerance=ROUGH, expect=ANY)
def _(s: Session) -> None:
    w = torch.randn(6, 6)

    def f(x):
        y = x @ w
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = (y @ w).relu()
            print(y.float().sum().item() > 1e9)
            z = y @ w
        return y, z, z.float() @ w

    f, x = s.root(f), torch.randn(5, 6)
    for _ in range(6):
        s.call(f, x)
    s.call(lambda: torch.is_autocast_enabled("cpu"))


@program(PROGRAMS, "begun here, ended elsewhere", tolerance=ROUGH, expect=ANY)
def _(s: Session) -> None:
    w = torch.randn(6, 6)
    region = torch.autocast("cpu", dtype=torch.bfloat16)

    def begin(x):
        region.__enter__()
        return x @ w

    def end(x):
        y = x @ w
        region.__exit__(None, None, None)
        return y, x @ w

    begin, end, x = s.root(begin), s.root(end), torch.randn(5, 6)
    for _ in range(4):
        s.call(begin, x)
        s.call(end, x)
        s.call(lambda: torch.is_autocast_enabled("cpu"))


@program(PROGRAMS, "by the functions underneath", tolerance=ROUGH, expect=ANY)
def _(s: Session) -> None:
    w = torch.randn(6, 6)

    def f(x):
        torch.set_autocast_enabled("cpu", True)
        try:
            return x @ w
        finally:
            torch.set_autocast_enabled("cpu", False)

    def cleared(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ w
            torch.clear_autocast_cache()
            return y @ w

    f, cleared, x = s.root(f), s.root(cleared), torch.randn(5, 6)
    for _ in range(4):
        s.call(f, x)
        s.call(cleared, x)
        s.call(lambda: torch.is_autocast_enabled("cpu"))


@program(PROGRAMS, "in a stack of contexts, chosen by an argument", tolerance=ROUGH)
def _(s: Session) -> None:
    w = torch.randn(6, 6)

    def f(x, dtype):
        casting = contextlib.nullcontext()
        if dtype is not None:
            casting = torch.amp.autocast("cpu", dtype=dtype)
        with casting:
            return x @ w

    f, x = s.root(f), torch.randn(5, 6)
    for dtype in (None, torch.bfloat16, torch.float16):
        s.warm(f, x, dtype)


@program(PROGRAMS, "a dtype it does not know, which is a warning", expect=ANY)
def _(s: Session) -> None:
    w = torch.randn(6, 6)

    def f(x):
        with torch.autocast("cpu", dtype=torch.float64):
            return x @ w

    f, x = s.root(f), torch.randn(5, 6)
    for _ in range(4):
        s.call(f, x)
