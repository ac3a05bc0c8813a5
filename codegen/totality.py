"""Which operations give a result whatever values their tensors hold.

In: a node of the tensor graph. Out: whether it may be left out when nobody reads its result.
Invariant: an operation that is not known here may raise (an index out of range, a target that
is no class, a matrix that cannot be factored), and is kept for its error.
"""

from __future__ import annotations

import torch

from accel.codegen.indices import INDEXED
from accel.codegen.lowering import LOWERINGS, MULTIPLE
from accel.codegen.products import PRODUCTS
from accel.codegen.tensor_graph import Node

aten = torch.ops.aten

# By name, all overloads: beside those that have a lowering or are tagged as pointwise.
_TOTAL = frozenset({
    "_adaptive_avg_pool2d", "_log_softmax_backward_data", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_scaled_dot_product_flash_attention_for_cpu", "_softmax_backward_data", "_to_copy", "all",
    "amax", "amin", "aminmax", "any", "argmax", "argmin", "argsort", "avg_pool1d", "baddbmm", "bmm",
    "cat", "clone", "convolution_backward", "cummax", "cummin", "cumprod", "cumsum", "dot", "empty",
    "empty_like", "empty_strided", "expand", "flip", "full", "full_like", "lift_fresh_copy",
    "linspace", "logcumsumexp", "logsumexp", "max", "max_pool2d",
    "mean", "min", "mv", "native_batch_norm", "native_batch_norm_backward", "native_group_norm",
    "native_layer_norm", "native_layer_norm_backward", "nonzero", "norm", "ones", "ones_like",
    "roll", "scalar_tensor", "sort", "stack", "std", "std_mean", "sum", "topk", "tril_indices",
    "triu_indices", "var", "var_mean", "zeros", "zeros_like",
})  # fmt: skip
# Pointwise, but an integer divided by zero raises.
_DIVISIONS = frozenset({"div", "floor_divide", "fmod", "remainder"})


def may_raise(node: Node) -> bool:
    """Whether running `node` can end in an error that depends on values."""
    if isinstance(node.target, str):  # our own: copies
        return False
    name = node.target.overloadpacket.__name__
    if name in _DIVISIONS:
        return not all(getattr(torch, view.dtype).is_floating_point for view in node.views())
    return node.target in INDEXED or not (
        name in _TOTAL
        or torch.Tag.pointwise in node.target.tags
        or node.target in LOWERINGS
        or node.target in MULTIPLE
        or node.target in PRODUCTS
    )
