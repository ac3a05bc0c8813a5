"""Split roots: functions that run compiled between the places that only Python can run.

In: a root whose recording met such a place (an *exit*). Out: plans of its islands, recorded runs
of it stretch by stretch, its nodes as roots of their own, and its functions with resumable code.
Invariant: a function is given resumable code only when its nodes exist; a plan that changes gets
new nodes, since pads are numbered by plan.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from accel import branching, log, metering, runtime
from accel.capture import segments
from accel.capture.recorder import Recording
from accel.capture.results import made_in_the_trace
from accel.capture.segments import LandingFacts, NodeFacts, Segment, SegmentRun
from accel.capture.twins import mark_twin, with_code
from accel.capture.variation import Variation
from accel.errors import reason_text
from accel.rewriter import islands, prologue, resumable, twin
from accel.rewriter.flow import local_names
from accel.roots import SETTLED, Installed, Root, Tally, failures
from accel.trial import Trial

MAX_PLANS = 12  # times a root's exits are found anew
MAX_RUNS = 24  # recorded runs of one root
MAX_FAILURES = 4  # stretches from one node that could not be used
EMPTY_PAUSE = 16  # visits, and this many times as many after each, of a node that did nothing
MAX_IN_VAIN = 2  # recorded runs in a row that do not pass the node for whose sake they are made
MAX_VISITS = 2  # recorded stretches from one node in one run
MAX_SEGMENTS = 48  # of one run
CHANGES = 3  # variants that one value keeps from serving: it is Python's


@dataclass
class Split:
    """What is known of a split root."""

    # What recorded runs and resumable code are made of: nodes are guarded by the very code of the
    # functions that it defines, so one serves all functions of the root. No prologue of its own.
    code: types.CodeType
    exits: set[int] = field(default_factory=set)  # instructions of the original code
    refused: set[int] = field(default_factory=set)  # exits that no plan can have
    reasons: dict[int, str] = field(default_factory=dict)  # exit -> why, with file and line
    plan: islands.Islands | None = None
    nodes: list[Root] = field(default_factory=list)
    points: dict[int, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    twin_code: types.CodeType | None = None
    functions: weakref.WeakSet[types.FunctionType] = field(default_factory=weakref.WeakSet)
    plans: int = 0
    runs: int = 0
    wanted: bool = True  # its next call is to be recorded
    asked: set[int] = field(default_factory=set)  # nodes that the next recorded run should pass
    in_vain: int = 0  # runs in a row that passed none of them
    settled: bool = False  # the last run met no unknown exit
    trials: dict[int, Trial] = field(default_factory=dict)  # by node
    meters: bool = False  # the next call that asks is to be metered
    failures: Counter[int] = field(default_factory=Counter)
    calls_before: int = -1  # calls of the root when its functions got resumable code
    retired: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # totals of former nodes

    def explain(self, exits: Iterable[int], why: str) -> None:
        """Notes why these instructions are exits, for users."""
        assert self.plan is not None
        for at in exits:
            self.reasons[at] = f"{why} ({self.plan.flow.location(at)})"

    def totals(self, root: Root) -> tuple[int, int, int, int, int]:
        """Segments that were served, their operations, the operations of those that were not,
        calls that resumable code ran, replays that were thrown away."""
        hits, ops, missed, failed = self.retired
        for node in self.nodes:
            hits += node.hits
            ops += sum(v.native.hits * v.operations for v in node.variants)
            ops += node.retired.operations
            most = max((v.operations for v in node.variants), default=node.ops_per_call)
            missed += max(node.entry.calls - node.hits, 0) * most
            failed += sum(v.native.errors + failures(v) for v in node.variants)
            failed += node.retired.errors + node.retired.failures
        calls = root.entry.calls - self.calls_before if self.calls_before >= 0 else 0
        return hits, ops, missed, calls, failed


class Splitter:
    """The part of the driver that deals with split roots."""

    def __init__(
        self,
        twin_of: Callable[[types.FunctionType], types.FunctionType | None],
        compile_segment: Callable[[Root, int, Recording], None],
        poll: Callable[[], None],
        count: Callable[[str], None],
        arm_inlined: Callable[[Root, tuple[types.CodeType, ...]], None],
        variation_of: Callable[[Root], Variation | None],
    ) -> None:
        self._twin_of = twin_of
        self._compile = compile_segment
        self._poll = poll
        self._count = count
        self._arm_inlined = arm_inlined
        self._variation_of = variation_of

    # ------------------------------------------------------------- plans

    def offer(self, root: Root, function: types.FunctionType, recording: Recording) -> bool:
        """A plain recording of a call of `function` met something that only Python can do: can the
        root be split there?"""
        void, offset = recording.void, recording.exit_offset
        if void is None or void.kind not in segments.EXITS or offset is None or root.code is None:
            return False
        try:
            found = twin.instruction_of(root.code, {}, offset)
            split = root.split or Split(prologue.under_prologue(function.__code__))
            split.reasons[found] = f"{reason_text(void.kind, void.detail)} ({recording.location})"
            self._plan(root, split, {found})
        except twin.RewriteError as error:
            log.artifact("exits", "%s is not split: %s", root.name, error)
            return False
        root.split = split
        self._arm_inlined(root, recording.exit_codes)
        return bool(split.nodes)

    def _plan(self, root: Root, split: Split, found: set[int]) -> None:
        plan = islands.plan_islands(split.code, split.exits | found)
        points: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
        for k, landing in enumerate(plan.landings):
            points.setdefault(landing.at, []).append(("land", (k, landing.depth)))
        for k, node in enumerate(plan.nodes):
            points.setdefault(node.at, []).append(("node", (k, node.depth)))
        for k, at in enumerate(plan.statements):
            depth = len(plan.flow.stack(at))
            points.setdefault(at, []).append(("node", (len(plan.nodes) + k, depth)))
        twin_code = twin.bind_twin(
            twin.build_twin_with(split.code, points), runtime.native.TRAMPOLINES
        )
        mark_twin(twin_code)
        self._retire(root, split)
        split.exits |= found
        for _ in found:
            self._count("graph_breaks")
        split.plan, split.points, split.twin_code = plan, points, twin_code
        split.plans += 1
        split.runs = 0
        split.settled = False
        split.failures.clear()
        split.asked.clear()
        split.trials.clear()
        split.nodes = [self._node_root(root, k, node) for k, node in enumerate(plan.nodes)]

    def _node_root(self, root: Root, number: int, node: islands.Node) -> Root:
        reference = weakref.ref(root)

        def on_call(entry: Any, _roots: tuple[Any, ...]) -> None:
            """A node that no variant served: the root's next call may record one."""
            owner = reference()
            if owner is not None and owner.split is not None:
                if any(node.pending for node in owner.split.nodes):
                    self._poll()
                    return
                if owner.split.runs < MAX_RUNS:
                    owner.split.wanted = True
                    owner.split.asked.add(number)
                    owner.entry.threshold = 1
                entry.threshold = min(2 * max(entry.threshold, 1), 4096)
                node = owner.split.nodes[number]
                if node.entry is entry and node.state in SETTLED and node.serves_nothing():
                    node.retire(node.variants)
                    entry.state = "off"

        entry = runtime.native.Entry(f"{root.name}:{node.line}", on_call)
        entry.stack_depth = node.depth
        entry.threshold = 2
        assert root.code is not None
        node_root = Root(
            f"{root.name}:{node.line}",
            "node",
            f"{root.code.co_filename}:{node.line}",
            entry,
            backend=root.backend,
            dynamic=root.dynamic,
            owner=reference,
        )
        entry.on_event = functools.partial(self._on_event, weakref.ref(node_root), number)
        return node_root

    def _on_event(
        self,
        node_reference: weakref.ref[Root],
        number: int,
        _entry: Any,
        kind: str,
        _message: str,
    ) -> None:
        """Native dispatch tells of a node's failed speculations, or of measured hits."""
        node = node_reference()
        root = node.owner() if node is not None and node.owner is not None else None
        if node is None or root is None or root.split is None:
            return
        if kind == "misspeculated":
            branching.leave(node, branching.doubt(node))
        elif kind == "review":
            trial = root.split.trials.setdefault(number, Trial())
            if metering.review(node, trial):
                root.split.meters, root.entry.threshold = True, 1
            if node.state == "losing":
                self._count("variants_losing")
                root.history.append(f"{node.location}: {node.reason}")

    def metered(self, root: Root, function: types.FunctionType) -> types.FunctionType | None:
        """What runs the next call as Python and measures it, when that is wanted."""
        split = root.split
        if split is None or split.plan is None or not split.functions:
            return None
        # While they compile, nodes run as Python anyway.
        pending = [node for node in split.nodes if node.pending and not node.variants]
        spare = any(len(node.eager_ns) < metering.ENOUGH for node in pending)
        if not spare and (not split.meters or split.wanted):
            return None
        split.meters = False
        return metering.metered(split.plan, split.nodes, function, split.code)

    def _retire(self, root: Root, split: Split) -> None:
        hits, ops, missed, _, failed = split.totals(root)
        split.retired = [hits, ops, missed, failed]
        for node in split.nodes:
            node.state = "disabled"
            node.retire(node.variants)
            node.retired = Tally()
            node.entry.state = "off"

    # -------------------------------------------------------------- runs

    def recorder(
        self, root: Root, function: types.FunctionType
    ) -> tuple[SegmentRun, types.FunctionType]:
        """What records the call that is about to be made, and the function to call."""
        split = root.split
        assert split is not None and split.plan is not None and split.twin_code is not None
        code = root.code
        assert code is not None
        visits: Counter[int] = Counter()
        split.functions.add(function)
        split.runs += 1
        split.wanted = False
        names = local_names(code)

        def wanted(number: int, values: tuple[Any, ...]) -> bool:
            split.asked.discard(number)
            if visits[number] >= MAX_VISITS or len(run.segments) >= MAX_SEGMENTS:
                return False
            if number >= len(split.nodes):
                visits[number] += 1
                return not split.settled
            node = split.nodes[number]
            if split.failures[number] >= MAX_FAILURES or node.state in SETTLED:
                return False
            roots = (*values, function)
            checks = [(v, v.program.check(roots)) for v in node.variants]
            rivals = [v for v, k in checks if k < 0]
            fresh = [s for s in run.segments if s.node == number]
            # Guards are not all: what a tensor decides, and sizes, are seen when it runs.
            if not all(v.native.misspeculations for v in rivals) or any(
                _program(s).check(roots) == -1 and not s.recording.assumed for s in fresh
            ):
                return False
            run.failed_guards.extend(
                (number, v.recording.differs(k))
                for v, k in checks
                if k >= 0 and not v.recording.is_type_of_number(k)
            )
            others = [v for v in rivals if failures(v)] + fresh
            run.rivals = tuple(r.assumed for r in _assuming(others))
            visits[number] += 1
            return True

        def _program(segment: Segment) -> Any:
            guards = segment.recording.guards
            assert guards is not None
            count = len(names) + split.plan.nodes[segment.node].depth + 1  # type: ignore[union-attr]
            return runtime.native.GuardProgram(guards.lower(count, []).instructions, count)

        run = SegmentRun(
            [_node_facts(k, node) for k, node in enumerate(split.plan.nodes)],
            [_landing_facts(k, landing) for k, landing in enumerate(split.plan.landings)],
            names,
            function,
            split.twin_code,
            self._twin_of,
            wanted,
            lambda run: self._over(root, split, run),
            lambda k: self._variation_of(split.nodes[k]) if k < len(split.nodes) else None,
        )
        return run, with_code(function, split.twin_code)

    def _over(self, root: Root, split: Split, run: SegmentRun) -> None:
        """A recorded run has ended; called with dispatch paused."""
        try:
            self._take(root, split, run)
        except Exception as error:
            log.internal_error("driver", error)
            self._retire(root, split)
            split.wanted = False
        finally:
            root.turn.release()

    def _take(self, root: Root, split: Split, run: SegmentRun) -> None:
        if root.split is not split:
            return  # reset meanwhile
        if run.error is not None:
            raise run.error
        code = root.code
        assert code is not None and split.plan is not None
        found: set[int] = set()
        for discovery in run.found:
            at = twin.instruction_of(code, split.points, discovery.offset)
            if at not in split.exits:
                why = reason_text(discovery.void.kind, discovery.void.detail)
                split.reasons[at] = f"{why} ({discovery.location})"
                found.add(at)
                self._arm_inlined(root, discovery.codes)
        found |= self._consumers(split, run) - split.exits
        found |= self._definitions(split, run) - split.exits
        found -= split.refused
        if found and split.plans < MAX_PLANS and self._replanned(root, split, found):
            return
        split.settled = not run.failed
        empty = False
        for segment in run.voided:
            void = segment.recording.void
            assert void is not None
            if void.kind == "dynamic" and split.nodes[segment.node].fix_sizes(void.detail):
                split.wanted, root.entry.threshold = True, 1
                continue
            split.failures[segment.node] += 1
            entry = split.nodes[segment.node].entry
            if split.failures[segment.node] >= MAX_FAILURES:
                entry.state = "armed" if split.nodes[segment.node].variants else "off"
                entry.threshold = 0  # never asks again
            elif void.kind == "no_operations":  # on this way, that is
                entry.threshold, empty = EMPTY_PAUSE ** split.failures[segment.node], True
            log.artifact(
                "exits", "%s: %s %s", split.nodes[segment.node].name, void.kind, void.detail
            )
        for segment in run.segments:
            node = split.nodes[segment.node]
            if segment.recording.assumed in segment.rivals:
                continue  # this way has been recorded already
            places = branching.places_to_leave(node.variants, segment.recording)
            if branching.leave(node, places):
                continue
            segment.recording.landing = segment.native_landing
            count = len(run.names) + split.plan.nodes[segment.node].depth + 1
            self._compile(node, count, segment.recording)
        if run.segments:
            self.rewrite(root, split)
            root.entry.threshold = 1  # while they are being compiled
        elif run.failed and split.runs < MAX_RUNS:
            # An error of the program's came first: this run has shown nothing.
            split.wanted, root.entry.threshold = True, 1
        elif empty and split.runs < MAX_RUNS and not any(n.variants for n in split.nodes):
            # Nothing asks at the nodes while nothing serves there.
            split.wanted, root.entry.threshold = True, EMPTY_PAUSE ** min(split.runs, 3)
        # A node that misses need not lie on the way of the very next call.
        split.in_vain = split.in_vain + 1 if split.asked else 0
        if 0 < split.in_vain < MAX_IN_VAIN:
            split.wanted, root.entry.threshold = True, 1
        else:
            split.in_vain = 0
            split.asked.clear()

    def _replanned(self, root: Root, split: Split, found: set[int]) -> bool:
        """Whether there is a plan with these exits too; then the next call is recorded."""
        try:
            self._plan(root, split, found)
        except twin.RewriteError as error:
            split.refused |= found
            log.artifact("exits", "%s has no further exits: %s", root.name, error)
            return False
        split.wanted, root.entry.threshold = True, 1
        return True

    def _consumers(self, split: Split, run: SegmentRun) -> set[int]:
        """The instructions that use locals and slots whose value is another at each visit."""
        assert split.plan is not None
        found: set[int] = set()
        for (number, name), count in Counter(run.failed_guards).items():
            node = split.plan.nodes[number]
            slots = {segments.stack_name(k): k - node.depth for k in range(node.depth)}
            named = {name: k for k, name in enumerate(run.names)} | slots
            if count >= CHANGES and name in named:
                users = split.plan.flow.users(node.at, named[name], node.stretch)
                found |= users
                split.explain(users, reason_text("changes", name))
        return found

    def _definitions(self, split: Split, run: SegmentRun) -> set[int]:
        """The definitions of functions that a stretch would have to hand on."""
        assert split.plan is not None
        found: set[int] = set()
        for segment in run.voided:
            void = segment.recording.void
            if void is not None and void.detail == made_in_the_trace(types.FunctionType):
                found |= split.plan.flow.definitions(split.plan.nodes[segment.node].stretch)
        split.explain(found, reason_text("definition", ""))
        return found

    def rewrite(self, root: Root, split: Split) -> None:
        """Gives the root's functions resumable code."""
        assert split.plan is not None
        if split.calls_before < 0:
            split.calls_before = root.entry.calls
        body = resumable.resumable(
            split.plan, split.code, lambda k: int(split.nodes[k].entry.index)
        )
        for function in list(split.functions):
            under = prologue.under_prologue(function.__code__)
            function.__code__ = prologue.insert_prologue(under, root.entry.index, body=body)

    def restore(self, root: Root) -> None:
        """Takes the resumable code away again."""
        split, root.split = root.split, None
        if split is None:
            return
        self._retire(root, split)
        for function in list(split.functions):
            under = prologue.under_prologue(function.__code__)
            if under is not function.__code__:
                function.__code__ = prologue.insert_prologue(under, root.entry.index)


def _assuming(parts: Iterable[Installed | Segment]) -> list[Recording]:
    """The recordings that assume what tensors decide."""
    return [part.recording for part in parts if part.recording.assumed]


def _node_facts(number: int, node: islands.Node) -> NodeFacts:
    stretch = node.stretch
    return NodeFacts(
        number,
        node.depth,
        node.reads,
        stretch.writes,
        stretch.untouched,
        node.context,
        stretch.carried,
        node.cells,
    )


def _landing_facts(number: int, landing: islands.Landing) -> LandingFacts:
    nulls = frozenset(landing.nulls)
    return LandingFacts(
        number, landing.depth, nulls, landing.context, landing.loads, landing.returns
    )


__all__ = ["Split", "Splitter"]
