"""Matrix products of a GPU that are one kernel with the pointwise work around them.

In: steps after fusion, where products are ATen's calls and what is around them groups. Out: the same
steps; a product whose results a pointwise group reads first, or whose operands only it reads,
has become a `Product` together with these groups, where `product_blocks` says that this pays.
Invariant: an epilogue visits each element of the product once; a preparation's values are read by
nobody else, and are computed again wherever an operand is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from accel.codegen.affine import ZERO, Affine, Split, address, combined
from accel.codegen.epilogues import is_pointwise, lined_up, loads_of
from accel.codegen.fusion import Group, Step
from accel.codegen.loop_ir import (
    ITEM_BYTES,
    Const,
    Expr,
    Kernel,
    Let,
    Load,
    RunNumber,
    leaves,
    rounded,
    transform,
)
from accel.codegen.options import CodegenOptions
from accel.codegen.product_blocks import GPUS, Blocks, Operand, Work, best_blocks, gain
from accel.codegen.program import ExternNode, LoopNode, Program, reads, writes
from accel.codegen.schedule import (
    KernelBuilder,
    Scheduled,
    collapse,
    expression_cost,
    narrow_iotas,
    order,
)
from accel.codegen.symbols import hint, is_same
from accel.codegen.tensor_graph import View, contiguous_strides

# ATen's calls that are products: how many arguments stand before the two operands.
_PRODUCTS = {"aten::mm.out": 0, "aten::bmm.out": 0, "aten::addmm.out": 1, "aten::baddbmm.out": 1}
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class Side:
    """An operand: the nodes that compute it, the last one its value, and of their variables which
    are the product's batch, which its rows (of the right side: columns), and which the sum's."""

    group: Group
    batch: list[str]
    extent: list[str]
    inner: list[str]

    def reads(self) -> set[int]:
        return self.group.reads() - self.group.writes()


@dataclass
class Product(Group):
    """A group whose first node's value is a sum over `left` times `right`, as the buffer `sums`,
    which has no memory; `outer` are `batch`, `rows` and `columns`."""

    sums: int = -1
    sides: tuple[Side, ...] = ()
    batch: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    inner_size: Any = 0  # numbers of a sum
    kind: str = ""  # their dtype, or "tf32"
    blocks: Blocks | None = None

    def show(self) -> str:
        sides = "; ".join(str(n.expr) for s in self.sides for n in s.group.nodes)
        return f"product of {self.kind} by {self.blocks}, of {sides}, {super().show()}"

    def reads(self) -> set[int]:
        return set().union(super().reads() - {self.sums}, *(s.reads() for s in self.sides))


@dataclass
class ScheduledProduct(Scheduled):
    """`kernel` is what follows the sums; `sides`, over the same parameters, compute the operands: their
    last local is the value."""

    sides: list[Kernel] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)  # of all variables

    def kernels(self) -> list[Kernel]:
        return [self.kernel, *self.sides]


@dataclass(frozen=True)
class _Call:
    """A product as ATen is called for it: views of two or, with a batch, three dimensions."""

    left: View
    right: View
    bias: View | None
    out: View
    alpha: float
    beta: float
    location: str

    @property
    def extents(self) -> tuple[Any, Any, Any, Any]:
        batch = self.left.sizes[0] if len(self.left.sizes) == 3 else 1
        return batch, self.left.sizes[-2], self.right.sizes[-1], self.left.sizes[-1]


@dataclass(frozen=True)
class Site:
    """A product that may be one kernel with what surrounds it: the steps that would be gone, in
    order, which of the buffers they write are wanted as memory, and the blocks that are likely best, by
    which so many seconds are likely gained."""

    program: Program
    steps: tuple[Step, ...]
    visible: frozenset[int]
    gpu: str
    work: Work
    blocks: Blocks
    gain_s: float


Choose = Callable[[Site], Blocks | None]


def likely(site: Site) -> Blocks | None:
    """The choice without a measurement."""
    return site.blocks if site.gain_s > 0 else None


def take_products(
    program: Program,
    steps: list[Step],
    kept: set[int],
    options: CodegenOptions,
    choose: Choose = likely,
) -> list[Step]:
    """`kept` are the buffers that outlive the steps; `choose` answers None where calls are to stay."""
    if options.gpu not in GPUS or not options.products:
        return steps
    return _Taking(program, steps, kept, options.gpu, choose).run()


class _Taking:
    def __init__(
        self, program: Program, steps: list[Step], kept: set[int], gpu: str, choose: Choose
    ) -> None:
        self.program, self.steps, self.kept, self.gpu = program, steps, kept, gpu
        self.choose = choose
        self.position = {id(step): at for at, step in enumerate(steps)}
        self.readers: dict[int, list[Step]] = {}
        self.writers: dict[int, list[Step]] = {}
        for step in steps:
            for buffer in step.reads() if isinstance(step, Group) else reads(step):
                self.readers.setdefault(buffer, []).append(step)
            if isinstance(step, Group):
                for buffer in step.writes():
                    self.writers.setdefault(buffer, []).append(step)
        self.made: dict[int, Product] = {}  # in whose place a product stands
        self.gone: set[int] = set()

    def run(self) -> list[Step]:
        for step in self.steps:
            call = self._call(step)
            if call is not None:
                self._take(step, call)
        return [self.made.get(id(s), s) for s in self.steps if id(s) not in self.gone]

    # ------------------------------------------------------------ what there is

    def _call(self, step: Step) -> _Call | None:
        """The product that a call is, if a kernel may take its place."""
        if not isinstance(step, ExternNode) or step.target not in _PRODUCTS or step.out is None:
            return None
        first = _PRODUCTS[step.target]
        views = list(step.args)
        numbers = {name: step.kwargs.get(name, 1) for name in ("alpha", "beta")}
        if len(views) != first + 2 or set(step.kwargs) - set(numbers):
            return None
        if not all(isinstance(v, View) for v in views):
            return None
        if any(type(n) not in (int, float) for n in numbers.values()):
            return None
        out = self.program.graph.buffers[step.out].view
        left, right = views[-2:]
        bias = views[0] if first else None
        # What is multiplied with 0 is not read by ATen.
        if bias is not None and numbers["beta"] == 0:
            return None
        given = [v for v in (left, right, bias, out) if v is not None]
        if len({v.dtype for v in given}) > 1 or out.dtype not in _DTYPES:
            return None
        if out.dtype == "float32" and self.program.graph.tf32 is None:
            return None
        if any(is_same(n, 0) for v in given for n in v.sizes):
            return None
        alpha, beta = (float(n) for n in numbers.values())
        return _Call(left, right, bias, out, alpha, beta, step.location)

    def _first_reader(self, call: _Call) -> Group | None:
        """The pointwise group that reads the product before all others."""
        users = self.readers.get(call.out.buffer, [])
        if not users or not self._is_free(users[0]):
            return None
        return users[0] if isinstance(users[0], Group) and is_pointwise(users[0]) else None

    def _is_free(self, step: Step) -> bool:
        return id(step) not in self.made and id(step) not in self.gone

    def _maker(self, call: _Call, side: int) -> Group | None:
        """The pointwise group that computes an operand for nobody else."""
        view, other = (call.left, call.right)[side], (call.right, call.left)[side]
        if view.buffer in (other.buffer, call.bias and call.bias.buffer):
            return None
        (maker,) = self.writers.get(view.buffer, [None])[:1]
        users = self.readers.get(view.buffer, [])
        if not isinstance(maker, Group) or not self._is_free(maker) or not is_pointwise(maker):
            return None
        if len(self.writers[view.buffer]) > 1 or len(users) != 1 or maker.nodes[-1].scatters:
            return None
        outside = {b for b in maker.writes() if self._is_visible(b, maker)}
        if outside != {view.buffer} or view.buffer in self.kept:
            return None
        found = [e for n in maker.nodes for e in leaves(n.expr)]
        if any(isinstance(e, RunNumber) for e in found) or any(n.gathers() for n in maker.nodes):
            return None
        return maker

    def _is_visible(self, buffer: int, group: Group) -> bool:
        """Whether somebody besides the group wants it as memory."""
        others = [s for s in self.readers.get(buffer, []) if s is not group]
        return bool(others) or buffer in self.kept

    # ------------------------------------------------------------ taking

    def _take(self, step: Step, call: _Call) -> None:
        follower = self._first_reader(call)
        behind = None if follower is None else self._behind(call, follower)
        makers = [self._maker(call, side) for side in (0, 1)]
        before = [
            None if m is None else self._before(call, m, side) for side, m in enumerate(makers)
        ]
        found = []
        for uses in _choices(before):
            if behind is None and not any(uses):
                continue
            chosen = [m if use else None for m, use in zip(makers, uses, strict=True)]
            work = self._work(call, follower if behind else None, chosen)
            blocks = best_blocks(work, self.gpu)
            if blocks is not None:
                found.append((gain(blocks, work, self.gpu), work, blocks, uses))
        if not found:
            return
        gained, work, blocks, uses = max(found, key=lambda f: f[0])
        chosen = [m if use else None for m, use in zip(makers, uses, strict=True)]
        around = [*chosen, step, follower if behind else None]
        site = self._site([s for s in around if s is not None], work, blocks, gained)
        best = self.choose(site)
        if best is None:
            return
        sides = []
        for side in (0, 1):
            split, maker = before[side], makers[side]
            if uses[side] and maker is not None and split is not None:
                sides.append(self._computed(split, maker, side))
                self.gone.add(id(maker))
            else:
                sides.append(self._plain(call, side))
        product = self._product(call, work, best, tuple(sides), behind, follower)
        if behind is None:
            self.made[id(step)] = product
        else:
            self.made[id(follower)] = product
            self.gone.add(id(step))

    def _site(self, steps: list[Step], work: Work, blocks: Blocks, gained: float) -> Site:
        steps.sort(key=lambda s: self.position[id(s)])
        written: set[int] = set()
        for s in steps:
            written |= s.writes() if isinstance(s, Group) else writes(s)
        inside = {id(s) for s in steps}
        visible = {
            b
            for b in written
            if b in self.kept or any(id(s) not in inside for s in self.readers.get(b, []))
        }
        return Site(self.program, tuple(steps), frozenset(visible), self.gpu, work, blocks, gained)

    def _variables(self, *sizes: Any) -> list[Affine]:
        """One for each of these extents, zero for one that has a single element."""
        return [ZERO if is_same(n, 1) else Affine.var(self.program.variable(n)) for n in sizes]

    def _behind(self, call: _Call, group: Group) -> tuple[Split, list[Affine]] | None:
        order(group, self.program.sizes)
        collapse(group, self.program.sizes)
        batch, m, n, _ = call.extents
        index = self._variables(batch, m, n)
        whole = address(0, call.out.strides, index[-len(call.out.sizes) :])
        split = lined_up(self.program, group, loads_of(group, call.out), whole)
        return None if split is None else (split, index)

    def _before(self, call: _Call, group: Group, side: int) -> tuple[Split, list[Affine]] | None:
        order(group, self.program.sizes)
        collapse(group, self.program.sizes)
        view = (call.left, call.right)[side]
        index, places = self._places(call, side)
        whole = address(view.offset, view.strides, places[-len(view.sizes) :])
        writer = group.writer(view.buffer)
        if writer is None or writer.dtype != view.dtype or writer is not group.nodes[-1]:
            return None
        split = lined_up(self.program, group, {writer.address}, whole)
        return None if split is None else (split, index)

    def _places(self, call: _Call, side: int) -> tuple[list[Affine], list[Affine]]:
        """Variables of an operand's batch, extent and sum, and the same in the order of its dimensions."""
        batch, m, n, k = call.extents
        index = self._variables(batch, (m, n)[side], k)
        return index, index if side == 0 else [index[0], index[2], index[1]]

    def _computed(self, lined: tuple[Split, list[Affine]], maker: Group, side: int) -> Side:
        split, index = lined
        maker.rename({var: combined(parts) for var, parts in split.first.items()})
        return Side(maker, *(_parts(split, i) for i in index))

    def _plain(self, call: _Call, side: int) -> Side:
        view = (call.left, call.right)[side]
        index, places = self._places(call, side)
        where = address(view.offset, view.strides, places[-len(view.sizes) :])
        names = [v for i in index for v in i.variables()]
        node = LoopNode(
            self.program.fresh("n"),
            self._temporary(view).buffer,
            Affine(0),
            view.dtype,
            Load(view.buffer, where, view.dtype),
            names,
        )
        return Side(Group([node], names), *(list(i.variables()) for i in index))

    def _temporary(self, view: View, dtype: str = "") -> View:
        """A buffer without memory."""
        dtype = dtype or view.dtype
        strides = contiguous_strides(view.sizes)
        return self.program.graph.new_buffer(view.numel, dtype, view.sizes, strides).view

    def _product(
        self,
        call: _Call,
        work: Work,
        blocks: Blocks,
        sides: tuple[Side, ...],
        behind: tuple[Split, list[Affine]] | None,
        follower: Group | None,
    ) -> Product:
        sums = self._temporary(call.out, "float32")
        if behind is None or follower is None:
            index = self._variables(*call.extents[:3])
            parts = [list(i.variables()) for i in index]
            nodes = []
        else:
            split, old = behind
            follower.rename({var: combined(parts) for var, parts in split.first.items()})
            parts = [_parts(split, i) for i in old]
            by = {v: combined(split.second[v]) for i in old for v in i.variables()}
            index = [i.substitute(by) for i in old]
            nodes = follower.nodes
        first = self._first_node(call, sums, index, [v for names in parts for v in names])
        return Product(
            [first, *nodes],
            list(first.dims),
            sums=sums.buffer,
            sides=sides,
            batch=parts[0],
            rows=parts[1],
            columns=parts[2],
            inner_size=call.extents[3],
            kind=work.kind,
            blocks=blocks,
        )

    def _first_node(
        self, call: _Call, sums: View, index: list[Affine], names: list[str]
    ) -> LoopNode:
        """What ATen's call makes of the sums."""
        places = index[-len(call.out.sizes) :]
        value: Expr = Load(sums.buffer, address(0, sums.strides, places), "float32")
        if call.alpha != 1:
            value = value * Const(call.alpha, "f32")
        if call.bias is not None:
            sizes, strides = call.bias.sizes, call.bias.strides
            own = places[len(places) - len(sizes) :]
            own = [ZERO if is_same(n, 1) else i for n, i in zip(sizes, own, strict=True)]
            bias: Expr = Load(
                call.bias.buffer, address(call.bias.offset, strides, own), call.bias.dtype
            )
            value = value + (bias if call.beta == 1 else bias * Const(call.beta, "f32"))
        return LoopNode(
            self.program.fresh("n"),
            call.out.buffer,
            address(0, call.out.strides, places),
            call.out.dtype,
            rounded(value, call.out.dtype),
            names,
            location=call.location,
        )

    # ------------------------------------------------------------ what it costs

    def _work(self, call: _Call, follower: Group | None, makers: list[Group | None]) -> Work:
        batch, m, n, k = (hint(x) for x in call.extents)
        item = ITEM_BYTES[call.out.dtype]
        around = 0 if call.bias is None else self._bytes({call.bias.buffer})
        product = batch * m * n * item
        apart = product + around
        kernels = 0
        seen = self._is_seen(call, follower)
        if follower is None:
            around += product
        else:
            kernels += 1
            moved = self._bytes(follower.reads() - follower.writes() - {call.out.buffer})
            moved += self._bytes({b for b in follower.writes() if self._is_visible(b, follower)})
            around += moved + product * seen
            apart += moved + product
        operands = []
        for view, maker in zip((call.left, call.right), makers, strict=True):
            own = self._bytes({view.buffer})
            apart += own
            if maker is None:
                operands.append(Operand(own))
                continue
            kernels += 1
            read = self._bytes(maker.reads() - maker.writes())
            apart += own + read
            cost = sum(expression_cost(n.expr) + 1 for n in maker.nodes)
            operands.append(Operand(read, cost, hint(view.numel)))
        kind = call.out.dtype
        if kind == "float32" and self.program.graph.tf32:
            kind = "tf32"
            # Rounding them to the nearest is work, too.
            operands = [
                replace(o, cost=o.cost + 4, numel=hint(v.numel))
                for o, v in zip(operands, (call.left, call.right), strict=True)
            ]
        left, right = operands
        return Work(batch, m, n, k, kind, left, right, around, apart, kernels)

    def _is_seen(self, call: _Call, follower: Group | None) -> bool:
        """Whether the plain product is wanted in memory as well."""
        others = [s for s in self.readers.get(call.out.buffer, []) if s is not follower]
        return bool(others) or call.out.buffer in self.kept

    def _bytes(self, buffers: set[int]) -> int:
        found = (self.program.graph.buffers[b] for b in buffers)
        return sum(hint(b.numel) * ITEM_BYTES.get(b.dtype, 8) for b in found)


