"""Affine index expressions: const + sum of coefficient * variable.

In: loop variables (names) and integers. Out: immutable `Affine` values, and `match`,
which lines two addresses of one buffer up by splitting variables. Invariant: terms are
sorted by variable, without zero coefficients, so equal addresses compare equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from accel.codegen.symbols import Dim, hint, is_same, surely

Sizes = Mapping[str, int]


class Affine(NamedTuple):
    """Numbers are ints, or `Dim`s where sizes differ between calls."""

    const: Any = 0
    terms: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def make(const: int, terms: Mapping[str, int]) -> Affine:
        return Affine(const, tuple(sorted((v, c) for v, c in terms.items() if c)))

    @staticmethod
    def var(name: str) -> Affine:
        return Affine(0, ((name, 1),))

    def plus(self, other: Affine | int, scale: int = 1) -> Affine:
        """self + scale * other."""
        if isinstance(other, (int, Dim)):
            return Affine(self.const + scale * other, self.terms)
        terms = dict(self.terms)
        for v, c in other.terms:
            terms[v] = terms.get(v, 0) + scale * c
        return Affine.make(self.const + scale * other.const, terms)

    def times(self, factor: int) -> Affine:
        return Affine.make(self.const * factor, {v: c * factor for v, c in self.terms})

    def substitute(self, by: Mapping[str, Affine]) -> Affine:
        if not any(v in by for v, _ in self.terms):
            return self
        result = Affine(self.const)
        for v, c in self.terms:
            result = result.plus(by.get(v, Affine.var(v)), c)
        return result

    def coefficient(self, name: str) -> Any:
        for v, c in self.terms:
            if v == name:
                return c
        return 0

    def variables(self) -> frozenset[str]:
        return frozenset(v for v, _ in self.terms)

    def show(self, name: Callable[[str], str] = str) -> str:
        parts = [name(v) if is_same(c, 1) else f"{c!r}*{name(v)}" for v, c in self.terms]
        if not is_same(self.const, 0) or not parts:
            parts.append(repr(self.const))
        return " + ".join(parts)


ZERO = Affine()


def equal(a: Affine, b: Affine) -> bool:
    """True when two addresses are the same for every size."""
    return (
        is_same(a.const, b.const)
        and len(a.terms) == len(b.terms)
        and all(v == w and is_same(c, d) for (v, c), (w, d) in zip(a.terms, b.terms, strict=True))
    )


def address(offset: int, strides: Sequence[int], index: Sequence[Affine]) -> Affine:
    """Element address of `index` in a strided tensor."""
    result = Affine(offset)
    for stride, i in zip(strides, index, strict=True):
        result = result.plus(i, stride)
    return result


class Split(NamedTuple):
    """How variables of two sides become common ones: side -> var -> parts, inner first."""

    first: dict[str, list[tuple[str, int]]]
    second: dict[str, list[tuple[str, int]]]


def match(
    first: Affine,
    first_sizes: Sizes,
    second: Affine,
    second_sizes: Sizes,
    fresh: Callable[[], str],
) -> Split | None:
    """Common variables under which both addresses are the same bijection, or None.

    Both sides are mixed-radix numbers: walked from the smallest coefficient up, the
    larger variable is cut where the smaller one ends.
    """
    if not is_same(first.const, second.const):
        return None
    a = _digits(first, first_sizes)
    b = _digits(second, second_sizes)
    split = Split({}, {})
    while a and b:
        (ca, sa, va), (cb, sb, vb) = a[0], b[0]
        low = _common(sa, sb)
        if low is None or not is_same(ca, cb) or not surely(">", ca, 0):
            return None
        part = (fresh(), low)
        split.first.setdefault(va, []).append(part)
        split.second.setdefault(vb, []).append(part)
        for side, size, name in ((a, sa, va), (b, sb, vb)):
            if is_same(size, low):
                side.pop(0)
            else:
                side[0] = (ca * low, size // low, name)
        # A cut variable must still come next, else its parts interleave with others.
        if any(s != sorted(s, key=_by_hint) for s in (a, b)):
            return None
    return split if not a and not b else None


def _digits(value: Affine, sizes: Sizes) -> list[tuple[Any, Any, str]]:
    """(coefficient, size, variable), the smallest coefficient first."""
    found = [(c, sizes[v], v) for v, c in value.terms if not is_same(sizes[v], 1)]
    return sorted(found, key=_by_hint)


def _by_hint(digit: tuple[Any, Any, str]) -> tuple[int, int, str]:
    return hint(digit[0]), hint(digit[1]), digit[2]


def _common(a: Any, b: Any) -> Any:
    """The one of two sizes that divides the other, or None."""
    if is_same(a, b):
        return a
    low, high = (a, b) if hint(a) < hint(b) else (b, a)
    return low if is_same(high % low, 0) else None


def combined(parts: Sequence[tuple[str, int]]) -> Affine:
    """The value of a variable in terms of its parts, inner first."""
    result, scale = ZERO, 1
    for name, size in parts:
        result = result.plus(Affine.var(name), scale)
        scale *= size
    return result


def row_major(names: Sequence[str], sizes: Sizes) -> Affine:
    """The position in the row-major order of these variables."""
    return combined([(name, sizes[name]) for name in reversed(names)])


def invert(
    value: Affine, sizes: Sizes, strides: Sequence[int], extents: Sequence[int]
) -> list[Affine] | None:
    """Indices i with sum(i * stride) == value and 0 <= i < extent, or None if not affine.

    `strides` must be those of a tensor without overlap.
    """
    several = [d for d in range(len(strides)) if not is_same(extents[d], 1)]
    order = sorted(several, key=lambda d: -hint(strides[d]))
    index = [ZERO] * len(strides)
    rest = dict(value.terms)
    const = value.const
    for d in order:
        stride = strides[d]
        if not surely(">", stride, 0):
            return None
        taken = {v: c // stride for v, c in rest.items() if is_same(c % stride, 0)}
        rest = {v: c for v, c in rest.items() if v not in taken}
        base, const = divmod(const, stride)
        if any(not surely(">=", c, 0) for c in (*taken.values(), *rest.values())):
            return None
        # What is left must stay below the stride, the quotient below the extent.
        low = const + sum(c * (sizes[v] - 1) for v, c in rest.items())
        high = base + sum(c * (sizes[v] - 1) for v, c in taken.items())
        inside = surely("<=", 0, base) and surely("<=", base, high)
        if not (inside and surely("<", low, stride) and surely("<", high, extents[d])):
            return None
        index[d] = Affine.make(base, taken)
    return index if not rest and is_same(const, 0) else None
