"""Measures one training row in this process and prints its JSON.

Run by `bench.py`; can be run alone: `python benchmarks/run_training.py step-mlp --threads 1`.
Competitors train copies of one model on the same data, each with its own optimizer; a call is one
step. A row's ratios are each other competitor's seconds over accel's, paired by round.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import Competitor, bootstrap, race, ratio
from run_call import accel_present
from torch import nn

SEED = 0
SETTLING_CALLS = 17
LOSS_TOLERANCE = 1e-3  # relative, after the steps that bring compiled code in
DRAWN_TOLERANCE = 0.25  # of the mean of losses whose masks differ between competitors

Step = Callable[[], Any]


Made = tuple[Any, Callable[[Any], Any]]


@dataclass(frozen=True)
class TrainingRow:
    """`make(fused)` gives a model and a step, which takes the model as it is to be called. `draws`:
    each competitor drops by random numbers of its own, accel by `fast_dropout`."""

    name: str
    make: Callable[[bool], Made]
    rounds: int
    competitors: tuple[str, ...]
    draws: bool = False


def _training(model: nn.Module, loss_of: Callable[[Any], torch.Tensor], fused: bool) -> Made:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True if fused else None)

    def step(model: Any) -> torch.Tensor:
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def _mlp(fused: bool) -> Made:
    layers = [part for _ in range(10) for part in (nn.Linear(256, 256), nn.ReLU())]
    x, y = torch.randn(64, 256), torch.randn(64, 256)
    return _training(nn.Sequential(*layers), lambda model: F.mse_loss(model(x), y), fused)


def _bert(dropout: float, fused: bool) -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=4, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    model = BertForSequenceClassification(config).train()
    tokens, labels = torch.randint(0, 30000, (4, 64)), torch.randint(0, 2, (4,))
    return _training(model, lambda model: model(tokens, labels=labels).loss, fused)


def _adamw(fused: bool) -> Made:
    parameters = [nn.Parameter(torch.randn(64, 64)) for _ in range(200)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(parameters, fused=True if fused else None)

    def step(_model: Any) -> torch.Tensor:
        optimizer.step()
        return parameters[0].detach()

    return None, step


def _tiny(backward: bool, fused: bool) -> Made:
    x = torch.randn(8, 16, requires_grad=True)
    y, gradient = torch.randn(8, 16), torch.randn(8, 16)

    def three_pointwise(x: Any, y: Any) -> Any:
        return torch.relu(x * y + 1.0)

    def step(function: Any) -> torch.Tensor:
        out = function(x, y)
        if backward:
            x.grad = None
            out.backward(gradient)
        return out.detach()

    return three_pointwise, step


ALL = ("eager", "eager fused", "compiled model", "compiled model fused", "compiled step", "accel")
TRAINING_ROWS = {
    row.name: row
    for row in (
        TrainingRow("tiny-forward", functools.partial(_tiny, False), 40,
                    ("eager", "compiled model", "accel")),
        TrainingRow("tiny-backward", functools.partial(_tiny, True), 40,
                    ("eager", "compiled model", "accel")),
        TrainingRow("step-mlp", _mlp, 30, ALL),
        TrainingRow("step-bert", functools.partial(_bert, 0.0), 9, ALL),
        TrainingRow("step-bert-dropout", functools.partial(_bert, 0.1), 9,
                    ("eager", "eager fused", "compiled model fused", "accel"), draws=True),
        TrainingRow("adamw", _adamw, 30, ("eager", "eager fused", "accel")),
    )
}  # fmt: skip


def competitor(row: TrainingRow, name: str) -> tuple[Competitor, list[float]]:
    """A competitor that has settled, and the losses of the steps that settle it."""
    torch.manual_seed(SEED)
    model, step = row.make(name.endswith("fused"))
    call: Step = functools.partial(step, model)
    if name.startswith("compiled model"):
        call = functools.partial(step, torch.compile(model))
    elif name == "compiled step":
        call = functools.partial(torch.compile(step), model)
    elif name == "accel":
        return _accel(row, model, step)
    losses = [float(call().sum()) for _ in range(SETTLING_CALLS)]
    return Competitor(name, call), losses


def _accel(
    row: TrainingRow, model: Any, step: Callable[[Any], Any]
) -> tuple[Competitor, list[float]]:
    import accel
    from accel import driver

    # A function is the root where that is what a user would hand over: here the whole step, or the
    # function that the row is about.
    if row.name.startswith("tiny"):
        call = functools.partial(step, accel.optimize(model))
    else:
        call = functools.partial(accel.optimize(step), model)
    losses = []
    for _ in range(SETTLING_CALLS):
        losses.append(float(call().sum()))
        accel.wait(120)
    driver.current.unpatch()
    return Competitor("accel", call, accel_present), losses


def _agree(expected: list[float], losses: list[float], draws: bool) -> bool:
    if draws:
        return abs(statistics.mean(expected) - statistics.mean(losses)) <= DRAWN_TOLERANCE
    return all(
        abs(a - b) <= LOSS_TOLERANCE * max(1.0, abs(a))
        for a, b in zip(expected, losses, strict=True)
    )


def measure(row: TrainingRow, rounds: int, names: list[str]) -> dict[str, Any]:
    competitors, losses = [], {}
    for name in names:
        found, losses[name] = competitor(row, name)
        competitors.append(found)
    race(competitors, rounds)
    seconds = {c.name: c.seconds for c in competitors}
    first = losses[names[0]]
    record: dict[str, Any] = {
        "s": {n: bootstrap(v).to_json() for n, v in seconds.items()},
        "agrees": {n: _agree(first, v, row.draws) for n, v in losses.items()},
        "rounds": rounds,
    }
    if "accel" in seconds:
        import accel

        record["ratio"] = {
            n: ratio(v, seconds["accel"]).to_json() for n, v in seconds.items() if n != "accel"
        }
        record["counters"] = {
            k: v
            for k, v in accel.counters().items()
            if k.startswith(("ops_", "backwards", "optim"))
        }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=list(TRAINING_ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--competitors", nargs="+", choices=ALL)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row = TRAINING_ROWS[arguments.row]
    if row.draws:
        os.environ["ACCEL_FAST_DROPOUT"] = "1"
    names = arguments.competitors or list(row.competitors)
    json.dump(measure(row, arguments.rounds or row.rounds, names), sys.stdout)
    print()


if __name__ == "__main__":
    main()
