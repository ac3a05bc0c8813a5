"""What is the same in every round of a loop is computed before it.

In: the body of a kernel. Out: a body in which loops have left what depends neither on their
variable nor on what they define, as locals before them. Compilers move arithmetic, but no load
past the stores of a loop: they cannot know that these are to other memory. Invariant: what a
kernel writes is read where it was read before.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from accel.codegen import loop_ir as ir


def hoist(kernel: ir.Kernel) -> None:
    kernel.body = _Hoist(kernel).of_body(kernel.body)


class _Hoist:
    def __init__(self, kernel: ir.Kernel) -> None:
        self.written = written(kernel)
        self.count = 0

    def of_body(self, body: list[Any]) -> list[Any]:
        made: list[Any] = []
        defined: set[str] = set()  # two loops may define one local, equally
        for s in body:
            for part in self.of_loop(s) if isinstance(s, ir.Loop) else [s]:
                if isinstance(part, ir.Let):
                    if part.name in defined:
                        continue
                    defined.add(part.name)
                made.append(part)
        return made

    def of_loop(self, loop: ir.Loop) -> list[Any]:
        """The loop, behind what was taken out of it."""
        body = self.of_body(loop.body)  # inner loops first: what leaves them may go on
        inside = set(ir.names(ir.Loop(loop.var, loop.size, loop.vector, body)))
        before: list[Any] = []
        known: dict[ir.Expr, ir.Local] = {}
        kept: list[Any] = []
        for s in body:
            if isinstance(s, ir.Let) and is_outside(s.expr, inside, self.written):
                before.append(s)
                inside.discard(s.name)
                continue
            if isinstance(s, ir.VALUED):
                s.expr = self.outside_parts(s.expr, inside, before, known)
            kept.append(s)
        return [*before, ir.Loop(loop.var, loop.size, loop.vector, kept)]

    def outside_parts(
        self, e: ir.Expr, inside: set[str], before: list[Any], known: dict[ir.Expr, ir.Local]
    ) -> ir.Expr:
        if isinstance(e, (ir.Const, ir.Local)):
            return e
        if is_outside(e, inside, self.written):
            if e not in known:
                known[e] = ir.Local(f"h{self.count}", e.type)
                self.count += 1
                before.append(ir.Let(known[e].name, e))
            return known[e]
        if isinstance(e, ir.Op):
            args = tuple(self.outside_parts(a, inside, before, known) for a in e.args)
            return ir.Op(e.name, args, e.type)
        if isinstance(e, ir.Gather):
            place = self.outside_parts(e.place, inside, before, known)
            return ir.Gather(e.buffer, e.address, place, e.dtype)
        return e


def written(kernel: ir.Kernel) -> frozenset[int]:
    """The parameters that the kernel writes."""
    return frozenset(i for i, param in enumerate(kernel.params) if param.written)


def is_outside(e: ir.Expr, inside: Collection[str], written: frozenset[int]) -> bool:
    """Whether it is the same in every round of a loop that defines what is `inside`."""
    if isinstance(e, ir.Op):
        parts = [a for a in e.args if not isinstance(a, ir.Const)]
        return (
            bool(parts)
            and e.name != "placed"
            and all(is_outside(a, inside, written) for a in parts)
        )
    if isinstance(e, ir.Local):
        return e.name not in inside
    if isinstance(e, (ir.Load, ir.Gather)):
        known = e.buffer != ir.RESULTS and e.buffer not in written
        same = known and not any(v in inside for v, _ in e.address.terms)
        places = [p for p in ir.children(e) if not isinstance(p, ir.Const)]
        return same and all(is_outside(p, inside, written) for p in places)
    return False
