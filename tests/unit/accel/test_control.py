"""What users say about compiling: stances, disabled parts, constant results; and what a recompile
tells them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from armed_roots import root_of

import accel
from accel import driver, log
from accel.config import settings
from accel.errors import RecompileError
from accel.guards import Guard
from accel.misses import Miss, miss_of
from accel.sources import constant, root, source_text
from accel.stance import STANCES

X = torch.ones(3, 4)
NUMBER = 1


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flag = "a"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.flag == "a" else x + 1


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    with torch.no_grad():
        yield
    assert driver.current is not None
    assert driver.current.stance == "default"
    accel.reset()


def call(function: Callable[..., Any], *args: Any, times: int = 1) -> Any:
    for _ in range(times):
        result = function(*args)
        accel.wait()
    return result


def served() -> int:
    return int(accel.counters()["calls_compiled"])


def recordings() -> int:
    return int(accel.counters()["recordings"])


def compiled() -> Any:
    model = accel.optimize(Scaled())
    call(model, X, times=2)
    assert served() == 1
    return model


# ---- stances ----


def test_the_setting_knows_every_stance() -> None:
    assert set(settings()["stance"].choices) == set(STANCES)


def test_force_eager_serves_and_records_nothing() -> None:
    model = compiled()
    with accel.set_stance("force_eager"):
        call(model, X)
        call(model, torch.ones(5, 4), times=4)
    assert (served(), recordings()) == (1, 1)
    call(model, X)
    assert served() == 2


def test_eager_on_recompile_serves_and_records_nothing() -> None:
    model = compiled()
    with accel.set_stance("eager_on_recompile"):
        call(model, X)
        assert served() == 2
        model.flag = "b"
        assert torch.equal(call(model, X, times=4), X + 1)
    assert (served(), recordings()) == (2, 1)
    call(model, X, times=4)
    assert recordings() == 2


def test_fail_on_recompile_names_what_changed() -> None:
    model = compiled()
    with accel.set_stance("fail_on_recompile"):
        call(model, X)
        model.flag = "b"
        with pytest.raises(RecompileError) as caught:
            model(X)
    error = caught.value
    assert (error.function, error.what, error.old, error.new) == (
        "Scaled",
        "self.flag",
        "'a'",
        "'b'",
    )
    line = Scaled.forward.__code__.co_firstlineno + 1
    assert error.location == f"{__file__}:{line}"
    for part in ("Scaled", "self.flag", "'a'", "'b'", error.location):
        assert part in str(error)
    assert torch.equal(model(X), X + 1)


def test_fail_on_recompile_holds_for_roots_that_are_full() -> None:
    model = compiled()
    assert driver.current is not None
    found = driver.current.roots.of_module(model)
    found.state, found.entry.threshold = "full", 4096
    with accel.set_stance("fail_on_recompile"), pytest.raises(RecompileError):
        model(torch.ones(7, 4))
    assert found.entry.threshold == 4096
    model(torch.ones(7, 4))


def test_a_function_that_was_never_compiled_runs() -> None:
    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return x * 3

    with accel.set_stance("fail_on_recompile"):
        assert torch.equal(call(f, X, times=3), X * 3)
    assert recordings() == 0


def test_stances_nest_and_end_with_an_exception() -> None:
    assert driver.current is not None
    with accel.set_stance("eager_on_recompile"):
        with pytest.raises(KeyError), accel.set_stance("force_eager"):
            raise KeyError
        assert driver.current.stance == "eager_on_recompile"


def test_a_stance_as_a_statement_and_as_a_decorator() -> None:
    model = compiled()

    @accel.set_stance("force_eager")
    def eagerly(x: torch.Tensor) -> Any:
        return model(x)

    call(eagerly, X)
    assert served() == 1
    call(model, X)
    assert served() == 2
    accel.set_stance("force_eager")
    call(model, X)
    accel.set_stance("default")
    assert served() == 2


def test_no_such_stance() -> None:
    with pytest.raises(ValueError, match="fail_on_recompile"):
        accel.set_stance("fail")


# ---- disable ----


def test_disable_as_a_context() -> None:
    model = compiled()
    with accel.disable():
        call(model, X, times=3)
    assert served() == 1
    call(model, X)
    assert served() == 2


@pytest.mark.parametrize("decorate", [accel.disable, accel.disable(), torch.compiler.disable])
def test_a_disabled_function_is_left_to_python(decorate: Any) -> None:
    @decorate
    def left(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        y = torch.relu(x * 2)
        z = left(y)
        return z.sum() * 2

    assert call(f, X, times=5) == ((X * 2 + 1).sum() * 2)
    found = root_of(f)
    assert found.state == "split"
    assert "left is left to Python" in found.reason


def test_a_disabled_callback_of_c_code_is_left_to_python() -> None:
    @accel.disable
    def left(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return sum(map(left, (x, x * 2)))

    assert torch.equal(call(f, X, times=4), X * 3 + 2)
    assert served() == 0
    assert "left is left to Python" in root_of(f).reason


def test_nothing_is_recorded_inside_what_torch_compiler_disabled() -> None:
    @accel.optimize
    def inner(x):  # type: ignore[no-untyped-def]
        return x * 5

    @torch.compiler.disable
    def outer(x: torch.Tensor) -> Any:
        return inner(x)

    call(outer, X, times=4)
    assert recordings() == 0
    call(inner, X, times=2)
    assert (recordings(), served()) == (1, 1)


def test_is_compiling_answers_what_eager_answers() -> None:
    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        compiling = torch.compiler.is_compiling() or torch._dynamo.is_compiling()
        return x * (3 if compiling else 2)

    for _ in range(3):
        assert torch.equal(call(f, X), X * 2)
    assert served() == 2


# ---- constant results ----


def test_a_constant_result_is_computed_once() -> None:
    calls = []

    @accel.assume_constant_result
    def settings_of_the_day() -> float:
        calls.append(1)
        return 3.0

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        return x * settings_of_the_day()

    assert torch.equal(call(f, X, times=4), X * 3)
    assert len(calls) == 1
    assert served() == 3


def test_only_functions_have_constant_results() -> None:
    with pytest.raises(TypeError):
        accel.assume_constant_result(3)


# ---- what a recompile says ----


def last_miss(function: Callable[..., Any], *calls: tuple[Any, ...]) -> Miss:
    accel.optimize(function, dynamic=False)
    for arguments in calls:
        call(function, *arguments, times=2)
    miss = root_of(function).miss
    assert miss is not None
    return miss


def test_sizes_dtypes_and_globals_in_the_users_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    miss = last_miss(f, (X,), (torch.ones(5, 4),))
    assert (miss.what, miss.old, miss.new) == ("x.shape[0]", "3", "5")

    def g(x: torch.Tensor) -> torch.Tensor:
        return x * NUMBER

    monkeypatch.setattr(log, "_enabled", frozenset({"recompiles"}))
    accel.optimize(g, dynamic=False)
    call(g, X, times=2)
    monkeypatch.setitem(globals(), "NUMBER", 2)
    call(g, X, times=2)
    line = g.__code__.co_firstlineno + 1
    said = capsys.readouterr().err
    assert f"global NUMBER of module {__name__} was 1, is 2" in said
    assert f"test_control.py:{line})" in said
    assert any("NUMBER" in text for text in root_of(g).history)


def test_too_many_variants_are_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @accel.optimize(dynamic=False)
    def f(x, n):  # type: ignore[no-untyped-def]
        return x * n

    for n in range(20):
        call(f, X, n, times=2)
    found = root_of(f)
    assert (found.state, len(found.variants)) == ("full", 8)
    said = [t for t in capsys.readouterr().err.splitlines() if "compiled variants" in t]
    assert len(said) == 1
    assert "n was 6, is 7" in said[0]
    assert "test_control.py" in said[0]
    assert "make it a tensor" in said[0]
    assert "n was 6, is 7" in found.reason


@pytest.mark.parametrize(
    ("check", "operands", "found", "text"),
    [
        ("EQUALS", (2,), "EQUALS slot 0: 2; found a int 3", "n was 2, is 3"),
        ("EQUALS", (2,), "EQUALS slot 0: 2; found a float 3.0", "n was 2, is 3.0 (a float)"),
        ("EQUALS", (2,), "EQUALS slot 0: 2; found a Box", "n was 2, is a Box"),
        ("TYPE_IS", (int,), "TYPE_IS; found a bool True", "n was an int, is True (a bool)"),
        ("LEN", (2,), "LEN slot 0: 2; found a list", "len(n) was 2, is another"),
        ("TENSOR", (), "TENSOR; dtype is Double, was Float", "n.dtype was Float, is Double"),
        ("TENSOR", (), "TENSOR; sizes are [2, 3], were [6]", "n.shape was [6], is [2, 3]"),
        ("TENSOR", (), "TENSOR; requires_grad", "n: requires_grad is not as it was"),
        ("DICT_ABSENT", ("k",), "DICT_ABSENT; found a dict", "n now has an entry 'k'"),
    ],
)
def test_words(check: str, operands: tuple[Any, ...], found: str, text: str) -> None:
    guard = Guard(root(0, "n"), check, operands, "f.py:3")
    assert str(miss_of(guard, found)) == f"{text} (f.py:3)"


def test_sources_in_words() -> None:
    names = constant({"__name__": "m"})
    number = names.child("dict_item", "N")
    assert source_text(number) == "global N of module m"
    scale = number.child("dict").child("dict_item", "scale")
    assert source_text(scale) == "N.scale (N is a global of module m)"


def test_a_split_function_is_explained_with_its_segments() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x) * 2
        zlib.crc32(b"exit")
        return torch.sin(y) + 1

    x = torch.randn(4, 4)
    first = accel.explain(f)(x)
    assert (first.graph_count, first.graph_break_count) == (0, 1)
    assert "in the next calls" in str(first)
    for _ in range(12):
        f(x)
        accel.wait(60)
    again = accel.explain(f)(x)
    assert (again.graph_count, again.graph_break_count, again.op_count) == (2, 1, 4)
    assert "torch.sin(a0)" in str(again) and "crc32" in str(again)
    assert " of 14 calls were split at graph breaks; compiled segments ran 2" in str(again)
