"""The plain data that recording hands to compiling: tensor metadata, operations, segment graphs.

In: what the recorder saw. Out: dataclasses with a JSON form (no pickle), and an
`torch.fx.GraphModule` for backends and readers. Invariant: `from_json(to_json(g)) == g`,
and two equal graphs have equal `key()`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from accel.casts import Autocast, Casts, autocast_kept, by_operation

# `operator`'s names of the augmented assignments, in the order of CPython's NB_INPLACE_* numbers.
IN_PLACE_NAMES = (
    "iadd iand ifloordiv ilshift imatmul imul imod ior ipow irshift isub itruediv ixor"
).split()
_WRITING_OPERATORS = frozenset(
    f"_operator.{name}" for name in [*IN_PLACE_NAMES, "iconcat", "setitem", "delitem"]
)
# Functions that write without a trailing underscore, depending on their arguments.
_SOMETIMES_WRITING = frozenset(
    "batch_norm instance_norm embedding embedding_bag native_batch_norm cudnn_batch_norm".split()
)
# Of torch.nn.functional: the option that makes them write, and its position.
_WRITING_OPTIONS = {
    "embedding": ("max_norm", 3),
    "embedding_bag": ("max_norm", 3),
    "batch_norm": ("training", 5),
}


@dataclass(frozen=True)
class TensorMeta:
    """Everything a kernel may rely on about one tensor.

    Units: `sizes`, `strides` and `storage_offset` count elements.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str  # "float32": the attribute's name in torch
    device: str = "cpu"
    storage_offset: int = 0

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorMeta:
        return TensorMeta(
            tuple(tensor.size()),
            tuple(tensor.stride()),
            str(tensor.dtype).removeprefix("torch."),
            str(tensor.device),
            tensor.storage_offset(),
        )

    @property
    def is_number(self) -> bool:
        """Without dimensions, on the processor: what operations on a GPU take as numbers."""
        return self.device == "cpu" and not self.sizes

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Ref:
    """A use of the value named `name` (a graph input or an earlier operation)."""

    name: str


@dataclass(frozen=True)
class Operation:
    """One recorded torch operation.

    `kind` is "call_function" (then `target` is an importable dotted name, e.g.
    "torch.nn.functional.gelu", "_operator.add") or "call_method" (a Tensor method's name).
    `args` and `kwargs` nest tuples, lists, dicts, slices, `Ref`s and constants.
    """

    name: str
    kind: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    location: str = ""  # "file:line" in the user's program, for reports

    @property
    def may_write(self) -> bool:
        """False only when the operation certainly writes to none of its operands."""
        if self.target in _WRITING_OPERATORS:
            return True
        parts = self.target.split(".")
        last = parts[-1]
        dunder = last.startswith("__") and last.endswith("__")
        if dunder and (last == "__setitem__" or last.startswith("__i")):
            return True
        if not dunder and last.endswith("_"):
            return True
        if not dunder and last in _SOMETIMES_WRITING and not self._leaves_alone(last):
            return True
        if self.kwargs.get("out") is not None or self.kwargs.get("inplace"):
            return True
        if parts[:3] == ["torch", "nn", "functional"] and True in self.args:
            return True  # `inplace` may be given by position
        # Operators of libraries: their names promise nothing.
        return parts[:2] == ["torch", "ops"] and parts[2:3] not in (["aten"], ["prims"])

    def _leaves_alone(self, name: str) -> bool:
        """Whether the option without which this function writes nothing is not given."""
        if name not in _WRITING_OPTIONS or self.target != f"torch.nn.functional.{name}":
            return False
        option, position = _WRITING_OPTIONS[name]
        given = self.args[position] if len(self.args) > position else self.kwargs.get(option)
        return given is None or given is False


@dataclass(frozen=True)
class Symbol:
    """A number of the graph that differs between its calls.

    `origin` is ("size", i, d) for dimension d of input i, or ("number", k) for the value of
    `numbers[k]`; `hint` is what it was when recorded.
    """

    origin: tuple[Any, ...]
    hint: int


