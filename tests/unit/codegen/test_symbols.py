"""Sizes that compute symbolically: arithmetic, bounds, and what each question leaves behind."""

from __future__ import annotations

import itertools
import random

import pytest

from accel import expressions
from accel.codegen import CompileError
from accel.codegen.symbols import Dim, SymbolSpace, hint, is_same, maximum, minimum, node, surely

HINTS = [6, 9, 4]


def space() -> tuple[SymbolSpace, Dim, Dim, Dim]:
    made = SymbolSpace(list(HINTS))
    return made, made.symbol(0), made.symbol(1), made.symbol(2)


def test_arithmetic_is_that_of_ints_for_every_value() -> None:
    """Random expressions, evaluated at other values than the hints, against Python's ints."""
    generator = random.Random(7)
    operations = [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a // (b if isinstance(b, int) and b else 3),
        lambda a, b: a % (b if isinstance(b, int) and b else 5),
        lambda a, b: b - a,
        lambda a, b: 2 * a,
        lambda a, b: -a,
    ]
    checked = 0
    for _ in range(300):
        made, *symbols = space()
        sampled = [generator.randint(2, 40) for _ in symbols]
        pairs = [*zip(symbols, sampled, strict=True), (3, 3), (1, 1), (16, 16)]
        for _ in range(5):
            operation = generator.choice(operations)
            (a, x), (b, y) = generator.choice(pairs), generator.choice(pairs)
            try:
                value = operation(a, b)
            except CompileError:  # of too high a degree
                continue
            # The divisor of // and % is an int on one side and a size on the other.
            if isinstance(b, Dim) and operation in (operations[3], operations[4]):
                wanted = x // 3 if operation is operations[3] else x % 5
            else:
                wanted = operation(x, y)
            pairs.append((value, wanted))
        for symbolic, wanted in pairs:
            assert expressions.evaluate(node(symbolic), sampled) == wanted
            checked += isinstance(symbolic, Dim)
        assert not made.tests
    assert checked > 600


def test_what_divides_exactly_leaves_nothing_behind() -> None:
    made, a, b, _ = space()
    assert is_same((a * b) // b, a)
    assert (a * b * 12) % b == 0
    assert is_same((64 * a) // 16, 4 * a)
    assert is_same(((a + 1) * b) // (a + 1), b)
    assert is_same((a * 3 + 7) // 1, a * 3 + 7)
    assert is_same(divmod(a * 4 + 3, 4)[0], a)
    assert divmod(a * 4 + 3, 4)[1] == 3
    assert a - a == 0
    assert isinstance(a + 1 - a, int)
    assert not made.tests


SETTLED = [
    (lambda a, b: a > 1, True),
    (lambda a, b: a == 1, False),
    (lambda a, b: a != 0, True),
    (lambda a, b: bool(a), True),
    (lambda a, b: a * b > a, True),
    (lambda a, b: 64 * a == 64, False),
    (lambda a, b: a * b >= 4, True),
    (lambda a, b: a + b < 4, False),
    (lambda a, b: -a < 0, True),
    (lambda a, b: a % 8 >= 0, True),
    (lambda a, b: a + 1 <= a, False),
    (lambda a, b: a * 2 == a + a, True),
    (lambda a, b: a == "text", False),
]


@pytest.mark.parametrize("number", range(len(SETTLED)))
def test_questions_with_one_answer_leave_no_test(number: int) -> None:
    question, answer = SETTLED[number]
    made, a, b, _ = space()
    assert question(a, b) is answer
    assert not made.tests


def test_other_questions_become_tests_that_tell_the_sizes_apart() -> None:
    questions = [
        lambda a, b: a == b,
        lambda a, b: a < b,
        lambda a, b: a > 5,
        lambda a, b: a * b == 54,
        lambda a, b: a % 4 == 2,
        lambda a, b: bool(a - 6),
        lambda a, b: a // 2 >= b - 7,
    ]
    for question in questions:
        made, a, b, _ = space()
        answer = question(a, b)
        assert answer is question(6, 9)
        assert len(made.tests) == 1
        for x, y in itertools.product(range(2, 14), repeat=2):
            same = question(x, y) is answer
            assert expressions.holds(made.tests[0], [x, y, 4]) is same, (x, y)


def test_a_value_is_asked_for() -> None:
    made, a, _, _ = space()
    assert list(range(a))[-1] == 5
    assert [0, 1, 2, 3, 4, 5, 6][a] == 6
    assert float(a) == 6.0
    assert made.tests == [["==", ["s", 0], 6]]


def test_what_only_takes_ints_fails_loudly() -> None:
    _, a, _, _ = space()
    with pytest.raises(TypeError):
        a / 2
    with pytest.raises(TypeError):
        a + 0.5
    with pytest.raises(TypeError):
        assert a < "text"


def test_asking_nothing() -> None:
    made, a, b, _ = space()
    assert hint(a * b + 1) == 55
    assert not is_same(a, 6)
    assert not is_same(a, b)
    assert surely(">", a, 1)
    assert not surely(">", a, 2)
    assert not surely("<", a, b)
    assert surely("<", 2, 3)
    assert not made.tests


def test_an_assumption_must_hold_for_the_hints() -> None:
    made, *_ = space()
    with pytest.raises(CompileError, match="does not hold"):
        made.assume(["==", ["s", 0], 7])


def test_extrema() -> None:
    made, a, b, _ = space()
    assert is_same(minimum(a, a + 1, made), a)
    assert is_same(maximum(a, 1, made), a)
    low = minimum(a, b, made)
    assert expressions.evaluate(node(low), [20, 3, 0]) == 3
    assert str(low).startswith("(")
    assert not made.tests


def test_cpp_text_of_what_cpp_would_round_otherwise() -> None:
    made, a, b, _ = space()
    assert str(a * 64 + 1) == "((64 * s0) + 1)"
    assert "/" in str(a // 7)
    assert not made.tests
    larger, smaller = (a, b) if made.hints[0] > made.hints[1] else (b, a)
    assert "/" in str((larger - smaller) // 7)
    assert made.tests == [[">=", (larger - smaller).node(), 0]]
    with pytest.raises(CompileError, match="does not hold"):
        str((smaller - larger) // 7)


def test_a_quotient_keeps_what_makes_it_positive() -> None:
    made, a, _, _ = space()
    n = made.hints[0]
    quotient = (16 * n - a) // 16
    assert "/" in str(quotient)
    assert made.tests == [[">=", (16 * n - a).node(), 0]]


def test_numbers_from_outside_may_be_anything() -> None:
    made = SymbolSpace([5], [None])
    n = made.symbol(0)
    assert n > 0
    assert made.tests == [[">", ["s", 0], 0]]


def test_equal_numbers_hash_alike() -> None:
    _, a, b, _ = space()
    assert hash(a * 2 + b) == hash(b + a + a)
    assert {a * 2: 1}[a + a] == 1


def test_numbers_that_are_settled_to_be_equal_are_the_same() -> None:
    made = SymbolSpace([4, 4, 12])
    a, b, c = (made.symbol(n) for n in range(3))
    assert not is_same(a * 2 + c, b * 2 + c)
    made.settle(1, a)
    assert is_same(a * 2 + c, b * 2 + c)
    assert made.tests == [["==", ["s", 1], ["s", 0]]]
    made.settle(2, a * 3)
    assert is_same(c + b, a * 4)
    assert not is_same(c, a * 4)
