"""One variant for many numbers: counted, not only compared."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from armed_roots import root_of

import accel
from accel import _native
from accel.capture.number_program import FUNCTIONS, NumberProgram, Step, Use, is_same
from accel.roots import Root


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    accel.reset()
    yield
    accel.reset()


def lift(function: Callable[..., Any], *calls: tuple[Any, ...]) -> Root:
    """Two calls that differ, and the one that is recorded for it."""
    for call in (calls[0], calls[1], calls[1]):
        function(*call)
        accel.wait()
    return root_of(function)


def test_one_variant_serves_every_number() -> None:
    @accel.optimize
    def f(x, lr, step):  # type: ignore[no-untyped-def]
        return x * lr - x / (1 - 0.9**step)

    x = torch.randn(4)
    root = lift(f, (x, 0.1, 1), (x, 0.2, 2))
    before = root.hits
    for k in range(3, 40):
        expected = x * (1 / k) - x / (1 - 0.9**k)
        assert torch.allclose(f(x, 1 / k, k), expected)
    assert root.hits == before + 37
    assert (len(root.variants), root.recordings, root.state) == (2, 2, "compiled")


def test_training_steps_with_a_schedule_are_served() -> None:
    model = torch.nn.Linear(3, 3)
    weights = {"loss": 1.0}

    @accel.optimize
    def loss(x):  # type: ignore[no-untyped-def]
        return (model(x) ** 2).sum() * weights["loss"]

    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for k in range(12):
        weights["loss"] = 1 / (k + 1)
        optimizer.zero_grad()
        value = loss(torch.randn(2, 3))
        value.backward()
        optimizer.step()
        scheduler.step()
        accel.wait()
    root = root_of(loss)
    assert root.recordings == 2
    assert root.hits >= 8
    assert accel.counters()["backwards_compiled"] >= 8
    assert accel.counters()["optimizer_steps"] == 12


def test_what_must_be_fixed_is_not_lifted_again() -> None:
    rates = ["", 1.5, 2.5, 3.5]

    @accel.optimize
    def f(x, n):  # type: ignore[no-untyped-def]
        return x * rates[n]  # which rate: Python looks at the number

    for n in (1, 2, 3):
        for _ in range(3):
            assert f(torch.ones(5), n).sum() == 5 * rates[n]
            accel.wait()
    root = root_of(f)
    assert len(root.variants) == 3
    newest = root.variants[0].recording
    assert newest.numbers is None
    assert root.hits == 4


def test_dynamic_false_lifts_nothing() -> None:
    @accel.optimize(dynamic=False)
    def f(x, t):  # type: ignore[no-untyped-def]
        return x * t

    root = lift(f, (torch.ones(2), 0.5), (torch.ones(2), 1.5))
    assert all(v.recording.numbers is None for v in root.variants)


def test_a_refusal_says_why() -> None:
    @accel.optimize
    def f(x, n):  # type: ignore[no-untyped-def]
        return x * n if n < 10 else x

    x = torch.ones(2)
    root = lift(f, (x, 1), (x, 2))
    f(x, 12)
    program = root.variants[0].recording.numbers
    assert program is not None
    assert program.why.startswith("n < 10 at ")
    assert program.why.endswith("is False now: n = 12")


# ---------------------------------------------------------------------- the program


def halves() -> NumberProgram:
    program = NumberProgram()
    n = program.add_leaf("n")
    half = program.add_step(Step(operator.truediv, (Use(n), 2), float))
    program.add_step(Step(operator.lt, (Use(half), 10.0), bool, True, "f.py:3"))
    program.operand(half, "float32")
    program.operand(n, "int64")
    program.output(half)
    return program


def test_a_program_computes_as_python_does() -> None:
    assert halves()([7]) == ([3.5, 7], [3.5])


@pytest.mark.parametrize(
    ("leaf", "why"),
    [
        (20, "(n / 2) < 10.0 at f.py:3 is False now: n = 20"),
        ("text", "n / 2 at  TypeError"),
        (1 << 2000, "n / 2 at  OverflowError"),
        (-(1 << 70), f"{-(1 << 70)} is no int64"),
    ],
)
def test_a_program_refuses(leaf: Any, why: str) -> None:
    program = halves()
    assert program([leaf]) is None
    assert program.why.startswith(why)


@pytest.mark.parametrize(("value", "fits"), [(1e38, True), (1e39, False), (math.inf, True)])
def test_numbers_beyond_float32_are_left_to_python(value: float, fits: bool) -> None:
    program = NumberProgram()
    program.operand(program.add_leaf("t"), "float32")
    assert (program([value]) is not None) is fits
    program.dtypes = ["float64"]
    assert program([value]) == ([value], [])


def test_a_result_of_another_type_refuses() -> None:
    program = NumberProgram()
    root = program.add_step(Step(operator.pow, (Use(program.add_leaf("t")), 0.5), float))
    program.output(root)
    assert program([4.0]) == ([], [2.0])
    assert program([-4.0]) is None
    assert "gives a complex" in program.why


def test_values_are_asked_for_once() -> None:
    program = halves()
    assert program.operand(1, "float32") == 0
    assert program.operand(1, "float64") == 2
    assert program.output(1) == 0


def test_sameness_is_of_bits() -> None:
    assert is_same(0.0, 0.0)
    assert not is_same(0.0, -0.0)
    assert not is_same(1, 1.0)
    assert is_same(float("nan"), float("nan"))
    assert is_same(1 << 80, 1 << 80)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda f: f.__name__)
def test_functions_of_numbers_are_pure(function: Callable[..., Any]) -> None:
    """Every row gives the same number twice, for one of these calls at least."""
    for arguments in ((4,), (0.5,), (7, 3), (0.5, 1.5), (0.5, 2)):
        try:
            first = function(*arguments)
        except (TypeError, ValueError):
            continue
        assert type(first) in (int, float, bool)
        assert is_same(first, function(*arguments)) or first is function(*arguments)
        return
    pytest.fail(f"{function} takes none of the arguments")


# ---------------------------------------------------------------------- native


def variant(numbers: Any, run: Any, result: Any = ("tensor", 0)) -> Any:
    guards = _native.GuardProgram([("TYPE_IS", -1, 0, float), ("TYPE_IS", -1, 1, float)], 3)
    entry = _native.Entry("numbers")
    entry.variants = (_native.Variant(guards, _native.Ambient(), run, [], result, None, numbers),)
    entry.state = "armed"
    return entry


def call(entry: Any, *values: Any) -> Any:
    """A prologue's roots are its locals and the function itself."""
    return _native.prologue(entry.index, *values)


