"""The native tests stand alone: no driver of an earlier test listens."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from accel import _native


@pytest.fixture(autouse=True)
def no_driver() -> Iterator[None]:
    """An entry without `on_call` asks the module hook, which a driver leaves set."""
    _native.set_module_hook(None)
    yield
    driver = getattr(sys.modules.get("accel.driver"), "current", None)
    if driver is not None:  # later tests have it
        _native.set_module_hook(driver.on_module_call, driver.config.threshold)