@dataclass(frozen=True)
class Sizes:
    """What a graph for several sizes has besides tensors.

    `numbers` names the ints that come with the inputs. Operations may give numbers: `hints`
    says which, and what they were when recorded; `predicates` are those of them that the run
    asked for their truth, with its answer; `outputs` those that the caller wants.
    """

    symbols: tuple[Symbol, ...]
    numbers: tuple[str, ...] = ()
    hints: tuple[tuple[str, Any], ...] = ()
    predicates: tuple[tuple[str, bool], ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gradients:
    """What a differentiable graph's recording knew of autograd.

    `inputs` and `outputs` name those that require grad; `no_grad` names the operations that
    ran with grad mode off; `tangents` names the outputs whose gradients backward will be
    given; `nodes` are what eager calls the nodes that made `outputs`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    no_grad: frozenset[str] = frozenset()
    tangents: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass
class SegmentGraph:
    """A straight-line graph over tensors: the unit of compilation.

    `outputs` name values in the order the plan returns them; `output_metas` are
    what eager returned for them (a plan must reproduce sizes, strides and dtypes).
    `speculations` pair the name of a one-element value with the truth value that
    the rest of the graph assumes; they are checked before anything is committed.
    In-place operations may appear; those that reach an input are the commit step.
    `gradients` is None for a graph that autograd has nothing to do with; `is_random` when the
    run drew from torch's generators. `autocast` is None where it was off.
    `sizes` is None for a graph whose every size is the recorded one. `allowed` names the
    operators that are functions of the user's, with their results (`accel.allowed`).
    `default_dtype` is torch's when recorded. `casts` are the regions of `torch.autocast` inside:
    before the operation that is named one begins, or (None) the innermost one ends. `tf32` says
    whether a GPU was allowed to multiply float32 with ten bits of precision; None where no tensor is on one.
    `layouts`: where random numbers were drawn on a GPU, the strides of those results that did not lie by rows.
    """

    inputs: list[tuple[str, TensorMeta]]
    operations: list[Operation]
    outputs: list[str]
    output_metas: list[TensorMeta]
    speculations: list[tuple[str, bool]] = field(default_factory=list)
    gradients: Gradients | None = None
    is_random: bool = False
    autocast: Autocast | None = None
    sizes: Sizes | None = None
    allowed: list[tuple[str, list[TensorMeta]]] = field(default_factory=list)
    default_dtype: str = "float32"
    casts: list[tuple[str, Autocast | None]] = field(default_factory=list)
    tf32: bool | None = None
    layouts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def key(self) -> str:
        """Content hash: equal graphs, equal keys (source locations do not count)."""
        data = self.to_json()
        for operation in data["operations"]:
            operation.pop("location")
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [[name, _meta_to_json(meta)] for name, meta in self.inputs],
            "operations": [
                {
                    "name": o.name,
                    "kind": o.kind,
                    "target": o.target,
                    "args": encode(o.args),
                    "kwargs": encode(o.kwargs),
                    "location": o.location,
                }
                for o in self.operations
            ],
            "outputs": list(self.outputs),
            "output_metas": [_meta_to_json(m) for m in self.output_metas],
            "speculations": [list(s) for s in self.speculations],
            "gradients": _gradients_to_json(self.gradients),
            "is_random": self.is_random,
            "autocast": None if self.autocast is None else list(self.autocast),
            "sizes": _sizes_to_json(self.sizes),
            "allowed": [[name, [_meta_to_json(m) for m in metas]] for name, metas in self.allowed],
            "default_dtype": self.default_dtype,
            "casts": [[name, cast and list(cast)] for name, cast in self.casts],
            "tf32": self.tf32,
            "layouts": {name: list(strides) for name, strides in self.layouts.items()},
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> SegmentGraph:
        return SegmentGraph(
            [(name, _meta_from_json(meta)) for name, meta in data["inputs"]],
            [
                Operation(
                    o["name"],
                    o["kind"],
                    o["target"],
                    decode(o["args"]),
                    decode(o["kwargs"]),
                    o["location"],
                )
                for o in data["operations"]
            ],
            list(data["outputs"]),
            [_meta_from_json(m) for m in data["output_metas"]],
            [(name, expected) for name, expected in data["speculations"]],
            _gradients_from_json(data["gradients"]),
            data["is_random"],
            data["autocast"] and Autocast.from_json(data["autocast"]),
            _sizes_from_json(data["sizes"]),
            [(name, [_meta_from_json(m) for m in metas]) for name, metas in data["allowed"]],
            data["default_dtype"],
            [(name, cast and Autocast.from_json(cast)) for name, cast in data["casts"]],
            data["tf32"],
            {name: tuple(strides) for name, strides in data["layouts"].items()},
        )

    @contextlib.contextmanager
    def as_recorded(self) -> Iterator[Casts]:
        """The casts and the default dtype with which the operations ran.

        Whoever runs the operations one by one says so of each (`Casts.before`); `to_fx`'s module
        begins and ends the regions itself.
        """
        before, wanted = torch.get_default_dtype(), getattr(torch, self.default_dtype)
        with contextlib.ExitStack() as stack:
            stack.enter_context(autocast_kept())
            if self.autocast is not None:
                stack.enter_context(self.autocast.region())
            if wanted is not before:
                torch.set_default_dtype(wanted)
                stack.callback(torch.set_default_dtype, before)
            casts = Casts(self.casts)
            stack.callback(casts.close)
            yield casts

    def to_fx(self) -> fx.GraphModule:
        """The same graph for backends and readers: outputs, then speculated values, as a tuple.

        A differentiable one is to be called with grad mode on, and leaves it on.
        """
        graph = fx.Graph()
        values: dict[str, fx.Node] = {}
        for name, _ in self.inputs:
            values[name] = graph.placeholder(name)
        for name in self.sizes.numbers if self.sizes is not None else ():
            values[name] = graph.placeholder(name)

        def load(value: Any) -> Any:
            return map_values(value, lambda ref: values[ref.name])

        grad_mode = True
        regions: list[fx.Node] = []
        settings = [self.autocast or Autocast.present().off()]
        casts = by_operation(self.casts)
        for o in self.operations:
            for cast in casts.get(o.name, ()):
                if cast is None:
                    graph.call_function(_exit_autocast, (regions.pop(),))
                    settings.pop()
                else:
                    begun = cast.begun_after(settings[-1])
                    regions.append(graph.call_function(_enter_autocast, begun))
                    settings.append(cast)
            if self.gradients is not None and (o.name not in self.gradients.no_grad) != grad_mode:
                grad_mode = not grad_mode
                graph.call_function(torch._C._set_grad_enabled, (grad_mode,))
            target = resolve(o.target) if o.kind == "call_function" else o.target
            node = graph.create_node(o.kind, target, load(o.args), load(o.kwargs), name=o.name)
            values[o.name] = node
        while regions:
            graph.call_function(_exit_autocast, (regions.pop(),))
        if not grad_mode:
            graph.call_function(torch._C._set_grad_enabled, (True,))
        names = [*self.outputs, *(name for name, _ in self.speculations)]
        graph.output(tuple(values[name] for name in names))
        return fx.GraphModule(torch.nn.Module(), graph)


def resolve(dotted: str) -> Any:
    """The object a dotted name means; the longest importable prefix is the module.

    Errors: LookupError when no such object exists.
    """
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        try:
            for part in parts[cut:]:
                value = getattr(value, part)
        except AttributeError:
            break
        return value
    raise LookupError(f"no importable object is called {dotted!r}")


def map_values(value: Any, on_ref: Any) -> Any:
    """`value` with every `Ref` in its nest replaced by `on_ref(ref)`."""
    kind = type(value)
    if kind is Ref:
        return on_ref(value)
    if kind is tuple or kind is list:
        return kind(map_values(v, on_ref) for v in value)
    if kind is dict:
        return {k: map_values(v, on_ref) for k, v in value.items()}
    if kind is slice:
        return slice(*(map_values(v, on_ref) for v in (value.start, value.stop, value.step)))
    return value


def encode(value: Any) -> Any:
    """JSON form of a nest of constants and `Ref`s; exact for floats.

    Errors: TypeError for a value that has no serialised form.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"f": value.hex() if math.isfinite(value) else repr(value)}
    if kind is complex:
        return {"c": [encode(value.real), encode(value.imag)]}
    if kind is Ref:
        return {"ref": value.name}
    if kind is tuple or kind is torch.Size:
        return {"t": [encode(v) for v in value]}
    if kind is list:
        return [encode(v) for v in value]
    if kind is dict:
        return {"d": [[encode(k), encode(v)] for k, v in value.items()]}
    if kind is slice:
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"torch": "..."}
    if kind in (torch.dtype, torch.layout, torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"device": str(value)}
    raise TypeError(f"a {kind.__name__} has no serialised form: {value!r}")


