"""Rows measured in one process: what one call costs under eager, torch.compile and accel.

A row is a factory that makes a fresh callable without arguments from a fixed seed, called once
for each competitor, so that none of them shares functions or modules with another.
"""

from __future__ import annotations

import functools
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))


@dataclass(frozen=True)
class Subject:
    """`target` is what gets compiled (a function or module); `args` and `kwargs` its input."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    def bind(self, target: Any) -> Callable[[], Any]:
        return functools.partial(target, *self.args, **(self.kwargs or {}))


@dataclass(frozen=True)
class CallRow:
    """One row of the table, with the ratio that it has to reach."""

    name: str
    title: str
    make: Callable[[], Subject]
    rounds: int
    target: str
    target_us: float | None = None  # at most so many microseconds a call
    over_eager: float | None = None  # at least so many times faster than eager
    over_compile: float | None = None  # at least so many times faster than torch.compile
    baseline: str | None = None  # subtract this row's time: what remains is overhead
    of_baseline: float | None = None  # or: at least so much of its speed, raced in one process


def tiny() -> Subject:
    def three_pointwise(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * y + 1.0)

    return Subject(three_pointwise, (torch.randn(8, 16), torch.randn(8, 16)))


class Shapes(nn.Module):
    """100 Linear layers of which only the parameters' shapes are used."""

    def __init__(self, count: int = 100) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = 0
        for layer in self.layers:
            total += layer.weight.shape[0] + layer.bias.shape[0]
        return x + total


class NoShapes(nn.Module):
    """What `Shapes` computes, with nothing to guard."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 800


def dispatch() -> Subject:
    return Subject(Shapes().eval(), (torch.randn(4),))


def dispatch_nothing() -> Subject:
    return Subject(NoShapes().eval(), (torch.randn(4),))


def mlp50() -> Subject:
    layers: list[nn.Module] = []
    for _ in range(50):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    return Subject(nn.Sequential(*layers).eval(), (torch.randn(8, 16),))


def softmax() -> Subject:
    def softmax_rows(x: torch.Tensor) -> torch.Tensor:
        return F.softmax(x, dim=-1)

    return Subject(softmax_rows, (torch.randn(64, 1024),))


def layernorm() -> Subject:
    def normalize(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (1024,), weight, bias)

    return Subject(normalize, (torch.randn(64, 1024), torch.randn(1024), torch.randn(1024)))


def gelu_mul_add() -> Subject:
    def gelu_chain(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return F.gelu(x) * y + z

    return Subject(gelu_chain, tuple(torch.randn(64, 1024) for _ in range(3)))


def one_exit() -> Subject:
    def interrupted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.relu(x * y + 1.0)
        zlib.crc32(b"only Python can call this")
        return torch.relu(z * y - 1.0)

    return Subject(interrupted, (torch.randn(8, 16), torch.randn(8, 16)))


def no_exit() -> Subject:
    def whole(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.relu(x * y + 1.0)
        return torch.relu(z * y - 1.0)

    return Subject(whole, (torch.randn(8, 16), torch.randn(8, 16)))


def _mlp(width: int) -> nn.Module:
    layers = [part for _ in range(3) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers).eval()


def printing_loop(width: int = 64) -> Subject:
    model, sink = _mlp(width), open(os.devnull, "w")

    def loop(x: torch.Tensor) -> torch.Tensor:
        for i in range(100):
            x = model(x) + x
            x = x / x.abs().max()
            print(i, file=sink)
        return x

    return Subject(loop, (torch.randn(32, width),))


def telling_loop(width: int = 64) -> Subject:
    """What it prints is a tensor's value: every round ends compiled code."""
    model, sink = _mlp(width), open(os.devnull, "w")

    def loop(x: torch.Tensor) -> torch.Tensor:
        for i in range(100):
            x = model(x) + x
            x = x / x.abs().max()
            print(i, x.sum().item(), file=sink)
        return x

    return Subject(loop, (torch.randn(32, width),))


