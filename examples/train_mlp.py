"""An MLP classifier on two interleaved spirals: cross-entropy, AdamW, a cosine schedule."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from reporting import parse_arguments, report
from torch import nn


def spirals(count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (count, 2) of two arms, and the arm of each."""
    arm = torch.randint(0, 2, (count,))
    angle = torch.rand(count) * 3 * math.pi + 0.5
    turned = angle + math.pi * arm
    points = torch.stack([turned.cos(), turned.sin()], 1) * angle[:, None] / 5
    return points + noise * torch.randn(count, 2), arm


def main() -> None:
    arguments = parse_arguments(__doc__)
    width, depth = (32, 3) if arguments.tiny else (256, 10)
    layers: list[nn.Module] = [nn.Linear(2, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    points, arms = spirals(1024, 0.05)

    losses, seconds = [], []
    for _ in range(arguments.steps):
        batch = torch.randint(0, len(points), (64,))
        start = time.perf_counter()
        loss = F.cross_entropy(model(points[batch]), arms[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.detach())
    weights = [p.detach() for p in model.parameters()]
    report("train_mlp", [torch.stack(losses), *weights], seconds, arguments)


if __name__ == "__main__":
    main()
