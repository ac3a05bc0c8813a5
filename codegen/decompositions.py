"""ATen operations that are written as other ATen operations before lowering.

In: the arguments of one dispatched operation, on fake tensors with the recorder active.
Out: what the operation returns. Rules for a new row: (1) only where eager's own kernel does
something a lowering cannot say (hidden writes, several results of different spaces);
(2) the result has eager's sizes, strides and dtype; (3) hidden writes become in-place
operations here, so that they reach the commit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from accel.codegen.decompositions_activations import ACTIVATIONS, cast, in_order, widened
from accel.codegen.decompositions_losses import LOSSES
from accel.codegen.options import CompileError

aten = torch.ops.aten


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    if training:
        return _batch_norm_training(x, weight, bias, mean, var, momentum, eps)
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    scale = torch.rsqrt(cast(var, wide) + eps)
    if weight is not None:
        scale = scale * cast(weight, wide)
    shift = -cast(mean, wide) * scale
    if bias is not None:
        shift = shift + cast(bias, wide)
    out = cast(cast(x, wide) * scale.view(shape) + shift.view(shape), x.dtype)
    empty = x.new_empty(0, dtype=mean.dtype)
    return out, empty, empty.clone()


def _batch_norm_training(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    shape = [1, -1] + [1] * (x.dim() - 2)
    axes = [d for d in range(x.dim()) if d != 1]
    wide = widened(x)
    batch_mean = wide.mean(axes)
    centred = wide - batch_mean.view(shape)
    batch_var = (centred * centred).mean(axes)
    invstd = torch.rsqrt(batch_var + eps)
    # As ATen: one factor and one summand for each channel.
    scale = invstd if weight is None else invstd * weight
    shift = -batch_mean * scale if bias is None else bias - batch_mean * scale
    out = wide * scale.view(shape) + shift.view(shape)
    count = x.numel() // x.size(1)
    if mean is not None:
        mean.mul_(1 - momentum).add_(batch_mean, alpha=momentum)
    if var is not None:
        unbiased = batch_var * (count / max(count - 1, 1))
        var.mul_(1 - momentum).add_(unbiased, alpha=momentum)
    return cast(out, x.dtype), batch_mean, invstd


def _group_norm(
    x: Any, weight: Any, bias: Any, n: int, channels: int, size: int, groups: int, eps: float
) -> Any:
    if not x.is_contiguous() or x.numel() == 0:
        return NotImplemented
    wide = widened(x).view(n, groups, channels // groups * size)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    # As ATen: one factor and one summand for each channel.
    scale = rstd if weight is None else rstd * widened(weight).view(1, groups, channels // groups)
    shift = -mean * scale
    if bias is not None:
        shift = shift + widened(bias).view(1, groups, channels // groups)
    each = [t.expand(n, groups, channels // groups).reshape(n, channels, 1) for t in (scale, shift)]
    out = widened(x).view(n, channels, size) * each[0] + each[1]
    facts = (cast(t.view(n, groups), x.dtype) for t in (mean, rstd))
    return cast(out.view(x.shape), x.dtype), *facts


@in_order
def _pixel_shuffle(x: Any, factor: int) -> Any:
    if x.numel() == 0:
        return NotImplemented
    *lead, channels, height, width = x.shape
    parts = x.reshape(math.prod(lead), channels // factor**2, factor, factor, height, width)
    shape = (*lead, channels // factor**2, height * factor, width * factor)
    return parts.permute(0, 1, 4, 2, 5, 3).contiguous().view(shape)


@in_order
def _pixel_unshuffle(x: Any, factor: int) -> Any:
    if x.numel() == 0:
        return NotImplemented
    *lead, channels, height, width = x.shape
    h, w = height // factor, width // factor
    parts = x.reshape(math.prod(lead), channels, h, factor, w, factor)
    shape = (*lead, channels * factor**2, h, w)
    return parts.permute(0, 1, 3, 5, 2, 4).contiguous().view(shape)


@in_order
def _logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    """As ATen does it: infinities are not subtracted from themselves."""
    if not x.dtype.is_floating_point or x.numel() == 0:
        return NotImplemented
    wide = widened(x)
    top = wide.amax(dim, keepdim=True)
    top = torch.where(torch.abs(top) == math.inf, 0.0, top)
    total = torch.log(torch.exp(wide - top).sum(dim, keepdim=True)) + top
    if not keepdim:
        dims = sorted(d % max(x.dim(), 1) for d in (dim if isinstance(dim, list) else [dim]))
        for d in reversed(dims if x.dim() else []):
            total = total.squeeze(d)
    return cast(total, x.dtype)


def _var(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return cast(_wide_var(x, dim, correction, keepdim), x.dtype)


def _wide_var(x: Any, dim: Any, correction: Any, keepdim: bool) -> Any:
    """In float64, as ATen computes it."""
    _check_freedom(x, dim, correction)
    axes = list(range(x.dim())) if dim is None or len(dim) == 0 else [d % x.dim() for d in dim]
    wide = widened(x)
    count = 1
    for d in axes:
        count *= x.size(d)
    # Squares overflow in less, and what the mean was rounded by is taken off again.
    centred = cast(wide - wide.mean(axes, keepdim=True), torch.float64)
    off = centred.sum(axes, keepdim=keepdim)
    total = (centred * centred).sum(axes, keepdim=keepdim) - off * off / count
    divisor = count - (1 if correction is None else correction)
    return total / divisor


def _check_freedom(x: Any, dim: Any, correction: Any) -> None:
    """ATen warns about too few degrees of freedom, at the program's own line.

    Errors: CompileError then: only the program itself can warn there.
    """
    axes = range(x.dim()) if dim is None or len(dim) == 0 else dim
    count = 1
    for d in axes:
        count *= x.size(d)
    if count - (1 if correction is None else correction) <= 0:
        raise CompileError("a variance of too few elements gives a warning")


def _std(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    _check_freedom(x, dim, correction)
    return cast(torch.sqrt(_wide_var(x, dim, correction, keepdim)), x.dtype)


def _var_mean(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    _check_freedom(x, dim, correction)
    axes = list(range(x.dim())) if dim is None or len(dim) == 0 else list(dim)
    return _var(x, dim, correction=correction, keepdim=keepdim), x.mean(axes, keepdim=keepdim)


def _stack(tensors: Any, dim: int = 0) -> Any:
    return torch.cat([t.unsqueeze(dim) for t in tensors], dim)


def _roll(x: Any, shifts: Any, dims: Any = ()) -> Any:
    """As ATen does it: what goes over the end is put before the beginning."""
    if x.numel() == 0:
        return x.clone()
    if not dims:
        return _roll(x.contiguous().view(-1), shifts, (0,)).view(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.size(dim)
        if 0 <= shift <= size:  # as it mostly is; a remainder of a size that is open is no size
            start = size - shift
        else:
            start = -shift if -size <= shift < 0 else (size - shift) % size
        x = torch.cat([x.narrow(dim, start, size - start), x.narrow(dim, 0, start)], dim)
    return x


@in_order
def _norm(x: Any, p: Any = None, dim: Any = (), keepdim: bool = False) -> Any:
    return aten.linalg_vector_norm.default(x, 2 if p is None else p, dim, keepdim)


def _slice_backward(grad: Any, sizes: Any, dim: int, start: int, end: int, step: int) -> Any:
    out = grad.new_zeros(sizes)
    aten.slice.Tensor(out, dim, start, end, step).copy_(grad)
    return out


def _select_backward(grad: Any, sizes: Any, dim: int, index: int) -> Any:
    out = grad.new_zeros(sizes)
    aten.select.int(out, dim, index).copy_(grad)
    return out


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **ACTIVATIONS,
    **LOSSES,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_group_norm.default: _group_norm,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.logsumexp.default: _logsumexp,
    aten.var.correction: _var,
    aten.std.correction: _std,
    aten.var_mean.correction: _var_mean,
    aten.stack.default: _stack,
    aten.roll.default: _roll,
    aten.norm.ScalarOpt_dim: _norm,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
}
