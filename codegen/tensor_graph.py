"""The tensor graph: ATen operations without side effects over buffers.

In: built by `tracing`. Out: read by the optimiser, the lowerings and the planner.
Invariant: a buffer is written by exactly one node (or is an input or a constant) and never
changes; every tensor is a `View`, a strided look at one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from accel.codegen.symbols import SymbolSpace, hint, surely

_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}  # by bytes


@dataclass(frozen=True)
class View:
    """A strided tensor over a buffer; offsets and strides count elements of `dtype`."""

    buffer: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: str

    @property
    def numel(self) -> int:
        count = 1
        for s in self.sizes:
            count *= s
        return count

    @property
    def bits(self) -> View:
        """The same memory as integers: what is only moved needs no arithmetic of its dtype."""
        bytes_ = int(getattr(torch, self.dtype).itemsize)
        if bytes_ <= 8:
            return replace(self, dtype=_INTEGERS[bytes_])
        pairs = tuple(s * 2 for s in self.strides)
        return View(self.buffer, (*self.sizes, 2), (*pairs, 1), self.offset * 2, _INTEGERS[8])

    @property
    def may_overlap_itself(self) -> bool:
        """Unless each element has a place of its own; what that asks of open sizes is assumed."""
        reached: Any = 1
        lines = zip(self.strides, self.sizes, strict=True)
        for stride, size in sorted(lines, key=lambda line: hint(line[0])):
            if surely("<=", size, 1):
                continue
            if reached > stride:
                return True
            reached = reached + (size - 1) * stride
        return False


@dataclass
class Buffer:
    """Memory of `numel` elements, seen by its writer as `sizes` and `strides`."""

    id: int
    numel: int
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    input: int | None = None
    constant: tuple[Any, ...] | None = None
    memory: int = 0  # of an output: elements that its memory has in eager, where they are more
    host: bool = (
        False  # a number on the processor, in a graph on a GPU: launches are given its value
    )

    @property
    def view(self) -> View:
        return View(self.id, self.sizes, self.strides, 0, self.dtype)


@dataclass
class Node:
    """One operation. `results` are the buffers it writes (None: not a tensor).

    `target` is an ATen overload, or one of our own: "write" (args: base view or None, the
    region's view of the result, the value) makes a copy of base with a region replaced;
    "copy" (args: value) makes a tensor with the result's layout.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int | None]
    result_is_list: bool = False
    operand_dtype: str = ""  # what the operands promote to, where ATen would promote
    location: str = ""
    origin: str = ""  # the recorded operation that it is a part of

    def views(self) -> Iterator[View]:
        yield from nested_views((self.args, self.kwargs))


@dataclass
class Commit:
    """A write to an input: `region` of it becomes `value`, both as views.

    `versions`: how often eager counts it in the tensor's version; 0 where its kernels write unseen.
    `state`: in a graph with gradients, the whole input as the call leaves it.
    """

    region: View
    value: View
    versions: int = 1
    state: View | None = None


@dataclass(frozen=True)
class Severed:
    """A tensor on another's memory that autograd does not know as its view (`detach`, `data`).

    `view` is its layout over the memory's first tensor, whose version it shares or not; one that has
    its version from another severed tensor says so with `of`. An output is it, or a view of it.
    """

    identity: int
    view: View
    shares_version: bool
    of: Severed | None = None


@dataclass
class TensorGraph:
    buffers: list[Buffer] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)
    # Which outputs and inputs are one tensor object: equal numbers, same tensor.
    output_identity: list[int] = field(default_factory=list)
    output_severed: list[Severed | None] = field(default_factory=list)
    input_identity: list[int] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    speculations: list[tuple[View, bool]] = field(default_factory=list)
    # Of a graph for several sizes: what is assumed of them, and numbers that it returns.
    symbols: SymbolSpace | None = None
    device: str = "cpu"
    tf32: bool | None = None  # whether a GPU may multiply float32 with ten bits; None: not known
    number_outputs: list[Any] = field(default_factory=list)
    may_speculate: bool = True  # who runs it can do without it
    # About tensors of indices: what another graph has made sure of before this one runs.
    answered: frozenset[Any] = frozenset()

    def new_buffer(
        self, numel: int, dtype: str, sizes: tuple[int, ...], strides: tuple[int, ...], **more: Any
    ) -> Buffer:
        buffer = Buffer(len(self.buffers), numel, dtype, sizes, strides, **more)
        self.buffers.append(buffer)
        return buffer

    def roots(self) -> Iterator[View]:
        """What must be computed."""
        yield from self.outputs
        for commit in self.commits:
            yield commit.value
        for view, _ in self.speculations:
            yield view

    def dump(self) -> str:
        lines = [f"input b{b}: {_show(self.buffers[b].view)}" for b in self.inputs]
        for node in self.nodes:
            results = ", ".join("_" if r is None else f"b{r}" for r in node.results)
            args = ", ".join(_show(a) for a in node.args)
            more = "".join(f", {k}={_show(v)}" for k, v in node.kwargs.items())
            lines.append(f"{results} = {node.target}({args}{more})")
        lines += [f"commit {_show(c.region)} <- {_show(c.value)}" for c in self.commits]
        lines += [f"expect {_show(v)} is {e}" for v, e in self.speculations]
        lines.append("return " + ", ".join(_show(v) for v in self.outputs))
        return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    if isinstance(value, View):
        sizes = "x".join(map(repr, value.sizes)) or "scalar"
        return f"b{value.buffer}[{sizes} {value.dtype} {list(value.strides)}+{value.offset!r}]"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_show, value)) + "]"
    return repr(value)


def nested_views(value: Any) -> Iterator[View]:
    """The views in a nest of arguments."""
    if isinstance(value, View):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from nested_views(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from nested_views(v)


def map_views(value: Any, function: Callable[[View], Any]) -> Any:
    """A nest of arguments with every view replaced."""
    if isinstance(value, View):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_views(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_views(v, function) for k, v in value.items()}
    return value


# Operations that draw only with a probability, and where it stands among their arguments.
_PROBABILITIES = {"aten::scaled_dot_product_attention": 4}


def is_certain(name: str, args: Sequence[Any]) -> bool:
    """Whether a call of an operation that may draw draws nothing."""
    place = _PROBABILITIES.get(name)
    return place is not None and not args[place]


def is_random(node: Node) -> bool:
    """True when the node draws from a generator: it runs once, in program order."""
    target = node.target
    if isinstance(target, str) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return not is_certain(target._schema.name, node.args)


def span(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last element of a strided tensor, both included."""
    if 0 in sizes:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def contiguous_strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for n in reversed(sizes):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
