"""torch.utils.checkpoint(use_reentrant=False): both runs of its function are served alike."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import accel
from accel import checkpoints, driver, runtime

EXPANSION = 8


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(size, EXPANSION * size)
        self.down = nn.Linear(EXPANSION * size, size)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x))) * self.scale


def plain(block: Block, x: torch.Tensor) -> Any:
    """What eager gives: the result and the gradient of the first weight."""
    with accel.set_stance("force_eager"):
        y = block(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), block.up.weight)
    return y.detach(), gradient


def warm(block: Any, x: torch.Tensor, calls: int = 6) -> None:
    for _ in range(calls):
        checkpoint(block, x, use_reentrant=False).square().sum().backward()
        assert accel.wait()


def served() -> int:
    return int(accel.counters()["calls_compiled"])


def descend(block: Any, x: torch.Tensor, between: Callable[[], Any] = lambda: None) -> Any:
    block.up.weight.grad = None
    y = checkpoint(block, x, use_reentrant=False)
    between()
    y.square().sum().backward()
    return y.detach(), block.up.weight.grad


@pytest.fixture(autouse=True)
def _serving() -> Iterator[None]:
    checkpoints.install()
    yield
    checkpoints.uninstall()


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 8)


def test_both_runs_are_served(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    warm(block, x, 12)
    before, backwards = served(), accel.counters()["backwards_compiled"]
    torch.testing.assert_close(descend(block, x), plain(block, x))
    assert served() - before == 2
    assert accel.counters()["backwards_compiled"] - backwards == 1


def test_what_is_compiled_in_between_waits_for_the_next_call(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    want = plain(block, x)
    for _ in range(6):
        got = descend(block, x, lambda: accel.wait())
        torch.testing.assert_close(got, want)


def test_variants_forgotten_in_between_serve_once_more(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    want = plain(block, x)
    warm(block, x, 12)
    torch.testing.assert_close(descend(block, x, accel.reset), want)
    torch.testing.assert_close(descend(block, x), want)


def test_a_root_turned_off_in_between_serves_once_more(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    want = plain(block, x)
    warm(block, x, 12)

    def off() -> None:
        entry = runtime.native.module_entry(block)
        entry.state, entry.variants, entry.disarm = "off", (), True

    torch.testing.assert_close(descend(block, x, off), want)


def test_dispatch_switched_off_in_between(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    want = plain(block, x)
    warm(block, x, 12)
    try:
        got = descend(block, x, lambda: runtime.native.set_enabled(False))
    finally:
        runtime.native.set_enabled(True)
    torch.testing.assert_close(got, want)


def test_a_function_with_a_prologue_of_its_own(x: torch.Tensor) -> None:
    @accel.optimize
    def part(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x @ w).sigmoid().exp()

    w = torch.randn(8, 8, requires_grad=True)
    for _ in range(10):
        y = checkpoint(part, x, w, use_reentrant=False)
        (got,) = torch.autograd.grad(y.sum(), w)
        (want,) = torch.autograd.grad((x @ w).sigmoid().exp().sum(), w)
        torch.testing.assert_close(got, want)
        assert accel.wait()
    before = served()
    checkpoint(part, x, w, use_reentrant=False).sum().backward()
    assert served() - before == 2


def test_state_that_changes_in_between_is_an_error(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    warm(block, x, 12)

    def change() -> None:
        block.up.weight = nn.Parameter(torch.randn(EXPANSION * 8, 8).double())

    with pytest.raises(CheckpointError, match="Block was served by code that accel had compiled"):
        descend(block, x, change)


def test_activations_are_not_held() -> None:
    size, count = 512, 6
    block = accel.optimize(Block(size))
    x = torch.randn(1024, size).requires_grad_()  # 2 MiB, and 16 MiB within
    warm(block, x)
    gc.collect()
    before = resident()
    y = x
    for _ in range(count):
        y = checkpoint(block, y, use_reentrant=False)
    assert resident() - before < count * 2 * 2**20 + 20 * 2**20
    y.sum().backward()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_node_called_by_the_program(x: torch.Tensor) -> None:
    """Outside of the engine there is no run whose end could be waited for."""

    @accel.optimize
    def part(x: torch.Tensor) -> torch.Tensor:
        return x.exp() * x

    x = x.requires_grad_()
    for _ in range(6):
        y = checkpoint(part, x * 1, use_reentrant=False)
        with torch.no_grad():
            found = y.grad_fn(torch.ones_like(x))
        assert accel.wait()
    torch.testing.assert_close(found, (x.exp() * x + x.exp()).detach())


def test_a_backward_that_keeps_its_graph_keeps_no_activations() -> None:
    block = accel.optimize(Block(256))
    x = torch.randn(1024, 256).requires_grad_()  # 1 MiB, and 8 MiB within
    warm(block, x)
    y = x
    for _ in range(8):
        y = checkpoint(block, y, use_reentrant=False)
    gc.collect()
    before = resident()
    y.sum().backward(retain_graph=True)
    assert resident() - before < 8 * 8 * 2**20


def test_a_call_that_was_not_served_comes_first(x: torch.Tensor) -> None:
    """At the same place, since it saves nothing."""

    @accel.optimize
    def part(x: torch.Tensor) -> torch.Tensor:
        return x.exp() * x

    def both(x: torch.Tensor) -> torch.Tensor:
        return part(x.detach()[:2]).sum() + part(x).sum()

    x = x.requires_grad_()
    for _ in range(6):
        part(x).sum().backward()
        assert accel.wait()
    for _ in range(6):
        x.grad = None
        checkpoint(both, x, use_reentrant=False).backward()
        torch.testing.assert_close(x.grad, (x.exp() * x + x.exp()).detach())
        assert accel.wait()


def test_a_backward_under_anomaly_mode(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    want = plain(block, x)
    warm(block, x, 12)
    y = checkpoint(block, x, use_reentrant=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            (got,) = torch.autograd.grad(y.square().sum(), block.up.weight)
    torch.testing.assert_close((y.detach(), got), want)


def test_a_function_that_saves_nothing_is_not_run_again(x: torch.Tensor) -> None:
    runs = []

    @accel.optimize
    def part(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).mean(-1)

    def counted(x: torch.Tensor) -> torch.Tensor:
        runs.append(0)
        return part(x)

    x = x.requires_grad_()
    for _ in range(6):
        y = checkpoint(counted, x * 1, use_reentrant=False)
        y.sum().backward()
        assert accel.wait()
    assert len(runs) == 6


def test_masks_of_compiled_code_in_nested_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    accel.optimize(lambda x: x)
    assert driver.current is not None
    monkeypatch.setitem(driver.current.service._options, "fast_dropout", True)
    dropout = torch.nn.functional.dropout
    first = accel.optimize(lambda x: dropout(x.sin(), 0.5) * x)
    second = accel.optimize(lambda x: dropout(x.exp(), 0.5) * x)

    def both(x: torch.Tensor) -> torch.Tensor:
        return second(checkpoint(first, x, use_reentrant=False) * 2)

    for _ in range(8):
        x = torch.rand(60).add_(1).requires_grad_()
        y = checkpoint(both, x, use_reentrant=False)
        y.sum().backward()
        assert torch.equal(y != 0, x.grad != 0)
        assert accel.wait()
    accel.reset()


def test_nothing_is_left_behind(x: torch.Tensor) -> None:
    block = accel.optimize(Block())
    warm(block, x, 12)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(500):
        checkpoint(block, x, use_reentrant=False).sum().backward()
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_hooks_that_are_not_as_expected(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> None:
    """Of a torch that this one does not know: nothing is served under them."""

    class Hook:
        def __init__(self, frame: Any) -> None:
            pass

    given = []
    monkeypatch.setattr(checkpoints.checkpoint, "_checkpoint_hook", Hook)
    monkeypatch.setattr(runtime, "native", type("Native", (), {"set_checkpoints": given.append}))
    monkeypatch.setattr(checkpoints, "installed", False)
    checkpoints.install()
    assert not given and not checkpoints.installed
