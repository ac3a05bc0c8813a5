"""Program -> groups: loop nodes that share one walk over memory.

In: a `Program`. Out: a list of `Group`s and calls in program order. A node joins the group
that produced its operands when both read and write the same element at the same position;
the addresses decide, so views, reshapes and permutations need no special case.

Invariant: inside a group a node reads another node's value only at the address where that
node wrote it, in the same iteration of the group's outer loops. A group has outer variables
and inner (row) variables; reductions and scans run over exactly the inner ones, and all scans
walk them in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from accel.codegen.affine import Affine, Split, combined, equal, match, row_major
from accel.codegen.loop_ir import Load
from accel.codegen.program import ExternNode, LoopNode, Program, TemplateNode, reads, writes
from accel.codegen.symbols import hint

_MAX_NODES = 96
_MAX_BUFFERS = 40


@dataclass
class Group:
    """Nodes in order, over `outer` x `inner` variables."""

    nodes: list[LoopNode]
    outer: list[str]
    inner: list[str] = field(default_factory=list)

    def reads(self) -> set[int]:
        return set().union(*(reads(n) for n in self.nodes))

    def writes(self) -> set[int]:
        return {n.buffer for n in self.nodes}

    def writer(self, buffer: int) -> LoopNode | None:
        found = [n for n in self.nodes if n.buffer == buffer]
        return found[0] if len(found) == 1 and not found[0].region else None

    def show(self) -> str:
        return f"group outer={self.outer} inner={self.inner}"

    def scanned(self) -> list[str]:
        """The inner variables in the order in which scans walk them; none without scans."""
        return next((list(n.scanned) for n in self.nodes if n.scan is not None), [])

    def rename(self, by: dict[str, Affine]) -> None:
        for node in self.nodes:
            node.rename(by)
        self.outer = _expanded(self.outer, by)
        self.inner = _expanded(self.inner, by)


Step = Group | ExternNode | TemplateNode


def _expanded(names: list[str], by: dict[str, Affine]) -> list[str]:
    result: list[str] = []
    for name in names:
        parts = sorted(by[name].terms, key=lambda t: -hint(t[1])) if name in by else [(name, 1)]
        result += [v for v, _ in parts]
    return result


def fuse(program: Program, nodes: Iterable[LoopNode | ExternNode | TemplateNode]) -> list[Step]:
    """Groups and calls in an order that respects every dependency."""
    return _Fusion(program).run(nodes)


class _Fusion:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.sizes = program.sizes
        self.steps: list[Step | None] = []
        self.writers: dict[int, set[int]] = {}  # buffer -> positions

    def run(self, nodes: Iterable[LoopNode | ExternNode | TemplateNode]) -> list[Step]:
        for node in nodes:
            if isinstance(node, LoopNode):
                self._place(node)
            else:
                self._append(node, writes(node))
        return [s for s in self.steps if s is not None]

    def _append(self, step: Step, written: set[int]) -> None:
        for buffer in written:
            self.writers.setdefault(buffer, set()).add(len(self.steps))
        self.steps.append(step)

    def _place(self, node: LoopNode) -> None:
        producers: set[int] = set()
        for buffer in reads(node):
            producers |= self.writers.get(buffer, set())
        # Writers of one buffer stay in order.
        order = self.writers.get(node.buffer, set())
        last = max(producers | order, default=-1)
        for position in sorted(producers, reverse=True):
            group = self.steps[position]
            if position < last and not self._can_move_down(position, last):
                continue
            if not isinstance(group, Group) or not self._join(group, node):
                continue
            if position < last:
                position = self._move(position, len(self.steps))
            self.writers.setdefault(node.buffer, set()).add(position)
            self._merge_producers(position, node, producers)
            return
        self._append(new_group(node), {node.buffer})

    # ------------------------------------------------------------ order

    def _can_move_down(self, position: int, last: int) -> bool:
        """True when nothing behind `position` needs what it writes."""
        group = self.steps[position]
        if not isinstance(group, Group):
            return False
        written = group.writes()
        for step in self.steps[position + 1 :]:
            if step is not None and written & (
                step.reads() if isinstance(step, Group) else reads(step)
            ):
                return False
            if isinstance(step, Group) and written & step.writes():
                return False
        return True

    def _move(self, position: int, to: int) -> int:
        step = self.steps[position]
        self.steps[position] = None
        assert to == len(self.steps)
        self.steps.append(step)
        for positions in self.writers.values():
            if position in positions:
                positions.remove(position)
                positions.add(to)
        return to

    # ------------------------------------------------------------ joining

    def _join(self, group: Group, node: LoopNode) -> bool:
        """Puts `node` into `group` if its reads line up with what the group writes."""
        # Two writers of one buffer walk it in different orders.
        if len(group.nodes) >= _MAX_NODES or (node.region and node.buffer in group.writes()):
            return False
        anchors = []
        for load in node.loads():
            if load.buffer not in group.writes():
                continue
            writer = group.writer(load.buffer)
            if writer is None or load.dtype != writer.dtype:
                return False
            anchors.append((load, writer))
        if any(gather.buffer in group.writes() for gather in node.gathers()):
            return False
        if not anchors or len(group.reads() | group.writes()) > _MAX_BUFFERS:
            return False
        load, writer = max(anchors, key=lambda a: len(a[0].address.terms))
        by = self._align(group, node, load, writer)
        if by is None:
            return False
        group_by, node_by = by
        if not self._lines_up(anchors, group_by, node_by):
            return False
        inner = self._inner_after(group, node, group_by, node_by)
        if inner is None:
            return False
        group.rename(group_by)
        node.rename(node_by)
        if node.rows and not group.inner:
            group.outer = [v for v in group.outer if v not in inner]
            group.inner = inner
        group.nodes.append(node)
        return True

    def _align(
        self, group: Group, node: LoopNode, load: Load, writer: LoopNode
    ) -> tuple[dict[str, Affine], dict[str, Affine]] | None:
        """Renamings of both sides' variables after which the load's address is the store's."""
        split = match(writer.address, self.sizes, load.address, self.sizes, self.program.part)
        if split is None:
            return None
        group_by, node_by = self._renaming(split)
        # Variables that the writer does not have: the node spans the group's rows too.
        missing = [v for v in (*node.dims, *node.reduced) if v not in node_by]
        if missing:
            rows = [v for v in (*group.outer, *group.inner) if v not in group_by]
            if not group.inner or set(rows) != set(group.inner):
                return None
            extra = match(
                row_major(rows, self.sizes),
                self.sizes,
                row_major(missing, self.sizes),
                self.sizes,
                self.program.part,
            )
            if extra is None:
                return None
            more_group, more_node = self._renaming(extra)
            group_by |= more_group
            node_by |= more_node
        return group_by, node_by

    def _renaming(self, split: Split) -> tuple[dict[str, Affine], dict[str, Affine]]:
        for parts in split.first.values():
            for name, size in parts:
                self.sizes[name] = size
        first, second = ({var: combined(parts) for var, parts in side.items()} for side in split)
        return first, second

    def _lines_up(
        self,
        anchors: list[tuple[Load, LoopNode]],
        group_by: dict[str, Affine],
        node_by: dict[str, Affine],
    ) -> bool:
        return all(
            equal(load.address.substitute(node_by), writer.address.substitute(group_by))
            for load, writer in anchors
        )

    def _inner_after(
        self,
        group: Group,
        node: LoopNode,
        group_by: dict[str, Affine],
        node_by: dict[str, Affine],
    ) -> list[str] | None:
        """The group's inner variables once the node is in, or None if it does not fit."""
        outer = _expanded(group.outer, group_by)
        inner = _expanded(group.inner, group_by)
        dims, rows = _expanded(node.dims, node_by), _expanded(node.rows, node_by)
        space = set(dims) | set(rows)
        if not space <= set(outer) | set(inner):
            return None
        if rows:
            if not inner:
                # Every node so far spans the whole space, and so must this one.
                if space != set(outer):
                    return None
                return [v for v in outer if v in set(rows)]
            if node.scan is not None and any(o != rows for o in _orders(group, group_by)):
                return None
            return inner if set(rows) == set(inner) and space == set(outer) | set(inner) else None
        fits = space == set(outer) or space == set(outer) | set(inner)
        return inner if fits else None

    # ------------------------------------------------------------ merging

    def _merge_producers(self, position: int, node: LoopNode, producers: set[int]) -> None:
        """Pulls the node's other producers into its group where that is possible."""
        for other in sorted(producers, reverse=True):
            if other == position or other > position:
                continue
            source, target = self.steps[other], self.steps[position]
            if not isinstance(source, Group) or not isinstance(target, Group):
                continue
            if self._blocked(other, position) or not self._merge(source, target, node):
                continue
            self.steps[other] = None
            for positions in self.writers.values():
                if other in positions:
                    positions.remove(other)
                    positions.add(position)

    def _blocked(self, source: int, target: int) -> bool:
        """True when a step between the two needs what the first writes."""
        first = self.steps[source]
        assert isinstance(first, Group)
        written = first.writes()
        for step in self.steps[source + 1 : target]:
            if step is None:
                continue
            used = step.reads() | step.writes() if isinstance(step, Group) else reads(step)
            if written & used:
                return True
        return False

    def _merge(self, source: Group, target: Group, node: LoopNode) -> bool:
        """Moves the nodes of `source` in front of those of `target`."""
        if len(source.nodes) + len(target.nodes) > _MAX_NODES:
            return False
        if len(source.reads() | source.writes() | target.reads() | target.writes()) > _MAX_BUFFERS:
            return False
        if source.writes() & target.writes():
            return False
        anchors: list[tuple[Load, LoopNode]] = []
        for reader in target.nodes:
            if any(gather.buffer in source.writes() for gather in reader.gathers()):
                return False
            for load in reader.loads():
                if load.buffer not in source.writes():
                    continue
                writer = source.writer(load.buffer)
                if writer is None or writer.dtype != load.dtype:
                    return False
                anchors.append((load, writer))
        load, writer = max(anchors, key=lambda a: len(a[0].address.terms))
        split = match(load.address, self.sizes, writer.address, self.sizes, self.program.part)
        if split is None:
            return False
        target_by, source_by = self._renaming(split)
        outer = [v for v in source.outer if v not in source_by]
        inner = [v for v in source.inner if v not in source_by]
        if outer or inner:
            # The anchor is a row value: the rows themselves must line up as well.
            rows = [v for v in target.inner if v not in target_by]
            if outer or inner != source.inner or rows != target.inner:
                return False
            extra = match(
                row_major(rows, self.sizes),
                self.sizes,
                row_major(inner, self.sizes),
                self.sizes,
                self.program.part,
            )
            if extra is None:
                return False
            more_target, more_source = self._renaming(extra)
            target_by |= more_target
            source_by |= more_source
        if not self._lines_up(anchors, source_by, target_by):
            return False
        outer_after = set(_expanded(target.outer, target_by))
        inner_after = set(_expanded(target.inner, target_by))
        source_outer = set(_expanded(source.outer, source_by))
        source_inner = set(_expanded(source.inner, source_by))
        same = source_outer == outer_after and source_inner == inner_after
        takes_rows = (
            bool(source_inner) and not inner_after and source_outer | source_inner == outer_after
        )
        pointwise_rows = not source_inner and source_outer == outer_after | inner_after
        row_values = not source_inner and source_outer == outer_after
        if not (same or takes_rows or pointwise_rows or row_values):
            return False
        orders = _orders(source, source_by) + _orders(target, target_by)
        if any(order != orders[0] for order in orders):
            return False
        target.rename(target_by)
        source.rename(source_by)
        if takes_rows:
            target.outer, target.inner = source.outer, source.inner
        target.nodes = source.nodes + target.nodes
        return True


def _orders(group: Group, by: dict[str, Affine]) -> list[list[str]]:
    """How the scans of a group walk a row once it is renamed."""
    return [_expanded(n.scanned, by) for n in group.nodes if n.scan is not None]


def new_group(node: LoopNode) -> Group:
    return Group([node], [v for v in node.dims if v not in node.rows], list(node.rows))
