"""Programs of numbers: what Python computed with numbers that differ between calls.

In: one recorded run's arithmetic on lifted ints and floats, step by step. Out: a callable that
does the same for another call's numbers. Invariant: every step is the very function that Python
ran, on exact ints and floats, so its results are Python's; where a step raises, gives another
type than it did, or answers a question otherwise, the program refuses, and nothing has happened.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Whole numbers up to here are the same whether they become a double or a float at once.
_EXACT = 1 << 53
_LARGEST = 3.4028234663852886e38  # of float32
_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True)
class Use:
    """The value of a leaf or step, by number, as an operand."""

    number: int


@dataclass(frozen=True)
class Step:
    """`function(*operands)`, whose operands are `Use`s and constants.

    `kind` is the type of its result; `expected` its value where that is a truth.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]
    kind: type
    expected: bool | None = None
    location: str = ""


def is_same(a: Any, b: Any) -> bool:
    """Whether two numbers cannot be told apart: type, value, the sign of zero, the bits."""
    if type(a) is not type(b):
        return False
    return struct.pack("d", a) == struct.pack("d", b) if type(a) is float else bool(a == b)


@dataclass
class NumberProgram:
    """`leaves` counts the numbers that come from outside; `names` are those for people."""

    names: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)  # what the graph is given
    dtypes: list[str] = field(default_factory=list)  # as which dtype
    sizes: list[int] = field(default_factory=list)  # the graph's numbers, behind the operands
    outputs: list[int] = field(default_factory=list)  # what results and effects are made of
    why: str = ""  # the newest refusal

    def add_leaf(self, name: str) -> int:
        """A number from outside. Leaves come before the first step that uses them."""
        self.names.append(name)
        self.steps.append(Step(_LEAF, (len(self.names) - 1,), object))
        return len(self.steps) - 1

    def add_step(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def operand(self, number: int, dtype: str) -> int:
        """The position of this value among what the graph is given."""
        for position, known in enumerate(zip(self.operands, self.dtypes, strict=True)):
            if known == (number, dtype):
                return position
        self.operands.append(number)
        self.dtypes.append(dtype)
        return len(self.operands) - 1

    def output(self, number: int) -> int:
        """The position of this value among what results and effects are made of."""
        if number not in self.outputs:
            self.outputs.append(number)
        return self.outputs.index(number)

    def __call__(self, leaves: list[Any]) -> tuple[list[Any], list[Any]] | None:
        """(operands, outputs) for these leaves; None where the recorded run does not apply."""
        values: list[Any] = []
        for step in self.steps:
            if step.function is _LEAF:
                values.append(leaves[step.operands[0]])
                continue
            try:
                value = step.function(
                    *[values[o.number] if type(o) is Use else o for o in step.operands]
                )
            except (ArithmeticError, ValueError, TypeError) as error:
                self._refuse(step, leaves, f"{type(error).__name__}: {error}")
                return None
            if type(value) is not step.kind:
                self._refuse(step, leaves, f"gives a {type(value).__name__}")
                return None
            if step.expected is not None and value is not step.expected:
                self._refuse(step, leaves, f"is {value} now")
                return None
            values.append(value)
        given = [values[n] for n in self.operands]
        for value, dtype in zip(given, self.dtypes, strict=True):
            if not _fits(value, dtype):
                self.why = f"{value} is no {dtype}"
                return None
        sizes = [values[n] for n in self.sizes]
        if any(n not in _INT64 for n in sizes):
            self.why = "a size does not fit 64 bits"
            return None
        return given + sizes, [values[n] for n in self.outputs]

    @property
    def given(self) -> list[str]:
        """As which dtype native code passes on each number that the graph is given."""
        return self.dtypes + ["int64"] * len(self.sizes)

    def _refuse(self, step: Step, leaves: list[Any], what: str) -> None:
        pairs = zip(self.names, leaves, strict=True)
        shown = ", ".join(f"{n} = {v!r}" for n, v in pairs if type(v) in (int, float))
        self.why = f"{self.text(step)} at {step.location} {what}: {shown}"

    def text(self, step: Step) -> str:
        """A step for people, in terms of leaves."""
        parts = [self._operand_text(o) for o in step.operands]
        sign: str | None = _SIGNS.get(step.function)
        if sign is not None and len(parts) == 2:
            return f"{parts[0]} {sign} {parts[1]}"
        name: str = getattr(step.function, "__name__", "?")
        return f"{name}({', '.join(parts)})"

    def _operand_text(self, operand: Any) -> str:
        if type(operand) is not Use:
            return repr(operand)
        step = self.steps[operand.number]
        if step.function is _LEAF:
            return self.names[int(step.operands[0])]
        text = self.text(step)
        return f"({text})" if step.function in _SIGNS else text


def _fits(value: Any, dtype: str) -> bool:
    """Whether a tensor of that dtype holds the number as ATen would have used it."""
    if type(value) is int:
        return value in _INT64 if dtype == "int64" else -_EXACT <= value <= _EXACT
    # ATen refuses some of these numbers: its business.
    return dtype != "float32" or abs(value) <= _LARGEST or not math.isfinite(value)


def _LEAF(*_: Any) -> Any:
    raise AssertionError("a leaf is not computed")


_SIGNS: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.and_: "&",
    operator.or_: "|", operator.xor: "^", operator.lshift: "<<", operator.rshift: ">>",
    operator.lt: "<", operator.le: "<=", operator.eq: "==", operator.ne: "!=",
    operator.gt: ">", operator.ge: ">=", is_same: "==",
}  # fmt: skip

# Operators on exact numbers: of the name that the recorder has for them.
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow,
    "and_": operator.and_, "or_": operator.or_, "xor": operator.xor,
    "lshift": operator.lshift, "rshift": operator.rshift,
}  # fmt: skip
UNARY: dict[str, Callable[[Any], Any]] = {
    "-": operator.neg, "+": operator.pos, "~": operator.invert,
}  # fmt: skip
# Functions that compute with exact numbers and nothing else. What they give for numbers of
# the same types must be a number or a truth of one type, or the program refuses.
FUNCTIONS: dict[int, Callable[..., Any]] = {
    id(f): f
    for f in (
        abs, bool, float, int, max, min, pow, round,
        math.acos, math.acosh, math.asin, math.asinh, math.atan, math.atan2, math.atanh,
        math.ceil, math.comb, math.copysign, math.cos, math.cosh, math.degrees, math.erf,
        math.erfc, math.exp, math.exp2, math.expm1, math.fabs, math.factorial, math.floor,
        math.fmod, math.gamma, math.gcd, math.hypot, math.isclose, math.isfinite, math.isinf,
        math.isnan, math.isqrt, math.lcm, math.ldexp, math.lgamma, math.log, math.log10,
        math.log1p, math.log2, math.perm, math.pow, math.radians, math.remainder, math.sin,
        math.sinh, math.sqrt, math.tan, math.tanh, math.trunc,
    )
}  # fmt: skip
