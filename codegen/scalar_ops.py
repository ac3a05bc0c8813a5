"""The scalar operations of the loop IR: type, cost, meaning, C++ text, Triton text.

In: operand types. Out: `SCALAR_OPS`, one row per operation. The interpreter reads
`torch`, the emitters read `cpp` and `triton`, the scheduler reads `cost`.

Rules for a new row:
1. `type` is "same" (of the first operand), "second", or a value type.
2. `torch` works on tensors whose dtype is the value type's; it is the oracle.
3. `cpp` works on GCC vectors of any lane count; bool is a vector of int 0 / -1.
4. `triton` works on blocks of the operands' types; bool is int1. It may call what
   `triton_preamble.py` defines. Nothing approximate: divisions and roots round correctly,
   functions are those of NVIDIA's device library, as in ATen's CUDA kernels.
5. `cost` is in units of a vector addition; a call per lane counts 40 or more.
6. NaN, infinities and signed zeros behave as in ATen's CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ScalarOp:
    type: str
    cost: float
    cpp: str
    triton: str
    torch: Callable[..., Any]

    def result_type(self, args: Sequence[Any]) -> str:
        if self.type == "same":
            return str(args[0].type)
        if self.type == "second":
            return str(args[1].type)
        return self.type


TORCH_TYPE = {
    "f32": torch.float32,
    "f64": torch.float64,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}


def _libm(name: str, function: Callable[..., Any], cost: float = 30.0) -> ScalarOp:
    operands = "{0}, {1}" if name in _BINARY_LIBM else "{0}"
    return ScalarOp(
        "same", cost, f"m_{name}({operands})", f"libdevice.{name}({operands})", function
    )


_BINARY_LIBM = frozenset({"pow", "atan2", "fmod", "hypot", "copysign", "nextafter"})


def _wrap(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda x: x.to(dtype).to(x.dtype)


def _floor_divide(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="floor")


def _truncate_divide(a: Any, b: Any) -> Any:
    return torch.div(a, b, rounding_mode="trunc")


def _divide(a: Any, b: Any) -> Any:
    return a / b


def _bounded(place: Any, count: Any) -> Any:
    return torch.minimum(place.clamp(min=0), count - 1)


def _random_bits(x: Any, first: Any, second: Any) -> Any:
    """32 bits from a position and two seeds, all int32.

    Source: `triple32` of Chris Wellons' hash-prospector (public domain), a bijection of 32 bits;
    the seeds enter before and between its rounds.
    """

    def right(v: Any, count: int) -> Any:  # as of an unsigned number
        return torch.bitwise_right_shift(v, count) & ((1 << (32 - count)) - 1)

    x = x ^ first
    x = (x ^ right(x, 17)) * (0xED5AD4BB - (1 << 32))
    x = (x ^ right(x, 11)) + second
    x = x * (0xAC4C1B51 - (1 << 32))
    x = (x ^ right(x, 15)) * 0x31848BAB
    return x ^ right(x, 14)


_WORD = (1 << 32) - 1


def _philox(seed: Any, counter: Any, thread: Any) -> list[Any]:
    """Philox4x32-10: four words of 32 bits, all as int64.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    x = [counter & _WORD, (counter >> 32) & _WORD, thread & _WORD, (thread >> 32) & _WORD]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57  # of 64 bits: shifts bring signs in
        x = [
            (b >> 32) & _WORD ^ x[1] ^ key[0],
            b & _WORD,
            (a >> 32) & _WORD ^ x[3] ^ key[1],
            a & _WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return x


def _philox_uniform(seed: Any, counter: Any, thread: Any, lane: Any) -> Any:
    words = torch.stack(torch.broadcast_tensors(*_philox(seed, counter, thread), lane)[:4])
    word = words.gather(0, lane.expand(words.shape[1:])[None])[0]
    return word.float() * 2.0**-32 + 2.0**-33


def _philox_uniform_wide(seed: Any, counter: Any, thread: Any, lane: Any) -> Any:
    a, b, c, d = _philox(seed, counter, thread)
    bits = torch.where(lane == 0, a ^ (b << 21), c ^ (d << 21))
    return bits.double() * 2.0**-53 + 2.0**-54


SCALAR_OPS: dict[str, ScalarOp] = {
    "add": ScalarOp("same", 1, "({0} + {1})", "({0} + {1})", torch.add),
    "sub": ScalarOp("same", 1, "({0} - {1})", "({0} - {1})", torch.sub),
    "mul": ScalarOp("same", 1, "({0} * {1})", "({0} * {1})", torch.mul),
    "div": ScalarOp("same", 4, "({0} / {1})", "divide({0}, {1})", _divide),
    "floor_divide": ScalarOp(
        "same", 12, "v_floor_divide({0}, {1})", "floor_divide({0}, {1})", _floor_divide
    ),
    "truncate_divide": ScalarOp(
        "same", 8, "v_truncate_divide({0}, {1})", "truncate_divide({0}, {1})", _truncate_divide
    ),
    "remainder": ScalarOp(
        "same", 60, "v_remainder({0}, {1})", "remainder({0}, {1})", torch.remainder
    ),
    "neg": ScalarOp("same", 1, "(-{0})", "negate({0})", torch.neg),
    "abs": ScalarOp("same", 1, "v_abs({0})", "tl.abs({0})", torch.abs),
    "maximum": ScalarOp("same", 2, "v_max({0}, {1})", "maximum({0}, {1})", torch.maximum),
    "minimum": ScalarOp("same", 2, "v_min({0}, {1})", "minimum({0}, {1})", torch.minimum),
    "sqrt": ScalarOp("same", 6, "v_sqrt({0})", "square_root({0})", torch.sqrt),
    "rsqrt": ScalarOp(
        "same", 10, "(1 / v_sqrt({0}))", "libdevice.rsqrt({0})", lambda x: 1 / torch.sqrt(x)
    ),
    "exp": ScalarOp("same", 10, "v_exp({0})", "libdevice.exp({0})", torch.exp),
    "log": ScalarOp("same", 12, "v_log({0})", "libdevice.log({0})", torch.log),
    "tanh": ScalarOp("same", 20, "v_tanh({0})", "libdevice.tanh({0})", torch.tanh),
    "sigmoid": ScalarOp("same", 14, "v_sigmoid({0})", "sigmoid({0})", torch.sigmoid),
    "erf": ScalarOp("same", 20, "v_erf({0})", "libdevice.erf({0})", torch.erf),
    "gelu": ScalarOp("same", 24, "v_gelu({0})", "gelu({0})", torch.nn.functional.gelu),
    "sin": ScalarOp("same", 20, "v_sin({0})", "libdevice.sin({0})", torch.sin),
    "cos": ScalarOp("same", 20, "v_cos({0})", "libdevice.cos({0})", torch.cos),
    "floor": ScalarOp("same", 1, "v_floor({0})", "libdevice.floor({0})", torch.floor),
    "ceil": ScalarOp("same", 1, "v_ceil({0})", "libdevice.ceil({0})", torch.ceil),
    "trunc": ScalarOp("same", 1, "v_trunc({0})", "libdevice.trunc({0})", torch.trunc),
    "round": ScalarOp("same", 1, "v_round({0})", "libdevice.rint({0})", torch.round),
    "pow": _libm("pow", torch.pow),
    "atan2": _libm("atan2", torch.atan2),
    "fmod": _libm("fmod", torch.fmod),
    "hypot": _libm("hypot", torch.hypot),
    "nextafter": _libm("nextafter", torch.nextafter),
    "copysign": _libm("copysign", torch.copysign),
    "expm1": _libm("expm1", torch.expm1),
    "log1p": _libm("log1p", torch.log1p),
    "exp2": _libm("exp2", torch.exp2),
    "log2": _libm("log2", torch.log2),
    "log10": _libm("log10", torch.log10),
    "tan": _libm("tan", torch.tan),
    "asin": _libm("asin", torch.asin),
    "acos": _libm("acos", torch.acos),
    "atan": _libm("atan", torch.atan),
    "sinh": _libm("sinh", torch.sinh),
    "cosh": _libm("cosh", torch.cosh),
    "asinh": ScalarOp("same", 30, "v_asinh({0})", "libdevice.asinh({0})", torch.asinh),
    "acosh": ScalarOp("same", 30, "v_acosh({0})", "libdevice.acosh({0})", torch.acosh),
    "atanh": _libm("atanh", torch.atanh),
    "erfc": _libm("erfc", torch.erfc),
    "eq": ScalarOp("bool", 1, "v_mask({0} == {1})", "({0} == {1})", torch.eq),
    "ne": ScalarOp("bool", 1, "v_mask({0} != {1})", "({0} != {1})", torch.ne),
    "lt": ScalarOp("bool", 1, "v_mask({0} < {1})", "({0} < {1})", torch.lt),
    "le": ScalarOp("bool", 1, "v_mask({0} <= {1})", "({0} <= {1})", torch.le),
    "gt": ScalarOp("bool", 1, "v_mask({0} > {1})", "({0} > {1})", torch.gt),
    "ge": ScalarOp("bool", 1, "v_mask({0} >= {1})", "({0} >= {1})", torch.ge),
    "where": ScalarOp(
        "second", 1, "v_where({0}, {1}, {2})", "tl.where({0}, {1}, {2})", torch.where
    ),
    "and": ScalarOp("same", 1, "({0} & {1})", "({0} & {1})", torch.bitwise_and),
    "or": ScalarOp("same", 1, "({0} | {1})", "({0} | {1})", torch.bitwise_or),
    "xor": ScalarOp("same", 1, "({0} ^ {1})", "({0} ^ {1})", torch.bitwise_xor),
    "not": ScalarOp("same", 1, "(~{0})", "(~{0})", torch.bitwise_not),
    # Of a dimension with {1} elements; on a GPU what is not inside ends the run.
    "bounded": ScalarOp("same", 3, "v_bounded({0}, {1})", "bounded({0}, {1})", _bounded),
    # What a scatter adds, and where; no operation of its own.
    "placed": ScalarOp("same", 8, "", "", lambda value, place: value),
    "random_bits": ScalarOp(
        "same", 12, "v_random_bits({0}, {1}, {2})", "random_bits({0}, {1}, {2})", _random_bits
    ),
    # Of a seed, a block of the stream, a thread and a lane of the block: in (0, 1], as cuRAND.
    "philox_uniform": ScalarOp(
        "f32",
        80,
        "v_philox_uniform({0}, {1}, {2}, {3})",
        "philox_uniform({0}, {1}, {2}, {3})",
        _philox_uniform,
    ),
    "philox_uniform_wide": ScalarOp(
        "f64",
        80,
        "v_philox_uniform_wide({0}, {1}, {2}, {3})",
        "philox_uniform_wide({0}, {1}, {2}, {3})",
        _philox_uniform_wide,
    ),
    "round_bfloat16": ScalarOp(
        "same",
        3,
        "v_round_bfloat16({0})",
        "{0}.to(tl.bfloat16).to(tl.float32)",
        _wrap(torch.bfloat16),
    ),
    "round_float16": ScalarOp(
        "same", 3, "v_round_float16({0})", "{0}.to(tl.float16).to(tl.float32)", _wrap(torch.float16)
    ),
    "wrap_int16": ScalarOp(
        "same", 2, "v_wrap<short>({0})", "{0}.to(tl.int16).to(tl.int32)", _wrap(torch.int16)
    ),
    "wrap_int8": ScalarOp(
        "same", 2, "v_wrap<signed char>({0})", "{0}.to(tl.int8).to(tl.int32)", _wrap(torch.int8)
    ),
    "wrap_uint8": ScalarOp(
        "same", 1, "v_wrap<unsigned char>({0})", "{0}.to(tl.uint8).to(tl.int32)", _wrap(torch.uint8)
    ),
    "to_f32": ScalarOp(
        "f32", 1, "v_to<float>({0})", "{0}.to(tl.float32)", lambda x: x.to(torch.float32)
    ),
    "to_f64": ScalarOp(
        "f64", 1, "v_to<double>({0})", "{0}.to(tl.float64)", lambda x: x.to(torch.float64)
    ),
    "to_i32": ScalarOp("i32", 1, "v_to<int>({0})", "{0}.to(tl.int32)", lambda x: x.to(torch.int32)),
    "to_i64": ScalarOp(
        "i64", 1, "v_to<long>({0})", "{0}.to(tl.int64)", lambda x: x.to(torch.int64)
    ),
    "to_bool": ScalarOp("bool", 1, "v_mask({0} != 0)", "({0} != 0)", lambda x: x != 0),
}
