"""Optimizer steps: torch.optim's update functions, in one native walk over all parameters.

In: torch.optim's functional forms, which every `step` ends in. Out: the same functions,
which hand what they can to `_native.optimizer_update` and the rest to torch's own code.
Invariant: hooks, closures, schedulers, state and its dict are torch's; only the arithmetic
on parameters and state moves, in the same order of operations.

Rules for whoever adds a row:
1. `parameters` are those of torch's function, in order; another signature turns the row off.
2. `lists` and `numbers` are in the order that native/optimizers.cpp wants; a list with a
   condition is handed over only when that argument is true.
3. What the native update does not do is in `refused`: an argument that is true there goes to
   torch's code.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from accel import log, runtime


@dataclass(frozen=True)
class Row:
    """One update rule and the functions of torch that follow it."""

    update: str
    module: str
    functions: tuple[str, ...]
    parameters: tuple[str, ...]
    lists: tuple[tuple[str, str | None], ...]  # (argument, condition)
    steps: str | None
    numbers: tuple[str, ...]
    refused: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lists(text: str) -> tuple[tuple[str, str | None], ...]:
    """Arguments, each with its condition if there is one: "params grads buffers?momentum"."""
    pairs = (word.partition("?") for word in text.split())
    return tuple((name, condition or None) for name, _, condition in pairs)


ROWS = (
    Row(
        "adam",
        "torch.optim.adam",
        ("_single_tensor_adam", "_multi_tensor_adam"),
        _words(
            "params grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps grad_scale found_inf "
            "amsgrad has_complex beta1 beta2 lr weight_decay eps maximize capturable "
            "differentiable decoupled_weight_decay"
        ),
        _lists("params grads exp_avgs exp_avg_sqs max_exp_avg_sqs?amsgrad"),
        "state_steps",
        _words("lr beta1 beta2 weight_decay eps amsgrad maximize decoupled_weight_decay"),
        _words("grad_scale found_inf has_complex capturable differentiable"),
    ),
    Row(
        "sgd",
        "torch.optim.sgd",
        ("_single_tensor_sgd", "_multi_tensor_sgd"),
        _words(
            "params grads momentum_buffer_list grad_scale found_inf weight_decay momentum lr "
            "dampening nesterov maximize has_sparse_grad"
        ),
        _lists("params grads momentum_buffer_list?momentum"),
        None,
        _words("lr momentum dampening weight_decay nesterov maximize"),
        _words("grad_scale found_inf has_sparse_grad"),
    ),
    Row(
        "adagrad",
        "torch.optim.adagrad",
        ("_single_tensor_adagrad", "_multi_tensor_adagrad"),
        _words(
            "params grads state_sums state_steps grad_scale found_inf lr weight_decay lr_decay "
            "eps has_sparse_grad maximize differentiable has_complex"
        ),
        _lists("params grads state_sums"),
        "state_steps",
        _words("lr lr_decay weight_decay eps maximize"),
        _words("grad_scale found_inf has_sparse_grad differentiable has_complex"),
    ),
    Row(
        "rmsprop",
        "torch.optim.rmsprop",
        ("_single_tensor_rmsprop", "_multi_tensor_rmsprop"),
        _words(
            "params grads square_avgs grad_avgs momentum_buffer_list state_steps lr alpha eps "
            "weight_decay momentum centered maximize differentiable capturable has_complex"
        ),
        _lists("params grads square_avgs grad_avgs?centered momentum_buffer_list?momentum"),
        "state_steps",
        _words("lr alpha eps weight_decay momentum centered maximize"),
        _words("differentiable capturable has_complex"),
    ),
)

_NUMBERS = frozenset({float, int, bool})
_installed: list[tuple[Any, str, Callable[..., None], Callable[..., None]]] = []


def install(on_update: Callable[[], None], is_eager: Callable[[], bool]) -> None:
    """Puts the native updates in place; `on_update` hears of each call that used one, and
    while `is_eager()` torch's own code runs."""
    if _installed:
        return
    for row in ROWS:
        module = importlib.import_module(row.module)
        for name in row.functions:
            original: Any = getattr(module, name, None)
            found = tuple(inspect.signature(original).parameters) if original else ()
            if original is None or found != row.parameters:
                log.artifact("driver", "%s.%s is not as expected: eager", row.module, name)
                continue
            replacement = _replacement(row, original, on_update, is_eager)
            setattr(module, name, replacement)
            _installed.append((module, name, original, replacement))


def uninstall() -> None:
    """Puts torch's own functions back."""
    while _installed:
        module, name, original, replacement = _installed.pop()
        if getattr(module, name) is replacement:
            setattr(module, name, original)


def _replacement(
    row: Row,
    original: Any,
    on_update: Callable[[], None],
    is_eager: Callable[[], bool],
) -> Callable[..., None]:
    native = runtime.native.optimizer_update
    positional = tuple(
        name
        for name, p in inspect.signature(original).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    )

    @functools.wraps(original)
    def update(*args: Any, **kwargs: Any) -> None:
        if torch.compiler.is_compiling() or is_eager():
            return original(*args, **kwargs)  # type: ignore[no-any-return]
        values = {**dict(zip(positional, args, strict=False)), **kwargs}
        numbers = _numbers(row, values)
        if numbers is None or not values["params"]:
            return original(**values)  # type: ignore[no-any-return]
        lists = tuple(
            values[name] if condition is None or values[condition] else None
            for name, condition in row.lists
        )
        steps = values[row.steps] if row.steps is not None else None
        rest = native(row.update, lists, steps, numbers)
        if len(rest) < len(values["params"]):
            on_update()
        if rest:
            _finish(row, original, values, rest)
        return None

    return update


def _numbers(row: Row, values: dict[str, Any]) -> tuple[float, ...] | None:
    """The row's numbers, or None when torch's own code has to run."""
    if any(values[name] for name in row.refused if values[name] is not None):
        return None
    numbers = []
    for name in row.numbers:
        value = values[name]
        if type(value) not in _NUMBERS:
            if type(value) is not torch.Tensor or not _is_number_for(value, values["params"]):
                return None
            value = value.item()
        numbers.append(float(value))
    return tuple(numbers)


def _is_number_for(value: torch.Tensor, params: list[torch.Tensor]) -> bool:
    """True for a learning rate whose own precision is the parameters'."""
    return (
        value.numel() == 1
        and value.device.type == "cpu"
        and not value.requires_grad
        and all(p.dtype is value.dtype for p in params)
    )


def _finish(
    row: Row, original: Callable[..., None], values: dict[str, Any], rest: list[int]
) -> None:
    """torch's own code for the parameters at `rest`."""
    if len(rest) == len(values["params"]):
        return original(**values)
    count = len(values["params"])
    parts = {
        name: [value[i] for i in rest]
        for name, value in values.items()
        if type(value) is list and len(value) == count
    }
    original(**{**values, **parts})
    for name, part in parts.items():  # it fills momentum buffers in
        for i, value in zip(rest, part, strict=True):
            values[name][i] = value
    return None
