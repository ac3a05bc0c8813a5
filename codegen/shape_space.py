"""Graphs for several sizes on fake tensors: torch's shape environment, and its answers as `Dim`s.

In: a graph's symbols and the recorded metadata of its inputs. Out: fake inputs whose sizes are
`torch.SymInt`s, and `Dim`s for whatever sizes come out of the operations. Invariant: every
guard that torch made on the way is a test of the graph's `SymbolSpace` (`finish`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch._guards import GuardSource, Source
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from accel.codegen import symbols
from accel.codegen.options import CompileError
from accel.codegen.symbols import SymbolSpace
from accel.trace import SegmentGraph, Sizes, Symbol, TensorMeta


class _Origin(Source):  # type: ignore[misc]
    """A name for torch's own bookkeeping; nothing is ever loaded from it."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def _name_template(self) -> str:
        return f"s{self.number}"

    @property
    def name(self) -> str:
        return f"s{self.number}"

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Origin) and other.number == self.number


def _lowest(symbol: Symbol) -> int | None:
    """What the graph takes for granted of a symbol, and tests."""
    if symbol.origin[0] == "size":
        return symbols.SMALLEST
    return 0 if symbol.hint >= 0 else None


class ShapeSpace:
    """The symbols of one graph, for torch and for us."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        # No duck shapes: dimensions that are equal by chance are different symbols.
        self.env = ShapeEnv(
            duck_shape=False, specialize_zero_one=True, assume_static_by_default=False
        )
        lows = [_lowest(s) for s in sizes.symbols]
        self.space = SymbolSpace([s.hint for s in sizes.symbols], lows)
        self.by_symbol: dict[Any, Any] = {}
        self.of_size: dict[tuple[int, int], Any] = {}
        self.numbers: dict[str, Any] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self.env)
        self.mode.cache_enabled = False  # its entries would not repeat the guards
        for number, symbol in enumerate(sizes.symbols):
            self._add(number, symbol.origin, symbol.hint)

    def _add(self, number: int, origin: tuple[Any, ...], hint: int) -> None:
        source = _Origin(number)
        if origin[0] == "size":
            if hint < symbols.SMALLEST:
                raise CompileError(f"a size of {hint} has a graph of its own")
            made = self.env.create_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
        else:
            made = self.env.create_unspecified_symbol(
                hint, source=source, dynamic_dim=DimDynamic.DYNAMIC
            )
        self.by_symbol[made] = self.space.symbol(number)
        value = self.env.create_symintnode(made, hint=hint, source=source)
        if origin[0] == "size":
            self.of_size[origin[1], origin[2]] = value
        else:
            self.numbers[self.sizes.numbers[origin[1]]] = value
            if hint >= 0 and not value >= 0:  # asking makes it a test of the graph
                raise CompileError(f"number {origin[1]} is {hint} and negative")

    # ------------------------------------------------------------ inputs

    def input(self, index: int, meta: TensorMeta) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Sizes and strides of an input, symbolic where the graph says so."""
        sizes = tuple(self.of_size.get((index, d), n) for d, n in enumerate(meta.sizes))
        return sizes, _strides(sizes, meta)

    # ------------------------------------------------------------ numbers

    def dim(self, value: Any) -> Any:
        """A number of torch's as an int or a `Dim`; one that is not an int settles."""
        if isinstance(value, torch.SymInt):
            expression = self.env.replace(value.node.expr)
            return symbols.from_sympy(expression, self.by_symbol, self.space)
        if isinstance(value, torch.SymFloat):
            return float(value)
        if isinstance(value, torch.SymBool):
            return bool(value)
        return value

    def check_hint(self, name: str, value: Any, expected: Any) -> None:
        """Errors: CompileError when a number is not what the recorded run saw."""
        found = value
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            found = value.node.hint
        if found != expected:
            raise CompileError(f"{name} was {expected} when recorded, traces as {found}")

    def finish(self) -> None:
        """Makes tests of the guards that torch has made, and notes the symbols that they settle."""
        for number, low in enumerate(self.space.lows):
            if low is not None:
                self.space.assume([">=", ["s", number], low])
        for guard in self.env.guards:
            test = symbols.test_from_sympy(guard.expr, self.by_symbol, self.space)
            if test is not None:
                self.space.assume(test)
        for symbol, bounds in self.env.var_to_range.items():
            self._assume_bounds(symbol, bounds)
        # What was made before its size was settled has the symbol, what was asked later has not.
        for number, symbol in enumerate(self.by_symbol):
            now = self.env.replace(symbol)
            if now != symbol:
                settled = symbols.from_sympy(now, self.by_symbol, self.space)
                self.space.settle(number, settled)

    def _assume_bounds(self, symbol: Any, bounds: Any) -> None:
        known = self.by_symbol.get(symbol)
        if known is None:
            raise CompileError("a size that only the operations' values decide")
        low, high = bounds.lower, bounds.upper
        # Sympy's infinities are no integers; torch narrows ranges by guards that are above.
        if low.is_Integer and symbols.lower_bound(known) != int(low):
            self.space.assume([">=", symbols.node(known), int(low)])
        if high.is_Integer:
            self.space.assume(["<=", symbols.node(known), int(high)])


def _strides(sizes: tuple[Any, ...], meta: TensorMeta) -> tuple[Any, ...]:
    """Strides in terms of sizes where they are a product of inner extents, else as recorded.

    A guess in either case: a call whose tensors lie otherwise is not served by this graph.
    """
    order = sorted(range(len(sizes)), key=lambda d: (meta.strides[d], -d))
    strides: dict[int, Any] = {}
    for d in order:
        strides[d] = meta.strides[d]
        inner = sorted(strides.keys() - {d}, key=lambda e: e != d + 1)
        for e in inner:
            if meta.sizes[e] * meta.strides[e] == meta.strides[d] and meta.sizes[e] > 1:
                strides[d] = sizes[e] * strides[e]
                break
    return tuple(strides[d] for d in range(len(sizes)))


def shape_space(graph: SegmentGraph) -> ShapeSpace | None:
    return None if graph.sizes is None else ShapeSpace(graph.sizes)
