"""Fused steps -> the plan that the executor runs (docs/architecture.md).

In: steps, kernels and the tensor graph. Out: plan data without the library's name.
Invariant: every output has its recorded layout and owns its storage, or shares it with the
input or output that eager would share it with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from accel.codegen.fusion import Group, Step
from accel.codegen.memory import Life, place
from accel.codegen.options import CompileError
from accel.codegen.program import ExternNode, Program, TemplateNode, reads, writes
from accel.codegen.symbols import Dim, is_same, is_symbolic, node
from accel.codegen.tensor_graph import Buffer, Severed, View, is_certain, nested_views

# Their kernels copy the whole storage of what they are given, offset and all.
_COPIES_STORAGE = frozenset(
    f"aten::{name}_scatter" for name in ("select", "slice", "diagonal", "as_strided")
)


@dataclass(frozen=True)
class Launch:
    """How a kernel of a GPU is started: how many programs, which symbols it takes, which
    numbers of the generator's stream (`loop_ir.RunNumber`), and which of its buffers by their value."""

    grid: Any
    symbols: list[int]
    drawn: list[int | None]
    hosts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class KernelUse:
    """One step's kernel: its name, the buffers it takes, and whether the values of the graph's
    symbols come behind them (on the processor) or which of them do (`launch`)."""

    symbol: str
    buffers: list[int]
    parallel: bool
    takes_symbols: bool = False
    launch: Launch | None = None


