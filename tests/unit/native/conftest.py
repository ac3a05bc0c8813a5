"""The native tests stand alone: no driver of an earlier test listens."""

from __future__ import annotations

import pytest

from accel import _native


@pytest.fixture(autouse=True)
def no_driver() -> None:
    """An entry without `on_call` asks the module hook, which a driver leaves set."""
    _native.set_module_hook(None)
