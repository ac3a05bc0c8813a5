"""Functions that graphs call as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from armed_roots import root_of

import accel

X = torch.randn(3, 4)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    with torch.no_grad():
        yield
    accel.reset()


def call(function: Callable[..., Any], *args: Any, times: int = 1) -> Any:
    for _ in range(times):
        result = function(*args)
        accel.wait()
    return result


def made(body: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """An allowed function that no recording could look into, and a count of its runs."""
    runs: list[int] = []

    @accel.allow_in_graph
    def allowed(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        globals()["_last"] = float(args[0].sum().item()) if args else 0.0
        return body(*args, **kwargs)

    return allowed, runs


def test_it_is_one_operation_of_the_graph() -> None:
    allowed, runs = made(lambda x, factor, plus: torch.from_numpy(x.numpy() * factor) + plus[0])

    @accel.optimize(fullgraph=True)
    def f(x):  # type: ignore[no-untyped-def]
        y = torch.relu(x) + 1
        return allowed(y, 3.0, plus=[x]) * 2

    for _ in range(5):
        x = torch.randn(3, 4)
        assert torch.allclose(call(f, x), ((torch.relu(x) + 1) * 3.0 + x) * 2)
    (installed,) = root_of(f).variants
    assert root_of(f).hits == 4
    assert len(runs) == 5
    graph = installed.recording.graph
    assert graph is not None
    (name, metas) = graph.allowed[0]
    assert [m.sizes for m in metas] == [(3, 4)]
    assert sum(name in o.target for o in graph.operations) == 1
    assert type(graph).from_json(graph.to_json()) == graph


def test_several_results_and_the_fx_form() -> None:
    allowed, _ = made(lambda x: (x.numpy().max() * torch.ones(2), torch.tensor(x.tolist())))

    @accel.optimize(fullgraph=True, backend="eager")
    def f(x):  # type: ignore[no-untyped-def]
        top, same = allowed(x)
        return same * top[0]

    @accel.optimize(fullgraph=True)
    def g(x):  # type: ignore[no-untyped-def]
        top, same = allowed(x)
        return same * top[0]

    for function in (f, g):
        for _ in range(4):
            x = torch.randn(3, 4)
            assert torch.allclose(call(function, x), x * x.max())
        assert root_of(function).hits == 3


def test_it_runs_once_for_each_call_in_program_order() -> None:
    order: list[float] = []
    allowed, _ = made(lambda x, n: (order.append(n), x * n)[1])

    @accel.optimize(fullgraph=True)
    def f(x):  # type: ignore[no-untyped-def]
        return allowed(x, 1) + allowed(x, 1) + allowed(x, 2)

    assert torch.allclose(call(f, X, times=3), X * 4)
    assert order == [1, 1, 2] * 3
    assert root_of(f).hits == 2


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda x: x.add_(0), "writes to its arguments"),
        (lambda x: x[0], "gives a part of its arguments"),
        (lambda x: 3, "gives a int"),
        (lambda x: [], "gives a list"),
    ],
)
def test_what_no_operation_does_runs_as_python(body: Any, why: str) -> None:
    allowed, _ = made(body)

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return allowed(x * 1) if why.startswith("writes") else (allowed(x), x * 2)

    expected = call(f, X.clone())
    got = call(f, X.clone(), times=3)
    assert type(got) is type(expected)
    assert root_of(f).hits == 0
    assert any(why in text for text in root_of(f).history)


def test_gradients_are_left_to_python() -> None:
    allowed, _ = made(lambda x: x * 2)

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return allowed(x).sum()

    with torch.enable_grad():
        for _ in range(3):
            x = torch.randn(3, requires_grad=True)
            call(f, x).backward()
            assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert any("requires grad" in text for text in root_of(f).history)


def test_other_results_than_recorded_run_the_body() -> None:
    sizes = [2, 2, 3]
    allowed, _ = made(lambda x: torch.ones(sizes.pop(0) if sizes else 3) * x.numpy().max())

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return allowed(x) * 2

    assert call(f, X).shape == (2,)
    assert call(f, X).shape == (2,)
    assert call(f, X).shape == (3,)


@pytest.mark.parametrize("what", [3, torch.nn.Linear, len])
def test_what_cannot_be_allowed(what: Any) -> None:
    with pytest.raises(TypeError):
        accel.allow_in_graph(what)


def test_generators_cannot_be_allowed() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError):
        accel.allow_in_graph(numbers)
