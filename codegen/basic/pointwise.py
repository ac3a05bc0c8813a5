"""Lowering of pointwise ATen operators: one row each, from operand texts to a C++ expression.

Rules for whoever adds a row:
1. A row is a function of the operands' expressions, already cast to the operator's
   computation type; it answers an expression of the same type (or of bool, for PREDICATES).
2. NaN, infinities and signed zeros come out as ATen's.
3. tests/unit/codegen/test_pointwise.py runs every row against eager.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# torch dtype -> C++ type. Other dtypes stay with ATen.
C_TYPES: dict[torch.dtype, str] = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}

Row = Callable[..., str]


def _binary(op: str) -> Row:
    return lambda a, b: f"({a} {op} {b})"


def _call(name: str) -> Row:
    return lambda *args: f"{name}({', '.join(args)})"


# Same type in and out, for every type of C_TYPES but bool.
ARITHMETIC: dict[Any, Row] = {
    aten.mul.Tensor: _binary("*"),
    aten.mul.Scalar: _binary("*"),
    aten.neg.default: lambda a: f"(-{a})",
    aten.maximum.default: _call("a_max"),
    aten.minimum.default: _call("a_min"),
    aten.clone.default: lambda a: a,
    aten.lift_fresh_copy.default: lambda a: a,
}

# float32 only: our own math.
FLOAT32: dict[Any, Row] = {
    aten.exp.default: _call("a_exp"),
    aten.erf.default: _call("a_erf"),
    aten.tanh.default: _call("a_tanh"),
    aten.sigmoid.default: _call("a_sigmoid"),
    aten.silu.default: _call("a_silu"),
}

# Floating types.
FLOATING: dict[Any, Row] = {
    aten.relu.default: lambda a: f"({a} < 0 ? 0 : {a})",
    aten.reciprocal.default: lambda a: f"(1 / {a})",
    aten.square.default: lambda a: f"({a} * {a})",
}
ROOTS: dict[Any, tuple[Row, Row]] = {  # float32, float64
    aten.sqrt.default: (_call("__builtin_sqrtf"), _call("__builtin_sqrt")),
    aten.rsqrt.default: (
        lambda a: f"(1.f / __builtin_sqrtf({a}))",
        lambda a: f"(1. / __builtin_sqrt({a}))",
    ),
    aten.abs.default: (_call("__builtin_fabsf"), _call("__builtin_fabs")),
    aten.floor.default: (_call("__builtin_floorf"), _call("__builtin_floor")),
    aten.ceil.default: (_call("__builtin_ceilf"), _call("__builtin_ceil")),
    aten.trunc.default: (_call("__builtin_truncf"), _call("__builtin_trunc")),
}

PREDICATES: dict[Any, Row] = {}
for _name, _op in (
    ("eq", "=="),
    ("ne", "!="),
    ("lt", "<"),
    ("le", "<="),
    ("gt", ">"),
    ("ge", ">="),
):
    for _overload in ("Tensor", "Scalar"):
        PREDICATES[getattr(getattr(aten, _name), _overload)] = _binary(_op)

LOGICAL: dict[Any, Row] = {
    aten.logical_not.default: lambda a: f"(!{a})",
    aten.logical_and.default: _binary("&&"),
    aten.logical_or.default: _binary("||"),
}
BITWISE: dict[Any, Row] = {
    aten.bitwise_and.Tensor: _binary("&"),
    aten.bitwise_or.Tensor: _binary("|"),
    aten.bitwise_xor.Tensor: _binary("^"),
}
BITWISE_NOT = aten.bitwise_not.default
WITH_ALPHA = {
    aten.add.Tensor: "+",
    aten.add.Scalar: "+",
    aten.sub.Tensor: "-",
    aten.sub.Scalar: "-",
}
DIVISIONS = {aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor}
CASTS = {aten._to_copy.default, aten.clone.default, aten.lift_fresh_copy.default}


# Constant tensors: which argument is the value; -1 is zero, -2 is one.
FILLS = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.scalar_tensor.default: 0,
    aten.zeros.default: -1,
    aten.zeros_like.default: -1,
    aten.ones.default: -2,
    aten.ones_like.default: -2,
}


def literal(value: Any, dtype: torch.dtype) -> str:
    """A Python number as a C++ constant of `dtype`."""
    if dtype is torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        return f"({C_TYPES[dtype]}){int(value)}L"
    number = float(value)
    suffix = "f" if dtype is torch.float32 else ""
    if math.isnan(number):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(number):
        return f"({'-' if number < 0 else ''}__builtin_inf{suffix}())"
    if suffix:
        number = float(torch.tensor(number, dtype=torch.float32))
        if math.isinf(number):
            return f"({'-' if number < 0 else ''}__builtin_inff())"
    return (
        f"({number!r}{suffix})" if "e" in repr(number) or "." in repr(number) else f"({number}.0)"
    )


def _cast(expression: str, source: torch.dtype, target: torch.dtype) -> str:
    if source is target:
        return expression
    if target is torch.bool:
        return f"({expression} != 0)"
    return f"(({C_TYPES[target]}){expression})"


def dtype_of(argument: Any) -> torch.dtype | None:
    if isinstance(argument, fx.Node):
        value = argument.meta.get("val")
        return value.dtype if isinstance(value, torch.Tensor) else None
    return None


def lower(node: fx.Node, operand: Callable[[Any], str]) -> str | None:
    """The C++ expression of a pointwise node, or None when it has no row.

    `operand` gives the expression of a tensor argument in its own dtype.
    """
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in C_TYPES:
        return None
    target = node.target
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    if any(dtype_of(a) not in C_TYPES for a in tensors) or value.dim() > 8:
        return None
    out = value.dtype
    if target in PREDICATES or target in LOGICAL:
        return _predicate(node, operand)

    def load(argument: Any, dtype: torch.dtype) -> str:
        if isinstance(argument, fx.Node):
            own = dtype_of(argument)
            assert own is not None
            return _cast(operand(argument), own, dtype)
        return literal(argument, dtype)

    if target in FILLS:
        return literal(node.args[FILLS[target]] if FILLS[target] >= 0 else -FILLS[target] - 1, out)
    if target in CASTS:
        if set(node.kwargs) - {"dtype", "memory_format", "device", "layout", "pin_memory"}:
            return None
        return load(node.args[0], out)
    if target is BITWISE_NOT:
        return f"(!{operand(node.args[0])})" if out is torch.bool else f"(~{operand(node.args[0])})"
    if target in BITWISE and not out.is_floating_point:
        expression = BITWISE[target](*(load(a, out) for a in node.args))
        return f"((bool){expression})" if out is torch.bool else expression
    if target is aten.where.self:
        condition, a, b = node.args
        if dtype_of(condition) is not torch.bool:
            return None
        return f"({operand(condition)} ? {load(a, out)} : {load(b, out)})"
    if target is aten.masked_fill.Scalar:
        a, mask, fill = node.args
        return f"({operand(mask)} ? {literal(fill, out)} : {load(a, out)})"
    if target is aten.masked_fill.Tensor:
        a, mask, fill = node.args
        return f"({operand(mask)} ? {load(fill, out)} : {load(a, out)})"
    if out is torch.bool:
        return None
    if target in WITH_ALPHA:
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        b = load(node.args[1], out)
        scaled = b if alpha == 1 else f"({literal(alpha, out)} * {b})"
        return f"({load(node.args[0], out)} {WITH_ALPHA[target]} {scaled})"
    if target in DIVISIONS and out.is_floating_point:
        return f"({load(node.args[0], out)} / {load(node.args[1], out)})"
    if target in ARITHMETIC and not node.kwargs:
        return ARITHMETIC[target](*(load(a, out) for a in node.args))
    if not out.is_floating_point or (node.kwargs and target is not aten.gelu.default):
        return _special(node, out, load)
    if target in FLOATING:
        return FLOATING[target](load(node.args[0], out))
    if target in ROOTS:
        return ROOTS[target][out is torch.float64](load(node.args[0], out))
    if target in FLOAT32 and out is torch.float32:
        return FLOAT32[target](load(node.args[0], out))
    return _special(node, out, load)


def _special(node: fx.Node, out: torch.dtype, load: Callable[..., str]) -> str | None:
    """Operators whose other arguments choose the expression."""
    if node.target is aten.gelu.default and out is torch.float32:
        form = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        name = "a_gelu_tanh" if form == "tanh" else "a_gelu"
        return f"{name}({load(node.args[0], out)})"
    if node.target is aten.pow.Tensor_Scalar and out.is_floating_point:
        base, exponent = load(node.args[0], out), node.args[1]
        if exponent == 2:
            return f"({base} * {base})"
        if exponent == 3:
            return f"({base} * {base} * {base})"
        if exponent == 1:
            return base
    if node.target is aten.clamp.default and out.is_floating_point:
        low, high = (*node.args[1:], None, None)[:2]
        expression = load(node.args[0], out)
        if low is not None:
            expression = f"a_max({expression}, {literal(low, out)})"
        if high is not None:
            expression = f"a_min({expression}, {literal(high, out)})"
        return expression
    return None


def _predicate(node: fx.Node, operand: Callable[[Any], str]) -> str | None:
    """Comparisons compute in the promoted type of their operands."""
    operands = list(node.args)
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in operands]
    common = values[0].dtype if len(values) == 1 else torch.result_type(*values)
    if common not in C_TYPES:
        return None
    texts = []
    for a in operands:
        own = dtype_of(a)
        if node.target in LOGICAL:
            assert own is not None
            texts.append(_cast(operand(a), own, torch.bool))
        else:
            texts.append(_cast(operand(a), own, common) if own else literal(a, common))
    row = PREDICATES.get(node.target) or LOGICAL[node.target]
    return row(*texts)
