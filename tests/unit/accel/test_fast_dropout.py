"""The setting `fast_dropout`: masks of compiled code's own, in the backward as in the forward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import accel
from accel import driver


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    accel.reset()
    torch.manual_seed(0)
    accel.optimize(lambda x: x)  # starts the driver
    assert driver.current is not None
    monkeypatch.setitem(driver.current.service._options, "fast_dropout", True)
    yield
    accel.reset()


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """`function`, which compiled code serves when called with `args`."""
    root = accel.optimize(function)
    for _ in range(3):
        root(*args)
        assert accel.wait()
    before = accel.counters()["calls_compiled"]
    root(*args)
    assert accel.counters()["calls_compiled"] == before + 1
    return root


def leaf(*sizes: int) -> torch.Tensor:
    return (torch.rand(*sizes) + 1).requires_grad_()


def test_gradients_are_of_the_masks_that_were_drawn() -> None:
    x = leaf(64, 33)
    root = compiled(lambda x: F.dropout(x * 3, 0.25), x)
    served = accel.counters()["calls_compiled"]
    for _ in range(3):
        y = root(x)
        ones = y != 0
        assert 0.65 < ones.float().mean() < 0.85
        torch.testing.assert_close(y.detach()[ones], (x.detach() * 3 / 0.75)[ones])
        arriving = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, arriving)
        torch.testing.assert_close(gradient, arriving * 3 / 0.75 * ones)
    assert accel.counters()["calls_compiled"] == served + 3


def test_the_seed_decides_and_calls_differ() -> None:
    x = leaf(300)
    root = compiled(lambda x: F.dropout(x * 3), x)
    torch.manual_seed(5)
    first, second = root(x), root(x)
    torch.manual_seed(5)
    assert torch.equal(root(x), first)
    assert torch.equal(root(x), second)
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(root(x), first)


def test_threads_draw_the_same() -> None:
    x = leaf(512, 999)
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            accel.reset()
            root = compiled(lambda x: F.dropout(x.exp(), 0.1), x)
            torch.manual_seed(5)
            found.append(root(x))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0] == 0, found[1] == 0)


def test_second_derivatives_are_of_the_same_masks() -> None:
    x = leaf(50)
    root = compiled(lambda x: F.dropout(x, 0.5) ** 3, x)
    y = root(x)
    ones = (y != 0).float()
    torch.rand(7)  # the program draws on
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * x**2 * 8 * ones)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x * 8 * ones)


def test_what_is_drawn_after_a_mask_that_nobody_reads() -> None:
    x = leaf(8)

    def function(x: torch.Tensor) -> torch.Tensor:
        F.dropout(x * 2, 0.5)
        return torch.rand_like(x) * x * x

    y = compiled(function, x)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(gradient * x, 2 * y)


def test_a_checkpoint_with_a_mask_that_nobody_reads() -> None:
    x = leaf(50)

    def part(x: torch.Tensor) -> torch.Tensor:
        F.dropout(x * 2, 0.5)
        return torch.rand_like(x) * x * x

    part = accel.optimize(part)
    for _ in range(4):
        part(x).sum().backward()
        with torch.no_grad():
            part(x)
        assert accel.wait()
    x.grad = None
    y = checkpoint(part, x, use_reentrant=True)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), 2 * y.detach())


def test_the_gradient_at_an_inner_result_is_of_the_same_masks() -> None:
    x = leaf(50)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.dropout(x * 2)
        return y, (y * y).sum()

    y, total = compiled(both, x)(x)
    (gradient,) = torch.autograd.grad(total, y)
    torch.testing.assert_close(gradient, 2 * y)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("warm", [0, 5])
def test_checkpoints_draw_their_masks_again(reentrant: bool, warm: int) -> None:
    """Whichever of the two runs is compiled, both have the same masks."""
    x = leaf(400)
    part = accel.optimize(lambda x: F.dropout(x * 2, 0.5))
    for _ in range(warm):
        part(x).sum().backward()
        with torch.no_grad():
            part(x)
        assert accel.wait()
    for _ in range(4):
        x.grad = None
        y = checkpoint(part, x, use_reentrant=reentrant)
        y.sum().backward()
        torch.testing.assert_close(x.grad, 4 * (y != 0).float())
        assert accel.wait()
        assert torch.equal(y != 0, x.grad != 0)


def test_without_gradients_the_numbers_are_eager_s() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x * 2, 0.5)

    x = torch.rand(400) + 1
    torch.manual_seed(5)
    want = F.dropout(x * 2, 0.5)
    root = compiled(f, x)
    torch.manual_seed(5)
    assert torch.equal(root(x), want)


def test_a_transformer_learns() -> None:
    """What its layers drop differs from eager's, what it learns does not."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
    x = torch.randn(8, 5, 16)

    def step(x: torch.Tensor) -> torch.Tensor:
        return ((layer(x) - x.flip(-1)) ** 2).mean()

    step = accel.optimize(step)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for k in range(120):
        optimizer.zero_grad()
        loss = step(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if k < 4:
            assert accel.wait()
    assert accel.counters()["calls_compiled"] > 100
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


SCRIPT = """
import torch, torch.nn.functional as F
torch.manual_seed(0)
x = torch.ones(1000, requires_grad=True)
def f(x):
    return F.dropout(x * 2, 0.5)
for k in range(6):
    torch.manual_seed(k)
    y = f(x)
    y.sum().backward()
    torch.manual_seed(k)
    print(torch.equal(y, F.dropout(x * 2, 0.5)))
"""


def test_the_flag_of_a_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    lines = {}
    for flag in ("--fast-dropout", "--no-fast-dropout"):
        command = [sys.executable, "-m", "accel", "run", "--sync", "--quiet", flag, str(script)]
        lines[flag] = subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.split()
    assert lines["--no-fast-dropout"] == ["True"] * 6
    assert lines["--fast-dropout"][0] == "True"  # eager
    assert lines["--fast-dropout"][-1] == "False"
