"""Lowerings of elementwise ATen operations: one row each.

In: scalar expressions of the operands. Out: the expression of the result.
Rules for a new row:
1. A row names an overload and a formula of expressions; operands arrive cast to the type
   that ATen computes in (float for half precisions) and the result is rounded to the
   result's dtype by the caller.
2. `COMPARISONS` get operands in the promoted type of the operands; `FORMULAS` in the type
   of the result.
3. NaN, infinities, signed zeros and integer wrap-around are eager's. What can raise in
   eager (integer division by a tensor) is no row.
4. A formula raises `Unsupported` for arguments it does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from accel.codegen.builder import Builder, Unsupported
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, cast, op
from accel.codegen.tensor_graph import Node, View, contiguous_strides

aten = torch.ops.aten
Formula = Callable[..., Expr]

SQRT_HALF = 0.7071067811865476
SQRT_2_OVER_PI = 0.7978845608028654


def _is_float(x: Expr) -> bool:
    return x.type in ("f32", "f64")


def _floats(*values: Any) -> None:
    if any(isinstance(v, Expr) and not _is_float(v) for v in values):
        raise Unsupported("an integer operand")


def _add(a: Expr, b: Expr, alpha: Any = 1) -> Expr:
    if a.type == "bool":
        if alpha not in (1, True):
            raise Unsupported("alpha with bool")
        return op("or", a, b)
    return a + (b if alpha == 1 else b * alpha)


def _sub(a: Expr, b: Expr, alpha: Any = 1) -> Expr:
    return a - (b if alpha == 1 else b * alpha)


def _rsub(a: Expr, b: Expr, alpha: Any = 1) -> Expr:
    return _sub(b, a, alpha)


def _mul(a: Expr, b: Expr) -> Expr:
    return op("and", a, b) if a.type == "bool" else a * b


def _divide_mode(a: Expr, b: Expr, rounding_mode: str | None = None) -> Expr:
    if rounding_mode is None:
        return a / b
    _check_divisor(a, b)
    return op({"floor": "floor_divide", "trunc": "truncate_divide"}[rounding_mode], a, b)


def _check_divisor(a: Expr, b: Expr) -> None:
    if not _is_float(a) and not (isinstance(b, Const) and b.value not in (0, -1)):
        raise Unsupported("an integer division that may raise")


def _floor_divide(a: Expr, b: Expr) -> Expr:
    return _divide_mode(a, b, "floor")


def _remainder(a: Expr, b: Expr) -> Expr:
    _check_divisor(a, b)
    return op("remainder", a, b)


def _fmod(a: Expr, b: Expr) -> Expr:
    _floats(a)
    return op("fmod", a, b)


def _pow(a: Expr, b: Expr) -> Expr:
    if isinstance(b, Const):
        exponent = float(b.value)
        if exponent == 2:
            return a * a
        if exponent == 3:
            return a * a * a
        if exponent == 1:
            return a
        if _is_float(a) and exponent == 0.5:
            return op("sqrt", a)
        if _is_float(a) and exponent == -0.5:
            return op("rsqrt", a)
        if _is_float(a) and exponent == -1:
            return 1.0 / a
        if _is_float(a) and exponent == -2:
            return 1.0 / (a * a)
    _floats(a, b)
    return op("pow", a, b)


def _relu(a: Expr) -> Expr:
    # The bound comes first: of equals the second is taken, so that -0 stays -0.
    return op("maximum", Const(0 if not _is_float(a) else 0.0, a.type), a)


def _clamp(a: Expr, low: Any = None, high: Any = None) -> Expr:
    if a.type == "bool":
        raise Unsupported("bool")
    if low is not None:
        a = op("maximum", low, a)
    if high is not None:
        a = op("minimum", high, a)
    return a


def _abs(a: Expr) -> Expr:
    return a if a.type == "bool" else op("abs", a)


def _negate(a: Expr) -> Expr:
    if a.type == "bool":
        raise Unsupported("bool")
    return -a


def _sign(a: Expr) -> Expr:
    if a.type == "bool":
        return a
    zero, one = (Const(n if not _is_float(a) else float(n), a.type) for n in (0, 1))
    # ATen: (0 < x) - (x < 0), so NaN gives 0.
    positive = op("where", op("gt", a, zero), one, zero)
    return op("where", op("lt", a, zero), -one, positive)


def _sigmoid(a: Expr) -> Expr:
    _floats(a)
    return op("sigmoid", a)


def _silu(a: Expr) -> Expr:
    return a / (1.0 + op("exp", -a))


def _gelu(a: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        inner = SQRT_2_OVER_PI * (a + 0.044715 * (a * a * a))
        return 0.5 * a * (1.0 + op("tanh", inner))
    return a * 0.5 * (1.0 + op("erf", a * SQRT_HALF))


def _hardtanh(a: Expr, low: Any = -1, high: Any = 1) -> Expr:
    return _clamp(a, Const(low, a.type), Const(high, a.type))


def _leaky_relu(a: Expr, slope: Any = 0.01) -> Expr:
    return op("where", op("gt", a, Const(0.0, a.type)), a, a * float(slope))


def _elu(a: Expr, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Expr:
    negative = op("expm1", a * float(input_scale)) * (float(alpha) * float(scale))
    return op("where", op("le", a, Const(0.0, a.type)), negative, a * float(scale))


def _hardsigmoid(a: Expr) -> Expr:
    return _clamp(a + 3.0, Const(0.0, a.type), Const(6.0, a.type)) / 6.0


def _hardswish(a: Expr) -> Expr:
    return a * _clamp(a + 3.0, Const(0.0, a.type), Const(6.0, a.type)) / 6.0


def _softplus(a: Expr, beta: Any = 1, threshold: Any = 20) -> Expr:
    scaled = a * float(beta)
    soft = op("log1p", op("exp", scaled)) / float(beta)
    return op("where", op("gt", scaled, Const(float(threshold), a.type)), a, soft)


def _log_sigmoid(a: Expr) -> Expr:
    zero = Const(0.0, a.type)
    return op("minimum", a, zero) - op("log1p", op("exp", -op("abs", a)))


def _mish(a: Expr) -> Expr:
    return a * op("tanh", op("log1p", op("exp", a)))


def _threshold(a: Expr, limit: Any, value: Any) -> Expr:
    return op("where", op("le", a, Const(limit, a.type)), Const(value, a.type), a)


def _reciprocal(a: Expr) -> Expr:
    return 1.0 / a


def _square(a: Expr) -> Expr:
    return a * a


def _addcmul(a: Expr, b: Expr, c: Expr, value: Any = 1) -> Expr:
    return a + (b * c if value == 1 else b * float(value) * c)


def _addcdiv(a: Expr, b: Expr, c: Expr, value: Any = 1) -> Expr:
    _floats(a)
    return a + (b / c if value == 1 else b * float(value) / c)


def _lerp(a: Expr, b: Expr, weight: Expr) -> Expr:
    _floats(a, weight)
    half = Const(0.5, a.type)
    low = a + weight * (b - a)
    high = b - (b - a) * (1.0 - weight)
    if isinstance(weight, Const):
        return low if abs(weight.value) < 0.5 else high
    return op("where", op("lt", op("abs", weight), half), low, high)


def _bitwise_not(a: Expr) -> Expr:
    return op("not", a)


def _integers(name: str) -> Formula:
    def formula(a: Expr, b: Expr) -> Expr:
        if _is_float(a):
            raise Unsupported("a float operand")
        return op(name, a, b)

    return formula


def _float_only(name: str) -> Formula:
    def formula(*operands: Expr) -> Expr:
        _floats(*operands)
        return op(name, *operands)

    return formula


def _whole(name: str) -> Formula:
    """floor and its kin: the identity on integers."""

    def formula(a: Expr) -> Expr:
        return op(name, a) if _is_float(a) else a

    return formula


def _ordered(name: str) -> Formula:
    def formula(a: Expr, b: Expr) -> Expr:
        if a.type == "bool":
            return op("or" if name == "maximum" else "and", a, b)
        return op(name, a, b)

    return formula


def _tanh_backward(grad: Expr, out: Expr) -> Expr:
    return grad * (1.0 - out * out)


def _sigmoid_backward(grad: Expr, out: Expr) -> Expr:
    return grad * ((1.0 - out) * out)


def _threshold_backward(grad: Expr, x: Expr, limit: Any) -> Expr:
    return op("where", op("le", x, Const(limit, x.type)), Const(0, grad.type), grad)


def _silu_backward(grad: Expr, x: Expr) -> Expr:
    s = 1.0 / (1.0 + op("exp", -x))
    return grad * s * (1.0 + x * (1.0 - s))


def _gelu_backward(grad: Expr, x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        cube = x * x * x
        t = op("tanh", SQRT_2_OVER_PI * (x + 0.044715 * cube))
        inner = SQRT_2_OVER_PI * (1.0 + 3.0 * 0.044715 * (x * x))
        return grad * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
    cdf = 0.5 * (1.0 + op("erf", x * SQRT_HALF))
    pdf = op("exp", x * x * -0.5) * (1.0 / math.sqrt(2 * math.pi))
    return grad * (cdf + x * pdf)


# Operands in the result's type; scalars after the operands' count stay Python numbers.
FORMULAS: dict[Any, tuple[int, Formula]] = {
    aten.add.Tensor: (2, _add),
    aten.add.Scalar: (2, _add),
    aten.sub.Tensor: (2, _sub),
    aten.sub.Scalar: (2, _sub),
    aten.rsub.Tensor: (2, _rsub),
    aten.rsub.Scalar: (2, _rsub),
    aten.mul.Tensor: (2, _mul),
    aten.mul.Scalar: (2, _mul),
    aten.div.Tensor: (2, lambda a, b: a / b),
    aten.div.Scalar: (2, lambda a, b: a / b),
    aten.div.Tensor_mode: (2, _divide_mode),
    aten.div.Scalar_mode: (2, _divide_mode),
    aten.floor_divide.default: (2, _floor_divide),
    aten.floor_divide.Scalar: (2, _floor_divide),
    aten.remainder.Tensor: (2, _remainder),
    aten.remainder.Scalar: (2, _remainder),
    aten.fmod.Tensor: (2, _fmod),
    aten.fmod.Scalar: (2, _fmod),
    aten.pow.Tensor_Scalar: (2, _pow),
    aten.pow.Tensor_Tensor: (2, _pow),
    aten.pow.Scalar: (2, _pow),
    aten.maximum.default: (2, _ordered("maximum")),
    aten.minimum.default: (2, _ordered("minimum")),
    aten.atan2.default: (2, _float_only("atan2")),
    aten.hypot.default: (2, _float_only("hypot")),
    aten.nextafter.default: (2, _float_only("nextafter")),
    aten.copysign.Tensor: (2, _float_only("copysign")),
    aten.copysign.Scalar: (2, _float_only("copysign")),
    aten.bitwise_and.Tensor: (2, _integers("and")),
    aten.bitwise_or.Tensor: (2, _integers("or")),
    aten.bitwise_xor.Tensor: (2, _integers("xor")),
    aten.bitwise_and.Scalar: (2, _integers("and")),
    aten.bitwise_or.Scalar: (2, _integers("or")),
    aten.bitwise_xor.Scalar: (2, _integers("xor")),
    aten.bitwise_not.default: (1, _bitwise_not),
    aten.neg.default: (1, _negate),
    aten.abs.default: (1, _abs),
    aten.sign.default: (1, _sign),
    aten.sgn.default: (1, _sign),
    aten.relu.default: (1, _relu),
    aten.relu6.default: (1, lambda a: _hardtanh(a, 0, 6)),
    aten.clamp.default: (3, _clamp),
    aten.clamp.Tensor: (3, _clamp),
    aten.clamp_min.default: (2, _clamp),
    aten.clamp_min.Tensor: (2, _clamp),
    aten.clamp_max.default: (2, lambda a, high: _clamp(a, None, high)),
    aten.clamp_max.Tensor: (2, lambda a, high: _clamp(a, None, high)),
    aten.sigmoid.default: (1, _sigmoid),
    aten.silu.default: (1, _silu),
    aten.hardtanh.default: (1, _hardtanh),
    aten.leaky_relu.default: (1, _leaky_relu),
    aten.elu.default: (1, _elu),
    aten.hardsigmoid.default: (1, _hardsigmoid),
    aten.hardswish.default: (1, _hardswish),
    aten.softplus.default: (1, _softplus),
    aten.mish.default: (1, _mish),
    aten.threshold.default: (1, _threshold),
    aten.reciprocal.default: (1, _reciprocal),
    aten.square.default: (1, _square),
    aten.exp.default: (1, _float_only("exp")),
    aten.exp2.default: (1, _float_only("exp2")),
    aten.expm1.default: (1, _float_only("expm1")),
    aten.log.default: (1, _float_only("log")),
    aten.log1p.default: (1, _float_only("log1p")),
    aten.log2.default: (1, _float_only("log2")),
    aten.log10.default: (1, _float_only("log10")),
    aten.sqrt.default: (1, _float_only("sqrt")),
    aten.rsqrt.default: (1, _float_only("rsqrt")),
    aten.tanh.default: (1, _float_only("tanh")),
    aten.erf.default: (1, _float_only("erf")),
    aten.erfc.default: (1, _float_only("erfc")),
    aten.sin.default: (1, _float_only("sin")),
    aten.cos.default: (1, _float_only("cos")),
    aten.tan.default: (1, _float_only("tan")),
    aten.asin.default: (1, _float_only("asin")),
    aten.acos.default: (1, _float_only("acos")),
    aten.atan.default: (1, _float_only("atan")),
    aten.sinh.default: (1, _float_only("sinh")),
    aten.cosh.default: (1, _float_only("cosh")),
    aten.asinh.default: (1, _float_only("asinh")),
    aten.acosh.default: (1, _float_only("acosh")),
    aten.atanh.default: (1, _float_only("atanh")),
    aten.floor.default: (1, _whole("floor")),
    aten.ceil.default: (1, _whole("ceil")),
    aten.trunc.default: (1, _whole("trunc")),
    aten.round.default: (1, _whole("round")),
    aten.addcmul.default: (3, _addcmul),
    aten.addcdiv.default: (3, _addcdiv),
    aten.lerp.Scalar: (3, _lerp),
    aten.lerp.Tensor: (3, _lerp),
    aten.tanh_backward.default: (2, _tanh_backward),
    aten.sigmoid_backward.default: (2, _sigmoid_backward),
    aten.threshold_backward.default: (2, _threshold_backward),
    aten.silu_backward.default: (2, _silu_backward),
    aten.gelu_backward.default: (2, _gelu_backward),
    aten.clone.default: (1, lambda a: a),
    aten._to_copy.default: (1, lambda a: a),
    aten.contiguous.default: (1, lambda a: a),
}
# Keyword arguments that only say what the result's metadata says already.
_METADATA_KEYWORDS = frozenset(
    ["dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"]
)

COMPARISONS: dict[Any, str] = {
    getattr(getattr(aten, name), overload): name
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for overload in ("Tensor", "Scalar")
}
LOGICAL: dict[Any, str] = {
    aten.logical_and.default: "and",
    aten.logical_or.default: "or",
    aten.logical_xor.default: "ne",
}


def lower_formula(b: Builder, node: Node, out: View) -> None:
    count, formula = FORMULAS[node.target]
    if out.dtype in _SIXTEEN_BITS and (why := _unlike_float(node, out.dtype)):
        raise Unsupported(why)
    type_ = _result_type(out)
    kwargs = {k: v for k, v in node.kwargs.items() if k not in _METADATA_KEYWORDS}

    def value(index: Any) -> Expr:
        operands = [
            _operand(b, _number(node.target if i else None, a, out.dtype), index, type_, out.dtype)
            for i, a in enumerate(node.args[:count])
        ]
        named = _keywords(b, kwargs, index, type_, out.dtype)
        return formula(*operands, *node.args[count:], **named)

    b.pointwise(out, value)


def _unlike_float(node: Node, dtype: str) -> str:
    """Why ATen's answer for 16-bit numbers is not the rounded one of float; "" where it is."""
    whole = (aten.floor_divide.default, aten.floor_divide.Scalar)
    modes = (aten.div.Tensor_mode, aten.div.Scalar_mode)
    if node.target in whole or (node.target in modes and node.kwargs.get("rounding_mode")):
        return "a whole quotient of 16-bit numbers"  # it rounds between its steps
    if node.target is aten.nextafter.default:
        return "the next 16-bit number"
    if node.target is aten.pow.Tensor_Scalar and dtype == "float16" and abs(node.args[1]) == 0.5:
        return "a root of float16 numbers as a power"  # pow() and sqrt() differ at -inf and -0
    return ""


