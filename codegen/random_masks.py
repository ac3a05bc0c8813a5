"""Dropout masks from a hash of positions: `fast_dropout`, for who asks for it.

In: a drawing of ones and zeros with one probability (`bernoulli`, which is what dropout draws).
Out: two numbers from the program's generator, which seed the masks of one drawing, and an
operator that makes them of the elements' positions inside loops, in the backward once more
rather than saved. Invariants: an element's bit is a function of its position and the seeds
alone, whatever computes it; `torch.manual_seed` determines the seeds. Only graphs with gradients
draw so: what recomputes a forward in its backward (torch.utils.checkpoint) runs it without
gradients or under hooks first, with eager's masks, and gets those again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.codegen.affine import Affine
from accel.codegen.builder import Builder
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, Iota, cast, constant, op
from accel.codegen.scalar_ops import SCALAR_OPS
from accel.codegen.tensor_graph import Node, View, contiguous_strides

aten = torch.ops.aten

_BITS = 1 << 32


_SCHEMA = (
    "bernoulli(SymInt[] size, SymInt[] stride, Tensor seeds, float p, ScalarType dtype) -> Tensor"
)


@functools.cache
def _library() -> Any:
    library = torch.library.Library("accel", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("bernoulli", _empty, "Meta")
    library.impl("bernoulli", _mask, "CPU")
    return library


def bernoulli_operator() -> Any:
    """`accel::bernoulli`, which the dispatcher knows from here on."""
    _library()
    return torch.ops.accel.bernoulli.default


def _empty(size: Any, stride: Any, seeds: Any, p: float, dtype: torch.dtype) -> torch.Tensor:
    return seeds.new_empty_strided(size, stride, dtype=dtype)


def _mask(size: Any, stride: Any, seeds: Any, p: float, dtype: torch.dtype) -> torch.Tensor:
    """What the kernels compute, by torch's operations."""
    places = torch.arange(math.prod(size), dtype=torch.int64).to(torch.int32)
    bits = bits_at(places, seeds[0], seeds[1], SCALAR_OPS["random_bits"].torch)
    return _empty(size, stride, seeds, p, dtype).copy_(_is_one(bits, p).view(size))


def bits_at(place: Any, first: Any, second: Any, hash_: Callable[..., Any]) -> Any:
    """32 random bits of a place. Of the seeds alone, and computed once: two keys, so that seeds
    which differ in one bit have nothing in common."""
    key = hash_(first, second, second)
    return hash_(place, key, hash_(second, key, key))


def _is_one(bits: torch.Tensor, p: float) -> torch.Tensor:
    bound = _bound(p)
    return torch.full_like(bits, bound) if isinstance(bound, bool) else bits < bound


def _bound(p: float) -> int | bool:
    """Bits, as a signed number, below it stand for a one; a truth where they all do, or none."""
    ones = round(p * _BITS)
    return ones - _BITS // 2 if 0 < ones < _BITS else ones > 0


def _bernoulli(x: Any, p: Any, *, generator: Any = None) -> Any:
    """`aten::bernoulli.p`, an operation that draws for each element, as one that draws seeds."""
    if generator is not None or not isinstance(p, float) or str(x.dtype)[6:] not in VALUE_TYPE:
        return NotImplemented
    low, high = -(1 << 31), 1 << 31
    seeds = aten.randint.low(low, high, [2], dtype=torch.int32, device=x.device)
    like = torch.empty_like(x)
    return bernoulli_operator()(like.shape, like.stride(), seeds, p, x.dtype)


# By functional operation; NotImplemented leaves a call as it is.
FAST_DROPOUT: dict[Any, Callable[..., Any]] = {aten.bernoulli.p: _bernoulli}


def lower_mask(b: Builder, node: Node, out: View) -> None:
    _, _, seeds, p, _ = node.args
    bound, type_ = _bound(p), VALUE_TYPE[out.dtype]
    strides = contiguous_strides(out.sizes)

    def value(index: list[Affine]) -> Expr:
        if isinstance(bound, bool):
            return Const(constant(bound, type_), type_)
        place = Affine()
        for i, stride in zip(index, strides, strict=True):
            place = place.plus(i.times(stride))
        first, second = (b.load(seeds, [Affine(k)]) for k in (0, 1))
        hash_ = functools.partial(op, "random_bits")
        bits = bits_at(cast(Iota(place), "i32"), first, second, hash_)
        return cast(op("lt", bits, Const(bound, "i32")), type_)

    b.pointwise(out, value)


class Redrawing(TorchDispatchMode):  # type: ignore[misc]
    """Eager operations under it draw the masks that a plan with `fast_dropout` has drawn."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.bernoulli_.float:
            p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            drawn = _bernoulli(args[0], p, generator=kwargs.get("generator"))
            if drawn is not NotImplemented:
                return args[0].copy_(drawn)
        elif func is aten.bernoulli.p:
            drawn = _bernoulli(*args, **kwargs)
            if drawn is not NotImplemented:
                return drawn
        return func(*args, **kwargs)
