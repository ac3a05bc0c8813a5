"""Random graphs beside eager: views, pointwise, reductions, writes, in random order.

The seed is the test's parameter. `python test_random_graphs.py FIRST COUNT` runs more.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch
from capture_graph import check

Tensors = list[torch.Tensor]


def pick(r: random.Random, pool: Tensors) -> torch.Tensor:
    return pool[r.randrange(len(pool))]


def unary(r: random.Random, pool: Tensors) -> torch.Tensor:
    x = pick(r, pool)
    return r.choice(
        [
            torch.tanh,
            torch.sigmoid,
            torch.neg,
            torch.abs,
            lambda t: t * 0.5 + 1,
            lambda t: t.clamp(-1, 1),
            torch.relu,
            torch.sin,
        ]
    )(x)


def binary(r: random.Random, pool: Tensors) -> torch.Tensor:
    x = pick(r, pool)
    fitting = [t for t in pool if can_broadcast(x, t)]
    y = r.choice(fitting or [x])
    return r.choice(
        [
            torch.add,
            torch.sub,
            torch.mul,
            torch.maximum,
            lambda a, b: torch.where(a > b, a, b * 0.5),
        ]
    )(x, y)


def can_broadcast(x: torch.Tensor, y: torch.Tensor) -> bool:
    try:
        return torch.broadcast_shapes(x.shape, y.shape).numel() <= 4096
    except RuntimeError:
        return False


def view(r: random.Random, pool: Tensors) -> torch.Tensor:
    x = pick(r, pool)
    d = x.dim()
    choices: list[Callable[[], torch.Tensor]] = [
        lambda: x.unsqueeze(r.randrange(d + 1)),
        lambda: x.reshape(-1),
    ]
    if d:
        axis = r.randrange(d)
        n = x.shape[axis]
        choices += [
            lambda: x.transpose(axis, r.randrange(d)),
            lambda: x.permute(r.sample(range(d), d)),
            lambda: x.narrow(axis, n // 3, max(n - n // 3 - n // 4, 1) if n else 0),
            lambda: x.select(axis, n - 1) if n else x,
            lambda: x.flatten(0, axis),
            lambda: x.unsqueeze(0).expand(2, *x.shape),
            lambda: x.squeeze(),
            lambda: x.chunk(2, axis)[-1],
        ]
        if n and n % 2 == 0:
            choices.append(lambda: x.unflatten(axis, (2, n // 2)))
            choices.append(lambda: x.unflatten(axis, (n // 2, 2)))
    y = r.choice(choices)()
    return y if y.numel() <= 4096 and y.dim() <= 5 else x


def reduction(r: random.Random, pool: Tensors) -> torch.Tensor:
    x = pick(r, pool)
    if not x.dim() or not x.numel():
        return x * 2
    axes = r.sample(range(x.dim()), r.randrange(1, x.dim() + 1))
    keep = r.random() < 0.5
    axis = axes[0]
    return r.choice(
        [
            lambda: x.mean(axes, keepdim=keep),
            lambda: x.sum(axes, keepdim=keep),
            lambda: x.amax(axes, keepdim=keep),
            lambda: x.softmax(axis),
            lambda: x - x.mean(axis, keepdim=True),
            lambda: x.log_softmax(axis),
            lambda: torch.nn.functional.layer_norm(x, x.shape[-1:]),
            lambda: (x > 0.3).any(axis).float(),
            lambda: x / (x.abs().amax(axis, keepdim=True) + 1),
        ]
    )()


def assemble(r: random.Random, pool: Tensors) -> torch.Tensor:
    x = pick(r, pool)
    if not x.dim():
        return torch.stack([x, x * 2])
    axis = r.randrange(x.dim())
    same = [t for t in pool if t.shape == x.shape]
    y = r.choice(same or [x])
    out = r.choice(
        [
            lambda: torch.cat([x, y * 2], axis),
            lambda: torch.stack([y, x], axis),
            lambda: torch.nn.functional.pad(x, (1, 2), value=0.5),
            lambda: x.contiguous().clone(),
        ]
    )()
    return out if out.numel() <= 4096 and out.dim() <= 5 else x


def write(r: random.Random, pool: Tensors) -> torch.Tensor:
    x = pick(r, pool)
    if x.dim() and x.numel() and 0 not in x.stride():
        n = x.shape[0]
        r.choice(
            [
                lambda: x.mul_(0.5),
                lambda: x[n // 2 :].add_(0.25),
                lambda: x[0].fill_(0.125),
                lambda: x[: n // 2].copy_(x[n - n // 2 :].clone()),
            ]
        )()
    return x


def product(r: random.Random, pool: Tensors) -> torch.Tensor:
    for _ in range(8):
        x, y = pick(r, pool), pick(r, pool)
        if x.dim() == 2 and y.dim() == 2:
            if x.shape[1] == y.shape[0]:
                return x @ y * 0.1
            if x.shape == y.shape:
                return x @ y.t() * 0.1
    return unary(r, pool)


STEPS = [unary] * 4 + [binary] * 5 + [view] * 5 + [reduction] * 3 + [assemble, write, product]


def random_function(seed: int) -> Callable[..., Tensors]:
    def function(*inputs: torch.Tensor) -> Tensors:
        r = random.Random(seed)
        pool = list(inputs)
        for _ in range(r.randrange(3, 25)):
            pool.append(r.choice(STEPS)(r, pool))
        made = [t for t in pool[len(inputs) :] if not any(t is x for x in inputs)]
        distinct = list({id(t): t for t in made}.values())
        return r.sample(distinct, min(len(distinct), r.randrange(1, 4))) or [inputs[0]]

    return function


def run(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [r.choice([1, 2, 3, 4, 7, 8, 16, 17, 33]) for _ in range(r.randrange(1, 4))]
    inputs = [torch.randn(sizes), torch.randn(sizes[-1:]), torch.randn([1, *sizes[1:]])]
    if r.random() < 0.3 and len(sizes) == 2:
        inputs[0] = torch.randn(sizes[::-1]).t()
    check(random_function(seed), *inputs, rtol=2e-4, atol=2e-5, native=r.random() < 0.5)


@pytest.mark.parametrize("seed", range(60))
def test_random_graph(seed: int) -> None:
    run(seed)


if __name__ == "__main__":
    first, count = int(sys.argv[1]), int(sys.argv[2])
    failed = 0
    for seed in range(first, first + count):
        try:
            run(seed)
        except Exception as error:  # the harness reports and goes on
            failed += 1
            print(seed, type(error).__name__, str(error)[:600])
    print("failed", failed)
