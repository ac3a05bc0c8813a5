"""The sole importer of the native module.

In: `_native_build.json` beside the package. Out: `native`, or `available = False` and a
one-line `reason`. Invariant: a module built for another torch or Python is never loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

_ADVICE = "run in accel's source folder: pip install --no-build-isolation --no-deps -e ."


def _refusal() -> str:
    """Why the native module must not be loaded; empty when it may be."""
    record = Path(__file__).with_name("_native_build.json")
    try:
        facts = json.loads(record.read_text())
    except (OSError, ValueError):
        return f"accel._native is not built; {_ADVICE}"
    python = "{}.{}".format(*sys.version_info[:2])
    built_python = ".".join(map(str, facts.get("python", ())))
    if built_python != python:
        return f"accel._native was built for Python {built_python}, this is {python}; {_ADVICE}"
    if facts.get("torch") != torch.__version__:
        return (
            f"accel._native was built for torch {facts.get('torch')}, "
            f"this is {torch.__version__}; {_ADVICE}"
        )
    return ""


native: Any = None
reason: str = _refusal()
if not reason:
    try:
        from accel import _native as native  # type: ignore[no-redef]
    except ImportError as error:
        reason = f"accel._native cannot be loaded ({error}); {_ADVICE}"
available: bool = native is not None