def _choices(before: list[Any]) -> Iterator[list[bool]]:
    """Which operands to compute in the kernel: as many as possible first."""
    left, right = (b is not None for b in before)
    found = [[left, right], [left, False], [False, right], [False, False]]
    yield from (c for at, c in enumerate(found) if c not in found[:at])


def _parts(split: Split, index: Affine) -> list[str]:
    """The variables that one became, outer first."""
    return [name for v in index.variables() for name, _ in reversed(split.second[v])]


def schedule_product(product: Product, sizes: dict[str, int], stored: set[int]) -> Scheduled:
    """The loop IR of what surrounds the sums."""
    narrow_iotas(product, sizes)
    builder = KernelBuilder(product, sizes, stored, "product", None, False, 1)
    builder.results = product.sums
    scheduled = builder.build()
    made = ScheduledProduct(scheduled.kernel, scheduled.buffers, sizes=sizes)
    for side in product.sides:
        narrow_iotas(side.group, sizes)
        own = KernelBuilder(side.group, sizes, set(), "operand", None, False, 1).build()
        first = len(made.buffers)
        made.buffers += own.buffers
        made.kernel.params += own.kernel.params
        own.kernel.params = made.kernel.params
        for let in own.kernel.body:
            assert isinstance(let, Let)
            let.expr = _moved(let.expr, first)
        made.sides.append(own.kernel)
    return made


def _moved(expr: Expr, by: int) -> Expr:
    """An expression over parameters that stand behind others."""

    def leaf(e: Expr) -> Expr:
        return Load(e.buffer + by, e.address, e.dtype) if isinstance(e, Load) else e

    return transform(expr, leaf)
