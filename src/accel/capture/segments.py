"""Segments: one recorded run of a root that Python has to interrupt, stretch by stretch.

In: the root's nodes and landings, and the events of a twin that announces them. Out: for every
stretch between a node and the landing (or return) that followed it a `Segment`: a recording whose
result is what the stretch did to the frame; and where else the run met something that only
Python can do.
Invariant: between two stretches nothing is recorded and nothing is remembered; a new one knows the
frame's locals and stack as roots only, and guards what it reads of them.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accel import runtime
from accel.capture.recorder import Recorder, Recording
from accel.capture.results import Describer, Template
from accel.capture.steps import Answer, Void
from accel.capture.values import has_finaliser
from accel.capture.variation import Variation
from accel.sources import Source

# What cannot be recorded but can be done by Python, between two stretches.
EXITS = frozenset(
    """branch changes class_or_module_store closure_store container container_write delete devices disabled finaliser global_store
    import late_text no_twin opaque_attribute opaque_call opaque_operation operand operation_raised read_after_write
    unknown_function tensor_attribute tensor_attribute_store tensor_method tensor_subclass
    text_of_object unbound_slot unknown_tensor unknown_value value_from_tensor""".split()
)


@dataclass(frozen=True)
class NodeFacts:
    """What a recording has to know of the stretches that begin at a node."""

    number: int
    depth: int  # slots on the stack
    reads: frozenset[int]  # locals that may be read before they are written
    writes: frozenset[int]
    untouched: int  # slots at the bottom of the stack that a stretch leaves alone
    context: tuple[int, ...]  # the exceptions that are being handled
    carried: frozenset[int] = frozenset()  # loads that no stretch uses
    cells: frozenset[int] = frozenset()  # locals that inner functions share


@dataclass(frozen=True)
class LandingFacts:
    """What a recording has to know of a landing."""

    number: int
    depth: int
    nulls: frozenset[int]  # slots that hold no value
    context: tuple[int, ...]
    loads: tuple[tuple[int, int, int], ...] = ()  # slots of locals: slot, load, local
    returns: bool = False  # the function's return: its locals are as good as gone


@dataclass
class Segment:
    """One recorded stretch. The recording's template gives a tuple: the locals `written`, then
    the stack's values."""

    node: int
    landing: int
    recording: Recording
    written: tuple[int, ...] = ()
    unset: tuple[int, ...] = ()
    rivals: tuple[Any, ...] = ()  # what others whose guards held assume

    @property
    def native_landing(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        return self.landing, self.written, self.unset


class SegmentRecorder(Recorder):
    """The recorder of one stretch; its roots are the frame's locals, its stack, the function."""

    def __init__(
        self,
        node: NodeFacts,
        names: tuple[str, ...],
        values: tuple[Any, ...],
        function: types.FunctionType,
        twin_of: Callable[[types.FunctionType], types.FunctionType | None],
        variation: Variation | None = None,
    ) -> None:
        if any(map(has_finaliser, values)):
            raise Void("finaliser", "in a local variable")
        stack = [stack_name(k) for k in range(node.depth)]
        roots = list(zip([*names, *stack], values, strict=True))
        touched = range(len(names) + node.untouched, len(values))
        self.node = node
        self.own_cells: dict[int, Source] = {}
        # Of numbers that are lifted: where in the frame, what stands for it, what was there.
        self.replaced: list[tuple[int, Any, Any]] = []
        try:
            super().__init__(
                [*roots, (function.__name__, function)],
                twin_of,
                lambda _recording: None,
                function=len(values),
                live=(node.reads | frozenset(touched)) - node.cells,
                variation=variation,
            )
            for i in sorted(node.cells):
                self._track_cell(i, values[i], i in node.reads)
        except Void:
            self.release()
            raise
        first = list(values)
        for i, own, _ in self.replaced:
            first[i] = own
        self.first = tuple(self._contents(i, v) for i, v in enumerate(first))
        self.local_count = len(names)

    def lift_arguments(self, index: int) -> None:
        """Root number `index` has been tracked: while the stretch lasts, the frame holds what
        stands for its numbers. What a cell holds is guarded."""
        read, self.read_numbers = self.read_numbers, None
        for value, source in read or ():
            if source.kind == "root" and index not in self.node.cells:
                self.replaced.append((index, self.leaf(value, source), value))
            else:
                self.track(value, source)

    def _fix(self, value: Any) -> None:
        """Somebody looks at a number that is another at each visit: that is Python's to do."""
        source = self.lifted_source(value)
        super()._fix(value)  # where this cannot be an exit, the next recording has it fixed
        raise Void("changes", str(source or "a number"))

    def restored(self, values: tuple[Any, ...]) -> tuple[tuple[int, Any], ...]:
        """What the frame, whose values are these, would hold had nothing been replaced."""
        before = {id(own): value for _, own, value in self.replaced}
        return tuple((i, before[id(v)]) for i, v in enumerate(values) if id(v) in before)

    def is_own_variable(self, source: Source) -> bool:
        if source.kind == "cell":
            return source.base is not None and self._is_own_cell(source.base)
        return source.kind == "root"

    def _is_own_cell(self, source: Source) -> bool:
        return source.kind == "root" and source.key[0] in self.node.cells

    def close(
        self, landing: LandingFacts, values: tuple[Any, ...], unseen_operations: int
    ) -> Segment:
        """The stretch ends at `landing` with these locals and slots."""
        written: list[int] = []
        unset: list[int] = []

        def describe(describer: Describer) -> Template:
            if self.node.context != landing.context:
                raise Void("opaque_call", "a stretch that enters or leaves an except block")
            now = [self._contents(i, v) for i, v in enumerate(values)]
            # Inner functions may have written the cells that they share.
            for i in sorted(self.node.writes | (self.node.cells & self.node.reads)):
                if now[i] is runtime.native.UNBOUND:
                    unset.append(i)
                elif landing.returns and i not in self.node.cells:
                    continue
                elif i not in self.node.reads or now[i] is not self.first[i]:
                    written.append(i)
            parts = [now[i] for i in written]
            loaded = {k: i for k, load, i in landing.loads if load in self.node.carried}
            for k in range(landing.depth):
                if k < self.node.untouched:
                    parts.append(self.roots[self.local_count + k])
                elif k in loaded:
                    parts.append(self._carried(loaded[k]))
                elif k not in landing.nulls:
                    parts.append(values[self.local_count + k])
            return describer.describe_parts(parts, self.effects)

        if unseen_operations and self.voided is None:
            self.voided = Void("escaped_operation", "between two landings")
        recording = self.conclude(describe, unseen_operations)
        self.release()
        written_locals, unset_locals = tuple(written), tuple(unset)
        return Segment(self.node.number, landing.number, recording, written_locals, unset_locals)

    def _contents(self, index: int, value: Any) -> Any:
        """The value of local number `index`, whose slot holds `value`."""
        return _shared(value) if index in self.node.cells else value

    def _track_cell(self, index: int, cell: Any, is_read: bool) -> None:
        contents = self.roots[index].child("cell")
        value = self._contents(index, cell)
        if is_read:
            if value is runtime.native.UNBOUND:
                raise Void("unbound_slot", str(contents))
            self.track(value, contents)
        self.own_cells[id(cell)] = self.roots[index]
        self.cells[id(cell)] = (cell, contents)

    def note_cell(self, cell: Any, source: Source) -> None:
        own = self.own_cells.get(id(cell))
        if own is not None:
            self.guards.add(source, "SAME", own)
            return
        for other in self.own_cells.values():  # they may be written
            self.guards.add(source, "NOT_SAME", other)
        super().note_cell(cell, source)

    def store_deref(self, value: Any, cell: Any) -> Answer:
        if id(cell) not in self.own_cells:
            return super().store_deref(value, cell)
        self.cells.pop(id(cell), None)  # what is in it is the stretch's own from now on
        return None

    def delete_deref(self, cell: Any) -> Answer:
        if id(cell) not in self.own_cells:
            return super().delete_deref(cell)
        self.cells.pop(id(cell), None)
        return None

    def _carried(self, local: int) -> Source:
        """A local that only waits on the stack: bound it must be, what it is does not count."""
        source = self.roots[local]
        value = self.first[local]
        if local not in self.node.reads and value is not runtime.native.UNBOUND:
            self.guards.add(source, "TYPE_IS", type(value))
        return source

    def forget(self) -> None:
        super().forget()
        self.first = ()

    def release(self) -> None:
        super().release()
        self.replaced.clear()


@dataclass
class Discovery:
    """Something that only Python can do, met where no landing was known."""

    offset: int  # in the twin's code
    void: Void
    location: str
    codes: tuple[types.CodeType, ...] = ()  # twins of what was inlined there


@dataclass
class SegmentRun:
    """The recorder, for native code, of one run of a root with islands.

    `wanted(node, values)` says whether a stretch from this node is to be recorded; nodes from
    `len(nodes)` on are only there to find more exits. `on_done` is told when the run is over.
    """

    nodes: list[NodeFacts]
    landings: list[LandingFacts]
    names: tuple[str, ...]
    function: types.FunctionType
    twin_code: types.CodeType
    twin_of: Callable[[types.FunctionType], types.FunctionType | None]
    wanted: Callable[[int, tuple[Any, ...]], bool]
    on_done: Callable[[SegmentRun], BaseException | None]
    # Which sizes the stretches from this node leave open.
    variation_of: Callable[[int], Variation | None] = lambda _node: None
    segments: list[Segment] = field(default_factory=list)
    voided: list[Segment] = field(default_factory=list)
    found: list[Discovery] = field(default_factory=list)
    # By variant that did not serve where a stretch was recorded: node, and what differed.
    failed_guards: list[tuple[int, str]] = field(default_factory=list)
    failed: bool = False
    error: BaseException | None = None
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    current: SegmentRecorder | None = None
    rivals: tuple[Any, ...] = ()  # of the stretch that is wanted, see Segment

    @property
    def handlers(self) -> tuple[Callable[..., Any], ...]:
        """What native code asks before the first node: nothing but the end."""
        return tuple(
            self.finish if name == "finish" else _nothing for name in runtime.native.HANDLER_NAMES
        )

    def at_node(self, number: int, values: tuple[Any, ...], _unseen: int) -> Any:
        """The handlers of the stretch that begins here, or None; and what the frame holds from
        now on."""
        restored = dict(self.current.restored(values)) if self.current is not None else {}
        self._discard()
        values = tuple(restored.get(i, v) for i, v in enumerate(values))
        recorder = self._begin(number, values)
        if recorder is None:
            return None, tuple(restored.items())
        handlers = tuple(
            self.finish if name == "finish" else handler
            for name, handler in zip(runtime.native.HANDLER_NAMES, recorder.handlers, strict=True)
        )
        return handlers, tuple((restored | {i: own for i, own, _ in recorder.replaced}).items())

    def _begin(self, number: int, values: tuple[Any, ...]) -> SegmentRecorder | None:
        """The recorder of the stretch that begins at this node, if one is wanted."""
        try:
            if not self.wanted(number, values):
                return None
            node = self._node(number, values)
            recorder = SegmentRecorder(
                node, self.names, values, self.function, self.twin_of, self.variation_of(number)
            )
        except Void:
            return None
        except Exception as error:
            self.error = error
            return None
        recorder.twin_code = self.twin_code
        self.current = recorder
        return recorder

    def _node(self, number: int, values: tuple[Any, ...]) -> NodeFacts:
        if number < len(self.nodes):
            return self.nodes[number]
        depth = len(values) - len(self.names)
        everything = frozenset(range(len(self.names)))
        shared = self.function.__code__.co_cellvars
        cells = frozenset(i for i, name in enumerate(self.names) if name in shared)
        unbound = {i for i in cells if _shared(values[i]) is runtime.native.UNBOUND}
        return NodeFacts(number, depth, everything - unbound, everything, 0, (), cells=cells)

    def at_landing(
        self, number: int, values: tuple[Any, ...], unseen: int
    ) -> tuple[tuple[int, Any], ...]:
        """The stretch, or what is left of it if it is void, ends here; what the frame holds from
        now on."""
        restored = self.current.restored(values) if self.current is not None else ()
        if self.current is None or self.current.voided is not None:
            self._discard()
        else:
            self._close(self.landings[number], values, unseen)
        return restored

    def finish(self, result: Any, failed: bool, unseen: int) -> BaseException | None:
        """The run is over."""
        self.failed = failed
        self._discard()
        self.seconds = time.perf_counter() - self.started
        try:
            return self.on_done(self)
        finally:
            self.segments.clear()
            self.voided.clear()
            del self.wanted, self.on_done, self.variation_of

    def _close(self, landing: LandingFacts, values: tuple[Any, ...], unseen: int) -> None:
        recorder, self.current = self.current, None
        if recorder is None:
            return
        try:
            segment = recorder.close(landing, values, unseen)
        except Exception as error:
            self.error = error
            recorder.release()
            return
        segment.rivals = self.rivals
        if segment.node < len(self.nodes):
            # At once: the next visit in this run may differ in what was read just now.
            segment.recording.show(self.variation_of(segment.node))
            kept = self.segments if segment.recording.void is None else self.voided
            kept.append(segment)
        self._note_exit(recorder)

    def _discard(self) -> None:
        """The stretch that was being recorded is void; why may be an exit not known so far."""
        recorder, self.current = self.current, None
        if recorder is None:
            return
        void = recorder.voided
        if void is not None and void.kind == "operation_raised" and self.failed:
            void = None  # nobody caught it
        if void is not None:
            self._note_exit(recorder)
        if void is not None and void.kind == "recorder_error":
            self.error = void
        recorder.release()

    def _note_exit(self, recorder: SegmentRecorder) -> None:
        """Why the stretch is void, if it is, may be something that only Python can do."""
        void, at = recorder.voided, recorder.exit_offset
        if void is not None and void.kind in EXITS and at is not None:
            self.found.append(Discovery(at, void, recorder.location, recorder.exit_codes))


def stack_name(slot: int) -> str:
    """What a slot of the stack is called as a root."""
    return f"<stack {slot}>"


def _nothing(*_arguments: Any) -> None:
    return None


__all__ = ["EXITS", "LandingFacts", "NodeFacts", "Segment", "SegmentRun", "stack_name"]


def _shared(slot: Any) -> Any:
    """The value of a variable that inner functions share, whose slot holds a cell or nothing."""
    unbound = runtime.native.UNBOUND
    if slot is unbound:
        return unbound
    try:
        return slot.cell_contents
    except ValueError:
        return unbound