def silent_loop(width: int = 64) -> Subject:
    model = _mlp(width)

    def loop(x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            x = model(x) + x
            x = x / x.abs().max()
        return x

    return Subject(loop, (torch.randn(32, width),))


def bert() -> Subject:
    from transformers import BertConfig, BertModel

    mask = torch.ones(1, 128, dtype=torch.int64)
    mask[:, 100:] = 0
    tokens = torch.randint(0, 30000, (1, 128))
    return Subject(BertModel(BertConfig()).eval(), (tokens,), {"attention_mask": mask})


def gpt2() -> Subject:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Subject(GPT2LMHeadModel(GPT2Config()).eval(), (torch.randint(0, 50000, (1, 64)),))


def vit() -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig()).eval()
    return Subject(model, (), {"pixel_values": torch.rand(1, 3, 224, 224)})


def resnet50() -> Subject:
    from resnet50 import ResNet, randomize_statistics

    model = ResNet((3, 4, 6, 3), width=64, classes=1000).eval()
    randomize_statistics(model)
    return Subject(model, (torch.rand(1, 3, 224, 224),))


CALL_ROWS = [
    CallRow("tiny", "three pointwise ops on 8x16", tiny, 60, "2.5 us; 5x torch.compile",
            target_us=2.5, over_compile=5.0),
    CallRow("dispatch", "200 guarded parameters, guards and wrapper only", dispatch, 60,
            "6 us over the row below", target_us=6.0, baseline="dispatch-nothing"),
    CallRow("dispatch-nothing", "the same result with nothing to guard", dispatch_nothing, 60,
            "(baseline)"),
    CallRow("exit", "two pointwise kernels and an opaque call between them", one_exit, 60,
            "5 us over the row below", target_us=5.0, baseline="exit-nothing"),
    CallRow("exit-nothing", "the same result without the call", no_exit, 60, "(baseline)"),
    CallRow("loop-print", "100 rounds of a small MLP, a print in each", printing_loop, 30,
            "0.8x the speed of the row below", of_baseline=0.8, baseline="loop-nothing"),
    CallRow("loop-value", "the loop with a print of a tensor's value", telling_loop, 30,
            "(no number asked)", baseline="loop-nothing"),
    CallRow("loop-nothing", "the same loop without the print", silent_loop, 30, "(baseline)"),
    CallRow("loop-print-128", "the loop with a print, layers of 128",
            functools.partial(printing_loop, 128), 20, "0.8x the speed of the row below",
            of_baseline=0.8, baseline="loop-nothing-128"),
    CallRow("loop-nothing-128", "the same loop without the print",
            functools.partial(silent_loop, 128), 20, "(baseline)"),
    CallRow("loop-print-256", "the loop with a print, layers of 256",
            functools.partial(printing_loop, 256), 15, "0.8x the speed of the row below",
            of_baseline=0.8, baseline="loop-nothing-256"),
    CallRow("loop-nothing-256", "the same loop without the print",
            functools.partial(silent_loop, 256), 15, "(baseline)"),
    CallRow("mlp50", "50 x (Linear 16x16, ReLU), batch 8", mlp50, 60, "3x torch.compile",
            over_compile=3.0),
    CallRow("softmax", "softmax on 64x1024", softmax, 60, "1.5x torch.compile", over_compile=1.5),
    CallRow("layernorm", "layernorm on 64x1024", layernorm, 60, "1.5x torch.compile",
            over_compile=1.5),
    CallRow("gelu", "gelu(x) * y + z on 64x1024", gelu_mul_add, 60, "1.5x torch.compile",
            over_compile=1.5),
    CallRow("bert", "BERT-base, 1x128, padding mask", bert, 15, "not slower than eager",
            over_eager=1.0),
    CallRow("gpt2", "GPT-2 prefill, 1x64, cache", gpt2, 15, "not slower than eager",
            over_eager=1.0),
    CallRow("vit", "ViT-base, one image", vit, 15, "not slower than eager", over_eager=1.0),
    CallRow("resnet50", "ResNet-50, one image", resnet50, 15, "not slower than eager",
            over_eager=1.0),
]  # fmt: skip
