"""Losses and their gradients as other ATen operations; rules as in `decompositions.py`.

In: the arguments of one dispatched operation. Out: what it returns. Source of the formulas: ATen's
CPU kernels (native/Loss.cpp, native/LossNLL.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from accel.codegen.decompositions_activations import cast, in_float, in_order, widened

aten = torch.ops.aten

_NONE, _MEAN = 0, 1  # at::Reduction


def _reduced(each: Any, reduction: int) -> Any:
    if reduction == _NONE:
        return each
    return each.mean() if reduction == _MEAN else each.sum()


def _share(x: Any, reduction: int) -> float:
    """What the gradient of each element is multiplied by."""
    if reduction != _MEAN:
        return 1.0
    return 1.0 / x.numel() if x.numel() else 0.0


def _mse(x: Any, y: Any, reduction: int = _MEAN) -> Any:
    d = x - y
    return _reduced(d * d, reduction)


def _mse_backward(grad: Any, x: Any, y: Any, reduction: int) -> Any:
    return (x - y) * (2.0 * _share(x, reduction)) * grad


def _smooth_l1(x: Any, y: Any, reduction: int = _MEAN, beta: float = 1.0) -> Any:
    z = torch.abs(x - y)
    return _reduced(torch.where(z < beta, 0.5 * z * z / beta, z - 0.5 * beta), reduction)


def _smooth_l1_backward(grad: Any, x: Any, y: Any, reduction: int, beta: float) -> Any:
    d, norm = x - y, _share(x, reduction)
    inner = torch.where(d >= beta, norm * grad, norm * d * grad / beta)
    return torch.where(d <= -beta, -norm * grad, inner)


def _huber(x: Any, y: Any, reduction: int = _MEAN, delta: float = 1.0) -> Any:
    z = torch.abs(x - y)
    return _reduced(torch.where(z < delta, 0.5 * z * z, delta * (z - 0.5 * delta)), reduction)


def _huber_backward(grad: Any, x: Any, y: Any, reduction: int, delta: float) -> Any:
    d, norm = x - y, _share(x, reduction)
    inner = torch.where(d >= delta, norm * grad * delta, norm * d * grad)
    return torch.where(d <= -delta, -norm * grad * delta, inner)


def _bce_with_logits(
    x: Any, y: Any, weight: Any = None, pos_weight: Any = None, reduction: int = _MEAN
) -> Any:
    log_sigmoid, _ = aten.log_sigmoid_forward.default(x)
    if pos_weight is not None:
        log_sigmoid = log_sigmoid * ((pos_weight - 1) * y + 1)
    each = (1 - y) * x - log_sigmoid
    return _reduced(each if weight is None else each * weight, reduction)


def _soft_margin(x: Any, y: Any, reduction: int = _MEAN) -> Any:
    return _reduced(torch.log(torch.exp(-y * x) + 1.0), reduction)


def _soft_margin_backward(grad: Any, x: Any, y: Any, reduction: int) -> Any:
    z = torch.exp(-y * x)
    return grad * (-_share(x, reduction) * y * z / (z + 1.0))


@in_order
def _nll_backward(
    grad: Any, x: Any, target: Any, weight: Any, reduction: int, ignored: int, total_weight: Any
) -> Any:
    """Zeros but at the targets: said for every element, so that what follows needs no such matrix."""
    if weight is not None or x.dim() not in (1, 2):
        return NotImplemented
    grad = widened(grad)
    if reduction == _MEAN:
        grad = grad / widened(total_weight)
    each = torch.where(target != ignored, -grad, 0.0)
    target = cast(target, torch.int32)  # the forward has found that it is a class
    if x.dim() == 2:
        each, target = each.unsqueeze(1), target.unsqueeze(1)
    classes = torch.arange(x.size(-1), dtype=torch.int32, device=x.device)
    return cast(torch.where(classes == target, each, 0.0), x.dtype)


@in_order
def _log_softmax_backward(grad: Any, out: Any, dim: int, dtype: torch.dtype) -> Any:
    wide = widened(grad)
    return cast(wide - torch.exp(widened(out)) * wide.sum(dim, keepdim=True), dtype)


@in_order
def _softmax_backward(grad: Any, out: Any, dim: int, dtype: torch.dtype) -> Any:
    wide = widened(out)
    each = widened(grad) * wide
    return cast(each - wide * each.sum(dim, keepdim=True), dtype)


_ELEMENTWISE: dict[Any, Callable[..., Any]] = {
    aten.mse_loss.default: _mse,
    aten.mse_loss_backward.default: _mse_backward,
    aten.smooth_l1_loss.default: _smooth_l1,
    aten.smooth_l1_loss_backward.default: _smooth_l1_backward,
    aten.huber_loss.default: _huber,
    aten.huber_loss_backward.default: _huber_backward,
    aten.binary_cross_entropy_with_logits.default: _bce_with_logits,
    aten.soft_margin_loss.default: _soft_margin,
    aten.soft_margin_loss_backward.default: _soft_margin_backward,
}

# Losses that eager reduces in place: the result keeps the memory of all elements' losses.
REDUCED_IN_PLACE = frozenset(
    [aten.mse_loss.default, aten.smooth_l1_loss.default, aten.soft_margin_loss.default]
)


def elements_behind(func: Any, args: Any, kwargs: Any) -> Any:
    """How many elements the memory of a loss's result has in eager; 0: as many as the result."""
    reduction = args[2] if len(args) > 2 else kwargs.get("reduction", _MEAN)
    if func not in REDUCED_IN_PLACE or reduction == _NONE:
        return 0
    return math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape))


LOSSES: dict[Any, Callable[..., Any]] = {
    **{k: in_float(f) for k, f in _ELEMENTWISE.items()},
    aten.nll_loss_backward.default: _nll_backward,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten._softmax_backward_data.default: _softmax_backward,
}
