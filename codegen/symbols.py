"""Sizes that are not known when a graph is compiled: numbers that compute symbolically.

In: the graph's symbols, each with the value it had when recorded (its hint). Out: `Dim`s,
which stand wherever an int may stand in the compiler, and the tests under which everything
that was decided about them holds. Invariant: whoever asks a `Dim` a question (a comparison,
its truth, its value) gets the hint's answer, and the question becomes a test of the compiled
graph unless the answer is the same for all sizes. So code that knows nothing of symbols is
right, if only for fewer sizes. What must not narrow the sizes asks `hint` and `is_same`.

A `Dim` is a polynomial with integer coefficients over atoms: symbols, and quotients,
remainders, minima and maxima of other polynomials.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from accel import expressions
from accel.codegen.options import CompileError

# An atom is ("s", k) or (operation, terms, terms); a monomial is a sorted tuple of atoms.
Atom = tuple[Any, ...]
Monomial = tuple[Atom, ...]
Terms = tuple[tuple[Monomial, int], ...]

SMALLEST = 2  # sizes 0 and 1 have graphs of their own
_MAX_DEGREE = 8
_FLIPPED = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}


@dataclass
class SymbolSpace:
    """The symbols of one graph and what was assumed about them."""

    hints: list[int]
    lows: list[int | None] = field(default_factory=list)  # the least value of each; None: any
    tests: list[Any] = field(default_factory=list)  # accel.expressions' tests
    settled: dict[Atom, Terms] = field(default_factory=dict)  # symbols, and what tests say they are
    _known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.lows = self.lows or [SMALLEST] * len(self.hints)

    def symbol(self, number: int) -> Dim:
        return Dim(_of_atom(("s", number)), self)

    def assume(self, test: Any) -> None:
        """Adds a test, which must hold for the hints.

        Errors: CompileError when it does not.
        """
        key = repr(test)
        if key in self._known:
            return
        if not expressions.holds(test, self.hints):
            raise CompileError(f"an assumption about sizes does not hold: {test}")
        self._known.add(key)
        self.tests.append(test)

    def settle(self, number: int, value: Any) -> None:
        """Notes what a symbol is wherever the tests hold."""
        self.assume(["==", ["s", number], node(value)])
        self.settled["s", number] = _terms(value)

    # ------------------------------------------------------------ atoms

    def low(self, atom: Atom) -> int | None:
        """The least value of an atom, None when there is none."""
        if atom[0] == "s":
            return self.lows[atom[1]]
        first, second = (_low(terms, self) for terms in atom[1:])
        if atom[0] == "max":
            known = [v for v in (first, second) if v is not None]
            return max(known) if known else None
        if first is None or second is None:
            return None
        if atom[0] == "min":
            return min(first, second)
        return 0 if first >= 0 and second > 0 else None

    def value(self, atom: Atom) -> int:
        return expressions.evaluate(_atom_node(atom), self.hints)


class Dim:
    """A number over the symbols of a space. Not an int: what takes only ints fails loudly."""

    __slots__ = ("_hash", "hint", "space", "terms")

    def __init__(self, terms: Terms, space: SymbolSpace) -> None:
        self.terms, self.space = terms, space
        self._hash = hash(terms)
        self.hint = sum(c * _product(space.value(a) for a in m) for m, c in terms)

    # ------------------------------------------------------------ arithmetic

    def __add__(self, other: Any) -> Any:
        return _made(_sum(self.terms, _terms(other)), self.space)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return _made(_sum(self.terms, _scaled(_terms(other), -1)), self.space)

    def __rsub__(self, other: Any) -> Any:
        return _made(_sum(_terms(other), _scaled(self.terms, -1)), self.space)

    def __mul__(self, other: Any) -> Any:
        return _made(_times(self.terms, _terms(other)), self.space)

    __rmul__ = __mul__

    def __neg__(self) -> Any:
        return _made(_scaled(self.terms, -1), self.space)

    def __floordiv__(self, other: Any) -> Any:
        return _divided(self.terms, _terms(other), self.space)[0]

    def __rfloordiv__(self, other: Any) -> Any:
        return _divided(_terms(other), self.terms, self.space)[0]

    def __mod__(self, other: Any) -> Any:
        return _divided(self.terms, _terms(other), self.space)[1]

    def __rmod__(self, other: Any) -> Any:
        return _divided(_terms(other), self.terms, self.space)[1]

    def __divmod__(self, other: Any) -> Any:
        return _divided(self.terms, _terms(other), self.space)

    def __rdivmod__(self, other: Any) -> Any:
        return _divided(_terms(other), self.terms, self.space)

    def __abs__(self) -> Any:
        return self if self >= 0 else -self

    # ------------------------------------------------------------ questions

    def __eq__(self, other: object) -> bool:
        return self._compare("==", other)

    def __ne__(self, other: object) -> bool:
        return self._compare("!=", other)

    def __lt__(self, other: Any) -> bool:
        return self._compare("<", other)

    def __le__(self, other: Any) -> bool:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> bool:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> bool:
        return self._compare(">=", other)

    def __bool__(self) -> bool:
        return self._compare("!=", 0)

    def __hash__(self) -> int:
        return self._hash

    def __index__(self) -> int:
        self.space.assume(["==", self.node(), self.hint])
        return self.hint

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.__index__())

    def _compare(self, relation: str, other: Any) -> bool:
        if not isinstance(other, (int, Dim)):
            if relation in ("==", "!="):
                return relation == "!="
            raise TypeError(f"a size cannot be compared with a {type(other).__name__}")
        difference = _sum(self.terms, _scaled(_terms(other), -1))
        settled = _settled(relation, difference, self.space)
        if settled is not None:
            return settled
        answer = expressions.RELATIONS[relation](self.hint, hint(other))
        if not answer:
            relation = _FLIPPED[relation]
        self.space.assume([relation, self.node(), node(other)])
        return answer

    # ------------------------------------------------------------ forms

    def node(self) -> Any:
        return _terms_node(self.terms)

    def __str__(self) -> str:
        """As a C++ expression. Errors: CompileError where C++ would divide otherwise."""
        return expressions.cpp(self.printable())

    def printable(self) -> Any:
        """The node, for languages that round quotients towards zero.

        Errors: CompileError where that would be another value.
        """
        for monomial, _ in self.terms:
            for atom in monomial:
                _check_printable(atom, self.space)
        return self.node()

    def __format__(self, spec: str) -> str:
        return str(self)

    def __repr__(self) -> str:
        return expressions.text(self.node(), [f"s{k}" for k in range(len(self.space.hints))])


def hint(value: Any) -> int:
    """The value when recorded: for choices that are right for every size."""
    return value.hint if isinstance(value, Dim) else int(value)


def is_symbolic(value: Any) -> bool:
    return isinstance(value, Dim)


def is_same(a: Any, b: Any) -> bool:
    """True when two numbers are equal for every size; asks nothing of the sizes."""
    if isinstance(a, Dim) or isinstance(b, Dim):
        return _settled_terms(a) == _settled_terms(b)
    return bool(a == b)


def surely(relation: str, a: Any, b: Any) -> bool:
    """True when the relation holds for every size; asks nothing of the sizes."""
    if not (isinstance(a, Dim) or isinstance(b, Dim)):
        return expressions.RELATIONS[relation](a, b)
    space = a.space if isinstance(a, Dim) else b.space
    return bool(_settled(relation, _sum(_terms(a), _scaled(_terms(b), -1)), space))


def node(value: Any) -> Any:
    return value.node() if isinstance(value, Dim) else int(value)


def lower_bound(value: Any) -> int | None:
    """The least that a number can be; None when that is not known."""
    return _low(value.terms, value.space) if isinstance(value, Dim) else int(value)


# ---------------------------------------------------------------- polynomials


def _of_atom(atom: Atom) -> Terms:
    return (((atom,), 1),)


def _terms(value: Any) -> Terms:
    if isinstance(value, Dim):
        return value.terms
    if not isinstance(value, int):
        raise TypeError(f"arithmetic of a size with a {type(value).__name__}")
    return (((), int(value)),) if value else ()


def _settled_terms(value: Any) -> Terms:
    """The terms, with what tests say of their symbols in the place of these."""
    terms = _terms(value)
    known = value.space.settled if isinstance(value, Dim) else {}
    if not any(atom in known for monomial, _ in terms for atom in monomial):
        return terms
    total: Terms = ()
    for monomial, c in terms:
        product: Terms = (((), c),)
        for atom in monomial:
            product = _times(product, known.get(atom, _of_atom(atom)))
        total = _sum(total, product)
    return total


def _normal(terms: Mapping[Monomial, int]) -> Terms:
    return tuple(sorted(((m, c) for m, c in terms.items() if c), key=repr))


def _made(terms: Terms, space: SymbolSpace) -> Any:
    """An int where nothing symbolic is left."""
    if not terms:
        return 0
    if len(terms) == 1 and terms[0][0] == ():
        return terms[0][1]
    if any(len(m) > _MAX_DEGREE for m, _ in terms):
        raise CompileError("a size is a product of too many others")
    return Dim(terms, space)


def _sum(a: Terms, b: Terms) -> Terms:
    total = dict(a)
    for monomial, c in b:
        total[monomial] = total.get(monomial, 0) + c
    return _normal(total)


def _scaled(terms: Terms, factor: int) -> Terms:
    return tuple((m, c * factor) for m, c in terms) if factor else ()


def _times(a: Terms, b: Terms) -> Terms:
    total: dict[Monomial, int] = {}
    for (m, c), (n, d) in itertools.product(a, b):
        monomial = tuple(sorted((*m, *n), key=repr))
        total[monomial] = total.get(monomial, 0) + c * d
    return _normal(total)


def _product(values: Any) -> int:
    result = 1
    for v in values:
        result *= v
    return result


def _without(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    """The monomial without the divisor's atoms, None when it lacks one of them."""
    rest = list(monomial)
    for atom in divisor:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def _divided(a: Terms, b: Terms, space: SymbolSpace) -> tuple[Any, Any]:
    """Quotient and remainder; what divides exactly leaves no atom behind."""
    if not b:
        raise ZeroDivisionError("division of a size by zero")
    quotient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    if len(b) == 1:
        ((divisor, factor),) = b
        for m, c in a:
            left = _without(m, divisor)
            if left is None or c % factor:
                rest[m] = c
            else:
                quotient[left] = c // factor
        if divisor == () and () in quotient and any(c < 0 for c in rest.values()):
            # `(16 - n) // 16` and not `1 + -n // 16`, which C++ would round the other way.
            rest[()] = rest.get((), 0) + quotient.pop(()) * factor
    else:
        exact = _exact_quotient(a, b)
        if exact is None:
            rest = dict(a)
        else:
            quotient = dict(exact)
    whole, left_over = _normal(quotient), _normal(rest)
    if not left_over:
        return _made(whole, space), 0
    if len(b) == 1 and b[0][0] == () and len(left_over) == 1 and left_over[0][0] == ():
        q, r = divmod(left_over[0][1], b[0][1])
        return _made(_sum(whole, _terms(q)), space), r
    quotient_atom, remainder_atom = (_of_atom((name, left_over, b)) for name in ("//", "%"))
    return _made(_sum(whole, quotient_atom), space), _made(remainder_atom, space)