def test_operands_become_tensors_of_their_dtype() -> None:
    seen = []

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.extend(inputs)
        return inputs

    program = lambda leaves: ([leaves[0], leaves[1], 7], [])  # noqa: E731
    entry = variant((program, [0, 1], ["float32", "float64", "int64"]), run)
    call(entry, 0.1, 1 / 3)
    assert [(t.dtype, t.dim()) for t in seen] == [
        (torch.float32, 0), (torch.float64, 0), (torch.int64, 0)
    ]  # fmt: skip
    assert [t.item() for t in seen] == [torch.tensor(0.1).item(), 1 / 3, 7]
    assert entry.hits == 1


def test_outputs_come_behind_the_tensors() -> None:
    program = lambda leaves: ([], [leaves[0] + leaves[1]])  # noqa: E731
    finish = lambda outputs, slots: outputs  # noqa: E731
    entry = variant((program, [0, 1], []), lambda inputs: [torch.ones(1)], ("call", finish))
    outputs = call(entry, 1.5, 2.0)
    assert outputs[-1] == [3.5]
    assert len(outputs) == 2


def test_a_refused_call_is_not_served() -> None:
    entry = variant((lambda leaves: None, [0], []), lambda inputs: [torch.ones(1)])
    assert call(entry, 1.0, 2.0) is _native.RUN_BODY
    assert entry.variants[0].misspeculations == 1


@pytest.mark.parametrize(
    "program",
    [
        lambda leaves: 3,
        lambda leaves: ([], []),
        lambda leaves: (["x"], []),
        lambda leaves: ([1 << 70], []),
        lambda leaves: 1 / 0,
    ],
)
def test_a_program_that_fails_runs_the_body(program: Any) -> None:
    entry = variant((program, [0], ["int64"]), lambda inputs: inputs)
    assert call(entry, 1.0, 2.0) is _native.RUN_BODY
    assert entry.variants[0].errors == 1


@pytest.mark.parametrize(
    "numbers", [3, (), (3, [], []), (math.sqrt, [9], []), (math.sqrt, [0], ["bfloat16"])]
)
def test_what_is_no_program_of_numbers(numbers: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        variant(numbers, lambda inputs: inputs)


def test_what_prints_a_counter_that_it_counts_up_is_split() -> None:
    """Each call prints another text: no variant would serve two."""
    counter = {"calls": 0}

    @accel.optimize
    def f(x):  # type: ignore[no-untyped-def]
        counter["calls"] += 1
        print("call", counter["calls"])
        return x * 2 + 1

    for _ in range(30):
        f(torch.ones(3))
        accel.wait()
    assert counter["calls"] == 30
    counted = accel.counters()
    assert counted["calls_split"] >= 12
    assert counted["recordings"] <= 10
