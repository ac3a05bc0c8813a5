"""Text streams that a compiled call may write to at its end: what `print` does to a recording.

In: a stream, and what is printed to it. Out: whether writing to it runs C code only and cannot
fail, the texts, and deep guards. Invariant: a stream of which a class, an attribute, a codec or a
file below runs Python code is not plain: such code may look at anything, and when it runs counts.
"""

from __future__ import annotations

import io
import math
import time
from typing import Any

import torch

from accel import runtime
from accel.capture.values import class_lookup, mro_of

# How long what is printed may wait for the end of compiled code: nobody sees it come later. The
# time of a recording counts, less what recording an operation takes itself.
MOST_SECONDS = 0.1
RECORDING_SECONDS = 0.0002
_LEAST_SECONDS = 1e-4  # what is shorter is not measured

# What C code looks up while it writes: on the stream, and on the files below it.
_LOOKED_UP = ("write", "flush", "closed", "__getattribute__")
_FILES = frozenset({io.BufferedWriter, io.BufferedRandom, io.BytesIO, io.FileIO})
# Encodings that TextIOWrapper does in C; those that can encode every text but a lone surrogate.
_ALL_OF_UNICODE = frozenset({"utf-8", "utf8"})
_ENCODINGS = _ALL_OF_UNICODE | {"ascii", "us-ascii", "latin-1", "iso-8859-1", "iso8859-1"}


def _encoding(stream: Any) -> str | None:
    """In which encoding a plain stream writes, "" for none at all; None where it is not plain."""
    kinds = mro_of(type(stream))
    base: Any = next((b for b in (io.TextIOWrapper, io.StringIO) if b in kinds), None)
    try:
        if base is None or not _is_of_c(stream, base) or base.closed.__get__(stream):
            return None
        if base is io.StringIO:
            return ""
        file = base.buffer.__get__(stream)
        while file is not None:
            kind: Any = type(file)
            if kind not in _FILES or not _is_of_c(file, kind) or not kind.writable(file):
                return None
            file = kind.raw.__get__(file) if hasattr(kind, "raw") else None
        encoding = str(base.encoding.__get__(stream)).lower()
        return encoding if encoding in _ENCODINGS else None
    except (AttributeError, ValueError):  # detached, or not yet initialised
        return None


def _is_of_c(stream: Any, base: type) -> bool:
    """Whether nothing stands before what this builtin class has under the names that count."""
    return all(
        class_lookup(type(stream), name) is class_lookup(base, name)
        and runtime.native.own_attribute(stream, name) is runtime.native.MISSING
        for name in _LOOKED_UP
    )


class PlainStream:
    """A deep guard: a stream writes ASCII, or `every` text, in C code to an open file."""

    def __init__(self, stream: Any, every: bool) -> None:
        """Errors: ValueError when it does not."""
        self.every = every
        if not self(stream):
            raise ValueError(f"a {type(stream).__name__} that is closed or runs Python code")

    def __call__(self, stream: Any) -> bool:
        encoding = _encoding(stream)
        if encoding is None:
            return False
        return not (self.every and encoding) or encoding in _ALL_OF_UNICODE


def is_ascii(text: str) -> bool:
    """Errors: ValueError for a lone surrogate, which no encoding takes."""
    return text.isascii() or not text.encode()


def printed(args: tuple[Any, ...], sep: Any = None, end: Any = None) -> list[str]:
    """What `print` would write of these constants, text by text. Errors: TypeError as print's."""
    between, last = " " if sep is None else sep, "\n" if end is None else end
    if type(between) is not str or type(last) is not str:
        raise TypeError("sep and end must be None or a string")
    texts: list[str] = []
    for k, value in enumerate(args):
        texts += [between, str(value)] if k else [str(value)]
    return [*texts, last]


class Waiting:
    """The first thing that a recording has printed and that waits for its end."""

    def __init__(self, operations: int, position: Any, location: str) -> None:
        self.since, self.operations = time.perf_counter(), operations
        self.position, self.location = position, location

    def seconds(self, operations: int) -> float:
        """How long it has waited by now, about, as the program runs by itself."""
        own = RECORDING_SECONDS * (operations - self.operations)
        return time.perf_counter() - self.since - own


class NotMuchLarger:
    """A deep guard: a tensor whose sizes are open has not so many more elements than the recorded
    one that a text would wait for too long, were the work even the square of their number."""

    def __init__(self, tensor: torch.Tensor, seconds: float) -> None:
        growth = math.sqrt(MOST_SECONDS / max(seconds, _LEAST_SECONDS))
        self.most = int(max(tensor.numel(), 1) * max(growth, 1.0))

    def __call__(self, tensor: torch.Tensor) -> bool:
        return bool(tensor.numel() <= self.most)
