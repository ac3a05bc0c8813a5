"""A short run of the program fuzzer, and that it finds what is wrong.

`ACCEL_FUZZ_PROGRAMS` says how many programs (default 25), `ACCEL_FUZZ_SEED` which.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import fuzz_programs
from random_programs import Case, Statement, Writer

PROGRAMS = int(os.environ.get("ACCEL_FUZZ_PROGRAMS", "25"))
SEED = int(os.environ.get("ACCEL_FUZZ_SEED", "1"))


def test_random_programs_agree_with_eager() -> None:
    assert not fuzz_programs.fuzz(SEED, PROGRAMS, shrink_s=60.0)


def forgetful(f: Callable[..., Any], **_: Any) -> Callable[..., Any]:
    """A wrong compiler: from the fourth call on it does not see that the mode has changed."""
    calls = 0

    def wrong(state: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        before = state.mode
        if calls > 3:
            state.mode = "a"
        try:
            return f(state, *arguments)
        finally:
            if calls > 3 and state.mode == "a":
                state.mode = before

    return wrong


def case_for(wanted: Callable[[Case], bool]) -> Case:
    return next(case for seed in range(1, 2000) if wanted(case := Writer(seed).case()))


def test_a_wrong_answer_is_found_and_made_small() -> None:
    case = case_for(
        lambda c: (
            any(call.before == "s.mode = 'b'" for call in c.calls)
            and bool(fuzz_programs.check(c, forgetful))
        )
    )
    small = fuzz_programs.shrink(case, 30.0, forgetful)
    assert fuzz_programs.check(small, forgetful)
    assert count(small.body) < count(case.body) or count(case.body) <= 2
    assert len(small.calls) < len(case.calls)


def count(body: list[Statement]) -> int:
    return sum(1 + sum(count(below or []) for _, below in s.parts) for s in body)


def test_programs_are_programs() -> None:
    """Each can be compiled, and most calls of them return."""
    raised = calls = 0
    for seed in range(1, 120):
        case = Writer(seed).case()
        compile(case.source(), "<fuzz>", "exec")
        outcomes = fuzz_programs.run(case, None)
        raised += sum("raised" in o for o in outcomes)
        calls += len(outcomes)
    assert raised < 0.4 * calls