# Whose numbers ATen keeps in float for 16-bit tensors; others are rounded to the tensor's dtype.
_EXACT_NUMBERS = frozenset(
    {
        aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar,
        aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.Scalar,
        aten.floor_divide.default, aten.lerp.Scalar,
    }
)  # fmt: skip
_SIXTEEN_BITS = frozenset({"bfloat16", "float16"})


def _number(target: Any, value: Any, dtype: str) -> Any:
    """A number among the operands, as ATen rounds it; anything else as it is."""
    if dtype not in _SIXTEEN_BITS or target in _EXACT_NUMBERS or not isinstance(value, float):
        return value
    return float(torch.tensor(value, dtype=torch.float64).to(getattr(torch, dtype)))


def _keywords(
    b: Builder, kwargs: dict[str, Any], index: Any, type_: str, dtype: str
) -> dict[str, Any]:
    return {
        {"min": "low", "max": "high"}.get(k, k): (
            _operand(b, v, index, type_, dtype)
            if k in ("min", "max")
            else (_number(None, v, dtype) if k == "alpha" else v)
        )
        for k, v in kwargs.items()
    }


def _operand(b: Builder, value: Any, index: Any, type_: str, dtype: str) -> Any:
    if isinstance(value, View):
        return cast(b.load(value, index), type_)
    return None if value is None else b.scalar(value, type_, dtype)


