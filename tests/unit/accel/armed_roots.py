"""What the driver knows of a function that was optimized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accel import driver
from accel.roots import Root


def root_of(function: Callable[..., Any]) -> Root:
    assert driver.current is not None
    return driver.current.roots.of_function(function)  # type: ignore[arg-type]
