"""Autograd's graph behind tensors: which were computed from which, and what a backward frees.

In: tensors. Out: histories, the places in autograd's graph where gradients at tensors arrive,
and relations between tensors, as positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

# A node and which of its outputs. Nodes are equal only to themselves, and a set keeps them alive.
History: TypeAlias = tuple[Any, int]
_DERIVED = re.compile(r"Backward\d+$")  # nodes whose saved tensors Python can see


def history(tensor: torch.Tensor) -> History:
    """Where the gradient at `tensor` arrives; the node is None for leaves."""
    return (tensor.grad_fn, tensor.output_nr)


def gradient_place(tensor: torch.Tensor) -> History:
    """The same, also for leaves: the node that adds to `grad`."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return (edge.node, edge.output_nr)


def histories_behind(tensor: torch.Tensor) -> set[History]:
    """The histories of all that `tensor` was differentiably computed from, without its own."""
    return {following for node in nodes_behind(tensor) for following in node.next_functions}


def nodes_behind(tensor: torch.Tensor) -> set[Any]:
    """The nodes that a backward from `tensor` runs."""
    found: set[Any] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
    return found


def inner_of(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """By tensor: the positions of the others that it was differentiably computed from."""
    own = [history(tensor) for tensor in tensors]
    behind = [histories_behind(tensor) for tensor in tensors] if len(own) > 1 else [set()]
    return [
        [j for j, place in enumerate(own) if j != k and place in seen]
        for k, seen in enumerate(behind)
    ]


def components_of(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """The positions of tensors whose backwards run nodes in common, leaves aside. The others'
    backwards know nothing of each other."""
    found: list[tuple[list[int], set[Any]]] = []
    for k, tensor in enumerate(tensors):
        members, nodes = [k], {node for node in nodes_behind(tensor) if not _is_leaf(node)}
        apart = []
        for others, theirs in found:
            if nodes.isdisjoint(theirs):
                apart.append((others, theirs))
            else:
                members, nodes = others + members, nodes | theirs
        found = [*apart, (sorted(members), nodes)]
    return sorted(members for members, _ in found)


def freed_with(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """By tensor: the positions of those (itself among them) whose backward frees what its own
    needs."""
    behind = [nodes_behind(tensor) for tensor in tensors]
    saving = {node for node in set().union(*behind) if _saves(node)}
    needs = [nodes & saving for nodes in behind]
    return [[j for j, theirs in enumerate(needs) if not own.isdisjoint(theirs)] for own in needs]


def _is_leaf(node: Any) -> bool:
    return not node.next_functions and hasattr(node, "variable")


def _saves(node: Any) -> bool:
    """Whether the node holds tensors that it frees; True where that cannot be seen."""
    if _is_leaf(node):
        return False
    if _DERIVED.search(node.name()) is None:
        return True
    for name in dir(node):
        if name.startswith("_saved_"):
            try:
                value = getattr(node, name)
            except RuntimeError:  # written since
                return True
            if any(isinstance(v, torch.Tensor) for v in _flat(value)):
                return True
    return False


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
