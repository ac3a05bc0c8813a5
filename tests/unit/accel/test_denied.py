"""What the user denies stays untouched, also where something else calls it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import accel
from accel import driver

SOURCE = """
import torch

def double(x):
    return torch.relu(x) * 2

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.layer(x)) + 1
"""
X = torch.randn(2, 4)


@pytest.fixture
def library() -> Iterator[types.ModuleType]:
    module = types.ModuleType("denied_library")
    sys.modules[module.__name__] = module
    exec(compile(SOURCE, "denied_library.py", "exec"), vars(module))
    yield module
    accel.enable(module)
    del sys.modules[module.__name__]
    accel.reset()


def compiled_calls(f: Any, calls: int = 12) -> int:
    """How many of these calls were served compiled as a whole, and not their parts."""
    assert driver.current is not None
    table = driver.current.roots
    root = table.of_module(f) if isinstance(f, torch.nn.Module) else table.of_function(f)
    with torch.no_grad():
        expected = f(X)
        for _ in range(calls // 2):
            torch.testing.assert_close(f(X), expected)
            accel.wait(60)
        before = root.hits
        for _ in range(calls):
            torch.testing.assert_close(f(X), expected)
    return root.hits - before


def test_a_denied_package_stays_untouched(library: types.ModuleType) -> None:
    accel.disable(library)
    assert compiled_calls(library.Net()) == 0
    accel.enable(library)
    assert compiled_calls(library.Net()) > 0


def test_a_package_is_denied_when_its_modules_run_compiled(library: types.ModuleType) -> None:
    net = library.Net()
    assert compiled_calls(net) > 0
    accel.disable(library.__name__)
    assert compiled_calls(net) == 0
    accel.enable(library.__name__)
    assert compiled_calls(net) > 0


def test_a_denied_function_is_no_part_of_others(library: types.ModuleType) -> None:

    def inner(x: torch.Tensor) -> torch.Tensor:
        return library.double(torch.tanh(x) + 1)  # type: ignore[no-any-return]

    f = accel.optimize(inner)
    assert compiled_calls(f) > 0
    accel.disable(library)
    original = library.double.__code__
    assert compiled_calls(f) == 0  # it is split: segments serve it
    root = driver.current.roots.of_function(f)  # type: ignore[union-attr]
    assert root.state == "split" and library.double.__code__ is original


def test_a_disabled_module_is_no_part_of_others() -> None:
    part = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    whole = torch.nn.Sequential(part, torch.nn.Tanh())
    assert compiled_calls(whole) > 0
    accel.disable(part)
    with torch.no_grad():
        whole(X)
    assert compiled_calls(whole) == 0
    accel.optimize(part)
    accel.reset()
    assert compiled_calls(whole) > 0


def test_explaining_leaves_the_backend_as_it_is() -> None:
    names = []

    def backend(gm: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        names.append(len(gm.graph.nodes))
        return gm.forward

    f = accel.optimize(lambda x: torch.relu(x) + 1, backend=backend)
    assert compiled_calls(f) > 0
    accel.explain(f)(X)
    accel.reset()
    assert compiled_calls(f) > 0
    assert len(names) == 2
