"""Autograd's graph behind tensors: which were computed from which.

In: tensors. Out: histories, the places in autograd's graph where gradients at tensors arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

# A node and which of its outputs. Nodes are equal only to themselves, and a set keeps them alive.
History: TypeAlias = tuple[Any, int]


def history(tensor: torch.Tensor) -> History:
    """Where the gradient at `tensor` arrives; the node is None for leaves."""
    return (tensor.grad_fn, tensor.output_nr)


def histories_behind(tensor: torch.Tensor) -> set[History]:
    """The histories of all that `tensor` was differentiably computed from, without its own."""
    seen: set[History] = set()
    nodes: set[Any] = {tensor.grad_fn}
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None:
            continue
        for following in node.next_functions:
            seen.add(following)
            if following[0] not in nodes:
                nodes.add(following[0])
                todo.append(following[0])
    return seen


def inner_of(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """By tensor: the positions of the others that it was differentiably computed from."""
    if len(tensors) < 2:
        return [[] for _ in tensors]
    own = [history(tensor) for tensor in tensors]
    behind = [histories_behind(tensor) for tensor in tensors]
    return [
        [j for j, place in enumerate(own) if j != k and place in seen]
        for k, seen in enumerate(behind)
    ]


def tiers_of(inner: Sequence[Sequence[int]]) -> list[int]:
    """By tensor, its tier: 0 where it was computed from none of the others, else one above the
    highest of these. `inner` is what `inner_of` gave."""
    tiers: dict[int, int] = {}
    for k in sorted(range(len(inner)), key=lambda k: len(inner[k])):  # a tensor's own come first
        tiers[k] = 1 + max((tiers[j] for j in inner[k]), default=-1)
    return [tiers[k] for k in range(len(inner))]
