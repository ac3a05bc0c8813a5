"""Groups -> kernels: loop order, the vector variable, phases of a row, threads.

In: a fused `Group` and which buffers need memory. Out: a `Kernel` of the loop IR and the
buffers its parameters stand for. Invariant: a row's loops run in phases; a value computed
in one phase and used in a later one is computed again, kept in a row buffer or read back
from memory, never taken from another iteration. A row with scans is walked in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from accel.codegen.affine import Affine, row_major
from accel.codegen.fusion import Group
from accel.codegen.hoisting import hoist
from accel.codegen.jamming import jam_rows
from accel.codegen.loop_ir import (
    ITEM_BYTES,
    RESULTS,
    ROUNDING,
    VALUE_TYPE,
    Accumulate,
    Begin,
    Const,
    Expr,
    Finish,
    Gather,
    Iota,
    Keep,
    Kept,
    Kernel,
    Let,
    Load,
    Local,
    Loop,
    Op,
    Param,
    Scan,
    Scatter,
    Store,
    Table,
    addresses,
    children,
    leaves,
    rounded,
    transform,
)
from accel.codegen.program import LoopNode
from accel.codegen.scalar_ops import SCALAR_OPS
from accel.codegen.symbols import hint, is_same, is_symbolic

# Above this cost a value is kept for later phases instead of computed again.
_RECOMPUTE_COST = 3.0
_SCRATCH_BYTES = 1 << 15
LONGEST_ROW = _SCRATCH_BYTES // 8  # elements of a row buffer whose length differs between calls
# Threads pay off above this estimate.
_PARALLEL_NS = 12_000.0
_NS_PER_VECTOR_OP = 0.35
_NS_PER_BYTE = 0.03
_NS_PER_STRIDED_ELEMENT = 0.7
_NS_PER_TURNED_ELEMENT = 0.15  # in tiles
_STRIDED_PENALTY = 40.0
_TURNED_PENALTY = 3.0  # in tiles
_NEAR_PENALTY, _NEAR_STEP = 4.0, 4  # elements this far apart come from a few vectors
_LEAST_TILE = 4
_ROUND_COST = 4.0
_ACROSS_COST = 12.0  # of a reduction over the lanes of one vector
_SCAN_COST = 8.0  # of one within a vector


@dataclass
class Scheduled:
    kernel: Kernel
    buffers: list[int]
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)

    def kernels(self) -> list[Kernel]:
        """All loop IR that becomes one function."""
        return [self.kernel]


def lanes_for(group: Group, vector_bytes: int) -> int:
    """Lanes of a vector: as many as the widest type of the group allows."""
    wide = any(_is_wide(n) for n in group.nodes)
    return max(vector_bytes // (8 if wide else 4), 2)


def _is_wide(node: LoopNode) -> bool:
    expr = node.expr
    if node.scan is not None and isinstance(expr, Op) and expr.name == "to_f64":
        (expr,) = expr.args  # nothing but the running value is wide
    return any(t in ("f64", "i64") for t in _types(expr)) or ITEM_BYTES[node.dtype] == 8


def _types(expr: Expr) -> Iterator[str]:
    yield expr.type
    for a in children(expr):
        yield from _types(a)


def spilled(group: Group, sizes: dict[str, int], stored: set[int], longest: int) -> set[int]:
    """Buffers that need memory because a later phase reads them, and a row of them is longer than
    what is kept; `stored` are those in memory anyway."""
    length = 1
    for v in group.inner:
        length *= sizes[v]
    found: set[int] = set()
    while True:
        phases = Phases(group, stored | found)
        more = {n.buffer for n in phases.carried(lambda n: _node_cost(n) > _RECOMPUTE_COST)}
        if not more or length <= longest:  # where sizes are open, asking makes a test of the graph
            return found
        found |= more  # computed early now, and with them what they are computed from


class Phases:
    """In which of a kernel's passes over a row its values are computed.

    A node's phase is the first in which its operands exist; a reduction's result exists one phase
    later. Values wanted only later are computed later, but for those that are `stored`.
    """

    def __init__(self, group: Group, stored: set[int]) -> None:
        self.group, self.stored = group, stored
        self.rows = set(group.inner)
        self.writer = {n.buffer: n for n in group.nodes if group.writer(n.buffer) is n}
        self.of: dict[str, int] = {}
        for node in group.nodes:
            self.of[node.name] = max((self._ready(d) for d in self.deps(node)), default=0)
        earliest = dict(self.of)
        for node in reversed(group.nodes):
            if node.kind is not None or node.buffer in stored or node.region:
                continue
            users = [self.of[u.name] for u in group.nodes if node in self.deps(u)]
            if users:
                self.of[node.name] = max(earliest[node.name], min(users))

    def _ready(self, dep: LoopNode) -> int:
        return self.of[dep.name] + (1 if dep.kind is not None else 0)

    def deps(self, node: LoopNode) -> list[LoopNode]:
        return [self.writer[e.buffer] for e in node.loads() if e.buffer in self.writer]

    def is_full(self, node: LoopNode) -> bool:
        return bool(node.space & self.rows)

    def carried(self, is_costly: Callable[[LoopNode], bool]) -> list[LoopNode]:
        """The costly values that a later phase needs, be it for computing others again."""
        found: list[LoopNode] = []

        def carry(dep: LoopNode) -> None:
            if dep.buffer in self.stored or dep in found:
                return
            if is_costly(dep):
                found.append(dep)
                return
            for inner in self.deps(dep):
                if self.is_full(inner) and inner.kind is None:
                    carry(inner)

        for node in self.group.nodes:
            for dep in self.deps(node):
                if self.is_full(dep) and dep.kind is None and self.is_full(node):
                    if self.of[dep.name] < self.of[node.name]:
                        carry(dep)
        return found


def schedule(
    group: Group, sizes: dict[str, int], stored: set[int], name: str, vector_bytes: int
) -> Scheduled:
    """The kernel of one group; `stored` are the buffers that other steps read."""
    narrow_iotas(group, sizes)
    lanes = lanes_for(group, vector_bytes)
    order(group, sizes)
    collapse(group, sizes)
    vector, over_rows = choose_vector(group, sizes, lanes)
    made = KernelBuilder(group, sizes, stored, name, vector, over_rows, lanes).build()
    if made.kernel.tile_var is None:
        hoist(made.kernel)
    jam_rows(made.kernel, lanes, vector_bytes)
    return made


def schedule_epilogue(
    group: Group, sizes: dict[str, int], stored: set[int], results: int, vector_bytes: int
) -> Scheduled:
    """The kernel of a group that runs on a template's `results` (a buffer), row by row."""
    narrow_iotas(group, sizes)
    lanes = lanes_for(group, vector_bytes)
    builder = KernelBuilder(group, sizes, stored, "", group.outer[-1], False, lanes)
    builder.results = results
    return builder.build()


