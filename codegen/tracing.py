"""Torch-level graph -> tensor graph: runs the graph on fake tensors and writes ATen down.

In: a `SegmentGraph`. Out: a `TensorGraph`. Views are recognised by the storage they share,
in-place operations become their functional forms plus a "write" of the region, and what
reached an input's storage becomes the commit. Invariant: the fake tensors have the
recorded sizes, strides, dtypes and storage offsets, so the operations are eager's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from accel import allowed
from accel.casts import Casts
from accel.codegen import gpu_attention, indexing
from accel.codegen.decompositions import DECOMPOSITIONS
from accel.codegen.decompositions_losses import REDUCED_IN_PLACE, elements_behind
from accel.codegen.gpu_random import Draws, draws_in_order, state_operator
from accel.codegen.loop_ir import VALUE_TYPE
from accel.codegen.options import CodegenOptions, CompileError
from accel.codegen.random_masks import FAST_DROPOUT
from accel.codegen.result_shapes import RESULTS
from accel.codegen.severing import Relations, storage_key
from accel.codegen.symbols import hint, is_symbolic
from accel.codegen.targets import target_of
from accel.codegen.tensor_graph import (
    Commit,
    Node,
    TensorGraph,
    View,
    contiguous_strides,
    is_random,
    span,
)
from accel.errors import untraceable, untraceable_operation
from accel.trace import Operation, SegmentGraph, TensorMeta, map_values, resolve

if TYPE_CHECKING:
    from accel.codegen.shape_space import ShapeSpace

aten = torch.ops.aten

# Operations that only say something about their argument.
_TRANSPARENT = {aten.lift_fresh.default, aten.lift_fresh_copy.default}
# Results are views by schema, but the storage test below sees that by itself.
_INDEXING: dict[str, Callable[..., Any]] = {
    "_operator.getitem": indexing.view,
    "_operator.setitem": indexing.store,
    "__getitem__": indexing.view,
    "__setitem__": indexing.store,
}
# Checks of what guards and the graph's tests see to.
_OF_METADATA = {
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
# What eager checks before it calls operations of which none does: a tensor that must be true.
_CHECKED: dict[str, Callable[..., torch.Tensor]] = {
    "torch.nn.functional.one_hot": lambda x, num_classes=-1: ((x >= 0) & (x < num_classes)).all()
}
# Besides pointwise operations, what gives the same numbers in the same order on all devices.
_EVERYWHERE = {
    overload
    for name in """arange cat clone constant_pad_nd copy empty empty_like empty_strided eye flip full full_like gather
        index index_select new_empty new_full new_ones new_zeros ones ones_like repeat roll scalar_tensor stack
        _to_copy tril triu zeros zeros_like""".split()
    for overload in (getattr(getattr(aten, name), o) for o in getattr(aten, name).overloads())
}
_CONSTANT_MAX_NUMEL = 1024


@dataclass
class _Storage:
    """A storage's state: the buffer that holds its contents now, and how it came to that."""

    buffer: int
    dtype: str
    input: int | None = None
    shift: int = 0  # of an input: its storage offset; addresses count from its first element
    original: int = -1
    writes: int = 0
    versioned: bool = False  # whether eager counted one of them in the version
    last_write: tuple[View, View] | None = None  # region and value, when there was only one


def trace_graph(graph: SegmentGraph, options: CodegenOptions) -> TensorGraph:
    """The functional ATen form of `graph`.

    Errors: CompileError when an operation cannot run on fake tensors, has no functional
    form, or the results do not have the recorded metadata.
    """
    return Tracer(graph, options).run()


