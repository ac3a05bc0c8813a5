"""Regions of `torch.autocast` in a graph: what they cast to, and how they are entered again.

In: the settings that a recording saw. Out: the same regions around the same operations. Invariant:
after an error in a region autocast is as it was before. Only autocast on the CPU is meant.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """Settings of `torch.autocast` on the CPU."""

    dtype: str
    enabled: bool
    caches: bool

    @staticmethod
    def present() -> Autocast:
        dtype = str(torch.get_autocast_dtype("cpu")).removeprefix("torch.")
        return Autocast(dtype, torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())

    def region(self) -> torch.autocast:
        dtype = getattr(torch, self.dtype)
        return torch.autocast("cpu", dtype, enabled=self.enabled, cache_enabled=self.caches)


class Casts:
    """The regions of `torch.autocast` in a graph, while its operations run one by one."""

    def __init__(self, casts: Sequence[tuple[str, Autocast | None]]) -> None:
        self.rows = by_operation(casts)
        self.regions: list[torch.autocast] = []

    def before(self, operation: str) -> None:
        """Begins and ends the regions that do so before this operation."""
        for cast in self.rows.get(operation, ()):
            if cast is None:
                self._end()
            else:
                region = cast.region()
                region.__enter__()
                self.regions.append(region)

    def close(self) -> None:
        while self.regions:
            self._end()

    def _end(self) -> None:
        self.regions.pop().__exit__(None, None, None)


def by_operation(
    casts: Sequence[tuple[str, Autocast | None]],
) -> dict[str, list[Autocast | None]]:
    rows: dict[str, list[Autocast | None]] = {}
    for name, cast in casts:
        rows.setdefault(name, []).append(cast)
    return rows


@contextlib.contextmanager
def autocast_kept() -> Iterator[None]:
    """After an error autocast is as it was before, wherever in a graph it happened."""
    before, depth = Autocast.present(), _autocast_depth()
    try:
        yield
    except BaseException:
        while _autocast_depth() > depth:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        if Autocast.present() != before:
            torch.set_autocast_enabled("cpu", before.enabled)
            torch.set_autocast_dtype("cpu", getattr(torch, before.dtype))
            torch.set_autocast_cache_enabled(before.caches)
        raise


def _autocast_depth() -> int:
    depth: int = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth - 1
