"""Indexing with numbers that differ between calls: what torch's own `tensor[key]` would fix.

In: a tensor and a key of ints, slices, `...` and None, some of its ints symbolic. Out: the view
that torch's indexing gives, made of selects and slices, which leave the numbers open.
Source: torch/csrc/autograd/python_variable_indexing.cpp (applySlicing, slicePrefix1sSize).
"""

from __future__ import annotations

from typing import Any

import torch

_PLAIN = (int, slice, type(None), type(...))


def applies(key: Any) -> bool:
    """Whether a symbolic int selects, in a key that holds nothing but ints, slices and the like."""
    parts = key if isinstance(key, tuple) else (key,)
    return any(isinstance(p, torch.SymInt) for p in parts) and all(
        isinstance(p, (torch.SymInt, *_PLAIN)) and not isinstance(p, bool) for p in parts
    )


def view(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """`tensor[key]`. Errors: IndexError as torch's."""
    parts = key if isinstance(key, tuple) else (key,)
    taken = sum(p is not None and p is not ... for p in parts)
    if taken > tensor.dim():
        raise IndexError(f"too many indices for tensor of dimension {tensor.dim()}")
    dim, result, left = 0, tensor, tensor.dim() - taken
    for part in parts:
        if part is None:
            result, dim = result.unsqueeze(dim), dim + 1
        elif part is ...:
            dim, left = dim + left, 0
        elif isinstance(part, slice):
            result, dim = result[(slice(None),) * dim + (part,)], dim + 1
        else:
            result = result.select(dim, part)
    return result


def store(tensor: torch.Tensor, key: Any, value: Any) -> None:
    """`tensor[key] = value`."""
    target = view(tensor, key)
    if not isinstance(value, torch.Tensor):
        target.fill_(value)
        return
    while value.dim() > target.dim() and value.size(0) == 1:
        value = value.squeeze(0)
    target.copy_(value)


__all__ = ["applies", "store", "view"]
