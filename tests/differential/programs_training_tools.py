"""What stands around a training step: scalers, clipping, optimizers of the user's own; and weights that are
changed by any route."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from harness import ANY, Program, Session, program
from torch import nn

PROGRAMS: list[Program] = []


def small_model(s: Session) -> nn.Module:
    return s.watch(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))


@program(PROGRAMS, "gradient scaler, with steps that it skips", expect=ANY, runs=5)
def _(s: Session) -> None:
    model = small_model(s)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = s.watch(torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))
    root = s.root(model)

    def step(x, y):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(root(x).float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), norm, scaler.get_scale()

    for k in range(9):
        x = torch.randn(5, 4)
        if k == 6:
            x[0, 0] = float("inf")
        s.call(step, x, torch.randn(5, 2))


@program(PROGRAMS, "clipping by value and by norm in a whole step", expect=ANY, runs=3)
def _(s: Session) -> None:
    model = small_model(s)
    optimizer = torch.optim.RMSprop(model.parameters(), 0.01, momentum=0.5)

    def step(x, y, by_value):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        if by_value:
            nn.utils.clip_grad_value_(model.parameters(), 0.01)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not by_value)
        return loss.detach()

    step = s.root(step)
    for k in range(12):
        s.call(step, torch.randn(5, 4), torch.randn(5, 2), k % 3 == 0)


class Factored(torch.optim.Optimizer):
    """As Adafactor: second moments by rows and columns, a step that its own norm limits."""

    def __init__(self, params, lr=0.05, decay=-0.8, limit=1.0):
        super().__init__(params, {"lr": lr, "decay": decay, "limit": limit})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    if p.dim() > 1:
                        state["rows"] = torch.zeros(p.shape[:-1])
                        state["columns"] = torch.zeros(p.shape[:-2] + p.shape[-1:])
                    else:
                        state["square"] = torch.zeros_like(p)
                state["step"] += 1
                beta = 1.0 - state["step"] ** group["decay"]
                square = p.grad.square() + 1e-30
                if p.dim() > 1:
                    rows, columns = state["rows"], state["columns"]
                    rows.mul_(beta).add_(square.mean(-1), alpha=1 - beta)
                    columns.mul_(beta).add_(square.mean(-2), alpha=1 - beta)
                    factor = (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)
                    update = p.grad * factor * columns.rsqrt().unsqueeze(-2)
                else:
                    state["square"].mul_(beta).add_(square, alpha=1 - beta)
                    update = p.grad * state["square"].rsqrt()
                rms = update.norm(2) / update.numel() ** 0.5
                update.div_((rms / group["limit"]).clamp_(min=1.0))
                p.add_(update, alpha=-group["lr"])


def train(s: Session, model: nn.Module, optimizer, after_step=lambda: None) -> None:
    root = s.root(model)

    def step(x, y):
        optimizer.zero_grad()
        loss = F.mse_loss(root(x), y)
        loss.backward()
        optimizer.step()
        after_step()
        return loss.detach()

    for _ in range(8):
        s.call(step, torch.randn(5, 4), torch.randn(5, 2))


@program(PROGRAMS, "an optimizer of the user's own, as Adafactor", expect=ANY, runs=3)
def _(s: Session) -> None:
    model = small_model(s)
    train(s, model, Factored(model.parameters()))


@program(PROGRAMS, "torch's Adafactor and a scheduler", expect=ANY, runs=3)
def _(s: Session) -> None:
    model = small_model(s)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.05)
    train(s, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5).step)


def by_data(w):
    w.data.add_(1)


def by_new_data(w):
    w.data = w.data * 2


def by_numpy(w):
    w.detach().numpy()[0] = 7


def by_dlpack(w):
    torch.from_dlpack(w.detach()).mul_(3)


def by_storage(w):
    w.untyped_storage()[0] = 1


def by_pointer(w):
    ctypes.memset(w.data_ptr(), 0, 8)


def by_fused_optimizer(w):
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], 0.1, fused=True).step()
    w.grad = None


def by_no_grad(w):
    with torch.no_grad():
        w.copy_(w.flip(0))


def by_other_storage(w):
    w.data.set_(torch.randn_like(w.data))


ROUTES = (
    by_data,
    by_new_data,
    by_numpy,
    by_dlpack,
    by_storage,
    by_pointer,
    by_fused_optimizer,
    by_no_grad,
    by_other_storage,
)


@program(
    PROGRAMS,
    "weights of products and convolutions that are written by any route",
    expect=ANY,
    runs=40,
)
def _(s: Session) -> None:
    models = (
        (nn.Linear(64, 48), (32, 64)),
        (nn.Linear(96, 8), (3, 96)),
        (nn.Linear(64, 64).bfloat16(), (5, 64)),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 9, 9)),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval(), (1, 4, 8, 8)),
    )
    for model, size in models:
        root = s.root(model)
        weight = next(model.parameters())
        x = torch.randn(size).to(weight.dtype)

        def call(root=root, x=x):
            with torch.no_grad():
                return root(x)

        for _ in range(3):
            s.call(call)
        for route in ROUTES:
            if weight.dtype is torch.bfloat16 and route is by_numpy:
                continue
            route(weight)
            s.call(call)
            s.call(call)
