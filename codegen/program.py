"""The lowered program: loop nodes, extern calls and kernels from templates over buffers.

In: built by the lowerings. Out: read by fusion, the memory planner and the emitter.
Invariant: steps are in program order; a buffer may have several writers only if they
write it together ("regions": concatenation, padding, partial writes).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from accel.codegen.affine import Affine
from accel.codegen.loop_ir import Expr, Gather, Load, leaves, substitute
from accel.codegen.symbols import hint
from accel.codegen.tensor_graph import TensorGraph, View, nested_views


@dataclass
class LoopNode:
    """`buffer[address] = expr` over `dims`, or its reduction by `kind` over `reduced`, or its
    `scan` along `scanned`, which are some of `dims`: what has been combined so far, this
    element included.

    `region` marks a writer that shares its buffer with others; one that `scatters` adds to what they
    have written, and its expression is `placed`. Scans that are `in_order` take elements one by one
    (`loop_ir.Scan`).
    """

    name: str
    buffer: int
    address: Affine
    dtype: str
    expr: Expr
    dims: list[str]
    reduced: list[str] = field(default_factory=list)
    kind: str | None = None
    region: bool = False
    scatters: bool = False
    location: str = ""
    scanned: list[str] = field(default_factory=list)
    scan: str | None = None
    in_order: bool = False

    @property
    def rows(self) -> list[str]:
        """The variables that a row of the node walks along, if it has rows."""
        return self.reduced or self.scanned

    @property
    def space(self) -> frozenset[str]:
        return frozenset(self.dims) | frozenset(self.reduced)

    def loads(self) -> list[Load]:
        return [e for e in leaves(self.expr) if isinstance(e, Load)]

    def gathers(self) -> list[Gather]:
        return [e for e in leaves(self.expr) if isinstance(e, Gather)]

    def rename(self, by: dict[str, Affine]) -> None:
        """Puts expressions of new variables in place of old ones."""
        self.address = self.address.substitute(by)
        self.expr = substitute(self.expr, by)
        self.dims = _expand(self.dims, by)
        self.reduced = _expand(self.reduced, by)
        self.scanned = _expand(self.scanned, by)


def _expand(names: list[str], by: dict[str, Affine]) -> list[str]:
    result = []
    for name in names:
        if name in by:  # outer part first
            result += [v for v, _ in sorted(by[name].terms, key=lambda t: -hint(t[1]))]
        else:
            result.append(name)
    return result


@dataclass
class ExternNode:
    """A call of an ATen operator.

    `out` is the buffer passed as the out argument; otherwise `results` are bound to the
    fresh tensors that the call returns.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int | None]
    out: int | None = None
    location: str = ""

    def views(self) -> Iterator[View]:
        yield from nested_views((self.args, self.kwargs))


@dataclass
class TemplateNode:
    """One kernel from a hand-written template: p[0...] are the operands, the last is `out`.

    `text` is the C++ of the kernel, with "@" for its name. With `rows` and `columns` the
    template hands its results out row by row to `@_results`, which stores them; an
    `epilogue`, a group that is the only reader of `out`, then takes the place of the store. With
    `pieces` the parts of a row that are handed out begin and end anywhere, not at whole vectors.
    """

    out: int
    operands: tuple[View, ...]
    text: str
    parallel: bool = False
    location: str = ""
    rows: int = 0
    columns: int = 0
    pieces: bool = False
    epilogue: Any = None


@dataclass
class Program:
    graph: TensorGraph
    sizes: dict[str, int] = field(default_factory=dict)
    steps: list[LoopNode | ExternNode | TemplateNode] = field(default_factory=list)
    commit_steps: list[LoopNode] = field(default_factory=list)
    drawn: int = 0  # by how much a run advances the offset of a GPU's generator
    _names: int = 0

    def fresh(self, prefix: str = "i") -> str:
        self._names += 1
        return f"{prefix}{self._names}"

    def variable(self, size: int) -> str:
        name = self.fresh()
        self.sizes[name] = size
        return name

    def part(self) -> str:
        return self.fresh()


def reads(step: LoopNode | ExternNode | TemplateNode) -> set[int]:
    if isinstance(step, LoopNode):
        return {e.buffer for e in step.loads()} | {e.buffer for e in step.gathers()}
    if isinstance(step, TemplateNode):
        own = {v.buffer for v in step.operands}
        return own if step.epilogue is None else own | (step.epilogue.reads() - {step.out})
    return {view.buffer for view in step.views()}


def writes(step: LoopNode | ExternNode | TemplateNode) -> set[int]:
    if isinstance(step, LoopNode):
        return {step.buffer}
    if isinstance(step, TemplateNode):
        written: set[int] = {step.out} if step.epilogue is None else step.epilogue.writes()
        return written
    if step.out is not None:
        return {step.out}
    return {r for r in step.results if r is not None}