def _exact_quotient(a: Terms, b: Terms) -> Terms | None:
    """`a / b` when b, of several terms, times a monomial is a; else None."""
    for m, c in a:
        for n, d in b:
            left = _without(m, n)
            if left is not None and c % d == 0:
                candidate: Terms = ((left, c // d),)
                if _times(candidate, b) == a:
                    return candidate
    return None


def minimum(a: Any, b: Any, space: SymbolSpace) -> Any:
    return _extremum("min", a, b, space)


def maximum(a: Any, b: Any, space: SymbolSpace) -> Any:
    return _extremum("max", a, b, space)


def _extremum(name: str, a: Any, b: Any, space: SymbolSpace) -> Any:
    settled = _settled("<=", _sum(_terms(a), _scaled(_terms(b), -1)), space)
    if settled is not None:
        return (a if settled else b) if name == "min" else (b if settled else a)
    first, second = sorted((_terms(a), _terms(b)), key=repr)
    return _made(_of_atom((name, first, second)), space)


# ---------------------------------------------------------------- bounds


def _low(terms: Terms, space: SymbolSpace) -> int | None:
    """The polynomial's least value, by writing each atom as its least value plus a rest that
    is not negative: where then no term is negative, the constant one is the least value."""
    shifted: dict[Monomial, int] = {}
    for monomial, c in terms:
        parts: list[tuple[Monomial, int]] = [((), c)]
        for atom in monomial:
            low = space.low(atom)
            if low is None:
                return None
            parts = [
                (tuple(sorted((*m, *extra), key=repr)), d * factor)
                for m, d in parts
                for extra, factor in (((atom,), 1), ((), low))
            ]
        for m, d in parts:
            shifted[m] = shifted.get(m, 0) + d
    if any(c < 0 for m, c in shifted.items() if m):
        return None
    return shifted.get((), 0)


def _settled(relation: str, difference: Terms, space: SymbolSpace) -> bool | None:
    """Whether `difference relation 0` for every size; None: it depends."""
    if not difference:
        return expressions.RELATIONS[relation](0, 0)
    low = _low(difference, space)
    if low is not None and (low > 0 or (low == 0 and relation in ("<", ">="))):
        return relation in ("!=", ">", ">=")
    low = _low(_scaled(difference, -1), space)
    if low is not None and (low > 0 or (low == 0 and relation in ("<=", ">"))):
        return relation in ("!=", "<", "<=")
    return None


# ---------------------------------------------------------------- nodes


def _terms_node(terms: Terms) -> Any:
    parts = []
    for monomial, c in terms:
        factors = [_atom_node(a) for a in monomial]
        if c != 1 or not factors:
            factors.insert(0, c)
        parts.append(factors[0] if len(factors) == 1 else ["*", *factors])
    if not parts:
        return 0
    return parts[0] if len(parts) == 1 else ["+", *parts]


def _atom_node(atom: Atom) -> Any:
    if atom[0] == "s":
        return ["s", atom[1]]
    return [atom[0], *(_terms_node(t) for t in atom[1:])]


def _check_printable(atom: Atom, space: SymbolSpace) -> None:
    """C++ rounds quotients towards zero: operands must not be negative, which is tested."""
    if atom[0] == "s":
        return
    for terms in atom[1:]:
        low = _low(terms, space)
        if atom[0] in ("//", "%") and (low is None or low < 0):
            space.assume([">=", _terms_node(terms), 0])
        for monomial, _ in terms:
            for inner in monomial:
                _check_printable(inner, space)


# ---------------------------------------------------------------- sympy


def from_sympy(expression: Any, symbols: Mapping[Any, Any], space: SymbolSpace) -> Any:
    """A sympy expression of torch's shape environment as a `Dim` or an int.

    Errors: CompileError for what has no such form.
    """
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return symbols[expression]
    name = type(expression).__name__
    build = _BUILDERS.get(name)
    if build is None:
        raise CompileError(f"a size that accel cannot express: {expression}")
    return build([from_sympy(a, symbols, space) for a in expression.args], space)


def _power(parts: list[Any], _space: SymbolSpace) -> Any:
    base, exponent = parts
    if not isinstance(exponent, int) or exponent < 0:
        raise CompileError("a power of sizes")
    return _product_of([base] * exponent)


def _product_of(parts: list[Any]) -> Any:
    result: Any = 1
    for part in parts:
        result = result * part
    return result


def _folded(function: Callable[[Any, Any, SymbolSpace], Any]) -> Callable[..., Any]:
    def fold(parts: list[Any], space: SymbolSpace) -> Any:
        result = parts[0]
        for part in parts[1:]:
            result = function(result, part, space)
        return result

    return fold


_BUILDERS: dict[str, Callable[[list[Any], SymbolSpace], Any]] = {
    "Add": lambda parts, _: sum(parts[1:], parts[0]),
    "Mul": lambda parts, _: _product_of(parts),
    "Pow": _power,
    "PowByNatural": _power,
    "FloorDiv": lambda parts, _: parts[0] // parts[1],
    "CleanDiv": lambda parts, _: parts[0] // parts[1],
    "Mod": lambda parts, _: parts[0] % parts[1],
    "PythonMod": lambda parts, _: parts[0] % parts[1],
    "Max": _folded(maximum),
    "Min": _folded(minimum),
    "Identity": lambda parts, _: parts[0],
}
_RELATIONALS = {
    "Equality": "==",
    "Unequality": "!=",
    "StrictLessThan": "<",
    "LessThan": "<=",
    "StrictGreaterThan": ">",
    "GreaterThan": ">=",
}
_CONNECTIVES = {"And": "and", "Or": "or", "Not": "not"}


def test_from_sympy(expression: Any, symbols: Mapping[Any, Any], space: SymbolSpace) -> Any:
    """A guard of torch's shape environment as a test; None for one that always holds.

    Errors: CompileError for what has no such form.
    """
    if expression is True or (expression.is_Boolean and expression == True):  # noqa: E712
        return None
    name = type(expression).__name__
    if name in _RELATIONALS:
        left, right = (from_sympy(a, symbols, space) for a in expression.args)
        return [_RELATIONALS[name], node(left), node(right)]
    if name in _CONNECTIVES:
        parts = [test_from_sympy(a, symbols, space) for a in expression.args]
        if None in parts:
            raise CompileError(f"a condition on sizes that accel cannot express: {expression}")
        return [_CONNECTIVES[name], *parts]
    raise CompileError(f"a condition on sizes that accel cannot express: {expression}")
