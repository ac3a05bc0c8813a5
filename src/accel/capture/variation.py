"""What differs between the calls of one root: which sizes and numbers a recording leaves open.

In: what earlier recordings of the root read, the user's marks, the `dynamic` setting. Out: for a
tensor at a source, the dimensions that become symbols; for an int or float, whether it is
lifted. Invariant: a policy only. Whatever it
answers, the guards of the recording and the tests of its graph decide which calls are served.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from accel.capture.number_program import is_same
from accel.errors import reason_text
from accel.guards import Guard
from accel.sources import Source
from accel.trace import TensorMeta

# Attributes of tensors that `accel.mark_dynamic` and `accel.mark_static` set; Dynamo's own
# marks mean the same.
DYNAMIC_MARK = "_accel_dynamic_dims"
STATIC_MARK = "_accel_static_dims"
_MARKS = {
    DYNAMIC_MARK: (DYNAMIC_MARK, "_dynamo_dynamic_indices"),
    STATIC_MARK: (STATIC_MARK, "_dynamo_static_indices"),
}
GRADIENTS = "gradients"  # why graphs that autograd takes part in have fixed sizes
_GROWTH = 3  # recordings, each with a longer container: it grows from call to call
_MAX_SEEN = 4  # values remembered of one number: two are enough to see that it changes
SMALLEST = 2  # sizes 0 and 1 mean something else (nothing, broadcasting)


class Variation:
    """The history of one root's inputs."""

    def __init__(self, dynamic: bool | None) -> None:
        """`dynamic`: True for every size at once, False for none, None for those that change."""
        self.dynamic = dynamic
        self.no_gradients = False  # recordings that begin with grad mode on leave nothing open
        self.grad_mode = False  # at the beginning of the present recording
        self.refused = ""  # why this root is recorded with fixed sizes from now on
        self.no_numbers = ""  # why no number of this root is lifted from now on
        self.no_size_numbers = ""  # the same, among sizes and positions
        self.has_lifted = False  # whether some recording lifted one
        self.has_size_numbers = False  # the same, among sizes and positions
        self._seen: dict[str, list[tuple[int, ...]]] = {}
        self._numbers: dict[str, list[Any]] = {}  # what recordings were specific to
        self._lengths: dict[str, list[int]] = {}  # the same, of containers; in order
        self._lifted: set[str] = set()
        self._fixed: set[str] = set()  # lifting them has served nothing
        self._has_fixed_computed = False  # what is computed from some that are lifted
        # Whether what looks at a number that differs between calls is left to Python, rather than
        # recorded for one value; None: it cannot be.
        self.leaves_numbers: bool | None = False

    @property
    def is_enabled(self) -> bool:
        return self.dynamic is not False and not self.refused

    def refuse(self, why: str, has_numbers: bool) -> str:
        """A recording cannot be compiled for other sizes: the next one asks for less. The reason
        in words. `has_numbers`: lifted ints were among its sizes."""
        reason = reason_text("dynamic", why)
        if has_numbers and not self.no_size_numbers:
            self.no_size_numbers = reason
        else:
            self.refused = reason
        return reason

    def observe(self, inputs: list[tuple[Source, TensorMeta]]) -> None:
        """Remembers what a recording read."""
        for source, meta in inputs:
            seen = self._seen.setdefault(str(source), [])
            if meta.sizes not in seen:
                seen.append(meta.sizes)

    def observe_numbers(self, guards: list[Guard]) -> None:
        """Remembers the numbers and the lengths of containers that a recording fixed."""
        for guard in guards:
            if guard.check in ("LEN", "DICT_KEYS"):
                length = guard.operands[0]
                seen = self._lengths.setdefault(str(guard.source), [])
                seen.append(length if type(length) is int else len(length))
            if guard.check == "EQUALS" and type(guard.operands[0]) in (int, float):
                seen = self._numbers.setdefault(str(guard.source), [])
                if len(seen) < _MAX_SEEN:
                    seen.append(guard.operands[0])

    def lifts(self, value: Any, source: Source) -> bool:
        """Whether the int or float at `source` differs between calls."""
        if not self._numbers or not self.is_enabled or self.no_numbers:
            return False
        if type(value) is float and math.isnan(value):
            return False
        name = str(source)
        if name in self._fixed and not self.leaves_numbers:
            return False
        if name not in self._lifted:
            seen = self._numbers.get(name, ())
            if not any(type(v) is type(value) and not is_same(v, value) for v in seen):
                return False
            self._lifted.add(name)
        return True

    def grows(self, source: Source, length: int) -> bool:
        """Whether the container at `source` was longer in each recording than in the one before:
        one more variant would serve one call."""
        seen = [*self._lengths.get(str(source), ())[-_GROWTH:], length]
        return len(seen) > _GROWTH and all(a < b for a, b in itertools.pairwise(seen))

    @property
    def has_fixed(self) -> bool:
        """Whether recordings hold for one value of a number that differs between calls."""
        return bool(self._fixed) or self._has_fixed_computed

    def fix_number(self, source: Source | None) -> None:
        """A recording had to fix the number there after all; None: one that was computed."""
        if source is None:
            self._has_fixed_computed = True
        else:
            self._fixed.add(str(source))

    def dims(self, tensor: torch.Tensor, source: Source) -> tuple[int, ...]:
        """The dimensions of the tensor at `source` that are left open."""
        if not self.is_enabled or (self.no_gradients and self.grad_mode):
            return ()
        sizes = tuple(tensor.size())
        marked, fixed = _marks(tensor, DYNAMIC_MARK), _marks(tensor, STATIC_MARK)
        everything = self.dynamic is True and type(tensor) is torch.Tensor
        seen = [s for s in self._seen.get(str(source), ()) if len(s) == len(sizes)]
        return tuple(
            d
            for d, n in enumerate(sizes)
            if n >= SMALLEST
            and d not in fixed
            and (d in marked or everything or any(s[d] != n for s in seen))
        )


def _marks(tensor: torch.Tensor, name: str) -> frozenset[int]:
    try:
        attributes = object.__getattribute__(tensor, "__dict__")
    except AttributeError:
        return frozenset()
    found: frozenset[int] = frozenset()
    for attribute in _MARKS[name]:
        found |= frozenset(attributes.get(attribute, ()))
    return found


def mark(tensor: torch.Tensor, dims: int | tuple[int, ...] | list[int], name: str) -> None:
    """Adds dimensions to a mark. Errors: TypeError, IndexError for what is no dimension."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a tensor, not a {type(tensor).__name__}")
    wanted = [dims] if isinstance(dims, int) else list(dims)
    rank = tensor.dim()
    for d in wanted:
        if not -rank <= d < rank:
            raise IndexError(f"a tensor of {rank} dimensions has no dimension {d}")
    marks = _marks(tensor, name) | {d % rank for d in wanted}
    setattr(tensor, name, marks)
