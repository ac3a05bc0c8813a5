"""A vision transformer (ViT-base) classifying images."""

from __future__ import annotations

import time

import torch
from reporting import parse_arguments, report
from transformers import ViTConfig, ViTForImageClassification


def main() -> None:
    arguments = parse_arguments(__doc__)
    config = ViTConfig(num_labels=100)
    if arguments.tiny:
        config = ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
    model = ViTForImageClassification(config).eval()
    images = torch.rand(2, 1, config.num_channels, config.image_size, config.image_size)

    outputs: dict[int, torch.Tensor] = {}
    seconds = []
    with torch.no_grad():
        for step in range(arguments.steps):
            index = step % len(images)
            start = time.perf_counter()
            result = model(pixel_values=images[index] * 2 - 1)
            seconds.append(time.perf_counter() - start)
            outputs[index] = result.logits
    report("vit", [outputs[index] for index in sorted(outputs)], seconds, arguments)


if __name__ == "__main__":
    main()
