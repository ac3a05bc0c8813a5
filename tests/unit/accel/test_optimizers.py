"""Native optimizer updates beside torch's own, over many steps."""

from __future__ import annotations

import copy
import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

from accel import optimizers

Make = Callable[[list[nn.Parameter]], optim.Optimizer]


def row(kind: type, **options: Any) -> tuple[str, Make]:
    shown = ", ".join(f"{k}={v}" for k, v in options.items())
    return f"{kind.__name__}({shown})", lambda p: kind(
        p, **{"lr": 1e-2, **{k: copy.deepcopy(v) for k, v in options.items()}}
    )


CASES = dict(
    [
        row(kind, **options)
        for kind in (optim.Adam, optim.AdamW)
        for options in (
            {},
            {"weight_decay": 0.1},
            {"amsgrad": True},
            {"maximize": True, "weight_decay": 0.1, "amsgrad": True},
            {"foreach": True},
            {"betas": (0.4, 0.9)},
            {"lr": torch.tensor(1e-2)},
        )
    ]
    + [
        row(optim.SGD, **options)
        for options in (
            {},
            {"momentum": 0.9},
            {"momentum": 0.9, "nesterov": True},
            {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
            {"weight_decay": 0.1, "maximize": True},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": True},
        )
    ]
    + [row(optim.Adagrad, **o) for o in ({}, {"lr_decay": 0.1, "weight_decay": 0.1})]
    + [
        row(optim.RMSprop, **options)
        for options in (
            {},
            {"momentum": 0.9},
            {"centered": True, "weight_decay": 0.1},
            {"momentum": 0.9, "centered": True},
            {"momentum": 0.9, "weight_decay": 0.1},
        )
    ]
)
STEPS = 50


@pytest.fixture
def updates() -> Iterator[list[int]]:
    """How many calls were native. torch's own functions are back afterwards."""
    counts = [0]

    def count() -> None:
        counts[0] += 1

    optimizers.uninstall()
    optimizers.install(count, lambda: False)
    yield counts
    optimizers.uninstall()


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    sizes = [(3, 4), (7,), (), (130, 33), (0, 2)]
    plain = [nn.Parameter(torch.randn(s, dtype=dtype)) for s in sizes]
    return [*plain, nn.Parameter(torch.randn(5, 6, dtype=dtype).T)]


def train(make: Make, dtype: torch.dtype) -> tuple[list[nn.Parameter], optim.Optimizer]:
    params = parameters(dtype)
    optimizer = make(params)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    torch.manual_seed(5)
    for step in range(STEPS):
        for p in params:
            p.grad = torch.randn_like(p)
        if step % 3 == 0:
            params[1].grad = None
        optimizer.step()
        schedule.step()
    return params, optimizer


def assert_equal_states(expected: Any, got: Any, **tolerance: float) -> None:
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_equal_states(value, got[key], **tolerance)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[key], value, **tolerance)
            assert got[key].stride() == value.stride()
        else:
            assert got[key] == value or key == "param_groups"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps(name: str, dtype: torch.dtype, updates: list[int]) -> None:
    optimizers.uninstall()
    expected, reference = train(CASES[name], dtype)
    optimizers.install(lambda: updates.__setitem__(0, updates[0] + 1), lambda: False)
    got, optimizer = train(CASES[name], dtype)
    wide = dtype is torch.float64
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if wide else {"rtol": 1e-5, "atol": 1e-6}
    for e, g in zip(expected, got):
        torch.testing.assert_close(g, e, **tolerance)
    assert_equal_states(reference.state_dict(), optimizer.state_dict(), **tolerance)
    if wide and "lr=" in name:  # torch computes with the learning rate's own precision
        assert updates[0] == 0
    else:
        assert updates[0] >= STEPS - 1  # the first step of a momentum is torch's


def test_versions_are_bumped(updates: list[int]) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = optim.AdamW([p])
    optimizer.step()
    state = optimizer.state[p]
    before = [t._version for t in (p, state["exp_avg"], state["exp_avg_sq"], state["step"])]
    optimizer.step()
    after = [t._version for t in (p, state["exp_avg"], state["exp_avg_sq"], state["step"])]
    assert updates[0] == 2 and all(a > b for a, b in zip(after, before))


def both(change: Callable[[list[nn.Parameter]], None], make: Make) -> tuple[Any, Any]:
    results = []
    for native in (False, True):
        optimizers.uninstall()
        if native:
            optimizers.install(lambda: None, lambda: False)
        params = [nn.Parameter(torch.arange(6.0).view(2, 3)), nn.Parameter(torch.ones(4))]
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        change(params)
        optimizer = make(params)
        for _ in range(3):
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    return tuple(results)  # type: ignore[return-value]


def _strided_gradient(params: list[nn.Parameter]) -> None:
    params[0].grad = torch.arange(6.0).view(3, 2).T


def _sixteen_bits(params: list[nn.Parameter]) -> None:
    params[1] = nn.Parameter(params[1].data.bfloat16())
    params[1].grad = torch.ones(4, dtype=torch.bfloat16)


def _overlapping(params: list[nn.Parameter]) -> None:
    base = torch.ones(6)
    params[:] = [nn.Parameter(base[:4]), nn.Parameter(base[2:])]
    for p in params:
        p.grad = torch.full_like(p, 0.5)


def _complex(params: list[nn.Parameter]) -> None:
    params[1] = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    params[1].grad = torch.ones(3, dtype=torch.complex64) * 1j


@pytest.mark.parametrize("change", [_strided_gradient, _sixteen_bits, _overlapping, _complex])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.AdamW(p, lr=0.1),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: optim.RMSprop(p, lr=0.1, momentum=0.5),
    ],
)
def test_unusual_parameters_go_to_torch(
    change: Callable[[list[nn.Parameter]], None], make: Make, updates: list[int]
) -> None:
    expected, got = both(change, make)
    for e, g in zip(expected, got):
        torch.testing.assert_close(g, e)


def test_hooks_closures_and_state_dicts(updates: list[int]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([p], lr=0.1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        seen.append("closure")
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert seen == ["before", "closure", "after"] and updates[0] == 1
    other = optim.Adam([nn.Parameter(p.detach().clone())], lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    q = other.param_groups[0]["params"][0]
    q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    torch.testing.assert_close(p, q)


def test_another_signature_turns_the_row_off(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers.uninstall()

    def changed(params: Any, grads: Any) -> None: ...

    sgd = importlib.import_module("torch.optim.sgd")
    monkeypatch.setattr(sgd, "_single_tensor_sgd", changed)
    optimizers.install(lambda: None, lambda: False)
    try:
        assert sgd._single_tensor_sgd is changed
    finally:
        optimizers.uninstall()
    assert sgd._single_tensor_sgd is changed


def test_eager_stance(updates: list[int]) -> None:
    optimizers.uninstall()
    optimizers.install(lambda: updates.__setitem__(0, 1), lambda: True)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optim.SGD([p], lr=1.0).step()
    assert updates[0] == 0 and torch.equal(p.detach(), torch.zeros(3))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_threads_share_a_large_step(updates: list[int]) -> None:
    params = [nn.Parameter(torch.ones(1 << 20)) for _ in range(20)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optim.AdamW(params)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer.step()  # the state is made
        own, of_all = time.thread_time(), time.process_time()
        for _ in range(5):
            optimizer.step()
        own, of_all = time.thread_time() - own, time.process_time() - of_all
    finally:
        torch.set_num_threads(threads)
    assert updates[0] == 6
    assert of_all > 1.5 * own
    assert all(torch.equal(p, params[0]) for p in params)