def _result_type(out: View) -> str:
    type_ = VALUE_TYPE.get(out.dtype)
    if type_ is None:
        raise Unsupported(f"dtype {out.dtype}")
    return type_


def lower_comparison(b: Builder, node: Node, out: View) -> None:
    name = COMPARISONS[node.target]
    type_ = VALUE_TYPE.get(node.operand_dtype)
    if type_ is None:
        raise Unsupported(f"dtype {node.operand_dtype}")
    left, right = node.args
    if type_ == "bool":  # ordered as numbers
        type_ = "i32"

    def value(index: Any) -> Expr:
        number = _number(node.target, right, node.operand_dtype)
        other = _operand(b, number, index, type_, node.operand_dtype)
        return op(name, _operand(b, left, index, type_, node.operand_dtype), other)

    b.pointwise(out, value)


def lower_logical(b: Builder, node: Node, out: View) -> None:
    name = LOGICAL[node.target]
    names = {"and": "and", "or": "or", "ne": "xor"}

    def value(index: Any) -> Expr:
        left, right = (cast(b.load(v, index), "bool") for v in node.args)
        return op(names[name], left, right)

    b.pointwise(out, value)


def lower_logical_not(b: Builder, node: Node, out: View) -> None:
    b.pointwise(out, lambda i: op("not", cast(b.load(node.args[0], i), "bool")))


