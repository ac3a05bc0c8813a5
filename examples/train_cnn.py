"""A convolution net with BatchNorm that tells shapes apart: SGD with momentum, step schedule."""

from __future__ import annotations

import time

import torch
from reporting import parse_arguments, report
from torch import nn


def shapes(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures (count, 1, size, size) of rings, crosses and stripes, and which is which."""
    kind = torch.randint(0, 3, (count,))
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x * x + y * y).sqrt()
    pictures = torch.stack(
        [
            ((radius - 0.6).abs() < 0.2).float(),
            (torch.minimum(x.abs(), y.abs()) < 0.2).float(),
            ((x * 6).sin() > 0).float(),
        ]
    )
    return pictures[kind][:, None] + 0.3 * torch.randn(count, 1, size, size), kind


class Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.short = nn.Conv2d(before, after, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.path(x) + self.short(x))


def main() -> None:
    arguments = parse_arguments(__doc__)
    size, width = (12, 8) if arguments.tiny else (32, 32)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width),
        Residual(width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 3),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(arguments.steps // 3, 1), 0.3)
    pictures, kinds = shapes(256, size)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)

    losses, seconds = [], []
    for _ in range(arguments.steps):
        batch = torch.randint(0, len(pictures), (16,))
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = criterion(model(pictures[batch]), kinds[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.detach())
    state = [value.detach().float() for value in model.state_dict().values()]
    report("train_cnn", [torch.stack(losses), *state], seconds, arguments)


if __name__ == "__main__":
    main()
