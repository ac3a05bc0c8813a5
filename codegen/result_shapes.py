"""What ATen operations give, where torch's own functions for fake tensors do not know it.

In: the arguments of one operation, on fake tensors. Out: a fake tensor like its result.
Rules for a new row: (1) only for operations that eager runs on the CPU and torch's meta function
refuses or states otherwise; (2) sizes, strides and dtype are those that eager gives. What the
arguments must fulfil was checked by eager when they were recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accel.codegen.tensor_graph import contiguous_strides

aten = torch.ops.aten

_ROW_BYTES = 16  # rows of a grouped product begin at multiples of this


def _grouped_mm(
    a: Any, b: Any, offs: Any = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> Any:
    """Source: ATen `create_grouped_gemm_output_tensor`; torch's meta function takes bfloat16 only."""
    dtype = out_dtype or a.dtype
    rows, columns = a.size(-2), b.size(-1)
    if a.dim() == 2 and b.dim() == 2:
        lead = [offs.size(0)]
    elif a.dim() == 3 and b.dim() == 3:
        lead = [a.size(0)]
    else:
        lead = []
    step = _ROW_BYTES // dtype.itemsize
    width = (columns + step - 1) // step * step
    strides = [rows * width, width, 1] if lead else [width, 1]
    return a.new_empty_strided([*lead, rows, columns], strides, dtype=dtype)


def _by_gradient(grad: Any, *args: Any) -> Any:
    """In the order of the gradient; where that has none (one number for all), of the input."""
    x = next(a for a in reversed(args) if isinstance(a, torch.Tensor))
    return aten.add.Tensor(grad, x)


def _in_order(grad: Any, x: Any, *args: Any) -> Any:
    return x.new_empty(x.shape)


def _like_gradient(grad: Any, *args: Any) -> Any:
    return torch.empty_like(grad)


def _log_sigmoid(x: Any) -> Any:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _convolution_backward(grad: Any, x: Any, weight: Any, *args: Any) -> Any:
    """The gradient of a 1x1 weight lies as the weight, also where images lie by channels."""
    into, of_weight, of_bias = aten.convolution_backward.default(grad, x, weight, *args)
    lies = contiguous_strides(tuple(weight.shape))
    if of_weight is not None and all(n == 1 for n in weight.shape[2:]) and weight.stride() == lies:
        of_weight = weight.new_empty(weight.shape)
    return into, of_weight, of_bias


RESULTS: dict[Any, Callable[..., Any]] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.convolution_backward.default: _convolution_backward,
    aten.elu_backward.default: _by_gradient,
    aten.hardtanh_backward.default: _by_gradient,
    aten.hardswish_backward.default: _by_gradient,
    aten.hardsigmoid_backward.default: _by_gradient,
    aten.softplus_backward.default: _by_gradient,
    aten.logit_backward.default: _by_gradient,
    aten.glu_backward.default: _in_order,
    aten.mse_loss_backward.default: _in_order,
    aten.smooth_l1_loss_backward.default: _in_order,
    aten.huber_loss_backward.default: _in_order,
    aten.log_sigmoid_forward.default: _log_sigmoid,
    aten.log_sigmoid_backward.default: _like_gradient,
}
