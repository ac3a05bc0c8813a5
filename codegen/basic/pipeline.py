"""The pipeline: a recorded graph becomes a plan and at most one library.

In: a `SegmentGraph`. Out: the plan of docs/architecture.md. Invariant: what has no lowering
is an extern call of ATen; nothing is unsupported, only unfused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from accel.codegen.basic import kernels, pointwise
from accel.codegen.basic.build import build
from accel.codegen.basic.functionalise import functionalise
from accel.codegen.basic.kernels import Layout
from accel.codegen.basic.preamble import PREAMBLE
from accel.errors import CompileError
from accel.trace import SegmentGraph, TensorMeta

aten = torch.ops.aten

# Functional operator -> its out-variant, run into planned memory.
OUT_VARIANTS = {
    aten.mm.default: "aten::mm.out",
    aten.addmm.default: "aten::addmm.out",
    aten.bmm.default: "aten::bmm.out",
    aten.baddbmm.default: "aten::baddbmm.out",
}


@dataclass
class Step:
    """A step before buffers have numbers: nodes read and written."""

    kind: str  # "pointwise" | "softmax" | "layer_norm" | "extern" | "commit"
    nodes: list[fx.Node]
    reads: list[fx.Node] = field(default_factory=list)
    writes: list[fx.Node] = field(default_factory=list)


def compile_graph(graph: SegmentGraph, *, out_dir: Path, options: Any = None) -> dict[str, Any]:
    """Compiles `graph`; the library is written into `out_dir`.

    Errors: CompileError when the graph is not static or the compiler fails.
    """
    functional = functionalise(graph)
    return _Planner(graph, functional.gm, functional.output_inputs, out_dir).plan()


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


class _Planner:
    def __init__(
        self, graph: SegmentGraph, gm: fx.GraphModule, output_inputs: list[int | None], out: Path
    ) -> None:
        self.graph = graph
        self.gm = gm
        self.out_dir = out
        self.output_inputs = output_inputs
        self.owner: dict[fx.Node, fx.Node] = {}
        self.buffers: list[dict[str, Any]] = []
        self.number: dict[fx.Node, int] = {}
        self.functions: dict[str, str] = {}
        self.storage: dict[int, fx.Node] = {}

    # ------------------------------------------------------------- analysis

    def plan(self) -> dict[str, Any]:
        self._inline_constants()
        nodes = list(self.gm.graph.nodes)
        output = nodes[-1]
        returned = list(output.args[0])
        count = len(self.graph.outputs)
        self.results = returned[:count]
        self.predicates = [self._truth(n) for n in returned[count:]]
        nodes = [n for n in self.gm.graph.nodes if n.op != "output"]
        self._find_owners(nodes)
        steps = self._steps(nodes)
        self._choose_outputs()
        return self._write(steps)

    def _inline_constants(self) -> None:
        """Numbers that tracing wrapped as tensors become constant tensors of the graph."""
        graph = self.gm.graph
        for node in list(graph.nodes):
            if node.op != "get_attr":
                continue
            tensor = getattr(self.gm, node.target)
            if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
                raise CompileError(f"a tensor constant {node.target}")
            constant = tensor.constant if hasattr(tensor, "constant") else tensor
            if constant is None:
                raise CompileError(f"a tensor constant {node.target}")
            with graph.inserting_before(node):
                made = graph.call_function(
                    aten.full.default,
                    (list(tensor.shape), constant.item()),
                    {"dtype": tensor.dtype},
                )
            made.meta["val"] = node.meta.get("val", tensor)
            node.replace_all_uses_with(made)
            graph.erase_node(node)

    def _truth(self, node: fx.Node) -> fx.Node:
        """A bool element that says whether `node`'s is not zero."""
        value = _value(node)
        if value.dtype is torch.bool:
            return node
        graph = self.gm.graph
        with graph.inserting_before(next(n for n in graph.nodes if n.op == "output")):
            made = graph.call_function(aten.ne.Scalar, (node, 0))
        made.meta["val"] = value.new_empty(value.shape, dtype=torch.bool)
        return made

    def _find_owners(self, nodes: list[fx.Node]) -> None:
        """Which node's memory each tensor lies in: its own, or another's (a view)."""
        for node in nodes:
            if node.op == "get_attr":
                raise CompileError(f"a tensor constant {node.target}")
            value = _value(node)
            if not isinstance(value, torch.Tensor):
                continue
            if node.target is aten.copy_.default:
                self.owner[node] = self.owner[node.args[0]]
                continue
            key = value.untyped_storage()._cdata
            self.owner[node] = self.storage.setdefault(key, node)

    def _is_view(self, node: fx.Node) -> bool:
        return self.owner.get(node, node) is not node

    def layout(self, node: fx.Node) -> Layout:
        value = _value(node)
        recorded = self.recorded.get(node)
        if recorded is not None:
            return Layout(recorded.sizes, recorded.strides, value.dtype)
        return Layout(tuple(value.shape), tuple(value.stride()), value.dtype)

    def _choose_outputs(self) -> None:
        """Owners whose memory is handed out, and views of inputs."""
        self.handed_out = set()
        rows = zip(self.results, self.graph.output_metas, self.output_inputs, strict=True)
        for node, meta, source in rows:
            if source is not None:
                continue
            value = _value(node)
            if tuple(value.shape) != meta.sizes or value.dtype is not meta.torch_dtype:
                raise CompileError("an output's shape differs from what was recorded")
            owner = self.owner[node]
            if self._is_view(node) or owner.op == "placeholder":
                if tuple(value.stride()) != meta.strides:
                    raise CompileError("an output's strides differ from what was recorded")
            if owner.op != "placeholder":
                self.handed_out.add(owner)

    # ---------------------------------------------------------------- steps

    def _steps(self, nodes: list[fx.Node]) -> list[Step]:
        metas: dict[fx.Node, TensorMeta] = {}
        for node, meta in zip(self.results, self.graph.output_metas, strict=True):
            if not self._is_view(node) and node.op != "placeholder":
                metas[node] = meta
        self.recorded = metas
        groups = _Grouping(nodes, self._is_pointwise, self.owner, self._is_view)
        steps = []
        wanted = {*self.results, *self.predicates}
        for members in groups.ordered():
            first = members[0]
            if first.op == "placeholder" or (self._is_view(first) and not _writes(first)):
                continue
            if first.op == "call_function" and first.target is _getitem:
                continue
            if groups.is_fused(first):
                inside = set(members)
                writes = [
                    n for n in members if n in wanted or any(u not in inside for u in n.users)
                ]
                reads = _operands(members, inside)
                if writes:
                    steps.append(Step("pointwise", members, reads, writes))
                continue
            steps.append(self._single(first))
        return steps

    def _is_pointwise(self, node: fx.Node) -> bool:
        if node.op != "call_function" or self._is_view(node):
            return False
        value = _value(node)
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return False
        try:
            return pointwise.lower(node, lambda a: "x") is not None
        except (KeyError, AssertionError, TypeError):
            return False

    def _single(self, node: fx.Node) -> Step:
        if node.target is aten.copy_.default:
            return Step("commit", [node], [node.args[1]], [])
        if node.target in (aten._softmax.default, aten._log_softmax.default):
            source, dim, half = node.args
            layout = self.layout(source)
            if (
                layout.dtype is torch.float32
                and not half
                and layout.is_contiguous()
                and self.layout(node).is_contiguous()
                and layout.sizes
                and dim in (-1, len(layout.sizes) - 1)
                and layout.numel
            ):
                return Step("softmax", [node], [source], [node])
        if node.target is aten.native_layer_norm.default and self._plain_layer_norm(node):
            source, _, weight, bias, _ = node.args
            (part,) = node.users
            reads = [n for n in (source, weight, bias) if n is not None]
            return Step("layer_norm", [node], reads, [part])
        return Step("extern", [node], _operands([node], set()), [node])

    def _plain_layer_norm(self, node: fx.Node) -> bool:
        """True when only the normalised rows are used, of contiguous float32 tensors."""
        users = list(node.users)
        if len(users) != 1 or users[0].target is not _getitem or users[0].args[1] != 0:
            return False
        tensors = [n for n in (node.args[0], *node.args[2:4]) if n is not None]
        return all(
            self.layout(n).dtype is torch.float32 and self.layout(n).is_contiguous()
            for n in [*tensors, users[0]]
        ) and bool(self.layout(node.args[0]).numel)

    # ------------------------------------------------------------- the plan

    def _write(self, steps: list[Step]) -> dict[str, Any]:
        memory = _Memory(self, steps)
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                self.number[node] = len(self.buffers)
                self.buffers.append({"kind": "input", "index": len(self.number) - 1})
        program: list[dict[str, Any]] = []
        commit: list[dict[str, Any]] = []
        for index, step in enumerate(steps):
            target = commit if step.kind == "commit" else program
            target += self._emit(step, memory)
            if step.kind != "commit":
                for node in memory.dying_after(index):
                    for buffer in self._dynamic_buffers(node):
                        program.append({"op": "free", "buffer": buffer})
        outputs = [self._result(k, node) for k, node in enumerate(self.results)]
        speculations = [
            {"buffer": self.buffer(node), "expected": expected}
            for node, (_, expected) in zip(self.predicates, self.graph.speculations, strict=True)
        ]
        library = None
        if self.functions:
            text = [PREAMBLE]
            text += [body.replace("@NAME@", name) for body, name in self.functions.items()]
            library = build("\n\n".join(text), self.out_dir)
        return {
            "version": 1,
            "library": library,
            "inputs": [
                {"sizes": list(m.sizes), "strides": list(m.strides), "dtype": m.dtype}
                for _, m in self.graph.inputs
            ],
            "arena_bytes": memory.arena_bytes,
            "buffers": self.buffers,
            "steps": program,
            "commit": commit,
            "speculations": speculations,
            "outputs": outputs,
        }

    def _described(self, kind: str, layout: Layout, **more: Any) -> dict[str, Any]:
        return {
            "kind": kind,
            "sizes": list(layout.sizes),
            "strides": list(layout.strides),
            "dtype": str(layout.dtype).removeprefix("torch."),
            **more,
        }

    def buffer(self, node: fx.Node) -> int:
        """The number of a node's buffer; a view's is made at its first use."""
        number = self.number.get(node)
        if number is not None:
            return number
        owner = self.owner[node]
        if owner is node:
            raise CompileError(f"{node} is used before it is computed")
        base = self.buffer(owner)
        value, whole = _value(node), _value(owner)
        if value.is_conj() or value.is_neg():
            raise CompileError("a conjugate view")
        self.number[node] = len(self.buffers)
        layout = Layout(tuple(value.shape), tuple(value.stride()), value.dtype)
        offset = value.storage_offset() * value.element_size()
        offset -= whole.storage_offset() * whole.element_size()
        self.buffers.append(
            self._described("view", layout, base=base, offset=offset // value.element_size())
        )
        return self.number[node]

    def _result(self, k: int, node: fx.Node) -> int:
        """The buffer of output `k`; what shares memory with an input is a view of it, whatever
        the functional graph computes in its place."""
        source = self.output_inputs[k]
        if source is None:
            return self.buffer(node)
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        meta, base = self.graph.output_metas[k], self.graph.inputs[source][1]
        if meta.dtype != base.dtype:
            raise CompileError("aliasing: an output is an input's memory as another dtype")
        layout = Layout(meta.sizes, meta.strides, meta.torch_dtype)
        offset = meta.storage_offset - base.storage_offset
        self.buffers.append(
            self._described("view", layout, base=self.number[placeholders[source]], offset=offset)
        )
        return len(self.buffers) - 1

    def _define(self, node: fx.Node, memory: _Memory, dynamic: bool = False) -> int:
        layout = self.layout(node)
        number = self.number[node] = len(self.buffers)
        if dynamic:
            self.buffers.append(self._described("dynamic", layout))
        elif node in self.handed_out:
            self.buffers.append(self._described("output", layout))
        else:
            self.buffers.append(self._described("arena", layout, offset=memory.offset[node]))
        return number

    def _dynamic_buffers(self, node: fx.Node) -> list[int]:
        number = self.number.get(node)
        if number is None or self.buffers[number]["kind"] != "dynamic":
            return []
        return [] if node in self.handed_out else [number]

    def _emit(self, step: Step, memory: _Memory) -> list[dict[str, Any]]:
        if step.kind == "extern":
            return [self._extern(step.nodes[0], memory)]
        if step.kind == "commit":
            node = step.nodes[0]
            args = [{"b": self.buffer(node.args[0])}, {"b": self.buffer(node.args[1])}]
            return [
                {
                    "op": "extern",
                    "target": "aten::copy_",
                    "args": [*args, {"bool": False}],
                    "kwargs": {},
                    "results": [None],
                }
            ]
        text, parallel = self._kernel(step)
        reads = [self.buffer(n) for n in step.reads]
        writes = [self._define(n, memory) for n in step.writes]
        name = self.functions.setdefault(text, f"k{len(self.functions)}")
        return [{"op": "kernel", "symbol": name, "buffers": reads + writes, "parallel": parallel}]

    def _kernel(self, step: Step) -> tuple[str, bool]:
        node = step.nodes[0]
        if step.kind == "pointwise":
            return kernels.pointwise_kernel(
                step.nodes,
                [(n, self.layout(n)) for n in step.reads],
                [(n, self.layout(n)) for n in step.writes],
            )
        sizes = self.layout(step.reads[0]).sizes
        if step.kind == "softmax":
            log = node.target is aten._log_softmax.default
            return kernels.softmax_kernel(math.prod(sizes[:-1]), sizes[-1], log)
        _, shape, weight, bias, eps = node.args
        columns = math.prod(shape)
        return kernels.layer_norm_kernel(
            math.prod(sizes) // columns, columns, eps, weight is not None, bias is not None
        )

    def _extern(self, node: fx.Node, memory: _Memory) -> dict[str, Any]:
        overload = node.target
        if not isinstance(overload, torch._ops.OpOverload):
            raise CompileError(f"{node.target} is not an operator")
        overload = _scalar_overload(node, overload)
        schema = overload._schema
        if schema.is_mutable:
            raise CompileError(f"{overload} writes its arguments")
        args, kwargs = self._arguments(node, schema)
        out = OUT_VARIANTS.get(overload)
        if out is not None and _value(node).numel() and all(memory.planned(n) for n in [node]):
            kwargs["out"] = {"b": self._define(node, memory)}
            return {"op": "extern", "target": out, "args": args, "kwargs": kwargs, "results": []}
        results: list[int | None] = []
        value = _value(node)
        if isinstance(value, torch.Tensor):
            results.append(self._define(node, memory, dynamic=True))
        else:
            parts = {u.args[1]: u for u in node.users if u.target is _getitem}
            for i, part in enumerate(value):
                used = parts.get(i)
                if used is None or not isinstance(part, torch.Tensor) or self._is_view(used):
                    results.append(None)
                else:
                    results.append(self._define(used, memory, dynamic=True))
        return {
            "op": "extern",
            "target": schema.name + (f".{schema.overload_name}" if schema.overload_name else ""),
            "args": args,
            "kwargs": kwargs,
            "results": results,
        }

    def _arguments(self, node: fx.Node, schema: Any) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for position, parameter in enumerate(schema.arguments):
            if position < len(node.args) and not parameter.kwarg_only:
                value = node.args[position]
            elif parameter.name in node.kwargs:
                value = node.kwargs[parameter.name]
            else:
                value = parameter.default_value
            encoded = self._encode(value, str(parameter.type))
            if parameter.kwarg_only:
                kwargs[parameter.name] = encoded
            else:
                args.append(encoded)
        return args, kwargs

    def _encode(self, value: Any, kind: str) -> dict[str, Any]:
        if value is None:
            return {"none": True}
        if isinstance(value, fx.Node):
            return {"b": self.buffer(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.layout):
            return {"layout": str(value).removeprefix("torch.")}
        if isinstance(value, torch.memory_format):
            return {"memory_format": str(value).removeprefix("torch.")}
        if isinstance(value, bool):
            return {"bool": value}
        if isinstance(value, int):
            if "float" in kind:
                return {"f": float(value).hex()}
            if "ScalarType" in kind or "Layout" in kind:
                raise CompileError(f"an enum default {value} for {kind}")
            return {"i": value}
        if isinstance(value, float):
            return {"f": value.hex() if math.isfinite(value) else repr(value)}
        if isinstance(value, str):
            return {"s": value}
        if isinstance(value, (list, tuple)):
            return self._encode_list(value, kind)
        raise CompileError(f"an argument of type {type(value).__name__}")

    def _encode_list(self, value: Any, kind: str) -> dict[str, Any]:
        if "Tensor" in kind or any(isinstance(v, fx.Node) for v in value):
            return {"bl": [None if v is None else self.buffer(v) for v in value]}
        if "bool" in kind:
            return {"boollist": list(value)}
        if "float" in kind:
            return {"fl": [float(v).hex() for v in value]}
        if all(isinstance(v, int) for v in value):
            return {"il": list(value)}
        raise CompileError(f"a list argument for {kind}")


_getitem = __import__("operator").getitem


def _scalar_overload(node: fx.Node, overload: Any) -> Any:
    """The overload that takes a number where `node` has one in a tensor's place."""
    numbers = [
        p.name
        for p, a in zip(overload._schema.arguments, node.args, strict=False)
        if str(p.type) == "Tensor" and isinstance(a, (bool, int, float))
    ]
    if not numbers:
        return overload
    for name in ("Scalar", "Tensor_Scalar", "Scalar_Tensor", "ScalarOther", "ScalarSelf"):
        candidate = getattr(overload.overloadpacket, name, None)
        if candidate is None:
            continue
        kinds = {p.name: str(p.type) for p in candidate._schema.arguments}
        if all(kinds.get(n) == "number" or kinds.get(n) == "Scalar" for n in numbers):
            return candidate
    raise CompileError(f"{overload} with a number as {', '.join(numbers)}")


def _writes(node: fx.Node) -> bool:
    return node.target is aten.copy_.default


def _operands(members: list[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """Tensor operands from outside, each once, in order of use."""
    found: dict[fx.Node, None] = {}
    for node in members:
        for operand in node.all_input_nodes:
            if operand not in inside and isinstance(_value(operand), torch.Tensor):
                found[operand] = None
    return list(found)


class _Grouping:
    """Partition of nodes into fused groups and single nodes, kept acyclic."""

    def __init__(self, nodes: list[fx.Node], fusable: Any, owner: Any, is_view: Any) -> None:
        self.nodes = nodes
        self.group: dict[fx.Node, int] = {}
        self.members: dict[int, list[fx.Node]] = {}
        self.fused: set[int] = set()
        for i, node in enumerate(nodes):
            group = i
            if fusable(node):
                for candidate in self._candidates(node):
                    if not self._reaches(candidate, node):
                        group = candidate
                        break
                self.fused.add(group)
            self.group[node] = group
            self.members.setdefault(group, []).append(node)

    def _candidates(self, node: fx.Node) -> list[int]:
        shape = tuple(_value(node).shape)
        found = []
        for operand in node.all_input_nodes:
            group = self.group[operand]
            if group in self.fused and group not in found:
                if tuple(_value(self.members[group][0]).shape) == shape:
                    found.append(group)
        return found

    def _reaches(self, group: int, node: fx.Node) -> bool:
        """Whether `node` depends on `group` through something outside it."""
        stack = [n for n in node.all_input_nodes if self.group[n] != group]
        seen: set[int] = set()
        while stack:
            current = self.group[stack.pop()]
            if current == group:
                return True
            if current in seen:
                continue
            seen.add(current)
            for member in self.members[current]:
                stack += [n for n in member.all_input_nodes if self.group[n] not in seen]
                stack = [n for n in stack if self.group[n] != current]
        return False

    def is_fused(self, node: fx.Node) -> bool:
        return self.group[node] in self.fused

    def ordered(self) -> list[list[fx.Node]]:
        """Groups in an order that respects every dependency."""
        result: list[list[fx.Node]] = []
        done: set[int] = set()

        def visit(group: int) -> None:
            stack = [(group, False)]
            while stack:
                current, expanded = stack.pop()
                if current in done:
                    continue
                if expanded:
                    done.add(current)
                    result.append(self.members[current])
                    continue
                stack.append((current, True))
                for member in self.members[current]:
                    for operand in reversed(member.all_input_nodes):
                        other = self.group[operand]
                        if other != current and other not in done:
                            stack.append((other, False))

        for node in self.nodes:
            visit(self.group[node])
        # Writes to inputs come last: what they overwrite may still be read.
        commits = [g for g in result if _writes(g[0])]
        return [g for g in result if not _writes(g[0])] + commits


class _Memory:
    """Arena offsets by liveness. Units: bytes."""

    ALIGNMENT = 64

    def __init__(self, planner: _Planner, steps: list[Step]) -> None:
        self.offset: dict[fx.Node, int] = {}
        self.arena_bytes = 0
        self.last: dict[fx.Node, int] = {}
        self._dying: dict[int, list[fx.Node]] = {}
        for index, step in enumerate(steps):
            operands = [*step.reads, *(o for n in step.nodes for o in n.all_input_nodes)]
            for node in [*operands, *step.writes]:
                self.last[planner.owner.get(node, node)] = index
            for node in step.nodes:
                for user in node.users:
                    if user.target is _getitem:
                        self.last.setdefault(planner.owner.get(user, user), index)
        end = len(steps)
        for node in [*planner.results, *planner.predicates]:
            self.last[planner.owner.get(node, node)] = end
        for node, index in self.last.items():
            self._dying.setdefault(index, []).append(node)
        free: list[tuple[int, int]] = []
        for index, step in enumerate(steps):
            for node in step.writes:
                if isinstance(_value(node), torch.Tensor) and node not in planner.handed_out:
                    self.offset[node] = self._take(free, self._size(planner, node))
            for node in self._dying.get(index, ()):
                if node in self.offset:
                    free.append((self.offset[node], self._size(planner, node)))
                    free = self._merge(free)

    def _size(self, planner: _Planner, node: fx.Node) -> int:
        layout = planner.layout(node)
        reach = 1 + sum((n - 1) * s for n, s in zip(layout.sizes, layout.strides, strict=True))
        size = (reach if layout.numel else 0) * layout.dtype.itemsize
        return max(-(-size // self.ALIGNMENT) * self.ALIGNMENT, self.ALIGNMENT)

    def _take(self, free: list[tuple[int, int]], size: int) -> int:
        fitting = [block for block in free if block[1] >= size]
        if fitting:
            start, length = min(fitting, key=lambda block: block[1])
            free.remove((start, length))
            if length > size:
                free.append((start + size, length - size))
            return start
        start = self.arena_bytes
        self.arena_bytes += size
        return start

    def _merge(self, free: list[tuple[int, int]]) -> list[tuple[int, int]]:
        merged: list[tuple[int, int]] = []
        for start, length in sorted(free):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        return merged

    def planned(self, node: fx.Node) -> bool:
        return isinstance(_value(node), torch.Tensor)

    def dying_after(self, index: int) -> list[fx.Node]:
        return self._dying.get(index, [])
