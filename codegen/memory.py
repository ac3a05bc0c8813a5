"""Places intermediates in one arena, reusing memory whose value nobody needs any longer.

In: the size and the life (first and last step) of every buffer. Out: an offset for each and
the arena's size. Invariant: two buffers whose lives touch do not overlap, so a step never
writes what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Life:
    buffer: int
    size_bytes: int
    first: int
    last: int


def place(lives: list[Life]) -> tuple[dict[int, int], int]:
    """Offsets by buffer, and the bytes needed. Big buffers choose first."""
    placed: list[tuple[Life, int]] = []
    top = 0
    for life in sorted(lives, key=lambda x: (-x.size_bytes, x.first, x.buffer)):
        size = _aligned(life.size_bytes)
        busy = sorted(
            (offset, offset + _aligned(other.size_bytes))
            for other, offset in placed
            if other.first <= life.last and life.first <= other.last
        )
        offset = 0
        for begin, end in busy:
            if offset + size <= begin:
                break
            offset = max(offset, end)
        placed.append((life, offset))
        top = max(top, offset + size)
    return {life.buffer: offset for life, offset in placed}, top


def _aligned(size: int) -> int:
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT
