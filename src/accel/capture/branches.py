"""Branches that tensors decide: where they stand, and which of them nobody assumes any more; and
operations that cannot be compiled where they stand.

In: a running recording; places that were found to go both ways. Out: the place of the branch that
is being recorded. Invariant: a policy only: what a recording assumes is checked by its graph,
and what it refuses to assume is left to Python.
"""

from __future__ import annotations

import functools
import itertools
import sys
import types

# File, function, first and last line, first and last column: the same in a function's twins.
Place = tuple[str, str, tuple[int | None, ...]]

PACKAGE_FILES = __file__.rsplit("/", 2)[0]

# Recordings are void at these, so that Python decides them.
both_ways: set[Place] = set()
# Operations that no compiler can follow, since what they give hangs on values: target, `file:line`.
untraceable: set[tuple[str, str]] = set()


def program_frame() -> types.FrameType | None:
    """The innermost frame that is not accel's own."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE_FILES):
        frame = frame.f_back
    return frame


def here() -> Place:
    """The place of the innermost instruction that is not accel's own."""
    frame = program_frame()
    if frame is None:
        return "", "", ()
    return _place(frame.f_code, frame.f_code.co_filename, frame.f_lasti)


@functools.lru_cache(4096)
def _place(code: types.CodeType, filename: str, offset: int) -> Place:
    """`filename`, since equal code may lie in two files."""
    position = next(itertools.islice(code.co_positions(), offset // 2, None), ())
    return filename, code.co_qualname, tuple(position)


def text(place: Place) -> str:
    """`file:line` of a place."""
    filename, _, position = place
    return f"{filename}:{position[0]}" if position else filename
