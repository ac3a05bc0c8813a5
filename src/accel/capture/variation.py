"""What differs between the calls of one root: which sizes a recording leaves open.

In: what earlier recordings of the root read, the user's marks, the `dynamic` setting. Out: for a
tensor at a source, the dimensions that become symbols. Invariant: a policy only. Whatever it
answers, the guards of the recording and the tests of its graph decide which calls are served.
"""

from __future__ import annotations

import torch

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
SMALLEST = 2  # sizes 0 and 1 mean something else (nothing, broadcasting)


class Variation:
    """The history of one root's inputs."""

    def __init__(self, dynamic: bool | None) -> None:
        """`dynamic`: True for every size at once, False for none, None for those that change."""
        self.dynamic = dynamic
        self.no_gradients = False  # recordings with grad mode on leave nothing open
        self.refused = ""  # why this root is recorded with fixed sizes from now on
        self._seen: dict[str, list[tuple[int, ...]]] = {}

    @property
    def is_enabled(self) -> bool:
        if self.no_gradients and torch.is_grad_enabled():
            return False
        return self.dynamic is not False and not self.refused

    def observe(self, inputs: list[tuple[Source, TensorMeta]]) -> None:
        """Remembers what a recording read."""
        for source, meta in inputs:
            seen = self._seen.setdefault(str(source), [])
            if meta.sizes not in seen:
                seen.append(meta.sizes)

    def dims(self, tensor: torch.Tensor, source: Source) -> tuple[int, ...]:
        """The dimensions of the tensor at `source` that are left open."""
        if not self.is_enabled:
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
