"""The recorder: one recorded run of a root, from its first event to a `Recording`.

In: events from the trampolines while the program's own code runs. Out: a `Recording`
(graph, guards, input sources, result template) or the reason why there is none.
Invariant: nothing here changes what the program does; a doubt voids the recording only.
"""

from __future__ import annotations

import builtins
import itertools
import os
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from accel import allowed, runtime
from accel.capture.branches import Place
from accel.capture.lifted import LiftedEvents
from accel.capture.number_program import NumberProgram
from accel.capture.results import Describer, Template
from accel.capture.state import RecorderState, user_location
from accel.capture.state import version as _version
from accel.capture.steps import Answer, Void
from accel.capture.streams import MOST_SECONDS, NotMuchLarger
from accel.capture.values import PLAIN_TENSORS, is_static
from accel.capture.variation import GRADIENTS, Variation
from accel.casts import Autocast
from accel.guards import Guard, GuardSet
from accel.sources import Source, root
from accel.trace import Gradients, SegmentGraph, TensorMeta

# Rows of the ambient state under which autograd's recording is left to eager.
_NOT_WITH_GRADIENTS = ("saved tensor hooks", "anomaly mode")

MAX_PAIRS = 20_000  # of objects that must be distinct
MAX_OPERATIONS = 50_000  # of one graph: compiling more would take too long


@dataclass
class Recording:
    """What one run left behind. `void` is the reason when the run could not be used."""

    graph: SegmentGraph | None
    guards: GuardSet | None
    inputs: list[Source]
    template: Template | None
    ambient: Any
    void: Void | None
    location: str
    operations: int
    seconds: float
    traceback: str = ""  # of an error of ours
    is_plain: bool = False  # no torch operation ran, seen or unseen
    exit_offset: int | None = None  # where in the root's twin it was voided
    # Twins of what was inlined there, or is called from there.
    exit_codes: tuple[types.CodeType, ...] = ()
    landing: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None  # of a segment
    assumed: tuple[tuple[Place, bool], ...] = ()  # by speculation: where, and what
    numbers: NumberProgram | None = None  # what Python computes with numbers that differ
    leaves: tuple[Source, ...] = ()  # where these come from
    leaf_slots: tuple[int, ...] = ()  # where the guard program finds them
    checked: tuple[Guard | Source, ...] = ()  # by instruction of its guard program

    def differs(self, instruction: int) -> str:
        """The source that this instruction of its guard program looks at."""
        checked = self.checked[instruction]
        return str(checked.source if isinstance(checked, Guard) else checked)

    def is_type_of_number(self, instruction: int) -> bool:
        """Whether this instruction tells an int from a float: such a value is lifted."""
        checked = self.checked[instruction]
        return (
            isinstance(checked, Guard)
            and checked.check == "TYPE_IS"
            and checked.operands[0] in (int, float)
        )

    def show(self, variation: Variation | None) -> None:
        """Tells the history of the root what this run has read."""
        if variation is not None and self.graph is not None:
            metas = [meta for _, meta in self.graph.inputs]
            # Behind the inputs that have a source lie those that Python computes.
            variation.observe(list(zip(self.inputs, metas, strict=False)))
            if self.guards is not None:
                variation.observe_numbers(self.guards.guards)


