"""Checks the invariants of the loop IR.

In: a `Kernel`. Out: nothing. Errors: CompileError naming the kernel and the fault; it means
a fault of the compiler, and the program runs eagerly.
"""

from __future__ import annotations

from typing import Any

from accel.codegen import loop_ir as ir
from accel.codegen.options import CompileError
from accel.codegen.scalar_ops import SCALAR_OPS


def verify(kernel: ir.Kernel) -> None:
    """Raises CompileError unless `kernel` is well formed."""
    _Verifier(kernel).check(kernel.body, [v for v, _ in kernel.outer], {}, set())


class _Verifier:
    def __init__(self, kernel: ir.Kernel) -> None:
        self.kernel = kernel
        self.began: dict[str, tuple[str, str, int]] = {}  # kind, type, loops around it

    def fail(self, what: str) -> None:
        raise CompileError(f"loop IR of {self.kernel.name}: {what}")

    def check(
        self, body: list[Any], scope: list[str], locals_: dict[str, str], begun: set[str]
    ) -> None:
        locals_ = dict(locals_)
        for s in body:
            if isinstance(s, ir.Loop):
                if s.var in scope:
                    self.fail(f"variable {s.var} is bound twice")
                if s.vector and s.var != self.kernel.vector_var:
                    self.fail(f"a vector loop over {s.var}")
                self.check(s.body, [*scope, s.var], locals_, begun)
            elif isinstance(s, ir.Begin):
                begun.add(s.name)
                self.began[s.name] = s.kind, s.type, len(scope)
                if s.kind not in {*ir.REDUCTIONS, *ir.SCANS}:
                    self.fail(f"unknown reduction {s.kind}")
            elif isinstance(s, ir.Finish):
                if s.accumulator not in begun:
                    self.fail(f"{s.accumulator} was never begun")
                locals_[s.name] = s.type
            else:
                self.expr(s.expr, scope, locals_)
                self.statement(s, scope, locals_, begun)

    def statement(self, s: Any, scope: list[str], locals_: dict[str, str], begun: set[str]) -> None:
        if isinstance(s, ir.Let):
            locals_[s.name] = s.expr.type
        elif isinstance(s, ir.Store):
            self.address(s.address, scope)
            param = self.kernel.params[s.param]
            if not param.written or param.dtype != s.dtype:
                self.fail(f"a store of {s.dtype} to parameter {s.param}: {param}")
            if isinstance(s, ir.Scatter) != (isinstance(s.expr, ir.Op) and s.expr.name == "placed"):
                self.fail("a place that is not scattered to")
            if s.expr.type != ir.VALUE_TYPE[s.dtype]:
                self.fail(f"a store of {s.expr.type} as {s.dtype}")
        elif isinstance(s, ir.Keep):
            self.address(s.address, scope)
            if s.scratch not in self.kernel.scratch:
                self.fail(f"no row buffer {s.scratch}")
        elif isinstance(s, ir.Accumulate) and s.name not in begun:
            self.fail(f"{s.name} was never begun")
        elif isinstance(s, ir.Scan):
            if s.accumulator not in begun:
                self.fail(f"{s.accumulator} was never begun")
            kind, type_, outside = self.began[s.accumulator]
            if s.kind != kind or s.kind not in ir.SCANS:
                self.fail(f"unknown scan {s.kind} of {kind}")
            if s.expr.type != type_:
                self.fail(f"{s.accumulator} is {type_}, scanned as {s.expr.type}")
            if len(scope) <= outside:
                self.fail(f"a scan of {s.accumulator} outside of a loop over its row")
            locals_[s.name] = type_

    def address(self, address: Any, scope: list[str]) -> None:
        missing = address.variables() - set(scope)
        if missing:
            self.fail(f"variables {sorted(missing)} are not bound")

    def expr(self, e: ir.Expr, scope: list[str], locals_: dict[str, str]) -> None:
        if isinstance(e, ir.Op):
            row = SCALAR_OPS.get(e.name)
            if row is None:
                return self.fail(f"unknown operation {e.name}")
            for a in e.args:
                self.expr(a, scope, locals_)
            if row.result_type(e.args) != e.type:
                self.fail(f"{e.name} gives {row.result_type(e.args)}, not {e.type}")
            operands = {"where": e.args[1:], "placed": e.args[:1]}.get(e.name, e.args)
            if len({a.type for a in operands}) > 1:
                self.fail(f"{e.name} of {[a.type for a in e.args]}")
        elif isinstance(e, ir.Local):
            if locals_.get(e.name) != e.type:
                self.fail(f"{e.name} is {locals_.get(e.name)}, used as {e.type}")
        elif isinstance(e, (ir.Load, ir.Gather, ir.Iota, ir.Kept, ir.Table)):
            self.address(e.address, scope)
        if isinstance(e, ir.Gather):
            self.expr(e.place, scope, locals_)
            if e.place.type not in ("i32", "i64"):
                self.fail(f"a place that is {e.place.type}")
        if isinstance(e, ir.Load) and e.buffer == ir.RESULTS:
            lanes = e.address.variables() == {self.kernel.vector_var}
            if e.dtype != "float32" or not (lanes or self.kernel.vector_var is None):
                self.fail("a load of a template's results that is not the vector at hand")
        elif isinstance(e, (ir.Load, ir.Gather)) and self.kernel.params[e.buffer].dtype != e.dtype:
            self.fail(f"a load of {e.dtype} from parameter {e.buffer}")
        return None
