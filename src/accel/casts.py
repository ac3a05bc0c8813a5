"""Regions of `torch.autocast` in a graph: what they cast to, and how they are entered again.

In: the settings that a recording saw. Out: the same regions around the same operations. Invariant:
after an error in a region autocast is as it was before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

DEVICES = ("cpu", "cuda")  # whose settings a graph has


class Autocast(NamedTuple):
    """Settings of `torch.autocast`: for each of the devices a dtype, and whether it is on."""

    dtypes: tuple[str, ...]
    enabled: tuple[bool, ...]
    caches: bool

    @staticmethod
    def present() -> Autocast:
        dtypes = [str(torch.get_autocast_dtype(d)).removeprefix("torch.") for d in DEVICES]
        enabled = [torch.is_autocast_enabled(d) for d in DEVICES]
        return Autocast(tuple(dtypes), tuple(enabled), torch.is_autocast_cache_enabled())

    @staticmethod
    def from_json(data: Sequence[Any]) -> Autocast:
        return Autocast(tuple(data[0]), tuple(data[1]), data[2])

    def off(self) -> Autocast:
        return self._replace(enabled=(False,) * len(DEVICES))

    def put(self) -> None:
        """Makes them those of this thread."""
        for device, dtype, enabled in zip(DEVICES, self.dtypes, self.enabled, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, getattr(torch, dtype))
        torch.set_autocast_cache_enabled(self.caches)

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """As `torch.autocast`, but for all devices, whether there is a GPU or not."""
        before = Autocast.present()
        torch.autocast_increment_nesting()
        self.put()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            before.put()

    def begun_after(self, before: Autocast) -> tuple[str, torch.dtype, bool, bool]:
        """Arguments of the `torch.autocast` that leads here."""

        def unlikely(k: int) -> tuple[bool, ...]:
            on, switched = self.enabled[k], self.enabled[k] != before.enabled[k]
            return not switched, not (on and self.dtypes[k] != before.dtypes[k]), not on

        k = min(range(len(DEVICES)), key=unlikely)
        return DEVICES[k], getattr(torch, self.dtypes[k]), self.enabled[k], self.caches


class Casts:
    """The regions of `torch.autocast` in a graph, while its operations run one by one."""

    def __init__(self, casts: Sequence[tuple[str, Autocast | None]]) -> None:
        self.rows = by_operation(casts)
        self.regions: list[contextlib.AbstractContextManager[None]] = []

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
            before.put()
        raise


def _autocast_depth() -> int:
    depth: int = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth - 1