def lower_where(b: Builder, node: Node, out: View) -> None:
    condition, yes, no = node.args
    if condition.dtype != "bool":
        raise Unsupported("a condition that is not bool")
    type_ = _result_type(out)
    b.pointwise(
        out,
        lambda i: op(
            "where",
            b.load(condition, i),
            _operand(b, yes, i, type_, out.dtype),
            _operand(b, no, i, type_, out.dtype),
        ),
    )


def lower_masked_fill(b: Builder, node: Node, out: View) -> None:
    x, mask, value = node.args
    if mask.dtype != "bool":
        raise Unsupported("a mask that is not bool")
    type_ = _result_type(out)
    b.pointwise(
        out,
        lambda i: op(
            "where",
            b.load(mask, i),
            _operand(b, value, i, type_, out.dtype),
            cast(b.load(x, i), type_),
        ),
    )


def lower_gelu(b: Builder, node: Node, out: View) -> None:
    """Where eager asks oneDNN, gelu(inf) is NaN; elsewhere the formula says what it is."""
    x, approximate = node.args[0], node.kwargs.get("approximate", "none")
    if len(node.args) > 1:
        approximate = node.args[1]
    type_ = _result_type(out)
    by_one_dnn = (
        torch.backends.mkldnn.is_available()
        and (
            out.dtype in ("float32", "bfloat16")
            or (out.dtype == "float16" and torch.ops.mkldnn._is_mkldnn_fp16_supported())
        )
        and x.numel > 1
        and x.strides == contiguous_strides(x.sizes)
    )

    def value(index: Any) -> Expr:
        a = cast(b.load(x, index), type_)
        return op("gelu", a) if by_one_dnn and approximate == "none" else _gelu(a, approximate)

    b.pointwise(out, value)


def lower_isnan(b: Builder, node: Node, out: View) -> None:
    x = node.args[0]

    def value(index: Any) -> Expr:
        v = b.load(x, index)
        return op("ne", v, v) if _is_float(v) else Const(False, "bool")

    b.pointwise(out, value)


def lower_isinf(b: Builder, node: Node, out: View) -> None:
    x = node.args[0]

    def value(index: Any) -> Expr:
        v = b.load(x, index)
        if not _is_float(v):
            return Const(False, "bool")
        return op("eq", op("abs", v), Const(math.inf, v.type))

    b.pointwise(out, value)


def lower_log_sigmoid(b: Builder, node: Node, out: View) -> None:
    type_ = _result_type(out)
    b.pointwise(out, lambda i: _log_sigmoid(cast(b.load(node.args[0], i), type_)))
