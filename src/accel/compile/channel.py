"""JSON messages over a socket: a length, then the document.

In: dicts to send, bytes that arrived. Out: bytes, and the dicts they hold. Invariant: a
message is delivered whole or not at all; a length beyond the limit is an error, never an
allocation.
"""

from __future__ import annotations

import json
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
_MAX_BYTES = 1 << 30


def encode(message: dict[str, Any]) -> bytes:
    """Errors: TypeError, ValueError for what JSON cannot say."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Puts messages together from the pieces in which they arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """The messages that `piece` completes. Errors: ValueError for what is no message."""
        self._buffer += piece
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > _MAX_BYTES:
                raise ValueError(f"a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(json.loads(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return messages