# ---------------------------------------------------------------- loops


def group_addresses(group: Group) -> Iterator[Affine]:
    for node in group.nodes:
        yield node.address
        yield from addresses(node.expr)


def order(group: Group, sizes: dict[str, int]) -> None:
    """Sorts variables by the strides of the widest store; rows of scans are walked in order."""
    leading = max((n.address for n in group.nodes), key=lambda a: len(a.terms))
    widest = max(group_addresses(group), key=lambda a: len(a.terms))
    if len(widest.terms) > len(leading.terms):
        leading = widest

    def key(v: str) -> int:
        return -hint(leading.coefficient(v))

    group.outer.sort(key=key)
    group.inner.sort(key=key)
    group.inner = group.scanned() or group.inner


def collapse(group: Group, sizes: dict[str, int]) -> None:
    """Makes one variable of neighbours that every address walks through in one stride."""
    for names in (group.outer, group.inner):
        i = 0
        while i + 1 < len(names):
            first, second = names[i], names[i + 1]
            if _can_collapse(group, first, second, sizes):
                _collapse_pair(group, names, i, sizes)
            else:
                i += 1


def _can_collapse(group: Group, first: str, second: str, sizes: dict[str, int]) -> bool:
    for node in group.nodes:
        if (first in node.space) != (second in node.space):
            return False
    size = sizes[second]
    return all(
        is_same(a.coefficient(first), a.coefficient(second) * size) for a in group_addresses(group)
    )


