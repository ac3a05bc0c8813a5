"""What every example shares: its command line, and how it reports what it computed.

In: the outputs and the seconds of each step. Out: one `checksum` line that does not change
from run to run, one `time` line, and, with `--save`, the outputs themselves.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch


def parse_arguments(description: str) -> argparse.Namespace:
    """The options that all examples understand."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=20, help="forward passes to run")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 keeps torch's")
    parser.add_argument("--tiny", action="store_true", help="a small model, for quick tests")
    parser.add_argument("--save", metavar="FILE", help="write the outputs of the steps to FILE")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    return arguments


def checksum(outputs: list[torch.Tensor]) -> str:
    """Mean magnitude, spread and a position-dependent sum of all the values."""
    values = torch.cat([output.detach().double().flatten() for output in outputs])
    weights = torch.cos(torch.arange(values.numel(), dtype=torch.float64))
    dot = float(values @ weights / values.norm())
    return f"magnitude {values.abs().mean():.5e} std {values.std():.5e} dot {dot:+.5f}"


def report(
    name: str, outputs: list[torch.Tensor], seconds: list[float], arguments: argparse.Namespace
) -> None:
    """Print the checksum and the time per step; `seconds` has one entry for each step."""
    print(f"checksum {name} {checksum(outputs)}")
    median = statistics.median(seconds)
    print(f"time {name} first {seconds[0] * 1e3:.2f} ms, median {median * 1e3:.3f} ms per step")
    if arguments.save:
        content: dict[str, Any] = {"outputs": outputs, "seconds": seconds}
        torch.save(content, arguments.save)
