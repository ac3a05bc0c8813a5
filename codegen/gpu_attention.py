"""Attention on a GPU: one call of torch's own function, which chooses among its kernels when it runs.

In: the arguments of `scaled_dot_product_attention`. Out: the call, and a tensor as its result will lie. Invariant:
nothing is taken apart: without a GPU torch would choose plain products here, whose scores fill memory. The choice hangs
on sizes, types, the GPU and settings; eager's choice at the same place is the same one.
"""

from __future__ import annotations

from typing import Any

import torch

from accel.codegen.options import CompileError

TARGET = "torch.nn.functional.scaled_dot_product_attention"


def result_and_call(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Errors: CompileError where the result has a history, which one call cannot give, or is random."""
    tensors = [t for t in (query, key, value, attn_mask) if isinstance(t, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise CompileError("torch chooses among its kernels, and their gradients, when it runs")
    if dropout_p:
        raise CompileError("kernels do not draw as it does on a GPU")
    sizes = [*query.shape[:-1], value.shape[-1]]
    function = torch.ops.aten.scaled_dot_product_attention.default
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    named = {"scale": scale, "enable_gqa": enable_gqa}
    return _as_flash_lays_it(query, sizes), (function, arguments, named)


def _as_flash_lays_it(query: Any, sizes: list[Any]) -> Any:
    """Heads beside each other in memory, as the fused kernels write them; another layout is copied."""
    if len(sizes) != 4:
        return query.new_empty(sizes)
    _, heads, length, width = sizes
    return query.new_empty_strided(sizes, [length * heads * width, width, heads * width, 1])
