"""`torch.autocast` begun and ended in a recording.

In: calls of the C functions that its `__enter__` and `__exit__` consist of. Out: the regions, by the
operation that they begin or end before (`SegmentGraph.casts`). Invariant: whenever an operation
runs, autocast is as the innermost region says, or as it was when the recording began.
"""

from __future__ import annotations

from typing import Any

from accel.capture.state import RecorderState
from accel.capture.steps import FOLD, Answer, Void
from accel.casts import Autocast

_ELSEWHERE = "autocast, other than by `with torch.autocast`"


class CastRules(RecorderState):
    """The rule for the functions of `policy.AUTOCAST_FUNCTIONS`."""

    def _call_autocast(self, f: Any, args: Any, kwargs: Any) -> Answer:
        if self.cast_outside is None:
            self.cast_outside = Autocast.present()
        name: str = f.__name__
        if name == "autocast_decrement_nesting" and not self.cast_regions:
            raise Void("ambient_changed", "autocast, whose region began before")
        if name == "clear_autocast_cache" and self.casts[-1:] != [(self._upcoming(), None)]:
            raise Void("ambient_changed", _ELSEWHERE)
        return (FOLD, f, args, kwargs or None, self._after_autocast, name)

    def _after_autocast(self, _: Any, name: str) -> Answer:
        self.casts_unsettled = True
        if name == "autocast_increment_nesting":
            self.cast_regions.append(None)
        elif name == "autocast_decrement_nesting":
            if self.cast_regions.pop() is not None:
                self.casts.append((self._upcoming(), None))
        elif name == "set_autocast_cache_enabled":  # the last call of `__enter__`
            if self.cast_regions and self.cast_regions[-1] is None:
                self.cast_regions[-1] = Autocast.present()
                self.casts.append((self._upcoming(), self.cast_regions[-1]))
        return None

    def _upcoming(self) -> str:
        """The name that the next operation will have."""
        return f"v{len(self.operations)}"

    def settle_casts(self) -> None:
        """Before an operation, and at the end. Errors: Void for autocast by other means."""
        self.casts_unsettled = False
        expected = self.cast_regions[-1] if self.cast_regions else self.cast_outside
        if Autocast.present() != expected:
            raise Void("ambient_changed", _ELSEWHERE)
