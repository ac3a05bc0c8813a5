"""Groups that run inside a template: on its results, before they reach memory.

In: steps after fusion. Out: the same steps, with pointwise groups that read a template's
results moved into it. Invariant: an epilogue is the only reader of those results, visits each
of them once, and its last variable walks along a row of them.
"""

from __future__ import annotations

from accel.codegen.affine import Affine, Split, address, combined, match
from accel.codegen.fusion import Group, Step
from accel.codegen.loop_ir import Load
from accel.codegen.program import Program, TemplateNode, reads
from accel.codegen.schedule import collapse, order
from accel.codegen.symbols import is_same
from accel.codegen.tensor_graph import View


def attach_epilogues(program: Program, steps: list[Step], kept: set[int]) -> list[Step]:
    """`kept` are the buffers that outlive the steps."""
    readers: dict[int, list[Step]] = {}
    for step in steps:
        for buffer in step.reads() if isinstance(step, Group) else reads(step):
            readers.setdefault(buffer, []).append(step)
    taken: dict[int, TemplateNode] = {}  # by id(group)
    gone = set()
    for step in steps:
        if not isinstance(step, TemplateNode) or not step.columns or step.out in kept:
            continue
        users = readers.get(step.out, [])
        if len(users) != 1 or not isinstance(users[0], Group) or id(users[0]) in taken:
            continue
        if _line_up(program, step, users[0]):
            step.epilogue = users[0]
            taken[id(users[0])] = step
            gone.add(id(step))
    return [taken.get(id(s), s) for s in steps if id(s) not in gone]


def _line_up(program: Program, node: TemplateNode, group: Group) -> bool:
    """Gives the group the variables (rows..., column), or leaves it as it is."""
    if not is_pointwise(group):
        return False
    order(group, program.sizes)
    collapse(group, program.sizes)
    row, column = program.variable(node.rows), program.variable(node.columns)
    whole = address(0, (node.columns, 1), (Affine.var(row), Affine.var(column)))
    view = program.graph.buffers[node.out].view
    split = lined_up(program, group, loads_of(group, view), whole)
    if split is None:
        return False
    columns = split.second.get(column, [])
    if len(columns) != 1:
        return False
    last = columns[0][0]
    by = {var: combined(parts) for var, parts in split.first.items()}
    if any(n.address.substitute(by).coefficient(last) != 1 for n in group.nodes):
        return False
    group.rename(by)
    rows = [name for name, _ in reversed(split.second.get(row, []))]
    group.outer = [*rows, last]
    return True


def is_pointwise(group: Group) -> bool:
    """Every value is one element's, and nobody else writes the same buffers."""
    return not group.inner and all(n.kind is None and not n.region for n in group.nodes)


def loads_of(group: Group, view: View) -> set[Affine]:
    """Where a group reads a whole buffer; nothing if it reads it in other ways too."""
    if any(e.buffer == view.buffer for n in group.nodes for e in n.gathers()):
        return set()
    loads = [e for n in group.nodes for e in n.loads() if e.buffer == view.buffer]
    return {e.address for e in loads} if all(e.dtype == view.dtype for e in loads) else set()


def lined_up(program: Program, group: Group, anchors: set[Affine], whole: Affine) -> Split | None:
    """What the group's variables and those of `whole` become when its only anchor, an address that
    walks over all of its iterations, is `whole`."""
    sizes, space = program.sizes, set(group.outer)
    if len(anchors) != 1 or any(n.space != space for n in group.nodes):
        return None
    split = match(next(iter(anchors)), sizes, whole, sizes, program.part)
    if split is None or set(split.first) != {v for v in space if not is_same(sizes[v], 1)}:
        return None
    for parts in split.first.values():
        for name, size in parts:
            sizes[name] = size
    return split


def is_result(load: Load, node: TemplateNode) -> bool:
    return load.buffer == node.out