def _collapse_pair(group: Group, names: list[str], i: int, sizes: dict[str, int]) -> None:
    first, second = names[i], names[i + 1]
    # The second takes both over: coefficients are right already once the first is gone.
    sizes[second] = sizes[first] * sizes[second]
    gone = {first: Affine()}
    for node in group.nodes:
        node.rename(gone)
    del names[i]


def choose_vector(group: Group, sizes: dict[str, int], lanes: int) -> tuple[str | None, bool]:
    """The variable whose iterations become lanes, and whether it is one of the outer ones
    of a group with rows. Reorders so that it is the last of its list, where a scan's stays."""
    inner = group.inner[-1:] if group.scanned() else group.inner
    candidates = [(v, False) for v in inner] or [(v, False) for v in group.outer]
    if group.inner and group.outer:
        candidates += [(v, True) for v in group.outer]
    if not candidates:
        return None, False
    # Later variables have smaller strides: they win ties.
    best = min(reversed(candidates), key=lambda c: _vector_cost(group, c[0], c[1], sizes, lanes))
    names = group.outer if best[1] or not group.inner else group.inner
    names.remove(best[0])
    names.append(best[0])
    return best


def _vector_cost(
    group: Group, var: str, over_rows: bool, sizes: dict[str, int], lanes: int
) -> float:
    size = hint(sizes[var])
    blocks = -(-size // lanes)
    used = size / (blocks * lanes)
    cost = _ROUND_COST / blocks  # of a loop over lanes, whose body is a step or more
    tiles = () if group.inner else tile_variables(group, sizes, var)
    stores = {n.address for n in group.nodes}
    for a in set(group_addresses(group)):
        step = a.coefficient(var)
        if is_same(step, 0) or is_same(step, 1):
            cost += 0.2 if is_same(step, 0) else 1.0
        elif len(tiles) == 1 and a not in stores:
            cost += _TURNED_PENALTY
        else:
            near = not is_symbolic(step) and -1 <= step <= _NEAR_STEP
            cost += _NEAR_PENALTY if near else _STRIDED_PENALTY
    cost += _STRIDED_PENALTY * sum(_anywhere(n, var) for n in group.nodes)
    if over_rows:
        cost *= 1.2  # rows are walked with a stride
    elif group.inner:
        for v in group.inner:
            blocks *= hint(sizes[v]) if v != var else 1
        cost += _ACROSS_COST * sum(n.kind is not None for n in group.nodes) * used / blocks
        cost += _SCAN_COST * sum(n.scan is not None for n in group.nodes)
    return cost / used


def _anywhere(node: LoopNode, var: str | None) -> int:
    """How many accesses of a node neighbours along a variable make in places of their own."""
    places = [gather.place for gather in node.gathers()]
    if node.scatters:
        places.append(children(node.expr)[1])
    return sum(any(var in a.variables() for a in addresses(place)) for place in places)


def tile_variables(group: Group, sizes: dict[str, int], vector: str) -> tuple[str, ...]:
    """Variables along which loads are contiguous that a vector variable strides over."""
    if any(is_symbolic(sizes[v]) for v in group.outer) or sizes[vector] < _LEAST_TILE:
        return ()
    written = {n.buffer for n in group.nodes}
    found: dict[str, None] = {}
    for node in group.nodes:
        for load in node.loads():
            step = load.address.coefficient(vector)
            if load.buffer in written or is_symbolic(step) or -1 <= step <= _NEAR_STEP:
                continue
            for v in group.outer:
                near = is_same(load.address.coefficient(v), 1) and sizes[v] >= _LEAST_TILE
                if v != vector and near:
                    found[v] = None
    return tuple(found)


def narrow_iotas(group: Group, sizes: dict[str, int]) -> None:
    """Positions that are only compared with positions are computed in 32 bits."""

    def narrow(e: Expr) -> Expr | None:
        if isinstance(e, Iota):
            top = abs(e.address.const) + sum(abs(c) * sizes[v] for v, c in e.address.terms)
            return Iota(e.address, "i32") if top < 1 << 30 else None
        if isinstance(e, Const) and e.type == "i64" and abs(e.value) < 1 << 30:
            return Const(e.value, "i32")
        if isinstance(e, Op) and e.name in ("add", "sub") and e.type == "i64":
            parts = [narrow(a) for a in e.args]
            if all(p is not None and not isinstance(p, Op) for p in parts):
                return Op(e.name, tuple(p for p in parts if p is not None), "i32")
        return None

    def walk(e: Expr) -> Expr:
        if not isinstance(e, Op):
            return e
        if e.name in ("eq", "ne", "lt", "le", "gt", "ge"):
            parts = [narrow(a) for a in e.args]
            if all(p is not None for p in parts):
                return Op(e.name, tuple(p for p in parts if p is not None), "bool")
        if e.name in ("to_f32", "to_i32") and isinstance(e.args[0], Iota):
            part = narrow(e.args[0])
            if part is not None:
                return part if e.name == "to_i32" else Op(e.name, (part,), e.type)
        args = tuple(walk(a) for a in e.args)
        return Op(e.name, args, e.type)

    for node in group.nodes:
        node.expr = walk(node.expr)


# ---------------------------------------------------------------- phases


class KernelBuilder:
    """Makes the kernel of one group; without a vector variable all its loops are plain."""

    def __init__(
        self,
        group: Group,
        sizes: dict[str, int],
        stored: set[int],
        name: str,
        vector: str | None,
        over_rows: bool,
        lanes: int,
    ) -> None:
        self.group, self.sizes, self.stored = group, sizes, stored
        self.vector, self.over_rows, self.lanes = vector, over_rows, lanes
        self.kernel = Kernel(name, [], [], [], vector_var=vector, lanes_over_rows=over_rows)
        self.buffers: list[int] = []
        self.params: dict[tuple[int, str], int] = {}
        self.phases = Phases(group, stored)
        self.phase, self.writer = self.phases.of, self.phases.writer
        self.kept: set[str] = set()
        self.defined: set[str] = set()  # locals of the loop body being written
        self.row_defined: set[str] = set()
        self.results: int | None = None  # a template's results, which are at hand
        self.longest_row = LONGEST_ROW

    def build(self) -> Scheduled:
        self._number_params()
        self._keep_rows()
        body: list[object] = []
        last = max(self.phase.values(), default=0)
        for phase in range(last + 1):
            self._row_statements(phase, body)
            self._row_loop(phase, body)
        self._row_statements(last + 1, body)
        k = self.kernel
        outer = list(self.group.outer)
        if self.vector is not None and (not self.group.inner or self.over_rows):
            outer.remove(self.vector)
            body = [Loop(self.vector, self.sizes[self.vector], True, body)]
        k.outer = [(v, self.sizes[v]) for v in outer]
        k.body = body
        k.tile_var = self._tile_var(outer, body)
        k.cost_ns = self._estimate()
        # Two threads could add to one cell.
        alone = any(n.scatters for n in self.group.nodes)
        k.parallel = k.cost_ns > _PARALLEL_NS and self._units() > 1 and not alone
        return Scheduled(k, self.buffers, set(), set())

    def _tile_var(self, outer: list[str], body: list[object]) -> str | None:
        """The outer variable along which loads are contiguous that the vector one strides over."""
        if self.group.inner or self.results is not None or self.vector is None or len(body) != 1:
            return None
        found = tile_variables(self.group, self.sizes, self.vector)
        return found[0] if len(found) == 1 and found[0] in outer else None

    def _units(self) -> int:
        units = 1
        for v in self.group.outer:
            units *= hint(self.sizes[v])
        return units

    def _estimate(self) -> float:
        total = 0.0
        for node in self.group.nodes:
            count = 1
            for v in node.space:
                count *= hint(self.sizes[v])
            cost = expression_cost(node.expr) + (_SCAN_COST if node.scan is not None else 1)
            total += count * cost * _NS_PER_VECTOR_OP / self.lanes
            for a, dtype in _accesses(node, self.writer, self.stored):
                if self.vector and hint(a.coefficient(self.vector)) > 1:
                    in_tiles = self.kernel.tile_var is not None
                    each = _NS_PER_TURNED_ELEMENT if in_tiles else _NS_PER_STRIDED_ELEMENT
                    total += count * (each + in_tiles * ITEM_BYTES[dtype] * _NS_PER_BYTE)
                elif self.vector and hint(a.coefficient(self.vector)):
                    total += count * ITEM_BYTES[dtype] * _NS_PER_BYTE
            total += count * _anywhere(node, self.vector) * _NS_PER_STRIDED_ELEMENT
        return total

    # ------------------------------------------------------------ params

    def _number_params(self) -> None:
        for node in self.group.nodes:
            for load in node.loads():
                if load.buffer == self.results:
                    continue
                if load.buffer not in self.writer or load.dtype != self.writer[load.buffer].dtype:
                    self._param(load.buffer, load.dtype, False)
            for gather in node.gathers():
                self._param(gather.buffer, gather.dtype, False)
        for node in self.group.nodes:
            if node.buffer in self.stored or node.region:
                self._param(node.buffer, node.dtype, True)

    def _param(self, buffer: int, dtype: str, written: bool) -> int:
        key = (buffer, dtype)
        if key not in self.params:
            self.params[key] = len(self.buffers)
            self.buffers.append(buffer)
            self.kernel.params.append(Param(dtype, written))
        elif written:
            self.kernel.params[self.params[key]] = Param(dtype, True)
        return self.params[key]

    # ------------------------------------------------------------ phases

    def _keep_rows(self) -> None:
        """What later phases need is in memory, in a row buffer, or computed anew."""
        carried = self.phases.carried(_is_kept)
        length = self._row_length() if carried else None
        if length is not None:
            for node in carried:
                self.kernel.scratch[node.name] = (length, VALUE_TYPE[node.dtype])
                self.kept.add(node.name)

    def _row_length(self) -> int | None:
        """Elements of a row buffer; None for a row that may be too long to keep."""
        length = 1
        for v in self.group.inner:
            length *= self.sizes[v]
        if not is_symbolic(length):
            return length if length <= self.longest_row else None
        # Its memory is for the longest row: the comparison makes that a test of the graph.
        return LONGEST_ROW if length <= LONGEST_ROW else None

    # ------------------------------------------------------------ statements

    def _row_statements(self, phase: int, body: list[object]) -> None:
        """What is one value a row: results of reductions, then what is made of them."""
        for node in self.group.nodes:
            if node.kind is not None and self.phase[node.name] == phase - 1:
                body.append(Finish(self._raw(node), f"a_{node.name}", node.kind, node.expr.type))
                value = rounded(Local(self._raw(node), node.expr.type), node.dtype)
                body.append(Let(node.name, value))
                self._store(node, body)
        for node in self.group.nodes:
            if (
                node.kind is None
                and not self.phases.is_full(node)
                and self.phase[node.name] == phase
            ):
                self._value(node, self._body(node, phase, body), body)

    def _raw(self, node: LoopNode) -> str:
        return f"r_{node.name}"

    def _value(self, node: LoopNode, expr: Expr, body: list[object]) -> None:
        if node.scatters:
            param = self._param(node.buffer, node.dtype, True)
            body.append(Scatter(param, node.address, expr, node.dtype))
            return
        body.append(Let(node.name, expr))
        self._store(node, body)

    def _store(self, node: LoopNode, body: list[object]) -> None:
        if node.buffer in self.stored or node.region:
            param = self._param(node.buffer, node.dtype, True)
            body.append(
                Store(param, node.address, Local(node.name, VALUE_TYPE[node.dtype]), node.dtype)
            )

    def _row_loop(self, phase: int, body: list[object]) -> None:
        nodes = [
            n for n in self.group.nodes if self.phases.is_full(n) and self.phase[n.name] == phase
        ]
        if not nodes:
            return
        self.defined = set()
        inside: list[object] = []
        for node in nodes:
            expr = self._body(node, phase, inside)
            if node.scan is not None:
                body.append(Begin(f"a_{node.name}", node.scan, expr.type))
                raw = Local(self._raw(node), expr.type)
                inside.append(Scan(raw.name, f"a_{node.name}", node.scan, expr, node.in_order))
                expr = rounded(raw, node.dtype)
            if node.kind is not None:
                body.append(Begin(f"a_{node.name}", node.kind, node.expr.type))
                inside.append(Accumulate(f"a_{node.name}", node.kind, expr))
                continue
            self.defined.add(node.name)
            self._value(node, expr, inside)
            if node.name in self.kept:
                where = row_major(self.group.inner, self.sizes)
                inside.append(Keep(node.name, where, Local(node.name, VALUE_TYPE[node.dtype])))
        loops = inside
        for v in reversed(self.group.inner):
            vector = v == self.vector and not self.over_rows
            loops = [Loop(v, self.sizes[v], vector, loops)]
        body += loops

    def _body(self, node: LoopNode, phase: int, body: list[object]) -> Expr:
        """The node's expression with parameters and locals in place of buffers."""

        def leaf(e: Expr) -> Expr:
            if isinstance(e, Gather):
                return Gather(self._param(e.buffer, e.dtype, False), e.address, e.place, e.dtype)
            if not isinstance(e, Load):
                return e
            dep = self.writer.get(e.buffer)
            if e.buffer == self.results:
                # By lanes, those of the vector; in a block, all of it.
                where = e.address if self.vector is None else Affine.var(self.vector)
                return Load(RESULTS, where, e.dtype)
            if dep is None or dep.dtype != e.dtype:
                return Load(self._param(e.buffer, e.dtype, False), e.address, e.dtype)
            return self._value_of(dep, phase, body)

        return transform(node.expr, leaf)

    def _value_of(self, dep: LoopNode, phase: int, body: list[object]) -> Expr:
        type_ = VALUE_TYPE[dep.dtype]
        if not self.phases.is_full(dep) or dep.kind is not None or dep.name in self.defined:
            return Local(dep.name, type_)
        # From an earlier phase: defined here once, under the same name.
        if dep.buffer in self.stored:
            again: Expr = Load(self._param(dep.buffer, dep.dtype, True), dep.address, dep.dtype)
        elif dep.name in self.kept:
            again = Kept(dep.name, row_major(self.group.inner, self.sizes), type_)
        else:
            again = self._body(dep, phase, body)
        body.append(Let(dep.name, again))
        self.defined.add(dep.name)
        return Local(dep.name, type_)


def _is_kept(node: LoopNode) -> bool:
    return _node_cost(node) > _RECOMPUTE_COST or len(node.loads()) > 2


def _node_cost(node: LoopNode) -> float:
    """What computing a value again would cost; a scan's is never computed from its operands."""
    return math.inf if node.scan is not None else expression_cost(node.expr)


def expression_cost(expr: Expr) -> float:
    if isinstance(expr, Op):
        own = 0.0 if expr.name in ROUNDING.values() else SCALAR_OPS[expr.name].cost
        return own + sum(expression_cost(a) for a in expr.args)
    if isinstance(expr, Gather):
        return 8.0 + expression_cost(expr.place)
    return 8.0 if isinstance(expr, Table) else 0.0


def _accesses(
    node: LoopNode, writer: dict[int, LoopNode], stored: set[int]
) -> Iterator[tuple[Affine, str]]:
    for e in leaves(node.expr):
        if isinstance(e, Gather) or (isinstance(e, Load) and e.buffer not in writer):
            yield e.address, e.dtype
    if node.buffer in stored or node.region:
        yield node.address, node.dtype
