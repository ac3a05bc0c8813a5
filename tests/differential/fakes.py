"""Engines that are wrong on purpose, one way each; the harness must catch them all."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from harness import Eager


class Fake(Eager):
    """An engine that wraps each function in `wrapper` and claims that every call was compiled."""

    keeps_code = True

    def __init__(self, wrapper: Callable[..., Any], reasons: tuple[str, ...] = ()) -> None:
        self._wrapper = wrapper
        self._reasons = list(reasons)
        self._calls = 0

    def optimize(self, function: Any, **options: Any) -> Any:
        @functools.wraps(function)
        def optimized(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            return self._wrapper(function, *args, **kwargs)

        return optimized

    def counters(self) -> dict[str, Any]:
        return {"calls_compiled": self._calls}

    def reasons(self) -> list[str]:
        return self._reasons


def honest(function: Any, *args: Any) -> Any:
    return function(*args)


def change(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    def wrapper(function: Any, *args: Any) -> Any:
        result = function(*args)
        return result | {name: edit(result[name]) for name, edit in changes.items()}

    return wrapper


def stale() -> Callable[..., Any]:
    first: list[Any] = []

    def wrapper(function: Any, *args: Any) -> Any:
        result = function(*args)
        first.append(result["y"])
        return result | {"y": first[0].clone()}

    return wrapper


def reuses_memory() -> Callable[..., Any]:
    buffer = torch.zeros(2, 3)

    def wrapper(function: Any, *args: Any) -> Any:
        result = function(*args)
        buffer.copy_(result["y"])
        return result | {"y": buffer}

    return wrapper


def holds_arguments() -> Callable[..., Any]:
    held: list[Any] = []

    def wrapper(function: Any, *args: Any) -> Any:
        held.append(args)
        return function(*args)

    return wrapper


def silences(function: Any, *args: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def swallows(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError:
        return None


def rewords(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError("replay failed") from error


def runs_twice(function: Any, *args: Any) -> Any:
    with (
        torch.random.fork_rng(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(ValueError),
    ):
        function(*args)
    return function(*args)


def draws_noise(function: Any, *args: Any) -> Any:
    torch.rand(1)
    return function(*args)


def undoes_writes(function: Any, *args: Any) -> Any:
    result = function(*args)
    return result | {"out": args[1].sub_(1)}


def leaks_grad_mode(function: Any, *args: Any) -> Any:
    result = function(*args)
    torch.set_grad_enabled(False)
    return result
