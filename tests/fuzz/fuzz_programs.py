"""Random programs, eager against accel: the answer must never differ.

    python tests/fuzz/fuzz_programs.py --programs 500 --seed 1

Each program (`random_programs.py`) is called several times with fresh inputs, other sizes and
flags, and things changed in between, once plainly and once under `accel.optimize`. Results,
arguments, state, what is printed, random numbers, gradients, aliasing and identities must agree.
A failure is made smaller for as long as `--shrink-s` allows, printed, and exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "differential"))

from random_programs import Call, Case, Writer, smaller_cases
from snapshots import Describer, Tolerance, differences

import accel
from accel import runtime

TOLERANCE = Tolerance(1e-4, 2e-5)
WAIT_S = 120.0
# Known and harmless: what made a view of an input that requires grad has another name.
KNOWN = re.compile(r"grad_fn: expected '\w+', got 'AsStridedBackward0'$")
DEVICE = "cpu"  # where arguments lie
LIMIT_S = 10.0  # of processor time, for all calls of one program
EAGER_LIMIT_S = 2.0  # of the same, without accel
Optimize = Callable[..., Any]


def code_of(case: Case) -> types.CodeType:
    return compile(case.source(), f"<fuzz {case.seed}>", "exec")


def arguments(call: Call, index: int, grad: bool) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(index)
    x = torch.rand(call.shape, generator=g).to(DEVICE) * call.sign
    y = torch.rand(call.shape, generator=g).to(DEVICE) * call.sign
    if grad:
        x.requires_grad_()
    if call.alias == "same":
        y = x
    elif call.alias == "view":
        y = x.view(-1).view(call.shape)
    elif call.alias == "turned":
        y = y.t().contiguous().t()
    extra = [torch.ones(4, device=DEVICE)] if call.extra else None
    return x, y, call.flag, call.k, extra


def differentiable(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in differentiable(v)]
    return []


def one_call(f: Any, space: dict[str, Any], state: Any, call: Call, index: int, grad: bool) -> Any:
    """Everything that can be seen of one call."""
    outcome: dict[str, Any] = {}
    printed = io.StringIO()
    exec(call.before, {**space, "s": state, "globals": lambda: space})
    given = arguments(call, index, grad)
    result = None
    torch.manual_seed(index)
    with torch.set_grad_enabled(grad), contextlib.redirect_stdout(printed):
        try:
            result = f(state, *given)
            if grad and (outputs := differentiable(result)):
                torch.autograd.backward([t.sum() for t in outputs])
        except Exception as error:
            outcome["raised"] = [type(error).__name__, str(error).split("\n")[0]]
    outcome["printed"] = printed.getvalue()
    outcome["drawn"] = torch.rand(()).item()
    outcome["globals"] = [space["COUNT"], dict(space["TABLE"])]
    describer = Describer()
    attributes = {k: v for k, v in vars(state).items() if k not in ("callbacks", "apply")}
    outcome["seen"] = [describer.describe(v) for v in (result, list(given), attributes)]
    for parameter in state.linear.parameters():
        parameter.grad = None
    for name, value in list(vars(state).items()):  # histories do not grow from call to call
        if isinstance(value, torch.Tensor) and value.requires_grad:
            setattr(state, name, value.detach())
    return outcome


class TooLong(BaseException):
    """No program catches it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Errors: TooLong, in the main thread, after so much processor time."""

    def over(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(case: Case, optimize: Optimize | None) -> list[Any]:
    module = sys.modules["fuzzed"] = types.ModuleType("fuzzed")  # dataclasses look it up
    space = vars(module)
    exec(code_of(case), space)
    state, f = space["State"](), space["f"]
    if optimize is None:
        was = runtime.native.set_enabled(False)
        try:
            return [one_call(f, space, state, c, i, case.grad) for i, c in enumerate(case.calls)]
        finally:
            runtime.native.set_enabled(was)
    f = optimize(f, backend="native" if case.native else "eager", dynamic=case.dynamic)
    seen = []
    for index, call in enumerate(case.calls):
        seen.append(one_call(f, space, state, call, index, case.grad))
        assert accel.wait(WAIT_S)
    return seen


def check(case: Case, optimize: Optimize = accel.optimize) -> str:
    """The first difference between eager and accel; empty when there is none."""
    try:
        with time_limit(EAGER_LIMIT_S):
            expected = run(case, None)
    except (SyntaxError, TooLong):
        return ""  # a smaller program that is none, or one that never ends
    try:
        with time_limit(LIMIT_S):
            got = run(case, optimize)
    except TooLong:
        return "accel did not come to an end"
    except Exception as error:
        return f"accel raised {type(error).__name__}: {error}"
    finally:
        accel.reset()
    for index, (a, b) in enumerate(zip(expected, got, strict=True)):
        found = differences(a, b, TOLERANCE, f"call {index}")
        found = [line for line in found if not KNOWN.search(line)]
        if found:
            return "\n  ".join(found[:4])
    return ""


def shrink(case: Case, seconds: float, optimize: Optimize = accel.optimize) -> Case:
    """A smaller case that still differs."""
    end = time.monotonic() + seconds
    changed = True
    while changed:
        changed = False
        for smaller in smaller_cases(case):
            if time.monotonic() > end:
                return case
            if check(smaller, optimize):
                case, changed = smaller, True
                break
    return case


def fuzz(first: int, count: int, shrink_s: float) -> list[str]:
    """What was wrong, one text for each program that was."""
    failures = []
    for seed in range(first, first + count):
        case = Writer(seed).case()
        difference = check(case)
        if not difference:
            continue
        small = shrink(case, shrink_s)
        failures.append(f"seed {seed}: {check(small) or difference}\n{small.text()}")
        print(failures[-1], flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shrink-s", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for seed in range(options.seed, options.seed + options.programs, 50):
        count = min(50, options.seed + options.programs - seed)
        failures += len(fuzz(seed, count, options.shrink_s))
        print(f"... to seed {seed + count - 1}: {failures} wrong", flush=True)
    print(f"{options.programs} programs from seed {options.seed}: {failures} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