class Planner:
    """Collects buffers and steps of one plan."""

    def __init__(
        self, program: Program, steps: list[Step], commit: list[Step], stored: set[int]
    ) -> None:
        """`stored` are the buffers with memory; other values stay inside kernels."""
        self.graph, self.stored, self.drawn = program.graph, stored, program.drawn
        self.steps, self.commit = steps, commit
        self.buffers: list[dict[str, Any]] = []
        self.ids: dict[int, int] = {}
        self.view_ids: dict[Any, int] = {}
        self.severed_ids: dict[int, int] = {}  # by the tensor's identity
        self.dynamic = {
            r for s in steps if isinstance(s, ExternNode) for r in s.results if r is not None
        }
        # Storages of their own, as eager's have.
        self.apart = {v.buffer for v in self.graph.outputs}
        for s in steps:
            if isinstance(s, ExternNode) and s.target in _COPIES_STORAGE:
                self.apart |= {v.buffer for v in s.views()}
        self.outputs = {v.buffer for v in self.graph.outputs}
        self.needed = self._needed()
        self.symbol_values = -1  # the buffer of the symbols' values

    def plan(self, kernels: dict[int, KernelUse]) -> dict[str, Any]:
        """The plan, or of a graph for several sizes its blueprint; `kernels` go by id(step)."""
        arena_bytes = self._place()
        steps = [self._step(s, kernels) for s in self.steps]
        commit = [self._step(s, kernels) for s in self.commit]
        self._mark_writes(commit)
        plan: dict[str, Any] = {
            "version": 1,
            "library": None,
            "inputs": [self._input(self.graph.buffers[b]) for b in self.graph.inputs],
            "arena_bytes": arena_bytes,
            "speculations": [
                {"buffer": self.view_id(v), "expected": expected}
                for v, expected in self.graph.speculations
            ],
            "outputs": self._outputs(),
            "steps": self._with_frees(steps),
            "commit": commit,
            "buffers": self.buffers,
        }
        if self.graph.device != "cpu":
            plan["device"] = self.graph.device
        if self.drawn:
            plan["draws"] = self.drawn
        if self.graph.symbols is not None:
            plan["inputs"].append(self._symbol_values())
            plan["sizes"] = {
                "tests": self.graph.symbols.tests,
                "outputs": [node(v) for v in self.graph.number_outputs],
            }
        return plan

    # ------------------------------------------------------------ buffers

    def _input(self, buffer: Buffer) -> dict[str, Any]:
        return self._layout(buffer.view) | ({"host": True} if buffer.host else {})

    def _needed(self) -> set[int]:
        """Buffers that something reads; an operation may leave its other results undefined."""
        needed = set(self.outputs)
        for step in [*self.steps, *self.commit]:
            needed |= step.reads() if isinstance(step, Group) else reads(step)
        needed.update(view.buffer for view, _ in self.graph.speculations)
        needed.update(commit.value.buffer for commit in self.graph.commits)
        return needed

    def _symbol_values(self) -> dict[str, Any]:
        """The layout of the input behind all others: the symbols' values."""
        assert self.graph.symbols is not None
        return {"sizes": [len(self.graph.symbols.hints)], "strides": [1], "dtype": "int64"}

    def _place(self) -> int:
        for index, buffer in enumerate(self.graph.inputs):
            self._add(buffer, {"kind": "input", "index": index})
        lives = self._lives()
        if self.graph.symbols is not None:
            self.symbol_values = len(self.buffers)
            self.buffers.append({"kind": "input", "index": len(self.graph.inputs)})
            return self._place_later(lives)
        offsets, total = place(lives)
        for life in lives:
            layout = self._layout(self.graph.buffers[life.buffer].view)
            self._add(life.buffer, {"kind": "arena", "offset": offsets[life.buffer], **layout})
        return total

    def _place_later(self, lives: list[Life]) -> int:
        """Arena buffers whose sizes are known when a plan is made of the blueprint."""
        for life in lives:
            row = {
                "kind": "arena",
                "bytes": _plain(life.size_bytes),
                "life": [life.first, life.last],
            }
            self._add(life.buffer, {**row, **self._layout(self.graph.buffers[life.buffer].view)})
        return 0

    def _lives(self) -> list[Life]:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, step in enumerate([*self.steps, *self.commit]):
            read = step.reads() if isinstance(step, Group) else reads(step)
            written = step.writes() if isinstance(step, Group) else writes(step)
            for b in (read | written) & self.stored:
                first.setdefault(b, at)
                last[b] = at
        end = len(self.steps) + len(self.commit)
        for view, _ in self.graph.speculations:
            last[view.buffer] = end
            first.setdefault(view.buffer, 0)
        for commit in self.graph.commits:
            last[commit.value.buffer] = end
        lives = []
        for b, at in first.items():
            buffer = self.graph.buffers[b]
            if buffer.input is not None or b in self.dynamic or b in self.apart:
                continue
            size = buffer.numel * getattr(torch, buffer.dtype).itemsize
            lives.append(Life(b, size, at, last[b]))
        return lives

    def _add(self, buffer: int, row: dict[str, Any]) -> int:
        self.ids[buffer] = len(self.buffers)
        self.buffers.append(row)
        return self.ids[buffer]

    def id_of(self, buffer: int) -> int:
        known = self.ids.get(buffer)
        if known is not None:
            return known
        b = self.graph.buffers[buffer]
        layout = self._layout(b.view)
        kind = "dynamic" if buffer in self.dynamic else "output"
        row = {"kind": kind, **layout}
        if kind == "output" and b.memory:
            row["memory"] = b.memory
        return self._add(buffer, row)

    def view_id(self, view: View, again: int = 0) -> int:
        """The plan's buffer for a tensor; `again` tells equal tensors apart."""
        base = self.graph.buffers[view.buffer]
        numbers = zip((*view.sizes, *view.strides), (*base.sizes, *base.strides), strict=False)
        same = (
            len(view.sizes) == len(base.sizes)
            and view.dtype == base.dtype
            and is_same(view.offset, 0)
            and all(is_same(a, b) for a, b in numbers)
        )
        base_id = self.id_of(view.buffer)
        if same and not again:
            return base_id
        key = (view, again)
        if key not in self.view_ids:
            self.view_ids[key] = self._add_view(view, {})
        return self.view_ids[key]

    def _add_view(self, view: View, more: dict[str, Any]) -> int:
        base, offset = self.id_of(view.buffer), _plain(view.offset)
        row = {"kind": "view", "base": base, "offset": offset, **self._layout(view), **more}
        self.buffers.append(row)
        return len(self.buffers) - 1

    def _severed_id(self, severed: Severed) -> int:
        """The plan's buffer for a tensor without history on another's memory."""
        known = self.severed_ids.get(severed.identity)
        if known is None:
            if severed.of is not None:
                more = {"severed": "detach", "of": self._severed_id(severed.of)}
            else:
                more = {"severed": "detach" if severed.shares_version else "data"}
            known = self.severed_ids[severed.identity] = self._add_view(severed.view, more)
        return known

    def _layout(self, view: View) -> dict[str, Any]:
        return {
            "sizes": [_plain(n) for n in view.sizes],
            "strides": [_plain(n) for n in view.strides],
            "dtype": view.dtype,
        }

    def _outputs(self) -> list[int]:
        """Ids of outputs: one tensor object, one id; equal tensors that are not one differ."""
        ids: dict[int, int] = {}
        used = {
            self.ids[b]: identity
            for b, identity in zip(self.graph.inputs, self.graph.input_identity, strict=True)
        }
        result = []
        g = self.graph
        for view, identity, severed in zip(
            g.outputs, g.output_identity, g.output_severed, strict=True
        ):
            if severed is not None and identity not in ids:
                ids[identity] = self._severed_id(severed)
                if identity != severed.identity:
                    ids[identity] = self._add_view(view, {"of": ids[identity]})
            elif identity not in ids:
                again = 0
                while used.get(self.view_id(view, again), identity) != identity:
                    again += 1
                ids[identity] = self.view_id(view, again)
                used[ids[identity]] = identity
            result.append(ids[identity])
        return result

    # ------------------------------------------------------------ steps

    def _step(self, step: Step, kernels: dict[int, KernelUse]) -> dict[str, Any]:
        if isinstance(step, ExternNode):
            return self._extern(step)
        use = kernels[id(step)]
        if isinstance(step, TemplateNode):
            ids = [self.view_id(v) for v in step.operands]
            written = [step.out] if step.epilogue is None else use.buffers
            ids += [self.id_of(b) for b in written]
        else:
            ids = [self.id_of(b) for b in use.buffers]
        if use.takes_symbols:
            ids.append(self.symbol_values)
        if use.launch is not None:
            hosts = [self.id_of(b) for b in use.launch.hosts]
            return {
                "op": "launch",
                "symbol": use.symbol,
                "buffers": [b for b in ids if b not in hosts],
                "grid": _plain(use.launch.grid),
                "numbers": [{"e": ["s", k]} for k in use.launch.symbols]
                + ["seed" if k is None else {"drawn": k} for k in use.launch.drawn]
                + [{"host": b} for b in hosts],
            }
        return {"op": "kernel", "symbol": use.symbol, "buffers": ids, "parallel": use.parallel}

    def _extern(self, step: ExternNode) -> dict[str, Any]:
        kwargs = {k: self._argument(v) for k, v in step.kwargs.items()}
        if step.out is not None:
            kwargs["out"] = {"b": self.id_of(step.out)}
        plain = {
            "op": "extern",
            "target": step.target,
            "args": [self._argument(a) for a in step.args],
            "kwargs": kwargs,
            "results": [self.id_of(r) if r in self.needed else None for r in step.results],
        }
        return {**plain, "certain": True} if is_certain(step.target, step.args) else plain

    def _argument(self, value: Any) -> dict[str, Any]:
        if isinstance(value, View):
            return {"b": self.view_id(value)}
        if isinstance(value, (list, tuple)):
            return self._list_argument(list(value))
        for type_, encode in _SCALAR_ARGUMENTS:
            if isinstance(value, type_):
                encoded: dict[str, Any] = encode(value)
                return encoded
        raise CompileError(f"an argument of type {type(value).__name__} in an ATen call")

    def _list_argument(self, values: list[Any]) -> dict[str, Any]:
        if any(True for _ in nested_views(values)):
            return {"bl": [None if v is None else self.view_id(v) for v in values]}
        if all(type(v) is bool for v in values) and values:
            return {"boollist": values}
        if all(type(v) is int or is_symbolic(v) for v in values):
            return {"il": [_plain(v) for v in values]}
        if all(type(v) in (int, float) for v in values):
            return {"fl": [_float_text(float(v)) for v in values]}
        raise CompileError(f"a list argument {values!r} in an ATen call")

    def _mark_writes(self, commit: list[dict[str, Any]]) -> None:
        """Says which inputs a commit kernel writes, and how often their versions count that."""
        versions = {c.region.buffer: c.versions for c in self.graph.commits}
        for step, row in zip(self.commit, commit, strict=True):
            if isinstance(step, Group):
                written = step.writes()
                row["writes"] = sorted(self.ids[b] for b in written)
            else:
                assert isinstance(step, ExternNode)  # a copy to a region
                written = {step.args[0].buffer}
            # Written by several steps, an input gets its versions with the first.
            counts = {b: versions.get(b, 1) for b in written}
            versions.update(dict.fromkeys(written, 0))
            if any(count != 1 for count in counts.values()):
                row["versions"] = sorted([self.ids[b], n] for b, n in counts.items() if n != 1)

    def _with_frees(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Adds the steps that drop dynamic buffers after their last use."""
        keep = {self._root(b) for b in self._kept_ids()}
        last: dict[int, int] = {}
        for at, row in enumerate(rows):
            for b in _row_buffers(row):
                last[self._root(b)] = at
        ends: dict[int, list[int]] = {}
        for b, at in last.items():
            if self.buffers[b]["kind"] == "dynamic" and b not in keep:
                ends.setdefault(at, []).append(b)
        result = []
        for at, row in enumerate(rows):
            result.append(row)
            result += [{"op": "free", "buffer": b} for b in sorted(ends.get(at, ()))]
        return result

    def _kept_ids(self) -> list[int]:
        kept = [self.id_of(v.buffer) for v in self.graph.outputs]
        kept += [self.id_of(v.buffer) for v, _ in self.graph.speculations]
        kept += [self.id_of(c.value.buffer) for c in self.graph.commits]
        return kept

    def _root(self, b: int) -> int:
        while self.buffers[b]["kind"] == "view":
            b = self.buffers[b]["base"]
        return b


def _row_buffers(row: dict[str, Any]) -> list[int]:
    if row["op"] in ("kernel", "launch"):
        return list(row["buffers"])
    found = [r for r in row["results"] if r is not None]
    for argument in [*row["args"], *row["kwargs"].values()]:
        if "b" in argument:
            found.append(argument["b"])
        found += [b for b in argument.get("bl", ()) if b is not None]
    return found


def _plain(value: Any) -> Any:
    """A number as JSON; a symbolic one is {"e": its expression}."""
    return {"e": node(value)} if is_symbolic(value) else value


def _float_text(value: float) -> str:
    return value.hex() if math.isfinite(value) else repr(value)


# In order: bool is an int.
_SCALAR_ARGUMENTS: list[tuple[Any, Any]] = [
    (type(None), lambda v: {"none": True}),
    (bool, lambda v: {"bool": v}),
    (Dim, lambda v: {"i": _plain(v)}),
    (int, lambda v: {"i": v}),
    (float, lambda v: {"f": _float_text(v)}),
    (complex, lambda v: {"c": [_float_text(v.real), _float_text(v.imag)]}),
    (str, lambda v: {"s": v}),
    (torch.dtype, lambda v: {"dtype": str(v).removeprefix("torch.")}),
    (torch.device, lambda v: {"device": str(v)}),
    (torch.layout, lambda v: {"layout": str(v).removeprefix("torch.")}),
    (torch.memory_format, lambda v: {"memory_format": str(v).removeprefix("torch.")}),
]
