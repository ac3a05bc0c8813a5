"""Expressions over a graph's symbols: plain data, evaluated, shown, printed as C++ or Triton.

In: nodes, as JSON has them. Out: their values, their text. Invariant: `evaluate` is Python's
own integer arithmetic, and the printed text has the same value wherever no operand is negative.

    node := int                       a constant
          | ["s", k]                  symbol number k
          | ["+" | "*", node, ...]
          | ["//" | "%", node, node]  Python's
          | ["min" | "max", node, node]
    test := [relation, node, node]    a row of RELATIONS
          | ["and" | "or", test, ...] | ["not", test]
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

Node = Any  # int or list, see above

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "+": sum,
    "*": math.prod,
    "//": lambda v: v[0] // v[1],
    "%": lambda v: v[0] % v[1],
    "min": min,
    "max": max,
}


def evaluate(node: Node, values: Sequence[int]) -> int:
    """The node's value where symbol k is `values[k]`.

    Errors: ZeroDivisionError; ValueError for what is no node.
    """
    if isinstance(node, int):
        return node
    name: str = node[0]
    operands: list[Node] = node[1:]
    if name == "s":
        return values[operands[0]]
    if name not in _OPERATIONS:
        raise ValueError(f"no operation is called {name!r}")
    return _OPERATIONS[name]([evaluate(o, values) for o in operands])


def holds(test: Node, values: Sequence[int]) -> bool:
    """Whether a test holds for these values. Errors: as `evaluate`."""
    name, *operands = test
    if name in RELATIONS:
        left, right = (evaluate(o, values) for o in operands)
        return RELATIONS[name](left, right)
    if name == "not":
        return not holds(operands[0], values)
    if name in ("and", "or"):
        return (all if name == "and" else any)(holds(o, values) for o in operands)
    raise ValueError(f"no test is called {name!r}")


def text(node: Node, names: Sequence[str]) -> str:
    """The node or test for people, with `names[k]` for symbol k."""
    if isinstance(node, int):
        return str(node)
    name: str = node[0]
    if name == "s":
        return str(names[node[1]])
    parts = [text(o, names) for o in node[1:]]
    if name in ("min", "max", "not"):
        return name + "(" + ", ".join(parts) + ")"
    if name not in ("+", *RELATIONS):
        parts = [f"({p})" if " " in p else p for p in parts]
    return f" {name} ".join(parts)


def cpp(node: Node) -> str:
    """The node as a C++ expression over variables `s0`, `s1`, ... of type i64."""
    if isinstance(node, int):
        return f"{node}L" if abs(node) >= 1 << 31 else str(node)
    name: str = node[0]
    if name == "s":
        return f"s{node[1]}"
    parts = [cpp(o) for o in node[1:]]
    if name in ("min", "max"):
        a, b = parts
        return f"({a} {'<' if name == 'min' else '>'} {b} ? {a} : {b})"
    sign = {"//": "/"}.get(name, name)
    return f"({f' {sign} '.join(parts)})"


def triton(node: Node) -> str:
    """The node as a Triton expression over scalars `s0`, `s1`, ... of type int64."""
    if isinstance(node, int):
        return str(node)
    name: str = node[0]
    if name == "s":
        return f"s{node[1]}"
    parts = [triton(o) for o in node[1:]]
    if name in ("min", "max"):
        return f"tl.{name}imum({', '.join(parts)})"
    return f"({f' {name} '.join(parts)})"
