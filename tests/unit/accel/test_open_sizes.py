"""One variant for many sizes: counted, not only compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from armed_roots import root_of

import accel
from accel.compile import family as families
from accel.compile.family import Family


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    with torch.no_grad():
        yield
    accel.reset()


def served(function: Callable[..., Any], *args: Any) -> bool:
    before = root_of(function).hits
    function(*args)
    accel.wait()
    return root_of(function).hits > before


def open_sizes(function: Callable[..., Any], *calls: tuple[Any, ...]) -> Family:
    """Calls until a variant with open sizes exists; its family."""
    for call in calls:
        for _ in range(2):
            function(*call)
            accel.wait()
    families = [v.native.executor for v in root_of(function).variants]
    (family,) = [f for f in families if isinstance(f, Family)]
    return family


def test_one_variant_serves_every_size() -> None:
    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return torch.softmax(x * 2, -1) + x.shape[0]

    family = open_sizes(f, (torch.randn(4, 5),), (torch.randn(6, 5),))
    for n in range(7, 60):
        assert served(f, torch.randn(n, 5)), n
    root = root_of(f)
    assert len(root.variants) == 2
    assert root.recordings == 2
    assert root.state == "compiled"
    assert family.refusals == 0
    assert len(family.members) == family.made >= 53
    assert accel.counters()["deopts"] == 0


@pytest.mark.parametrize("name", ["MAX_EXECUTORS", "MAX_ARENA_BYTES"])
def test_what_is_kept_has_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        y = torch.softmax(x * 2, -1)
        return y @ y.T

    monkeypatch.setattr(families, name, 20)
    family = open_sizes(f, (torch.randn(4, 5),), (torch.randn(6, 5),))
    for _ in range(2):
        for n in range(7, 60):
            assert served(f, torch.randn(n, 5)), n
    kept = {"MAX_EXECUTORS": 20, "MAX_ARENA_BYTES": 16}[name]
    assert len(family.members) == kept < family.made
    assert family.arena_bytes == sum(member.arena_bytes for member in family.members.values())


def test_a_size_that_is_first_read_under_no_grad() -> None:
    w = torch.randn(8, 8, requires_grad=True)

    @accel.optimize
    def f(x, memories):  # type: ignore[no-untyped-def]
        y = torch.tanh(x @ w)
        with torch.no_grad():
            m = torch.cat([memories[0], x])[-2:]
        return (y + m.mean(0)).sum()

    for k in range(12):
        with torch.enable_grad():
            f(torch.randn(5, 8), [torch.randn(2 if k == 0 else 4, 8)]).backward()
        assert accel.wait(60)
    assert accel.counters()["recordings"] <= 3
    assert accel.counters()["calls_compiled"] >= 8


def test_sizes_that_come_again_are_not_made_again() -> None:
    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return x * 2

    family = open_sizes(f, (torch.randn(4, 5),), (torch.randn(6, 5),))
    for _ in range(5):
        for n in (7, 8, 9):
            f(torch.randn(n, 5))
    assert family.made == 3


def test_a_recompile_names_old_and_new_value() -> None:
    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return x * 2 if x.shape[0] > 5 else x * 3

    open_sizes(f, (torch.randn(8, 5),), (torch.randn(9, 5),))
    for _ in range(2):
        f(torch.randn(3, 5))
        accel.wait()
    first, second = root_of(f).history
    assert "x.shape[0] was 8, is 9" in first
    assert "test_open_sizes.py:" in first
    assert "x.shape[0] > 5 does not hold: x.shape[0] = 3" in second


def test_no_more_variants_than_allowed() -> None:
    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return [x[i] for i in range(x.shape[0])]

    for n in range(2, 20):
        for _ in range(2):
            f(torch.randn(n, 2))
            accel.wait()
    root = root_of(f)
    assert len(root.variants) == 8
    assert root.state == "full"
    assert "8 variants exist already" in root.reason
    assert not served(f, torch.randn(30, 2))


def test_a_graph_that_cannot_be_open_is_compiled_for_each_size() -> None:
    @accel.optimize
    def f(x, y):  # type: ignore[no-untyped-def]
        return [t * 2 for t in filter(lambda t: t.shape[0] - 5, [x, y])]

    a = torch.randn(4, 2)
    for n in (5, 6, 7):
        for _ in range(4):
            f(torch.randn(n, 2), a)
            accel.wait()
    root = root_of(f)
    assert root.variation is not None
    assert "looks at what a function gives" in root.variation.refused
    assert root.variants
    assert not any(isinstance(v.native.executor, Family) for v in root.variants)
    assert served(f, torch.randn(7, 2), a)


def test_gradients_are_compiled_for_each_size() -> None:
    weight = torch.randn(5, 3, requires_grad=True)

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return (x @ weight).relu()

    with torch.enable_grad():
        for n in (4, 6, 7):
            for _ in range(4):
                f(torch.randn(n, 5)).sum().backward()
                accel.wait()
        assert served(f, torch.randn(7, 5))
    root = root_of(f)
    assert not any(isinstance(v.native.executor, Family) for v in root.variants)
    assert root.variation is not None
    assert not root.variation.refused


def test_the_setting_and_the_marks() -> None:
    @accel.optimize(dynamic=True)
    def at_once(x):  # type: ignore[no-untyped-def]
        return x * 2

    @accel.optimize(dynamic=False)
    def never(x):  # type: ignore[no-untyped-def]
        return x * 2

    @accel.optimize
    def marked(x):  # type: ignore[no-untyped-def]
        return x * 2

    for f in (at_once, never, marked):
        x = torch.randn(4, 5)
        accel.mark_dynamic(x, -2)
        for _ in range(2):
            f(x)
            accel.wait()
    assert served(at_once, torch.randn(7, 9))
    assert not served(never, torch.randn(7, 5))
    assert served(marked, torch.randn(7, 5))
    assert not served(marked, torch.randn(7, 6))


def test_marks_are_checked() -> None:
    with pytest.raises(TypeError, match="expected a tensor"):
        accel.mark_dynamic([1, 2], 0)
    with pytest.raises(IndexError, match="no dimension 2"):
        accel.mark_dynamic(torch.randn(2, 2), 2)
    with pytest.raises(IndexError, match="no dimension -3"):
        accel.mark_static(torch.randn(2, 2), (0, -3))
