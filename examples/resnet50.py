"""ResNet-50 written with nothing but torch.nn, in evaluation mode."""

from __future__ import annotations

import time

import torch
from reporting import parse_arguments, report
from torch import nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut."""

    EXPANSION = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        channels_out = width * self.EXPANSION
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """The stem, stages of bottlenecks, and a linear head."""

    def __init__(self, blocks: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        stages: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            stage_width = width * 2**stage
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Bottleneck(channels, stage_width, stride))
                channels = stage_width * Bottleneck.EXPANSION
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.stem(x))
        return self.head(torch.flatten(self.pool(x), 1))


def randomize_statistics(model: nn.Module) -> None:
    """Give the batch norms statistics that differ from channel to channel, as training would."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.tiny:
        model, size = ResNet((1, 1), width=8, classes=10), 32
    else:
        model, size = ResNet((3, 4, 6, 3), width=64, classes=1000), 224
    randomize_statistics(model)
    model.eval()
    images = torch.rand(2, 1, 3, size, size)

    outputs: dict[int, torch.Tensor] = {}
    seconds = []
    with torch.no_grad():
        for step in range(arguments.steps):
            index = step % len(images)
            start = time.perf_counter()
            logits = model(images[index])
            seconds.append(time.perf_counter() - start)
            outputs[index] = logits
    report("resnet50", [outputs[index] for index in sorted(outputs)], seconds, arguments)


if __name__ == "__main__":
    main()
