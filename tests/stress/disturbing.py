"""Disturbs a program at an exact step of accel's own work.

In: a function of accel's (class and name), what is to happen inside its n-th call. Out: whether
it happened, and in which state of the root. Invariant: what is disturbed does its own work too.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch

import accel
from accel import driver, runtime

WAIT_S = 60


class Hit:
    """Whether a disturbance came, and whether a recording was under way."""

    def __init__(self) -> None:
        self.calls = 0
        self.happened = False
        self.recording = False


@contextlib.contextmanager
def inside(owner: Any, name: str, action: Callable[[], Any], at: int = 1) -> Iterator[Hit]:
    """`action` runs at the begin of call number `at` of `owner.name`."""
    hit, plain = Hit(), owner.__dict__[name]

    @functools.wraps(plain)
    def disturbed(*args: Any, **kwargs: Any) -> Any:
        hit.calls += 1
        if hit.calls == at:
            hit.happened, hit.recording = True, runtime.native.is_recording()
            action()
        return plain(*args, **kwargs)

    setattr(owner, name, disturbed)
    try:
        yield hit
    finally:
        setattr(owner, name, plain)


@contextlib.contextmanager
def handling(number: int, handler: Callable[..., Any]) -> Iterator[None]:
    """A handler for a signal, and no timer left behind."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(number, before)


def raising(error: BaseException) -> Callable[..., Any]:
    """A handler of signals that raises."""

    def handler(*_: Any) -> None:
        raise error

    return handler


def root_of(function: Any) -> Any:
    """The root of a function or module that has been optimized."""
    current = driver.current
    assert current is not None
    if isinstance(function, torch.nn.Module):
        return current.roots.of_module(function)
    return current.roots.of_function(getattr(function, "__func__", function))


def served(call: Callable[[], Any], calls: int = 6) -> int:
    """How many of some calls ran compiled, whole or in part; waits for the compiler in between."""
    names = ("calls_compiled", "segments_served")
    before = sum(accel.counters()[name] for name in names)
    for _ in range(calls):
        call()
        assert accel.wait(WAIT_S), "compilation never became idle"
    return int(sum(accel.counters()[name] for name in names) - before)


def new_function(number: float) -> Any:
    namespace = {"torch": torch}
    exec(f"def f(x):\n    return torch.relu(x * {number}).softmax(-1)\n", namespace)
    return namespace.pop("f")  # guards hold namespaces