class Recorder(LiftedEvents):
    """Handlers for the native session; `on_done(recording)` is told when the run is over."""

    def __init__(
        self,
        roots: list[tuple[str, Any]],
        twin_of: Callable[[types.FunctionType], types.FunctionType | None],
        on_done: Callable[[Recording], BaseException | None],
        *,
        starred: tuple[int, ...] = (),
        function: int | None = None,
        live: frozenset[int] | None = None,
        variation: Variation | None = None,
        assumes_all: bool = False,
    ) -> None:
        """`roots` name the call's locals; those at `starred` are *args and **kwargs, which the
        recorded call binds anew; the one at `function` is the root function itself. Only
        those in `live` can be read, if it is given; `variation` says which sizes are left open;
        `assumes_all`: what tensors decide is assumed even where it is known to change."""
        RecorderState.__init__(self)
        self.assumes_all = assumes_all
        self.follow_numbers(variation)
        self.missing = runtime.native.MISSING
        self.twin_of = twin_of
        self.on_done = on_done
        self.prepared = {}
        self.seen_globals = {}
        self.context_sets = {}
        self.inner_codes = set()
        self.builtins = vars(builtins)
        self.imported_from = []
        self.traceback = ""
        self.input_tensors: dict[int, Any] = {}
        self.twin_code: types.CodeType | None = None
        self.exit_offset: int | None = None
        self.exit_codes: tuple[types.CodeType, ...] = ()
        self.callee_codes: tuple[types.CodeType, ...] = ()
        self.ambient = runtime.native.Ambient()
        self.rng = _random_streams()
        self.roots = [root(i, name) for i, (name, _) in enumerate(roots)]
        self.handlers = tuple(self._handler(name) for name in runtime.native.HANDLER_NAMES)
        for index, (source, (_, value)) in enumerate(zip(self.roots, roots, strict=True)):
            if index == function:  # its code is the entry's; what it closes over is guarded
                self.known[id(value)] = (value, source)
                self.prepare(value)
                continue
            if live is not None and index not in live:
                continue
            if value is runtime.native.UNBOUND:
                self.guards.add(source, "UNBOUND")
                continue
            self.read_numbers = []
            if index in starred:
                self.track_starred(value, source)
            else:
                self.track(value, source)
            self.lift_arguments(index)
        self.started = time.perf_counter()

    def _handler(self, name: str) -> Callable[..., Any]:
        special = {
            "consume": self.consume_event,
            "fresh": self.fresh_event,
            "finish": self.finish,
            "void": self.void_event,
            "checkpoint": self.checkpoint,
        }
        handler: Any = special.get(name) or getattr(self, name)
        return self.number_handler(name, handler)

    # ------------------------------------------------------------ the end

    def void_event(self, kind: str, detail: Any) -> Answer:
        """The recording is over before its end; the run itself goes on."""
        if self.voided is None:
            self.location = user_location()
            self.exit_offset, inlined = self.position_in_root()
            self.exit_codes = inlined + self.callee_codes
            if kind == "recorder_error" and isinstance(detail, Void):
                # Without its traceback, whose frames would keep the program's objects alive.
                self.voided = Void(detail.kind, detail.detail)
            else:
                text = detail
                if isinstance(detail, RecursionError):
                    kind = "recursion"
                if kind == "operation_raised":
                    text = getattr(detail, "__name__", type(detail).__name__)
                if isinstance(detail, types.CodeType):
                    text = f"{detail.co_qualname} ({detail.co_filename})"
                elif isinstance(detail, BaseException):
                    text = f"{type(detail).__name__}: {detail}"
                self.voided = Void(kind, str(text or ""))
                if isinstance(detail, BaseException):
                    self.traceback = "".join(traceback.format_exception(detail))
            self.forget()  # what is about to die must not wait for the end of the run
        return None

    def position_in_root(self) -> tuple[int | None, tuple[types.CodeType, ...]]:
        """At which byte of the root's twin the run is, and the codes of what it has called."""
        found: int | None = None
        codes: list[types.CodeType] = []
        inner: tuple[types.CodeType, ...] = ()
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None and self.twin_code is not None:
            if frame.f_code is self.twin_code:
                # The outermost: the root may call itself.
                found, inner = frame.f_lasti, tuple(codes)
            codes.append(frame.f_code)
            frame = frame.f_back
        return found, inner

    def checkpoint(self) -> Answer:
        """Some thousand events have passed: is this recording still worth its time?"""
        if not self.operations:
            raise Void("no_operations")
        if len(self.operations) > MAX_OPERATIONS:
            raise Void("too_long", str(MAX_OPERATIONS))
        return None

    def finish(self, result: Any, failed: bool, unseen_operations: int) -> BaseException | None:
        """The recorded run returned `result`, or raised. What is returned is raised instead."""
        if failed and (self.voided is None or self.voided.kind == "operation_raised"):
            self.voided = Void("raised")  # nobody caught it: no fault of the function's
        recording = self.conclude(
            lambda describer: describer.describe(result, self.effects), unseen_operations
        )
        try:
            return self.on_done(recording)
        finally:
            self.release()

    def conclude(
        self, describe: Callable[[Describer], Template], unseen_operations: int
    ) -> Recording:
        """What was recorded; `describe` makes the template."""
        graph = template = None
        if self.voided is None:
            self.voided = self.spoiled
        if self.voided is None:
            try:
                self._check_ambient()
                self._check_waiting()
                self._check_layouts()
                template = describe(Describer(self))
                template.has_lifted = bool(self.leaf_sources)
                graph = self._graph(template)
                self._guard_identities()
                self._guard_aliasing()
            except Void as why:
                self.voided = Void(why.kind, why.detail)  # without its traceback: see void_event
        return Recording(
            graph,
            self.guards if self.voided is None else None,
            [source for _, source, _ in self.inputs],
            template,
            self.ambient,
            self.voided,
            self.location,
            len(self.operations) - len(self.hints),
            time.perf_counter() - self.started,
            self.traceback,
            len(self.operations) == len(self.hints) and not unseen_operations,
            self.exit_offset,
            self.exit_codes,
            assumed=tuple(self.assumed),
            numbers=self.number_program if self.leaf_sources else None,
            leaves=tuple(self.leaf_sources),
        )

    def forget(self) -> None:
        """Of objects that may die nothing is held any longer."""
        self.known.clear()
        self.read_at.clear()
        self.before.clear()
        self.origins.clear()
        self.fresh.clear()
        self.cells.clear()
        self.effects.clear()
        self.prepared.clear()
        self.output_tensors.clear()
        self.input_tensors.clear()

    def release(self) -> None:
        """Nothing of the user's is held any longer."""
        self.forget()
        self.numbers.clear()
        self.lifted.clear()
        self.leaves.clear()
        self.originals.clear()
        self.own_globals.clear()
        self.own_arguments.clear()
        self.settled.clear()
        self.handlers = ()

    def _check_ambient(self) -> None:
        if not self.ambient.matches():
            raise Void("ambient_changed", self.ambient.difference())
        if self.casts_unsettled:
            self.settle_casts()
        if self.cast_regions:
            raise Void("ambient_changed", "autocast, whose region does not end")
        if None in self.rng:
            raise Void("ambient_changed", "a stream of a GPU, which is captured")
        if self.context_sets:
            raise Void("opaque_call", "ContextVar.set() without reset()")

    def _check_waiting(self) -> None:
        """What is printed shall be seen when the program says so, not long after."""
        if self.waiting is None:
            return
        seconds = self.waiting.seconds(len(self.operations))
        for name, source, _ in self.inputs:
            if name in self.open_inputs:
                self.guards.add(source, "CALL", NotMuchLarger(self._tensor_of(source), seconds))
        if seconds > MOST_SECONDS or self.size_numbers:
            self.location = self.waiting.location
            self.exit_offset, self.exit_codes = self.waiting.position
            known = seconds > MOST_SECONDS
            raise Void("late_text", f"{seconds:.2g} s" if known else "any amount")

    def _graph(self, template: Template) -> SegmentGraph:
        if len(self.operations) == len(self.hints):
            raise Void("no_operations")
        sizes = self.open_sizes(template.numbers)
        metas = [TensorMeta.of(t) for t in self.output_tensors]
        gradients = self._gradients(template)
        if sizes is not None and gradients is not None:
            raise Void("dynamic", GRADIENTS)
        self.number_program.sizes = list(self.size_numbers)
        is_random = self.rng != _random_streams()
        return SegmentGraph(
            [(name, meta) for name, _, meta in self.inputs] + self.scalar_inputs(),
            self.operations,
            list(template.outputs),
            metas,
            self.speculations,
            gradients,
            is_random,
            _autocast(),
            sizes,
            [
                (name, list(allowed.metas_of(o.target)))
                for o in self.operations
                if (name := allowed.name_in(o.target))
            ],
            str(torch.get_default_dtype()).removeprefix("torch."),
            self.casts,
            _tf32(metas + [meta for _, _, meta in self.inputs]),
            self.layouts if is_random else {},
        )

    def _gradients(self, template: Template) -> Gradients | None:
        """Autograd's part in the run; None when nothing that leaves it requires grad."""
        if not self.differentiable:
            return None
        for name in self._written_inputs():
            source = next(s for n, s, _ in self.inputs if n == name)
            if self._tensor_of(source).requires_grad:
                raise Void("requires_grad", f"{source} is written")
        for _, source, _ in self.inputs:
            given = self._tensor_of(source)
            if given.requires_grad and _overlaps_itself(given):
                # Views of it are made of its storage, and autograd shares gradients out there.
                if any(_share_storage(given, made) for made in self.output_tensors):
                    raise Void("requires_grad", f"{source} overlaps itself and a view is returned")
        differentiable = [
            (name, tensor)
            for name, tensor in zip(template.outputs, self.output_tensors, strict=True)
            if tensor.requires_grad
        ]
        if not differentiable:
            return None
        ambient = runtime.native.ambient()
        for row in _NOT_WITH_GRADIENTS:
            if ambient[row]:
                raise Void("requires_grad", row)
        names = tuple(name for name, _ in differentiable)
        nodes = tuple(_node_name(tensor.grad_fn) for _, tensor in differentiable)
        no_grad = frozenset(self.no_grad)
        return Gradients(tuple(self.grad_inputs), names, no_grad, names, nodes)

    def _guard_identities(self) -> None:
        """What the call writes must not be reachable under another name that it reads, unless
        it was just now."""
        self._guard_told_apart()
        if not self.writes_seen:
            return
        by_type: dict[type, list[tuple[int, Source]]] = {}
        for value, source in self.known.values():
            if type(value) not in PLAIN_TENSORS and not is_static(value):
                by_type.setdefault(type(value), []).append((id(value), source))
        for cell, contents in self.cells.values():
            assert contents.base is not None
            by_type.setdefault(types.CellType, []).append((id(cell), contents.base))
        pairs = 0
        dicts = [source for value, source in self.known.values() if type(value) is dict]
        for identity, written in self.writes_seen.items():
            if runtime.native.own_attribute(self.known[identity][0], "") is runtime.native.MISSING:
                # Its attributes may have a name of their own: `vars(obj)`.
                for source in dicts:
                    if source is not written.child("dict"):
                        self.guards.add(written.child("dict"), "NOT_SAME", source)
                        pairs += 1
            for other, source in by_type.get(type(self.known[identity][0]), ()):
                if other != identity:
                    self.guards.add(written, "NOT_SAME", source)
                    pairs += 1
            if pairs > MAX_PAIRS:
                raise Void("aliased_write", f"{written}: too many others of its kind")

    def _check_layouts(self) -> None:
        """Guards look at inputs as they lie now, and the graph as they lay when they were used."""
        for _, source, meta in self.inputs:
            tensor = self._tensor_of(source)
            if tensor.size() != meta.sizes or tensor.stride() != meta.strides:
                raise Void("opaque_operation", f"the size of {source} is changed")

    def _guard_told_apart(self) -> None:
        """What was hashed or compared as the objects that they are: no two of them are one."""
        by_type: dict[type, list[Source]] = {}
        for identity, value in self.told_apart.items():
            by_type.setdefault(type(value), []).append(self.known[identity][1])
        for kind, sources in by_type.items():
            if len(sources) ** 2 > 2 * MAX_PAIRS:
                raise Void("container", f"{len(sources)} objects of type {kind.__name__} as keys")
            for one, other in itertools.combinations(sources, 2):
                if not one.kind == other.kind == "constant":
                    self.guards.add(one, "NOT_SAME", other)

    def _guard_aliasing(self) -> None:
        """What the graph writes must not overlap what else it reads, unless it did just now."""
        written = self._written_inputs()
        if not written:
            return
        tensors = {name: (source, self._tensor_of(source)) for name, source, _ in self.inputs}
        for name in written:
            source, tensor = tensors[name]
            for other_name, (other, other_tensor) in tensors.items():
                if other_name == name:
                    continue
                if _share_storage(tensor, other_tensor):
                    raise Void("aliased_write", f"{source} and {other}")
                self.guards.add(source, "NO_OVERLAP", other)

    def _tensor_of(self, source: Source) -> torch.Tensor:
        if not self.input_tensors:
            wanted = {id(s) for _, s, _ in self.inputs}
            self.input_tensors = {
                id(s): value for value, s in self.known.values() if id(s) in wanted
            }
        return self.input_tensors[id(source)]

    def _written_inputs(self) -> list[str]:
        """Names of the inputs that the run wrote: those whose version counter moved."""
        blind = any(o.target == "builtins.getattr" and o.args[1] == "data" for o in self.operations)
        written = []
        for name, source, _ in self.inputs:
            before = self.versions[name]
            if blind or before is None or before != _version(self._tensor_of(source)):
                written.append(name)
        if (blind or None in self.versions.values()) and not any(
            o.may_write for o in self.operations
        ):
            return []
        return written


