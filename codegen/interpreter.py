"""Runs loop-IR kernels on tensors: the oracle for emitters.

In: a `Kernel` and one flat tensor per parameter. Out: the written parameters, changed in
place. Invariant: shares nothing with the emitters but the IR and the table of operations;
loops are evaluated as whole index grids, reductions by torch in the accumulator's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine
from accel.codegen.scalar_ops import SCALAR_OPS, TORCH_TYPE

_REDUCE = {
    "sum": torch.sum,
    "prod": torch.prod,
    "max": torch.amax,
    "min": torch.amin,
    "any": torch.any,
    "all": torch.all,
}

_SCAN: dict[str, Callable[..., torch.Tensor]] = {"sum": torch.cumsum, "prod": torch.cumprod}


def interpret(
    kernel: ir.Kernel, memory: list[torch.Tensor], stream: tuple[int, int] = (0, 0)
) -> None:
    """Runs the kernel; `memory[i]` is parameter i as a flat tensor, `stream` the seed and the block
    of random numbers that the run begins at."""
    _Interpreter(kernel, memory, stream).run()


class _Interpreter:
    def __init__(
        self, kernel: ir.Kernel, memory: list[torch.Tensor], stream: tuple[int, int]
    ) -> None:
        self.kernel, self.memory, self.stream = kernel, memory, stream
        self.axes: dict[str, int] = {}
        self.extents: list[int] = []
        self.values: dict[str, torch.Tensor] = {}
        self.started: dict[str, tuple[tuple[str, ...], str]] = {}
        self.scratch: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        variables = list(dict.fromkeys([*self.kernel.outer, *_loops(self.kernel.body)]))
        for axis, (name, size) in enumerate(variables):
            self.axes[name] = axis
            self.extents.append(size)
        self._run_body(self.kernel.body, tuple(v for v, _ in self.kernel.outer))

    def _run_body(self, body: list[Any], scope: tuple[str, ...]) -> None:
        for statement in body:
            if isinstance(statement, ir.Loop):
                self._run_body(statement.body, (*scope, statement.var))
            else:
                getattr(self, f"_run_{type(statement).__name__.lower()}")(statement, scope)

    def _run_let(self, s: ir.Let, scope: tuple[str, ...]) -> None:
        self.values[s.name] = self.value(s.expr)

    def _run_store(self, s: ir.Store, scope: tuple[str, ...]) -> None:
        value = self._spread(self.value(s.expr), scope)
        where = self._spread(self.index(s.address), scope)
        target = self.memory[s.param]
        target[where.reshape(-1)] = value.reshape(-1).to(target.dtype)

    def _run_scatter(self, s: ir.Scatter, scope: tuple[str, ...]) -> None:
        assert isinstance(s.expr, ir.Op)
        value, place = (self._spread(self.value(a), scope) for a in s.expr.args)
        where = (self._spread(self.index(s.address), scope) + place).reshape(-1)
        target = self.memory[s.param]
        target.index_put_((where,), value.reshape(-1).to(target.dtype), accumulate=True)

    def _run_keep(self, s: ir.Keep, scope: tuple[str, ...]) -> None:
        self.scratch[s.scratch] = self.value(s.expr)

    def _run_begin(self, s: ir.Begin, scope: tuple[str, ...]) -> None:
        self.started[s.name] = (scope, s.kind)

    def _run_accumulate(self, s: ir.Accumulate, scope: tuple[str, ...]) -> None:
        outside, kind = self.started[s.name]
        value = self._spread(self.value(s.expr), scope)
        for var in scope:
            if var not in outside:
                value = _REDUCE[kind](value, dim=self.axes[var], keepdim=True)
        self.values[s.name] = value

    def _run_scan(self, s: ir.Scan, scope: tuple[str, ...]) -> None:
        outside, kind = self.started[s.accumulator]
        value = self._spread(self.value(s.expr), scope)
        # A row's loops become one dimension, as they are nested.
        axes = [self.axes[var] for var in scope if var not in outside]
        last = list(range(-len(axes), 0))
        rows = value.movedim(axes, last)
        scanned = _SCAN[kind](rows.flatten(-len(axes)), -1, dtype=TORCH_TYPE[s.expr.type])
        self.values[s.name] = scanned.reshape(rows.shape).movedim(last, axes)

    def _run_finish(self, s: ir.Finish, scope: tuple[str, ...]) -> None:
        self.values[s.name] = self.values[s.accumulator].to(TORCH_TYPE[s.type])

    def _spread(self, value: torch.Tensor, scope: tuple[str, ...]) -> torch.Tensor:
        """`value` as it is in every iteration of the loops in scope."""
        shape = [1] * len(self.extents)
        for var in scope:
            shape[self.axes[var]] = self.extents[self.axes[var]]
        return value.expand(torch.broadcast_shapes(value.shape, shape)) if shape else value

    def index(self, address: Affine) -> torch.Tensor:
        result = torch.full([1] * len(self.extents), address.const, dtype=torch.int64)
        for var, coefficient in address.terms:
            shape = [1] * len(self.extents)
            shape[self.axes[var]] = self.extents[self.axes[var]]
            result = result + coefficient * torch.arange(shape[self.axes[var]]).reshape(shape)
        return result

    def value(self, e: ir.Expr) -> torch.Tensor:
        if isinstance(e, ir.Const):
            return torch.full([1] * len(self.extents), e.value, dtype=TORCH_TYPE[e.type])
        if isinstance(e, ir.RunNumber):
            seed, block = self.stream
            value = seed if e.blocks is None else block + e.blocks
            return torch.full([1] * len(self.extents), value, dtype=torch.int64)
        if isinstance(e, ir.Iota):
            return self.index(e.address).to(TORCH_TYPE[e.type])
        if isinstance(e, ir.Local):
            return self.values[e.name]
        if isinstance(e, ir.Load):
            return self.memory[e.buffer][self.index(e.address)].to(TORCH_TYPE[e.type])
        if isinstance(e, ir.Gather):
            where = self.index(e.address) + self.value(e.place)
            return self.memory[e.buffer][where].to(TORCH_TYPE[e.type])
        if isinstance(e, ir.Kept):
            return self.scratch[e.scratch]
        if isinstance(e, ir.Table):
            return torch.tensor(e.values, dtype=TORCH_TYPE[e.type])[self.index(e.address)]
        assert isinstance(e, ir.Op)
        return SCALAR_OPS[e.name].torch(*(self.value(a) for a in e.args))


def _loops(body: list[Any]) -> list[tuple[str, int]]:
    found = []
    for statement in body:
        if isinstance(statement, ir.Loop):
            found.append((statement.var, statement.size))
            found += _loops(statement.body)
    return found
