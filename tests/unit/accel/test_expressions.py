"""Expressions over symbols: values, tests, text."""

from __future__ import annotations

import pytest

from accel import expressions

S0, S1 = ["s", 0], ["s", 1]
VALUES = [
    (7, 7),
    (["+", S0, 1, S1], 14),
    (["*", 2, S0, S1], 60),
    (["//", ["+", S0, -9], 2], -3),
    (["%", ["+", S0, -9], 4], 2),
    (["min", S0, S1], 3),
    (["max", S0, S1], 10),
]


@pytest.mark.parametrize(("node", "value"), VALUES)
def test_values(node: object, value: int) -> None:
    assert expressions.evaluate(node, [3, 10]) == value


TESTS = [
    (["==", S0, 3], True),
    (["!=", S0, 3], False),
    (["<", S0, S1], True),
    (["<=", S1, S0], False),
    ([">", ["+", S0, 7], S1], False),
    ([">=", ["+", S0, 7], S1], True),
    (["and", ["==", S0, 3], ["==", S1, 9]], False),
    (["or", ["==", S0, 3], ["==", S1, 9]], True),
    (["not", ["==", S0, 3]], False),
]


@pytest.mark.parametrize(("test", "holds"), TESTS)
def test_tests(test: object, holds: bool) -> None:
    assert expressions.holds(test, [3, 10]) is holds


def test_text() -> None:
    names = ["x.size(0)", "n"]
    assert expressions.text(["==", ["*", 2, ["+", S0, 1]], S1], names) == "2 * (x.size(0) + 1) == n"
    assert expressions.text(["not", ["<", S0, 3]], names) == "not(x.size(0) < 3)"


def test_cpp() -> None:
    assert expressions.cpp(["//", ["*", 3, S0], 2]) == "((3 * s0) / 2)"
    assert expressions.cpp(["max", S0, 1]) == "(s0 > 1 ? s0 : 1)"
    assert expressions.cpp(1 << 40) == f"{1 << 40}L"


@pytest.mark.parametrize("bad", [["?", 1, 2], ["holds", 1]])
def test_what_is_no_node_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="no operation"):
        expressions.evaluate(bad, [])
    with pytest.raises(ValueError, match="no test"):
        expressions.holds(bad, [])
