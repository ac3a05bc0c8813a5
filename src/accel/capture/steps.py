"""What a handler answers to a trampoline: the protocol of native/session.h.

`None`: do the instruction's own operation. `(value,)`: the result is `value`.
`(mode, f, args, kwargs, post, token)`: carry out a step, then tell `post(result, token)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

INLINE, OPERATION, FOLD, NATIVE, CONSTRUCT = range(5)

Answer = tuple[Any, ...] | None
Post = Callable[[Any, Any], Answer]


class Void(Exception):
    """The recording is over; `kind` is a row of `accel.errors.REASONS`, `detail` names the thing."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail
