"""Text streams that a compiled call may write to at its end: what `print` does to a recording.

In: a stream, and what is printed to it. Out: whether writing to it runs C code only, the text, and
a deep guard. Invariant: a stream of which a class, an attribute or a file below runs Python code
is not plain: such code may look at anything, and when it runs counts.
"""

from __future__ import annotations

import io
import time
from typing import Any

from accel import runtime
from accel.capture.values import class_lookup

# How long what is printed may wait for the end of compiled code: nobody sees it come later. The
# time of a recording counts, less what recording an operation takes itself.
MOST_SECONDS = 0.1
RECORDING_SECONDS = 0.0002

_METHODS = ("write", "flush")
_FILES = frozenset({io.BufferedWriter, io.BufferedRandom, io.BytesIO, io.FileIO})


def _state(stream: Any) -> Any:
    """What writing to a plain stream hangs on; None for one that is not plain, or not open."""
    base: Any = next((b for b in (io.TextIOWrapper, io.StringIO) if isinstance(stream, b)), None)
    if base is None or not _is_of_c(stream, type(stream), base):
        return None
    try:
        if base.closed.__get__(stream):
            return None
        if base is io.StringIO:
            return (base,)
        kinds = []
        file = base.buffer.__get__(stream)
        while file is not None:
            kind = type(file)
            if kind not in _FILES or not _is_of_c(file, kind, kind):
                return None
            kinds.append(kind)
            file = kind.raw.__get__(file) if hasattr(kind, "raw") else None
        return (base, *kinds, base.encoding.__get__(stream), base.errors.__get__(stream))
    except (AttributeError, ValueError):  # detached, or not yet initialised
        return None


def _is_of_c(stream: Any, kind: type, base: type) -> bool:
    """Whether nothing stands before the methods of this builtin class."""
    return all(
        class_lookup(kind, name) is class_lookup(base, name)
        and runtime.native.own_attribute(stream, name) is runtime.native.MISSING
        for name in _METHODS
    )


class PlainStream:
    """A deep guard: a stream writes in C code, to an open file, in the same encoding."""

    def __init__(self, stream: Any) -> None:
        """Errors: ValueError when it does not."""
        self.state = _state(stream)
        if self.state is None:
            raise ValueError(
                f"writing to a {type(stream).__name__} that is closed or runs Python code"
            )

    def __call__(self, stream: Any) -> bool:
        return bool(_state(stream) == self.state)


def printed(args: tuple[Any, ...], words: dict[str, Any]) -> str:
    """What `print` would write of these constants. Errors: TypeError as print's."""
    text = io.StringIO(newline="")
    print(*args, **words, file=text)
    return text.getvalue()


class Waiting:
    """The first thing that a recording has printed and that waits for its end."""

    def __init__(self, operations: int, position: Any, location: str) -> None:
        self.since, self.operations = time.perf_counter(), operations
        self.position, self.location = position, location

    def seconds(self, operations: int) -> float:
        """How long it has waited by now, about, as the program runs by itself."""
        own = RECORDING_SECONDS * (operations - self.operations)
        return time.perf_counter() - self.since - own