class Tracer(TorchDispatchMode):  # type: ignore[misc]
    """The dispatch mode that writes down what runs under it."""

    def __init__(self, graph: SegmentGraph, options: CodegenOptions) -> None:
        super().__init__()
        self.source = graph
        self.decompositions = DECOMPOSITIONS
        if options.fast_dropout and graph.gradients is not None:
            self.decompositions = DECOMPOSITIONS | FAST_DROPOUT
        if graph.is_random and options.gpu_blocks:
            draws = Draws(options.gpu_blocks, lambda: self.origin, self._is_fresh)
            self.decompositions = self.decompositions | draws.table()
        self.operations = {o.name: o for o in graph.operations}
        self.graph = TensorGraph()
        self.graph.tf32 = graph.tf32
        self.storages: dict[int, _Storage] = {}
        self.alive: list[Any] = []  # storages are known by address: none may be freed
        self.location = self.origin = ""  # of the recorded operation that runs
        self.device: str | None = None
        # Of inputs, the tensors that stand for them, and their versions at first.
        self.fakes: dict[int, tuple[torch.Tensor, int]] = {}
        self.memories: dict[int, int] = {}  # by storage: elements that it has in eager
        self.unversioned = False  # writes that no schema mentions are going on
        self.unseen: dict[int, int] = {}  # versions of `fakes` that such writes were
        # Torch's shape environment is only imported for graphs that need it.
        self.shapes: ShapeSpace | None = None
        if graph.sizes is not None:
            from accel.codegen.shape_space import ShapeSpace

            self.shapes = ShapeSpace(graph.sizes)
            self.graph.symbols = self.shapes.space
            self.fake_mode = self.shapes.mode
        else:
            self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

        for name, metas in graph.allowed:
            allowed.define(name, metas)

    def run(self) -> TensorGraph:
        values: dict[str, Any] = {} if self.shapes is None else dict(self.shapes.numbers)
        metas = [*(meta for _, meta in self.source.inputs), *self.source.output_metas]
        for device in dict.fromkeys(meta.device for meta in metas if meta.device != "cpu"):
            self._place(device)
        with self.fake_mode:
            for index, (name, meta) in enumerate(self.source.inputs):
                values[name] = fake = self._input(index, meta)
                self.graph.input_identity.append(id(fake))
        inference: AbstractContextManager[Any] = torch.no_grad()
        with (
            inference,
            self.source.as_recorded() as casts,
            self._symbolically(),
            self.fake_mode,
            self,
        ):
            self._run_operations(values, casts)
        self._finish(values)
        self._sever_outputs(values)
        if self.shapes is not None:
            self._finish_sizes(self.shapes, values)
        return self.graph

    def _symbolically(self) -> AbstractContextManager[Any]:
        """Torch's own C++ kernels fix sizes here and there where its Python ones do not."""
        if self.shapes is None:
            return nullcontext()
        from torch._dispatch.python import enable_python_dispatcher  # slow to import

        dispatcher: AbstractContextManager[Any] = enable_python_dispatcher()
        return dispatcher

    def _run_operations(self, values: dict[str, Any], casts: Casts) -> None:
        hints, predicates = self._known_numbers()
        for o in self.source.operations:
            casts.before(o.name)
            value = values[o.name] = self._run_operation(o, values)
            if o.name in hints and self.shapes is not None:
                self.shapes.check_hint(o.name, value, hints[o.name])
            # Asking settles it: the answer becomes a test of the graph.
            if o.name in predicates and bool(value) is not predicates[o.name]:
                raise CompileError(f"{o.target} at {o.location} has another truth when traced")

    def _known_numbers(self) -> tuple[dict[str, Any], dict[str, bool]]:
        sizes = self.source.sizes
        return ({}, {}) if sizes is None else (dict(sizes.hints), dict(sizes.predicates))

    def _finish_sizes(self, shapes: ShapeSpace, values: dict[str, Any]) -> None:
        """The numbers among the outputs, and the tests that torch's own questions made."""
        self.graph.number_outputs = [shapes.dim(values[name]) for name in shapes.sizes.outputs]
        shapes.finish()

    def _numbers(self, values: Any) -> tuple[Any, ...]:
        """Sizes or strides, with `Dim`s for what is symbolic."""
        if self.shapes is None:
            return tuple(values)
        return tuple(self.shapes.dim(v) for v in values)

    def _number(self, value: Any) -> Any:
        return value if self.shapes is None else self.shapes.dim(value)

    def _finish(self, values: dict[str, Any]) -> None:
        """Outputs, speculations and commits."""
        for name, meta in zip(self.source.outputs, self.source.output_metas, strict=True):
            with self._blaming(self._maker(name)):
                self.graph.outputs.append(self._output(name, values[name], meta))
        for name, expected in self.source.speculations:
            self.graph.speculations.append((self._speculated(values[name]), expected))
        for state in list(self.storages.values()):
            if state.input is not None and state.buffer != state.original:
                self.graph.commits.append(self._commit(state))
        self._detach_commits()
        if self.source.is_random and not any(is_random(node) for node in self.graph.nodes):
            raise CompileError("random numbers are drawn in eager only")
        for node in self.graph.nodes if self.graph.device != "cpu" else ():
            if is_random(node) and node.target is not state_operator():
                why = "kernels do not draw as it does on a GPU"
                raise CompileError(untraceable(node.origin, node.location, why))

    def _is_fresh(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in memory that the graph allocates."""
        state = self.storages.get(storage_key(tensor))
        return state is not None and state.input is None

    def _detach_commits(self) -> None:
        """A commit must not read what an earlier commit has written: such values are copied."""
        written = {commit.region.buffer for commit in self.graph.commits}
        for commit in self.graph.commits:
            if commit.value.buffer in written:
                result = self._copied(commit.value, contiguous_strides(commit.value.sizes))
                commit.value = result

    def _maker(self, name: str) -> Operation | None:
        """The operation that the program called for this value; None for an input."""
        maker = self.operations.get(name)
        if maker is not None and maker.target == "_operator.getitem" and not maker.location:
            return self.operations[maker.args[0].name]  # of several results, each is a step
        return maker

    @contextmanager
    def _blaming(self, o: Operation | None) -> Iterator[None]:
        """Errors in the context name the operation `o`, which can be left to Python then."""
        try:
            yield
        except CompileError as error:
            why = str(error)
            if o is None or untraceable_operation(why) is not None:
                raise
            raise CompileError(untraceable(o.target, o.location, why)) from error

    def _run_operation(self, o: Operation, values: dict[str, Any]) -> Any:
        self.location, self.origin = o.location, o.target
        with self._blaming(o):
            answer = self._answer(o, values)
            if self.device != "cpu" and self.shapes is None and draws_in_order(o.target):
                self._check_layout(o.name, answer)
            return answer

    def _check_layout(self, name: str, result: Any) -> None:
        """Random numbers follow a tensor's memory: it must lie as it did in eager."""
        recorded = self.source.layouts.get(name)
        if not isinstance(result, torch.Tensor) or any(
            traced != eager and n > 1
            for n, traced, eager in zip(
                result.shape,
                result.stride(),
                recorded or contiguous_strides(tuple(result.shape)),
                strict=True,
            )
        ):
            raise CompileError("it draws for a tensor that lies otherwise than in eager")

    def _answer(self, o: Operation, values: dict[str, Any]) -> Any:
        args, kwargs = (map_values(v, lambda ref: values[ref.name]) for v in (o.args, o.kwargs))
        try:
            with warnings.catch_warnings(record=True) as given:
                warnings.simplefilter("always")
                answer = self._result(o, args, kwargs)
        except CompileError:
            raise
        except Exception as error:  # whatever torch raises: the graph is not ours to run
            text = (str(error).splitlines() or [""])[0]
            why = f"{type(error).__name__}: {text}"
            raise CompileError(untraceable(o.target, o.location, why)) from error
        if given:  # only the program itself can warn, at its own line and by its own filters
            text = (str(given[0].message).splitlines() or [""])[0]
            raise CompileError(untraceable(o.target, o.location, f"it warns: {text}"))
        return answer

    def _result(self, o: Operation, args: Any, kwargs: Any) -> Any:
        if o.target in _CHECKED:
            torch._assert_async(_CHECKED[o.target](*args, **kwargs))
        if o.target in _INDEXING and indexing.applies(args[1]):
            return _INDEXING[o.target](*args)
        if o.target == gpu_attention.TARGET and self.device != "cpu":
            with _disable_current_modes():
                out, call = gpu_attention.result_and_call(*args, **kwargs)
            self._record(*call, out)
            return out
        if o.kind == "call_method":
            return getattr(args[0], o.target)(*args[1:], **kwargs)
        return resolve(o.target)(*args, **kwargs)

    # ------------------------------------------------------------ inputs, outputs

    def _place(self, device: str) -> None:
        """Notes that a tensor is on a device, of which a graph has one that kernels run on."""
        if self.device is None:
            target_of(device)
            self.device = self.graph.device = device
        elif device != self.device:
            raise CompileError(f"tensors on {self.device} and on {device} in one graph")

    def _input(self, index: int, meta: TensorMeta) -> FakeTensor:
        host = meta.is_number and self.device not in (None, "cpu")
        if not host:
            self._place(meta.device)
        sizes: tuple[Any, ...] = meta.sizes
        strides: tuple[Any, ...] = meta.strides
        if self.shapes is not None:
            sizes, strides = self.shapes.input(index, meta)
        length = meta.storage_offset + span(sizes, strides)
        storage = torch.empty(length, dtype=meta.torch_dtype, device=meta.device)
        fake = storage.as_strided(sizes, strides, meta.storage_offset)
        sizes, strides = self._numbers(sizes), self._numbers(strides)
        buffer = self.graph.new_buffer(
            span(sizes, strides), meta.dtype, sizes, strides, input=index, host=host
        )
        self.graph.inputs.append(buffer.id)
        self.storages[storage_key(fake)] = _Storage(
            buffer.id, meta.dtype, index, meta.storage_offset, buffer.id
        )
        self.alive.append(fake)
        self.fakes[index] = fake, fake._version
        return fake

    def _output(self, name: str, value: Any, meta: TensorMeta) -> View:
        if not isinstance(value, torch.Tensor):
            raise CompileError(f"output {name} is a {type(value).__name__}, not a tensor")
        sizes, dtype = tuple(map(hint, self._numbers(value.shape))), _dtype_name(value.dtype)
        if sizes != meta.sizes or dtype != meta.dtype:
            raise CompileError(
                f"output {name} was {meta.dtype}{list(meta.sizes)} when recorded, "
                f"traces as {dtype}{list(sizes)}"
            )
        if not str(value.device) == self.device == meta.device:
            raise CompileError(f"output {name} is on {value.device}, the graph on {self.device}")
        self.graph.output_identity.append(id(value))
        self.alive.append(value)
        if value.is_conj() or value.is_neg():
            raise CompileError(f"output {name} is lazily conjugated or negated")
        view = self._place_of(value)
        state = self.storages[storage_key(value)]
        self.graph.buffers[view.buffer].memory = self.memories.get(storage_key(value), 0)
        if any(is_symbolic(n) for n in (*view.sizes, *view.strides)):
            return _symbolic_output(name, view, meta)
        if view.strides == meta.strides:
            return view
        same_cells = all(
            a == b for a, b, n in zip(view.strides, meta.strides, meta.sizes, strict=True) if n > 1
        )
        if same_cells or view.numel == 0:
            return View(view.buffer, view.sizes, meta.strides, view.offset, view.dtype)
        if state.input is not None or view.numel != self.graph.buffers[state.buffer].numel:
            raise CompileError(f"aliasing: output {name} is a view with other strides")
        return self._copied(view, meta.strides)

    def _sever_outputs(self, values: dict[str, Any]) -> None:
        """Which outputs lie on a tensor's memory without being its views, as autograd has views.

        Counts versions up: the last that is asked of the tensors.
        """
        inputs = [values[name] for name, _ in self.source.inputs]
        relations, severed = Relations(inputs, self._place_of, self.graph), []
        for name in self.source.outputs:
            with self._blaming(self._maker(name)):
                severed.append(relations.severed(values[name]))
        self.graph.output_severed = [*severed, *self.graph.output_severed]  # gradients come last

    def _place_of(self, value: torch.Tensor) -> View:
        """Where an output lies; its memory is an input's after the commit as well."""
        view, state = self.view_of(value), self.storages[storage_key(value)]
        return view if state.input is None else replace(view, buffer=state.original)

    def _copied(self, view: View, strides: tuple[int, ...]) -> View:
        result = self.graph.new_buffer(span(view.sizes, strides), view.dtype, view.sizes, strides)
        self._note("copy", (view,), result.id)
        return result.view

    def _note(self, target: Any, args: tuple[Any, ...], result: int, **kwargs: Any) -> None:
        """A node that no operation of ATen's stands for as it is."""
        node = Node(target, args, kwargs, [result], location=self.location, origin=self.origin)
        self.graph.nodes.append(node)

    def _speculated(self, value: Any) -> View:
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise CompileError("a speculated value is not a tensor of one element")
        view = self.view_of(value)
        if view.dtype != "bool":
            result = self.graph.new_buffer(1, "bool", view.sizes, (1,) * len(view.sizes))
            self.graph.nodes.append(
                Node(aten.ne.Scalar, (view, 0), {}, [result.id], False, view.dtype)
            )
            view = result.view
        return view

    def _commit(self, state: _Storage) -> Commit:
        original = self.graph.buffers[state.original]
        assert state.input is not None
        if original.host:
            raise CompileError("a number on the processor is written")
        fake, version = self.fakes[state.input]
        counted = fake._version - version - self.unseen.get(state.input, 0)  # not by way of `.data`
        versions = counted if state.versioned else 0
        now = self.graph.buffers[state.buffer]
        if state.writes == 1 and state.last_write is not None:
            region, value = state.last_write
            return Commit(
                View(original.id, region.sizes, region.strides, region.offset, region.dtype),
                value,
                versions,
                now.view,
            )
        if original.numel != _dense_numel(original.sizes):
            raise CompileError(
                "an input with gaps or overlap between its elements is written twice"
            )
        flat = View(original.id, (original.numel,), (1,), 0, original.dtype)
        whole = View(now.id, (original.numel,), (1,), 0, now.dtype)
        return Commit(flat, whole, versions, now.view)

    # ------------------------------------------------------------ operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func in _TRANSPARENT:
            return self._constant(func, args, kwargs)
        if func in self.decompositions and not (func in REDUCED_IN_PLACE and self.shapes):
            out = self._decomposed(func, args, kwargs)
            if out is not NotImplemented:
                if elements := elements_behind(func, args, kwargs):
                    self.memories[storage_key(out)] = elements
                return out
        if self.unversioned:  # of a decomposition: what dispatch would have taken apart above us
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        schema = func._schema
        if schema.is_mutable:
            return self._mutating(func, args, kwargs)
        out = RESULTS.get(func, func)(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What it writes in place, eager's kernel writes behind autograd's back."""
        outside, self.unversioned = self.unversioned, True
        before = {index: fake._version for index, (fake, _) in self.fakes.items()}
        try:
            with self:
                return self.decompositions[func](*args, **kwargs)
        finally:
            self.unversioned = outside
            for index, version in () if outside else before.items():
                written = self.fakes[index][0]._version - version
                self.unseen[index] = self.unseen.get(index, 0) + written

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.alive.append(out)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        if not func._schema.returns and func not in _OF_METADATA:
            outs = []  # a check, or an effect: nobody reads it, and it must not be lost
        fresh = [isinstance(t, torch.Tensor) and storage_key(t) not in self.storages for t in outs]
        if outs and not any(fresh):
            return
        kwargs = self._located(func, args, kwargs, outs)
        node = Node(
            func,
            self._arguments(args),
            self._arguments(kwargs),
            [],
            isinstance(out, list),
            _promoted(func, args),
            self.location,
            self.origin,
        )
        for t, is_fresh in zip(outs, fresh, strict=True):
            if isinstance(t, torch.Tensor) and not is_fresh and storage_key(t) in self.storages:
                raise CompileError(f"aliasing: {func} returns both fresh tensors and views")
            node.results.append(self._fresh(t).id if isinstance(t, torch.Tensor) else None)
        self.graph.nodes.append(node)

    def _located(self, func: Any, args: Any, kwargs: Any, outs: list[Any]) -> Any:
        """`kwargs` of a call where the graph is. On a GPU that is also where what the program makes of nothing but
        numbers on the processor is computed; what goes from there to the processor is no kernel's."""
        for t in outs:
            if not isinstance(t, torch.Tensor):
                continue
            if self.device in (None, "cpu") or t.device.type != "cpu":
                self._place(str(t.device))
            elif any(_is_on_gpu(other) for other in tree_leaves((args, kwargs))):
                raise CompileError(f"{func} goes from {self.device} to the processor")
            elif torch.Tag.pointwise not in func.tags and func not in _EVERYWHERE:
                raise CompileError(f"{func} may answer otherwise on {self.device}")
        if self.device in (None, "cpu") or not any(
            a.name == "device" for a in func._schema.arguments
        ):
            return kwargs
        if kwargs.get("pin_memory"):
            raise CompileError("memory that is pinned")
        return {**kwargs, "device": torch.device(str(self.device))}

    def _fresh(self, tensor: torch.Tensor) -> Any:
        """The new buffer of a tensor that an operation made."""
        if tensor.layout != torch.strided:
            raise CompileError(f"a tensor with layout {tensor.layout}")
        sizes, strides = self._numbers(tensor.shape), self._numbers(tensor.stride())
        dtype = _dtype_name(tensor.dtype)
        buffer = self.graph.new_buffer(span(sizes, strides), dtype, sizes, strides)
        self.storages[storage_key(tensor)] = _Storage(
            buffer.id, dtype, shift=self._number(tensor.storage_offset())
        )
        return buffer

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor that the operation brought along (torch.tensor, index constants)."""
        (source,) = args
        if isinstance(source, FakeTensor):
            out = func(*args, **kwargs)
            self.alive.append(out)
            if storage_key(out) not in self.storages:
                self._record(aten.clone.default, args, {}, out)
            return out
        return self._adopt(source)

    def _adopt(self, source: torch.Tensor) -> Any:
        if source.numel() > _CONSTANT_MAX_NUMEL:
            raise CompileError(f"a constant tensor of {source.numel()} elements in the graph")
        # What came from the processor is written into kernels' texts, wherever they run.
        if source.device.type != "cpu" or self.device is None:
            self._place(str(source.device))
        with _disable_current_modes():
            copy = source.detach().clone().contiguous().resolve_conj()
            flat = copy.flatten()
            dtype, sizes = _dtype_name(copy.dtype), tuple(copy.shape)
            if dtype not in VALUE_TYPE:  # kept as bits
                like = View(0, sizes, contiguous_strides(sizes), 0, dtype).bits
                dtype, sizes = like.dtype, (like.numel,)
                flat = flat.view(getattr(torch, dtype))
            values = tuple(flat.tolist())
        out = self.fake_mode.from_tensor(copy)
        buffer = self.graph.new_buffer(
            len(values), dtype, sizes, contiguous_strides(sizes), constant=values
        )
        self.storages[storage_key(out)] = _Storage(buffer.id, buffer.dtype)
        self.alive += [out, copy]
        return out

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.view_of(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._arguments(v) for v in value)
        if isinstance(value, dict):
            return {k: self._arguments(v) for k, v in value.items()}
        return self._number(value)

    def view_of(self, tensor: torch.Tensor) -> View:
        """The tensor as a view of its storage's present buffer."""
        if not isinstance(tensor, FakeTensor):
            tensor = self._adopt(tensor)
        state = self.storages.get(storage_key(tensor))
        if state is None:
            raise CompileError("a tensor from outside the graph")
        if tensor.is_conj() or tensor.is_neg():
            tensor = self._computed(tensor)
            state = self.storages[storage_key(tensor)]
        dtype = _dtype_name(tensor.dtype)
        shift = state.shift
        if dtype != state.dtype:
            size, base_size = tensor.element_size(), getattr(torch, state.dtype).itemsize
            shift = shift * base_size // size
        offset = self._number(tensor.storage_offset()) - shift
        if offset < 0:
            raise CompileError("aliasing: a view that begins before the input it was made from")
        sizes, strides = self._numbers(tensor.shape), self._numbers(tensor.stride())
        return View(state.buffer, sizes, strides, offset, dtype)

    def _computed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A lazily conjugated or negated tensor as one that holds its values."""
        if tensor.is_conj():
            plain, func = torch._conj(tensor), aten.conj_physical.default
        else:
            plain, func = torch._neg_view(tensor), aten.neg.default
        self.alive.append(plain)
        out = func(plain)
        self._record(func, (plain,), {}, out)
        return self._computed(out) if out.is_neg() else out

    # ------------------------------------------------------------ writes

    def _mutating(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        targets = _written_arguments(func, args, kwargs)
        if func in (aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default):
            out = func(*args, **kwargs)
            self._assign(func, args)
            return out
        functional = _functional_form(func)
        values = self._compute(functional, func, _with_defaults(func, args, kwargs), kwargs)
        out = func(*args, **kwargs)  # checks, and resizes an empty out
        values = list(values) if isinstance(values, (tuple, list)) else [values]
        if len(values) != len(targets):
            raise CompileError(f"{func} writes {len(targets)} arguments")
        for target, value in zip(targets, values, strict=True):
            if torch.Tag.nondeterministic_seeded in func.tags and target.stride() != value.stride():
                raise CompileError(f"{func} draws in another order for these strides")
            self._write(target, self.view_of(value))
        return out

    def _compute(self, functional: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if func._schema.is_mutable and "out" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "out"}
        if functional in self.decompositions:
            value = self._decomposed(functional, args, kwargs)
            if value is not NotImplemented:
                return value
        value = functional(*args, **kwargs)
        self._record(functional, args, kwargs, value)
        return value

    def _assign(self, func: Any, args: tuple[Any, ...]) -> None:
        target = args[0]
        view = self.view_of(target)
        value = 0 if func is aten.zero_.default else args[1]
        if func is aten.copy_.default or isinstance(value, torch.Tensor):
            source = self.view_of(value)
        else:
            source = self._filled(view, value)
        self._write(target, source)

    def _filled(self, like: View, value: Any) -> View:
        result = self.graph.new_buffer(1, like.dtype, (), ())
        args: tuple[Any, ...] = ([], self._number(value))
        self._note(aten.full.default, args, result.id, dtype=getattr(torch, like.dtype))
        return result.view

    def _write(self, target: torch.Tensor, value: View) -> None:
        """The storage under `target` has `value` (broadcast, cast) there from now on."""
        if target.is_conj() or target.is_neg():
            raise CompileError("a write to a lazily conjugated or negated tensor")
        state = self.storages[storage_key(target)]
        region = self.view_of(target)
        if region.dtype != state.dtype:
            raise CompileError("a write through a view of another dtype")
        if region.may_overlap_itself:  # which of two values stays is eager's order; some warn
            raise CompileError("a write to a tensor whose elements overlap one another")
        value = self._converted(_broadcast(value, region.sizes), region.dtype)
        before = self.graph.buffers[state.buffer]
        whole = _covers(region, before.numel)
        sizes, strides = (region.sizes, region.strides) if whole else (before.sizes, before.strides)
        after = self.graph.new_buffer(before.numel, before.dtype, sizes, strides)
        placed = View(after.id, region.sizes, region.strides, region.offset, region.dtype)
        base = None if whole else View(before.id, before.sizes, before.strides, 0, before.dtype)
        if base is not None and before.numel != _dense_numel(before.sizes):
            base = View(before.id, (before.numel,), (1,), 0, before.dtype)
        self._note("write", (base, placed, value), after.id)
        state.buffer = after.id
        state.writes += 1
        state.versioned |= not self.unversioned
        written = View(after.id, region.sizes, region.strides, region.offset, region.dtype)
        state.last_write = (region, written if whole else value)
        if whole:
            state.writes = 1

    def _converted(self, value: View, dtype: str) -> View:
        """The value in `dtype`, where one of the two is complex: loops do not convert those."""
        wanted = getattr(torch, dtype)
        if value.dtype == dtype or not (
            wanted.is_complex or getattr(torch, value.dtype).is_complex
        ):
            return value
        strides = contiguous_strides(value.sizes)
        result = self.graph.new_buffer(span(value.sizes, strides), dtype, value.sizes, strides)
        self._note(aten._to_copy.default, (value,), result.id, dtype=wanted)
        return result.view


def _symbolic_output(name: str, view: View, meta: TensorMeta) -> View:
    """Errors: CompileError where tracing and eager disagree about the strides that matter."""
    strides = []
    for n, traced, eager in zip(view.sizes, view.strides, meta.strides, strict=True):
        if hint(traced) != eager and not (isinstance(n, int) and n == 1):
            raise CompileError(f"output {name} has other strides in eager")
        strides.append(traced if hint(traced) == eager else eager)
    return View(view.buffer, view.sizes, tuple(strides), view.offset, view.dtype)


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense_numel(sizes: tuple[int, ...]) -> int:
    count = 1
    for n in sizes:
        count *= n
    return count


def _covers(view: View, numel: int) -> bool:
    """True when the view touches every element of its buffer exactly once."""
    return view.offset == 0 and view.numel == numel and span(view.sizes, view.strides) == numel


def _broadcast(view: View, sizes: tuple[int, ...]) -> View:
    lead = len(sizes) - len(view.sizes)
    if lead < 0:  # copy_ drops leading ones
        view = View(view.buffer, view.sizes[-lead:], view.strides[-lead:], view.offset, view.dtype)
        lead = 0
    strides = [0] * lead
    for n, s, want in zip(view.sizes, view.strides, sizes[lead:], strict=True):
        strides.append(s if n == want else 0)
    return View(view.buffer, sizes, tuple(strides), view.offset, view.dtype)


def _promoted(func: Any, args: Any) -> str:
    """The dtype two operands of an elementwise operation promote to, "" if there are none."""
    if len(args) < 2 or not any(isinstance(a, torch.Tensor) for a in args[:2]):
        return _dtype_name(args[0].dtype) if args and isinstance(args[0], torch.Tensor) else ""
    try:
        return _dtype_name(torch.result_type(args[0], args[1]))
    except (TypeError, RuntimeError):
        return ""


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    written = []
    for i, formal in enumerate(func._schema.arguments):
        if formal.alias_info is None or not formal.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(formal.name)
        if isinstance(value, (list, tuple)):
            written += list(value)
        elif value is not None:
            written.append(value)
    return written


def _with_defaults(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments that the dispatcher left out: another overload may have no defaults."""
    rest = func._schema.arguments[len(args) :]
    missing = []
    for formal in rest:
        if formal.kwarg_only or formal.name in kwargs or not formal.has_default_value():
            break
        missing.append(formal.default_value)
    return (*args, *missing)


def _functional_form(func: Any) -> Any:
    """The operation without the write: `add_.Tensor` -> `add.Tensor`, `add.out` -> `add.Tensor`.

    Errors: CompileError when there is none.
    """
    schema = func._schema
    name = schema.name.split("::")[1]
    is_out = any(a.is_out for a in schema.arguments)
    base = name if is_out else name.removesuffix("_")
    wanted = [str(a.type) for a in schema.arguments if not a.is_out]
    for other_name in (base, f"{base}_functional"):  # aten::normal_functional
        packet = getattr(getattr(torch.ops, func.namespace), other_name, None)
        for overload in packet.overloads() if packet is not None else ():
            candidate = getattr(packet, overload)
            other = candidate._schema
            if not other.is_mutable and [str(a.type) for a in other.arguments] == wanted:
                return candidate
    raise CompileError(f"{func} has no functional form")