def decode(data: Any) -> Any:
    """Inverse of `encode`."""
    if type(data) is list:
        return [decode(v) for v in data]
    if type(data) is not dict:
        return data
    ((tag, body),) = data.items()
    if tag == "f":
        return float.fromhex(body) if body not in ("nan", "inf", "-inf") else float(body)
    if tag == "c":
        return complex(decode(body[0]), decode(body[1]))
    if tag == "ref":
        return Ref(body)
    if tag == "t":
        return tuple(decode(v) for v in body)
    if tag == "d":
        return {decode(k): decode(v) for k, v in body}
    if tag == "slice":
        return slice(*(decode(v) for v in body))
    if tag == "torch":
        return Ellipsis if body == "..." else getattr(torch, body)
    if tag == "device":
        return torch.device(body)
    raise ValueError(f"unknown tag {tag!r} in a serialised graph")


def _gradients_to_json(gradients: Gradients | None) -> dict[str, Any] | None:
    if gradients is None:
        return None
    return {
        "inputs": list(gradients.inputs),
        "outputs": list(gradients.outputs),
        "no_grad": sorted(gradients.no_grad),
        "tangents": list(gradients.tangents),
        "nodes": list(gradients.nodes),
    }


def _gradients_from_json(data: dict[str, Any] | None) -> Gradients | None:
    if data is None:
        return None
    return Gradients(
        tuple(data["inputs"]),
        tuple(data["outputs"]),
        frozenset(data["no_grad"]),
        tuple(data["tangents"]),
        tuple(data["nodes"]),
    )


def _sizes_to_json(sizes: Sizes | None) -> dict[str, Any] | None:
    if sizes is None:
        return None
    return {
        "symbols": [[list(s.origin), s.hint] for s in sizes.symbols],
        "numbers": list(sizes.numbers),
        "hints": [[name, encode(value)] for name, value in sizes.hints],
        "predicates": [list(p) for p in sizes.predicates],
        "outputs": list(sizes.outputs),
    }


def _sizes_from_json(data: dict[str, Any] | None) -> Sizes | None:
    if data is None:
        return None
    return Sizes(
        tuple(Symbol(tuple(origin), hint) for origin, hint in data["symbols"]),
        tuple(data["numbers"]),
        tuple((name, decode(value)) for name, value in data["hints"]),
        tuple((name, expected) for name, expected in data["predicates"]),
        tuple(data["outputs"]),
    )


def _meta_to_json(meta: TensorMeta) -> list[Any]:
    return [list(meta.sizes), list(meta.strides), meta.dtype, meta.device, meta.storage_offset]


def _meta_from_json(data: list[Any]) -> TensorMeta:
    sizes, strides, dtype, device, offset = data
    return TensorMeta(tuple(sizes), tuple(strides), dtype, device, offset)
