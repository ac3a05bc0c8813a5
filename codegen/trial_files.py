"""What was measured, kept beside the libraries.

In: the digest of all that an answer depends on, and how long both ways took. Out: the same, in a
later process. Invariant: a record appears complete or not at all; one that is damaged counts as
not there, and is made again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

_TIMES = ("ours_s", "aten_s")


def path_of(out_dir: Path, key: str) -> Path:
    return out_dir / f"{key}.trial"


def kept(path: Path) -> dict[str, Any] | None:
    """The record of an earlier trial: at least "ours_s" and "aten_s", two times."""
    try:
        known = json.loads(path.read_text())
        times = [float(known[name]) for name in _TIMES]
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return None
    if not all(0 < t < math.inf for t in times):
        return None
    return {**known, **dict(zip(_TIMES, times, strict=True))}


def keep(path: Path, record: dict[str, Any]) -> None:
    """Where it cannot be written nothing is left."""
    part = path.parent / f".put_{path.name}.{os.getpid()}"
    try:
        part.write_text(json.dumps(record))
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
