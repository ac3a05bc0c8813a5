"""Installing: from a recording to a variant that serves calls, and what becomes of it there.

In: recordings, and what native dispatch tells of installed variants. Out: graphs handed to the
compile service, variants published to dispatch; those that lose, fail or are too many taken away.
Invariant: a variant is published with its guards, or not at all.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from accel import branching, errors, log, misses, runtime, trial
from accel.capture.recorder import Recording
from accel.compile import gradients
from accel.compile.family import Family
from accel.compile.service import CompiledSegment, CompileService
from accel.config import Config
from accel.counting import Counters
from accel.guards import Guard
from accel.report import Progress, short_place
from accel.roots import Installed, Limits, Root
from accel.sources import Source


@dataclass(frozen=True)
class Prepared:
    """A recording as native code takes it: its guards, the slots in which these find the graph's
    inputs, and how the call's result is built."""

    recording: Recording
    program: Any
    inputs: list[int]
    result: tuple[Any, ...]


PATTERN_SEEN = 3  # backwards with gradients at the same outputs, and never at others


class Installer:
    """Compiles recordings for roots; `on_change(root)` is told of every variant installed."""

    def __init__(
        self,
        config: Config,
        limits: Limits,
        counters: Counters,
        service: CompileService,
        progress: Progress,
        on_change: Callable[[Root], None],
    ) -> None:
        self.config = config
        self.limits = limits
        self.counters = counters
        self.service = service
        self.progress = progress
        self._on_change = on_change

    def compile(
        self, root: Root, root_count: int, recording: Recording, roots: list[Any] | None = None
    ) -> None:
        """`roots`: the values of the whole call that was recorded, which is over."""
        graph, guards, template = recording.graph, recording.guards, recording.template
        assert graph is not None and guards is not None and template is not None
        wanted = [*recording.inputs, *recording.leaves, *template.sources]
        lowered = guards.lower(root_count, wanted)
        try:
            program = runtime.native.GuardProgram(lowered.instructions, root_count)
        except ValueError as error:
            root.give_up("tensor_kind", str(error), root.location)
            return
        recording.checked = tuple(map(misses.remembered, lowered.guard_of))
        if roots is not None and root.recordings == 1:
            failed = program.check(tuple(roots))
            if failed >= 0 and _is_own_state(root, lowered.guard_of[failed]):
                # It counts, or has made once what it uses from now on: another call would be
                # served by another variant. The next call is recorded instead.
                changed = misses.name_of(lowered.guard_of[failed])
                root.history.append(f"recorded again: its first call has changed {changed}")
                root.entry.threshold = 1
                return
        guards.release()
        slots = lowered.slots
        needed = [slots[id(source)] for source in template.sources]

        def slot_of(source: Source) -> int:
            return slots[id(source)]

        finish = template.builder(slot_of)
        inputs = [slots[id(source)] for source in recording.inputs]
        recording.leaf_slots = tuple(slots[id(source)] for source in recording.leaves)
        result = result_plan(template, finish, needed, slot_of)
        log.artifact("graph", "%s: %s", root.name, graph)
        self.counters.add("segments")
        self._submit(root, Prepared(recording, program, inputs, result))

    def _submit(self, root: Root, prepared: Prepared) -> None:
        """Hands a recording's graph to the compiler, to be installed when it is done."""
        recording = prepared.recording
        assert recording.graph is not None
        root.pending += 1
        root.state = "compiling"
        root.entry.state = "count" if not root.variants else "armed"
        root.entry.threshold = 1

        def done(segment: CompiledSegment) -> None:
            root.pending -= 1
            try:
                if segment.error:
                    kind = errors.MissingError if segment.is_missing else errors.CompileError
                    raise kind(segment.error)
                self._install(root, prepared, segment)
            except (errors.CompileError, OSError, ValueError) as error:
                if _names_what_is_missing(error, segment):
                    log.notice_once(f"running eagerly on GPUs: {error}", "GPU")
                    root.give_up("compile_failed", str(error), root.location)
                    return
                if self._retries_static(root, recording, str(error)):
                    return
                if branching.leave_operation(root, recording, str(error)):
                    return
                if "compiler" in str(error):
                    log.notice_once(f"running eagerly: {error}", "compiler")
                if errors.ONLY_VIEWS in str(error):
                    root.give_up("only_views", "", root.location)
                else:
                    root.give_up("compile_failed", str(error), root.location)

        self.progress.compiling(root.name)
        self.service.submit(recording.graph, root.backend or self.config.backend, done)
        if self.config.sync or self.config.deterministic:
            self.service.idle(None)

    def _retries_static(self, root: Root, recording: Recording, why: str) -> bool:
        """A graph for several sizes cannot be compiled: the next one is for one size."""
        graph, variation = recording.graph, root.variation
        if graph is None or graph.sizes is None or variation is None:
            return False
        reason = variation.refuse(why, has_numbers=bool(graph.sizes.numbers))
        root.history.append(reason)
        log.artifact("driver", "%s: %s", root.name, reason)
        root.state = "compiled" if root.variants else "cold"
        root.entry.threshold = 1
        return True

    def _install(self, root: Root, prepared: Prepared, segment: CompiledSegment) -> None:
        """The compiler has answered: from now on a variant serves."""
        self.counters.add("seconds_compiling", segment.seconds)
        recording = prepared.recording
        variant = self._variant(root, prepared, segment)
        variant.landing = recording.landing
        installed = Installed(
            variant, recording, prepared.program, segment.key, recording.operations
        )
        replaced = [v for v in root.variants if v.program is prepared.program]
        self._put_on_trial(root, installed)
        for v in replaced:
            installed.trial.eager_ns.extend(v.trial.eager_ns)
        branching.watch(root, installed)
        # Variants for one size come first: they know more.
        is_family = isinstance(variant.executor, Family)
        root.variants.insert(len(root.variants) if is_family else 0, installed)
        branching.order(root.variants)
        self.counters.add("variants")
        root.retire(replaced)
        root.entry.state = "armed"
        root.ops_per_call = recording.operations
        if len(root.variants) >= self.config.max_variants:
            root.state = "full"
            self._full(root)
            root.entry.threshold = self.limits.max_backoff_calls
        else:
            root.state = "compiled"
            root.entry.threshold = self.config.threshold
        self._on_change(root)
        self.progress.done(root.name)

    def _variant(self, root: Root, prepared: Prepared, segment: CompiledSegment) -> Any:
        recording, graph = prepared.recording, prepared.recording.graph
        connected: tuple[Any, ...] | None = None
        executor: Any = segment.callable
        if segment.kind == "plan":
            assert segment.plan is not None and graph is not None
            if graph.sizes is not None:
                executor = Family(graph, segment.plan, segment.library_path)
            else:
                executor = runtime.native.Executor(segment.plan, segment.library_path)
                if graph.gradients is not None:
                    connected = self._gradients(root, prepared, segment, executor)
        variant = runtime.native.Variant(
            prepared.program,
            recording.ambient,
            executor,
            prepared.inputs,
            prepared.result,
            connected,
            _numbers(recording),
        )
        if connected is not None:
            assert segment.plan is not None and graph is not None and recording.template is not None
            specs = segment.plan["gradients"]
            # A checkpoint's first run drew eager's masks: it had no gradients.
            variant.outside_backward = any(spec["redraws"] for spec in specs)
            # Where eager saves something: only so both end their second runs at the same call.
            saves = any(spec["saved"] for spec in specs)
            changes = bool(segment.plan["commit"] or recording.template.effects)
            variant.repeatable, variant.is_random = saves and not changes, graph.is_random
        return variant

    def _put_on_trial(self, root: Root, installed: Installed) -> None:
        """Its calls are measured: it has to be faster than eager."""
        # The eager backend is there to look for errors with; it cannot win.
        if not self.config.deterministic and (root.backend or self.config.backend) != "eager":
            installed.native.probe_every, installed.native.review_at = 1, trial.FIRST_REVIEW
            if not root.variants:
                installed.trial.eager_ns.extend(root.eager_ns)
        if root.kind != "node":  # whose trial and events are its own, see accel.metering
            root.eager_ns.clear()
            root.entry.on_event = functools.partial(self._tell, weakref.ref(root))

    def _gradients(
        self, root: Root, prepared: Prepared, segment: CompiledSegment, executor: Any
    ) -> tuple[Any, ...]:
        """What makes the autograd nodes of a differentiable variant, by component."""
        graph = prepared.recording.graph
        assert segment.plan is not None and graph is not None
        reference = weakref.ref(root)

        patterns: Counter[tuple[str, ...]] = Counter()

        def on_recompute(use: gradients.Use) -> None:
            if not use.zeros:
                self.counters.add("backwards_recomputed")
            root = reference()
            if root is None or root.state == "blacklisted" or root.pending:
                return
            if not any(v.recording is prepared.recording for v in root.variants):
                return  # what is asked of that variant is known already
            if use.ends:
                places = {(o.target, o.location) for o in graph.operations if o.name in use.ends}
                if branching.leave_operations(root, places, use.why):
                    return
            patterns[use.tangents] += use.zeros
            if use.zeros and (len(patterns) > 1 or patterns[use.tangents] < PATTERN_SEEN):
                return  # zeros serve every pattern; one alone deserves a plan of its own
            if use.tangents and root.backward_patterns < self.limits.max_backward_patterns:
                self._compile_backward(root, prepared, use)
                return
            root.retire(root.variants)
            root.give_up("derivatives", use.why, root.location)

        found = []
        for spec in segment.plan["gradients"]:
            backward = runtime.native.Executor(spec["plan"], segment.library_path)
            recompute = gradients.recomputation(graph, spec, on_recompute)
            found.append(runtime.native.Gradient(spec, executor, backward, recompute))
        return tuple(found)

    def _compile_backward(self, root: Root, prepared: Prepared, use: gradients.Use) -> None:
        """Gradients arrive at other outputs than the variant was compiled for: a new one. Until
        it is there the old one serves, if zeros for what does not arrive make it right."""
        recording = prepared.recording
        assert recording.graph is not None and recording.graph.gradients is not None
        root.backward_patterns += 1
        if not use.zeros:
            root.retire(v for v in root.variants if v.program is prepared.program)
        known = recording.graph.gradients
        # What it was compiled for comes again, most likely (two losses in turn): for both, then.
        names = {*use.tangents, *(() if use.zeros else known.tangents)}
        wanted = replace(known, tangents=tuple(n for n in known.outputs if n in names))
        recording = replace(recording, graph=replace(recording.graph, gradients=wanted))
        self._submit(root, replace(prepared, recording=recording))
        for v in root.variants if root.pending else ():
            v.native.review_at = v.native.hits + 1  # to look for what has been compiled

    # ------------------------------------------------------ what becomes of variants

    def _tell(self, reference: weakref.ref[Root], _entry: Any, kind: str, message: str) -> None:
        """Native dispatch tells of a failed executor ("error") or a due review."""
        root = reference()
        if root is None:
            return
        if kind == "error":
            log.artifact("driver", "%s: the executor failed: %s", root.name, message)
            self._drop_failed(root, message)
            return
        if kind == "misspeculated":
            branching.leave(root, branching.doubt(root))
            return
        due = [v for v in root.variants if v.native.review_at == 0]
        if root.pending:  # nobody else may ask the compiler while all calls are served
            self._take_up()
        for installed in due:
            if root.pending:
                installed.native.review_at = installed.native.hits + 1
            elif installed in root.variants:
                self._review(root, installed)

    def _take_up(self) -> None:
        try:
            self.service.poll()
        except Exception as error:
            if self.config.strict:
                raise
            log.internal_error("installing", error)

    def _drop_failed(self, root: Root, message: str) -> None:
        """Variants that native dispatch has dropped for their errors; another recording of such
        a call would give another of the kind."""
        dropped = [v for v in root.variants if v.native not in root.entry.variants]
        if not dropped:
            return
        root.retire(dropped)
        root.give_up("executor_failed", message, root.location)

    def _review(self, root: Root, installed: Installed) -> None:
        """Whether this variant is worth its place."""
        native = installed.native
        times = native.ns_compiled
        ruling = installed.trial.review(times)
        if ruling.losing:
            self._lose(root, installed, installed.trial.text(times))
            return
        if installed.trial.strikes or ruling.probe_every == 1:
            native.clear_probes()
        native.probe_every = ruling.probe_every
        native.eager_runs = ruling.eager_runs
        native.review_at = native.hits + ruling.review_in

    def _lose(self, root: Root, installed: Installed, text: str) -> None:
        """Drops a variant that is slower than eager; its calls run eagerly from now on."""
        log.artifact("driver", "%s is losing: %s", root.name, text)
        self.counters.add("variants_losing")
        root.retire([installed])
        root.reason = errors.reason_text("losing", text)
        root.reason_location = root.location
        root.entry.threshold = self.limits.max_backoff_calls
        # A variant for other calls may win; calls of the losing kind must not record again.
        root.state = "full" if root.variants else "losing"
        if not root.variants:
            root.entry.state = "off"

    @staticmethod
    def _full(root: Root) -> None:
        """A root has all the variants it may have: its other calls run eagerly."""
        root.reason = errors.reason_text("too_many_variants", str(len(root.variants)))
        if root.miss is None:
            return
        root.reason += f"; the last since {root.miss}"
        log.notice_once(
            f"{root.name} ({short_place(root.location)}) has {len(root.variants)} compiled variants "
            f"and gets no more: {root.miss}; other calls run eagerly. {root.miss.fix}",
            f"variants of {root.entry.index}",
        )


