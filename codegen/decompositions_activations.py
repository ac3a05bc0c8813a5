"""Activations and their gradients as other ATen operations; rules as in `decompositions.py`.

In: the arguments of one dispatched operation. Out: what it returns, computed in float32 where the
tensors have 16 bits, as ATen's kernels compute it. Source of the formulas: ATen's CPU kernels
(native/cpu/Activation.cpp); where these answer a NaN otherwise in vectors than behind the last whole one,
the vectors'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def cast(x: Any, dtype: torch.dtype) -> Any:
    """`x.to(dtype)`, which here would stay an operation that has no lowering."""
    return x if x.dtype == dtype else aten._to_copy.default(x, dtype=dtype)


def widened(x: Any) -> Any:
    narrow = isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16)
    return cast(x, torch.float32) if narrow else x


def in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` where all tensors lie in order: some of eager's kernels keep another order in their
    results, others do not, and the operations here do not tell them apart."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for t in args:
            if isinstance(t, torch.Tensor) and not t.is_contiguous() and any(t.stride()):
                return NotImplemented
        return function(*args, **kwargs)

    return wrapper


def in_float(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of widened tensors in order, with results of the first argument's dtype. Operands of
    several dtypes, and others than floating point, stay one operation."""

    @in_order
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
        if len(dtypes) > 1 or not args[0].dtype.is_floating_point:
            return NotImplemented
        out = function(*map(widened, args), **kwargs)
        if isinstance(out, tuple):
            return tuple(cast(t, args[0].dtype) for t in out)
        return cast(out, args[0].dtype)

    return wrapper


def _elu_backward(
    grad: Any, alpha: float, scale: float, input_scale: float, is_result: bool, x: Any
) -> Any:
    if is_result:
        negative = grad * input_scale * (x + alpha * scale)
    else:
        negative = grad * input_scale * (alpha * scale) * torch.exp(x * input_scale)
    return torch.where(x > 0, grad * scale, negative)


def _celu(x: Any, alpha: float = 1.0) -> Any:
    return aten.elu.default(x, alpha, 1.0, 1.0 / alpha)


def _leaky_relu_backward(grad: Any, x: Any, slope: float, is_result: bool) -> Any:
    return torch.where(x > 0, grad, grad * slope)


def _hardtanh_backward(grad: Any, x: Any, low: float, high: float) -> Any:
    return torch.where((x > low) & (x < high), grad, 0.0)


def _hardswish_backward(grad: Any, x: Any) -> Any:
    middle = torch.where(x >= 3, grad, grad * (x / 3 + 0.5))
    return torch.where(x <= -3, 0.0, middle)


def _hardsigmoid_backward(grad: Any, x: Any) -> Any:
    return torch.where((x > -3) & (x < 3), grad / 6, 0.0)


def _softplus_backward(grad: Any, x: Any, beta: float, threshold: float) -> Any:
    z = torch.exp(x * beta)
    return torch.where(x * beta > threshold, grad, grad * z / (z + 1))


def _mish_backward(grad: Any, x: Any) -> Any:
    t = torch.tanh(torch.log1p(torch.exp(x)))
    return grad * (t + x * torch.sigmoid(x) * (1 - t * t))


def _prelu(x: Any, weight: Any) -> Any:
    return torch.where(x > 0, x, weight * x)


def _prelu_backward(grad: Any, x: Any, weight: Any) -> Any:
    positive = x > 0
    return torch.where(positive, grad, weight * grad), torch.where(positive, 0.0, x * grad)


def _glu(x: Any, dim: int = -1) -> Any:
    half = x.size(dim) // 2
    return x.narrow(dim, 0, half) * torch.sigmoid(x.narrow(dim, half, half))


def _glu_backward(grad: Any, x: Any, dim: int) -> Any:
    half = x.size(dim) // 2
    a, s = x.narrow(dim, 0, half), torch.sigmoid(x.narrow(dim, half, half))
    return torch.cat([s * grad, (1 - s) * s * grad * a], dim)


def _softshrink(x: Any, limit: float = 0.5) -> Any:
    inner = torch.where(x < -limit, x + limit, x * 0.0)
    return torch.where(x > limit, x - limit, inner)


def _hardshrink(x: Any, limit: float = 0.5) -> Any:
    return torch.where((x >= -limit) & (x <= limit), 0.0, x)


def _shrink_backward(grad: Any, x: Any, limit: float) -> Any:
    return torch.where((x > limit) | (x < -limit), grad, 0.0)


def _log_sigmoid(x: Any) -> Any:
    z = torch.exp(-torch.abs(x))
    return torch.clamp_max(x, 0.0) - torch.log1p(z), z


def _log_sigmoid_backward(grad: Any, x: Any, z: Any) -> Any:
    rest = z / (1 + z)
    return grad * torch.where(x < 0, 1 - rest, rest)


def _logit(x: Any, eps: float | None = None) -> Any:
    if eps is not None:
        x = torch.where(x < eps, eps, torch.where(x > 1 - eps, 1 - eps, x))
    return torch.log(x / (1 - x))


def _logit_backward(grad: Any, x: Any, eps: float | None = None) -> Any:
    bounded = eps is not None and eps >= 0
    low, outside = (eps, 0.0) if bounded else (0.0, math.nan)
    assert low is not None
    return torch.where((x >= low) & (x <= 1 - low), grad / (x * (1 - x)), outside)


def _logaddexp(a: Any, b: Any) -> Any:
    same = torch.isinf(a) & (a == b)
    rest = torch.log1p(torch.exp(-torch.abs(a - b)))
    return torch.where(same, a, torch.maximum(a, b) + rest)


_FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.elu_backward.default: _elu_backward,
    aten.celu.default: _celu,
    aten.leaky_relu_backward.default: _leaky_relu_backward,
    aten.hardtanh_backward.default: _hardtanh_backward,
    aten.hardswish_backward.default: _hardswish_backward,
    aten.hardsigmoid_backward.default: _hardsigmoid_backward,
    aten.softplus_backward.default: _softplus_backward,
    aten.mish_backward.default: _mish_backward,
    aten._prelu_kernel.default: _prelu,
    aten._prelu_kernel_backward.default: _prelu_backward,
    aten.glu.default: _glu,
    aten.glu_backward.default: _glu_backward,
    aten.softshrink.default: _softshrink,
    aten.softshrink_backward.default: _shrink_backward,
    aten.hardshrink.default: _hardshrink,
    aten.hardshrink_backward.default: _shrink_backward,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.log_sigmoid_backward.default: _log_sigmoid_backward,
    aten.logit.default: _logit,
    aten.logit_backward.default: _logit_backward,
    aten.logaddexp.default: _logaddexp,
}

ACTIVATIONS: dict[Any, Callable[..., Any]] = {k: in_float(f) for k, f in _FORMULAS.items()}