def _random_streams() -> tuple[Any, ...]:
    """Where they stand; None for those of GPUs while one's stream is captured."""
    count = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    on_gpus = runtime.native.gpu_offsets(count) if count else ()
    return torch.default_generator.get_state().numpy().tobytes(), on_gpus


def _autocast() -> Autocast | None:
    present = Autocast.present()
    return present if any(present.enabled) else None


def _tf32(metas: list[TensorMeta]) -> bool | None:
    """Whether products of float32 may have ten bits on a GPU, now; ambient guards keep it so."""
    if not any(meta.device.startswith("cuda") for meta in metas):
        return None
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":  # read by cuBLAS
        return False
    getter = getattr(torch._C, "_get_fp32_precision_getter", None)
    if getter is None:  # before torch 2.9
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return bool(getter("cuda", "matmul") == "tf32")


def _node_name(node: Any) -> str:
    """What printing a tensor shows of the autograd node that made it."""
    name = type(node).__name__
    return node.name().rsplit("::", maxsplit=1)[-1] if name == "CppFunction" else name


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of it lie in one place; True, too, for some where none do."""
    reached = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride < reached:
            return True
        reached += (size - 1) * stride
    return False


def _share_storage(a: Any, b: Any) -> bool:
    if type(a) not in PLAIN_TENSORS or type(b) not in PLAIN_TENSORS:
        return False
    return bool(runtime.native.storage_key(a) == runtime.native.storage_key(b))
