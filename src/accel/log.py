"""Logging: artifacts on request, one-line notices to the user.

In: `ACCEL_LOG=graph,guards,...`. Out: lines on stderr. Invariant: silent unless asked,
except for notices, each given once.
"""

from __future__ import annotations

import os
import sys
import traceback

ARTIFACTS = (
    "trace",
    "guards",
    "exits",
    "graph",
    "loops",
    "schedule",
    "code",
    "driver",
    "worker",
    "recompiles",
)

_enabled = frozenset(filter(None, os.environ.get("ACCEL_LOG", "").split(",")))
_said: set[str] = set()


def configure(names: list[str]) -> None:
    global _enabled
    _enabled = frozenset(names) | _enabled


def is_enabled(artifact_name: str) -> bool:
    return artifact_name in _enabled


def artifact(name: str, text: str, *args: object) -> None:
    """A line of artifact `name`, if the user asked for it."""
    if name in _enabled:
        print(f"accel[{name}] {text % args if args else text}", file=sys.stderr)


def notice_once(text: str, subject: str = "") -> None:
    """One line that the user should see, once; of one `subject`, only the first text."""
    key = subject or text
    if key not in _said:
        _said.add(key)
        print(f"accel: {text.splitlines()[0]}", file=sys.stderr)


def internal_error(where: str, error: BaseException, details: str = "") -> None:
    """An error of ours that was kept from the program."""
    if is_enabled("driver"):
        text = details or "".join(traceback.format_exception(error))
        print(f"accel[driver] internal error in {where}:\n{text}", file=sys.stderr)
    else:
        notice_once(f"internal error in {where} ({error}); ACCEL_LOG=driver shows it")
