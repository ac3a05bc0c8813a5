"""What autograd and version counters say of tensors that lie on one memory.

In: a traced graph's inputs and outputs, as fake tensors that have run the program's operations. Out: for
each output the `Severed` tensor that it is, or is a view of, or None for one that is what its
place in memory says: an input, its view, or memory of its own. Invariant: bases and versions
are those that torch itself gave the fakes; no operation is known by name here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from accel.codegen.options import CompileError
from accel.codegen.tensor_graph import Severed, TensorGraph, View


class Relations:
    """`place_of` says where a tensor lies in the graph's buffers."""

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        place_of: Callable[[torch.Tensor], View],
        graph: TensorGraph,
    ) -> None:
        self.inputs = {id(t) for t in inputs}
        self.place_of = place_of
        self.graph = graph
        # By memory: the tensor that its buffer is (None: nobody sees it), and the severed ones.
        self.first: dict[int, torch.Tensor | None] = {
            storage_key(_base(t)): _base(t) for t in inputs
        }
        self.known: dict[int, list[tuple[torch.Tensor, Severed]]] = defaultdict(list)

    def severed(self, output: torch.Tensor) -> Severed | None:
        """Errors: CompileError for a view that changes the dtype of a severed tensor."""
        base, key = _base(output), storage_key(output)
        if id(output) in self.inputs or self.first.get(key) is base:
            return None
        view = self.place_of(base)
        if key not in self.first:
            whole = view == self.graph.buffers[view.buffer].view
            self.first[key] = base if whole else None
            if whole:
                return None
        found = next((s for tensor, s in self.known[key] if tensor is base), None)
        if found is None:
            found = Severed(id(base), view, *self._version_of(base, key))
            self.known[key].append((base, found))
        if base.dtype != output.dtype:
            raise CompileError("aliasing: an output looks at a detached tensor as another dtype")
        return found

    def _version_of(self, tensor: torch.Tensor, key: int) -> tuple[bool, Severed | None]:
        """Whether it has the version of its memory's first tensor, or that of a severed one."""
        root, known = self.first[key], self.known[key]
        if root is not None and _share_version(root, tensor):
            return True, None
        if root is None and not known:  # it stands for the one that nobody sees
            return True, None
        for other, severed in known:
            if _share_version(other, tensor):
                return severed.shares_version, None if severed.shares_version else severed
        return False, None


def _base(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that autograd knows it as a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def storage_key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _share_version(a: torch.Tensor, b: torch.Tensor) -> bool:
    before = b._version
    torch.autograd.graph.increment_version(a)
    return bool(b._version != before)
