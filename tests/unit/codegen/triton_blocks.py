"""Test support: other ways to cut kernels for a GPU into blocks than those chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from accel.codegen import emit_triton, schedule_tiled, tiles
from accel.codegen.targets import TARGETS

_SMALL = {"_FLAT_BLOCK": 64, "_ROW_BLOCK": 4, "_COLUMNS": 4, "_SQUARE": (8, 4)}


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs, and rows that are walked in loops."""
    for name, value in _SMALL.items():
        monkeypatch.setattr(tiles, name, value)


def _long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row fits a block: what a later phase wants lies in memory."""
    _small(monkeypatch)
    monkeypatch.setattr(schedule_tiled, "LONGEST_TILE", 8)
    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cpu"], longest_row=8))


def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit_triton, "_NARROW", 0)


BLOCKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "as chosen": lambda monkeypatch: None,
    "small": _small,
    "long rows": _long_rows,
    "64 bits": _wide,
}