def _names_what_is_missing(error: Exception, segment: CompiledSegment) -> bool:
    """No other recording would fare better: also what NVIDIA's driver says when it loads a plan."""
    if isinstance(error, errors.MissingError):
        return True
    return isinstance(error, OSError) and segment.plan is not None and "kernels" in segment.plan


def _numbers(recording: Recording) -> tuple[Any, ...] | None:
    """What native code is told of the numbers that differ between calls."""
    program = recording.numbers
    return None if program is None else (program, recording.leaf_slots, program.given)


def result_plan(
    template: Any,
    finish: Callable[..., Any],
    needed: list[int],
    slot_of: Callable[[Source], int],
) -> tuple[Any, ...]:
    """The shortest of the native result forms that builds this result; `needed` are the guard
    slots that `finish` is given."""
    spec = template.result
    if not template.effects:
        if spec[0] == "output":
            return ("tensor", spec[1])
        if spec[0] == "make" and spec[2][:2] == ("sequence", tuple):
            parts = spec[2][2]
            if all(part[0] in ("output", "slot", "const") for part in parts):
                return (
                    "parts",
                    [(kind, slot_of(v) if kind == "slot" else v) for kind, v in parts],
                )
        if spec[0] == "const":
            return ("const", spec[1])
    return ("call", finish, needed)


def _is_own_state(root: Root, checked: Guard | Source) -> bool:
    """Whether a guard looks at the function's or module's own state, not at an argument."""
    source = checked if isinstance(checked, Source) else checked.source
    while source.base is not None:
        source = source.base
    return source.kind != "root" or (source.key[0] == 0 and root.kind == "module")


__all__ = ["Installer", "result_plan"]
