"""The driver: wires rewriting, recording, compiling and dispatch together.

In: notifications from native dispatch (a root's call that no variant served) and finished
compilations. Out: recordings, installed variants, and the summary for the user.
Invariant: the only module that knows all stages. Its code runs with dispatch paused, never
raises into the program, and a call it is asked about either runs the user's own body or is
that body being recorded.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accel import (
    arming,
    branching,
    errors,
    log,
    misses,
    optimizers,
    other_tracers,
    runtime,
    teardown,
    trial,
)
from accel.capture import branches, left_to_python
from accel.capture.recorder import Recorder, Recording
from accel.capture.twins import CodeKey, TwinFactory, code_key
from accel.capture.values import class_lookup
from accel.capture.variation import Variation
from accel.compile import gradients
from accel.compile.family import Family
from accel.compile.service import CompiledSegment, CompileService
from accel.config import Config
from accel.counting import Counters
from accel.report import Progress, short_place
from accel.rewriter import hook, prologue, twin
from accel.rewriter.cache import CodeCache
from accel.roots import SETTLED, Installed, Limits, Owners, Root
from accel.splitting import Splitter
from accel.trace import SegmentGraph

# Voids that say nothing about the root: another try costs only time.
TRANSIENT = frozenset({"foreign_frame", "interrupted", "escaped_operation"})
# Voids that hang on how the root was called: it is tried again, ever more rarely.
PASSING = frozenset({"requires_grad", "ambient_changed", "raised", "tensor_kind", "first_use"})


class Driver:
    """State of accel in one process."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.stance = "default"
        self.limits = Limits()
        self.service = CompileService(config)
        self.roots: dict[int, Root] = {}
        self._code_index: dict[CodeKey, int] = {}
        self._owners = Owners(self._make_root)
        self._code_cache = CodeCache(Path(config.cache_dir) / "code")
        self.twins = TwinFactory(self._build_twin)
        self.splitter = Splitter(
            self.twins.function,
            self._compile,
            self._poll,
            self.counters.add,
            self._arm_inlined,
            self._variation,
        )
        self.progress = Progress(config)
        self._closed = False
        self._module_call: types.CodeType | None = None
        self._packages: set[str] = set()
        self._denied: set[str] = set()
        self._functions = functions_by_module(config.functions)
        self._first_calls: dict[str, set[str]] = {}  # file -> functions recorded at once
        self._base_calls: dict[int, int] = {}
        self.script_directory: Path | None = None
        native = runtime.native
        # Last of all handlers: what runs while the interpreter goes down is the program's alone.
        atexit.register(native.set_enabled, False)
        teardown.publish(
            __accel_prologue__=native.prologue,
            __accel_module_prologue__=native.module_prologue,
            __accel_run_body__=native.RUN_BODY,
            __accel_node__=native.node,
        )
        native.set_module_hook(self.on_module_call, config.threshold)
        self._patch_module_call()
        other_tracers.install()
        self.set_stance(config.stance)

    # ------------------------------------------------------------ rewriting

    def _build_twin(self, code: types.CodeType) -> types.CodeType | None:
        original = prologue.original_code(code)
        if not twin.is_twinnable(original):
            return None
        built = self._code_cache.twin(original)
        return twin.bind_twin(built, runtime.native.TRAMPOLINES)

    def _patch_module_call(self) -> None:
        """The universal roots: nn.Module.__call__ gets its prologue, optimizers their updates."""
        f = torch.nn.Module._wrapped_call_impl
        if prologue.original_code(f.__code__) is f.__code__:
            # The same code object each time: guards know it by identity.
            if self._module_call is None:
                self._module_call = prologue.insert_prologue(f.__code__, 0, kind="module")
            f.__code__ = self._module_call
        if not _inside("torch.optim", set(self.config.deny)):
            optimizers.install(
                lambda: self.counters.add("optimizer_steps"),
                lambda: self.stance == "force_eager" or _under_a_mode(),
            )

    def unpatch(self) -> None:
        prologue.remove_prologue(torch.nn.Module._wrapped_call_impl)
        optimizers.uninstall()

    def assign_index(self, code: types.CodeType) -> int:
        """The dispatch index of a function's code; makes its entry."""
        index = self._code_index.get(code_key(code))
        if index is None:
            index = self._code_index[code_key(code)] = self._make_root(code).entry.index
        return index

    def _make_root(self, code: types.CodeType) -> Root:
        entry = runtime.native.Entry(code.co_qualname, self.on_call)
        entry.threshold = self.config.threshold
        entry.state = "count"
        location = f"{code.co_filename}:{code.co_firstlineno}"
        root = self.roots[entry.index] = Root(
            code.co_qualname, "function", location, entry, code=code
        )
        if code.co_qualname in self._first_calls.get(code.co_filename, ()):
            root.forced = True
            entry.threshold = 1
        return root

    def root_of_function(self, f: types.FunctionType) -> Root:
        """Arms a function: its code gets a prologue if it has none."""
        original = prologue.original_code(f.__code__)
        if not arming.may_be_root(original):
            raise TypeError(
                f"{f.__qualname__} cannot be a root: generators, coroutines and class bodies "
                "run as Python; optimize the function that calls it"
            )
        if (index := prologue.entry_index(f.__code__)) is None:
            index = self.assign_index(original)
            f.__code__ = prologue.insert_prologue(original, index)
        return self.roots[index]

    def own_root_of_function(self, f: types.FunctionType) -> Root:
        """The same, but not shared with functions of equal code."""
        return self._owners.claim(f, self.root_of_function(f))

    def root_of_module(self, module: torch.nn.Module) -> Root:
        entry = runtime.native.module_entry(module)
        return self._module_root(entry, module)

    def _module_root(self, entry: Any, module: torch.nn.Module) -> Root:
        root = self.roots.get(entry.index)
        if root is None or root.module is None or root.module() is not module:
            cls = type(module)
            forward = class_lookup(cls, "forward")
            location = "?"
            if isinstance(forward, types.FunctionType):
                location = f"{forward.__code__.co_filename}:{forward.__code__.co_firstlineno}"
            root = Root(cls.__qualname__, "module", location, entry, module=weakref.ref(module))
            entry.threshold = self.config.threshold
            self.roots[entry.index] = root
        return root

    # ------------------------------------------------------------- dispatch

    def on_module_call(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        return self._guarded(self._decide_module, entry, roots)

    def on_call(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        return self._guarded(self._decide_function, entry, roots)

    def _guarded(self, decide: Callable[..., Any], entry: Any, roots: tuple[Any, ...]) -> Any:
        """An error of ours turns accel off for that root; the program never sees it. What one of
        the program's signal handlers raised meanwhile is the program's."""
        try:
            known = entry.variants
            self.service.poll()
            if entry.variants is not known:
                return None  # what was installed just now may serve the next call
            return decide(entry, roots)
        except errors.RecompileError:
            raise  # asked for
        except BaseException as error:
            if runtime.native.deliver_interrupt(error):
                return None
            if self.config.strict or not isinstance(error, Exception):
                raise
            entry.state = "off"
            log.internal_error("driver", error)
            return None

    def _poll(self) -> None:
        """Takes up what was compiled meanwhile."""
        try:
            self.service.poll()
        except BaseException as error:
            if runtime.native.deliver_interrupt(error):
                return
            if self.config.strict or not isinstance(error, Exception):
                raise
            log.internal_error("driver", error)

    def _decide_module(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        module, args, kwargs = roots
        root = self._module_root(entry, module)
        function = torch.nn.Module._wrapped_call_impl
        if (times := self._wants_measuring(root)) is not None:
            return (times, function, (module, *args), kwargs)
        self._check_stance(root, roots)
        if not self._wants_recording(root):
            return None
        named = [("self", module), ("args", args), ("kwargs", kwargs)]
        return self._record(root, named, function, _module_arguments, (1, 2))

    def _decide_function(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        root = self.roots[entry.index]
        code = root.code
        assert code is not None
        *values, function = roots
        if (times := self._wants_measuring(root)) is not None:
            return (times, function, *call_arguments(code, values))
        self._check_stance(root, roots)
        if (metered := self.splitter.metered(root, function)) is not None:
            return ([], metered, *call_arguments(code, values), True)
        if not self._wants_recording(root):
            return None
        named = list(zip(argument_names(code), values, strict=True))
        named.append((code.co_name, function))
        bind = functools.partial(call_arguments, code)
        return self._record(root, named, function, bind, starred_positions(code))

    def _check_stance(self, root: Root, roots: tuple[Any, ...]) -> None:
        """Errors: RecompileError for a call that no variant served, where the user wants that."""
        if self.stance != "fail_on_recompile" or not root.variants or _under_a_mode():
            return
        miss = misses.why_missed(root.variants, roots, _parameters(root))[0]
        raise errors.RecompileError(root.name, miss.what, miss.old, miss.new, miss.location)

    def _wants_measuring(self, root: Root) -> list[int] | None:
        """Where this call's time goes when it is to run eagerly and be measured; or None."""
        sampled = root.entry.sampled
        if sampled is not None:
            for installed in root.variants:
                if installed.native is sampled:
                    return installed.trial.eager_ns
            return []  # replaced meanwhile; the call must run all the same
        if root.pending and not root.variants and len(root.eager_ns) < self.limits.max_eager_times:
            return root.eager_ns
        return None

    def _wants_recording(self, root: Root) -> bool:
        entry = root.entry
        if self.stance != "default":
            return False
        if self._closed or root.state in SETTLED:
            entry.state = "off" if not root.variants else "armed"
            entry.threshold = self.limits.max_backoff_calls
            return False
        if _under_a_mode() or other_tracers.is_disabled_here():
            return False
        if root.pending or root.is_recording:
            entry.threshold = 1  # look for the finished compilation at the next call
            return False
        if root.split is not None:
            compiling = any(node.pending for node in root.split.nodes)
            entry.threshold = 1 if compiling else self.limits.max_backoff_calls
            if compiling or not root.split.wanted:
                return False
        elif not root.forced and self._defers(root):
            entry.threshold = 1
            return False
        if not root.turn.acquire(blocking=False):  # another thread was faster
            entry.threshold = 1
            return False
        if root.variants:
            self.counters.add("recompiles")
        return True

    def _defers(self, root: Root) -> bool:
        """True when an enclosing candidate should be judged before this inner root."""
        counts = False
        for enclosing in self._enclosing(root):
            if (
                enclosing.kind == "module"
                and enclosing.state != "blacklisted"
                and _is_forward_of(root, enclosing)
            ):
                return True  # the module itself is the better root of the two
            if enclosing.state == "compiled":
                counts = True  # it misses this one call only, unless it goes on missing
            elif enclosing.state == "compiling" or enclosing.is_recording:
                return True
            elif not enclosing.judged and not enclosing.recordings:
                if enclosing.entry.calls > 1:
                    return True  # it is due itself
                # In its first call: a module is likely to be called again, a main() is not.
                if enclosing.kind == "module" and self._is_young(enclosing):
                    return True
                counts = True
        if not counts or root.deferrals >= self.limits.max_deferrals:
            return False
        root.deferrals += 1
        return True

    def _is_young(self, root: Root) -> bool:
        """Whether its first call has not been running for long."""
        now = time.monotonic()
        if not root.first_seen_s:
            root.first_seen_s = now
        return now - root.first_seen_s < self.limits.first_call_s

    def _enclosing(self, root: Root) -> Iterator[Root]:
        """The roots whose bodies are running in this thread, innermost first, besides `root`."""
        frame: types.FrameType | None = sys._getframe(1)
        call = torch.nn.Module._wrapped_call_impl.__code__
        while frame is not None:
            code = frame.f_code
            if code is call:
                module = frame.f_locals["self"]
                entry = runtime.native.module_entry(module)
                if entry is not None and root is not (found := self._module_root(entry, module)):
                    yield found
            else:
                index = prologue.entry_index(code)
                if index is None:
                    index = self._code_index.get(code_key(prologue.original_code(code)))
                if index is not None and self.roots[index] is not root:
                    yield self.roots[index]
            frame = frame.f_back

    # ------------------------------------------------------------ recording

    def _record(
        self,
        root: Root,
        named: list[tuple[str, Any]],
        function: types.FunctionType,
        bind: Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any] | None]],
        starred: tuple[int, ...],
    ) -> Any:
        """What native code is to run; the run's end gives the root's turn back."""
        answer = None
        try:
            answer = self._recorder(root, named, function, bind, starred)
        finally:
            if answer is None:
                root.turn.release()
        return answer

    def _recorder(
        self,
        root: Root,
        named: list[tuple[str, Any]],
        function: types.FunctionType,
        bind: Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any] | None]],
        starred: tuple[int, ...],
    ) -> Any:
        values = [value for _, value in named]
        if root.split is not None:
            run, run_twin = self.splitter.recorder(root, function)
            self.counters.add("recordings")
            root.recordings += 1
            return (run, run_twin, *bind(values))
        twin_function = self.twins.function(function)
        if twin_function is None:
            self._give_up(root, "no_twin", function.__qualname__, root.location)
            return None
        recorder = Recorder(
            named,
            self.twins.function,
            lambda recording: self._recorded(root, named, recording),
            starred=starred,
            function=len(named) - 1 if root.kind == "function" else None,
            variation=self._variation(root),
            assumes_all=root.assumes_all or root.fullgraph,
        )
        recorder.twin_code = twin_function.__code__
        if root.variants:
            self._note_miss(root, tuple(values))
        self.counters.add("recordings")
        root.recordings += 1
        return (recorder, twin_function, *bind(recorder.bound_arguments(values)))

    def _note_miss(self, root: Root, roots: tuple[Any, ...]) -> None:
        """A call is about to be recorded since no variant of its root served it."""
        found = misses.why_missed(root.variants, roots, _parameters(root))
        root.miss = found[0]  # of the newest variant, which is tried first
        why = "; ".join(dict.fromkeys(map(str, found)))
        root.history.append(f"another variant, since {why}")
        log.artifact("recompiles", "%s recompiles: %s", root.name, why)

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

    def _variation(self, root: Root) -> Variation | None:
        """Which sizes are left open; only our own compiler takes such graphs."""
        if (root.backend or self.config.backend) != "native":
            return None
        if root.variation is None:
            dynamic = self.config.dynamic if root.dynamic is None else root.dynamic
            root.variation = Variation(dynamic)
        return root.variation

    def _recorded(
        self, root: Root, named: list[Any], recording: Recording
    ) -> errors.GraphBreakError | None:
        """A recorded run is over; called in the recording session, with dispatch paused, by the
        thread that has the root's turn.

        What is returned is raised by the recorded call.
        """
        self.counters.add("seconds_recording", recording.seconds)
        try:
            if recording.void is not None:
                return self._voided(root, recording)
            recording.show(root.variation)
            if root.variation is not None and recording.graph is not None:
                # So that no recording is spent on finding that out.
                root.variation.no_gradients |= recording.graph.gradients is not None
            if branching.leave(root, branching.places_to_leave(root.variants, recording)):
                return None
            self._compile(root, len(named), recording)
        except BaseException as error:
            if runtime.native.deliver_interrupt(error):
                return None  # not judged: a later call is recorded
            if self.config.strict or not isinstance(error, Exception):
                raise
            log.internal_error("driver", error)
            self._give_up(root, "recorder_error", repr(error), root.location)
        finally:
            root.turn.release()
        return None

    def _voided(self, root: Root, recording: Recording) -> errors.GraphBreakError | None:
        void = recording.void
        assert void is not None
        self.counters.add("recordings_voided")
        log.artifact(
            "trace", "%s voided: %s %s at %s", root.name, void.kind, void.detail, recording.location
        )
        if void.kind == "recorder_error":
            log.internal_error("capture", void, recording.traceback)
        root.reason = errors.reason_text(void.kind, void.detail)
        root.reason_location = recording.location
        root.history.append(f"{root.reason} ({recording.location})")
        if void.kind in TRANSIENT and root.transient_voids < self.limits.max_transient_voids:
            root.transient_voids += 1
            root.entry.threshold = 1 + root.transient_voids
            return None
        if void.kind == "dynamic" and root.fix_sizes(void.detail):
            root.entry.threshold = 1
            return None
        if recording.is_plain and not root.forced and void.kind != "raised":
            self._ran_plain(root)
            return None
        if root.fullgraph and void.kind != "raised":
            self.counters.add("graph_breaks")
            return errors.graph_break(recording.location, void.kind, void.detail)
        if void.kind in PASSING:
            root.backoff = min(2 * root.backoff, self.limits.max_backoff_calls)
            root.entry.threshold = root.backoff
            return None
        if not root.variants and self.splitter.offer(root, recording):
            root.state, root.entry.threshold = "split", 1
            return None
        if void.kind == "branch" and _own_forward(root) is None:
            root.assumes_all, root.entry.threshold = True, 1
            return None
        self.counters.add("graph_breaks")
        self._give_up(root, void.kind, void.detail, recording.location)
        if root.kind == "module":
            self._arm_forward(root)
        return None

    def _arm_forward(self, root: Root) -> None:
        """A module that cannot be recorded whole: its `forward` may be split."""
        forward = _own_forward(root)
        if forward is not None:
            function_root = self.root_of_function(forward)
            function_root.forced |= root.forced
            function_root.backend = function_root.backend or root.backend
            if root.forced and function_root.state == "cold":
                function_root.entry.threshold = 1

    def _arm_inlined(self, root: Root, codes: tuple[types.CodeType, ...]) -> None:
        """What the root calls at an exit runs as Python: those functions get their own turn."""
        denied = self._denied | set(self.config.deny)
        for function in arming.functions_to_arm(self.twins, codes, lambda m: _inside(m, denied)):
            try:
                inner = self.root_of_function(function)
            except prologue.RewriteError as error:
                log.artifact("driver", "%s gets no prologue: %s", function.__qualname__, error)
                continue
            inner.backend = inner.backend or root.backend

    def _ran_plain(self, root: Root) -> None:
        """A call without torch operations: once more, later; then the root is left alone."""
        root.plain_runs += 1
        if root.plain_runs < self.limits.max_plain_runs:
            root.entry.threshold = self.limits.plain_pause_calls
        else:
            root.state = "full" if root.variants else "plain"
            self._disarm(root)

    def _give_up(self, root: Root, kind: str, detail: str, location: str) -> None:
        root.state = "full" if root.variants else "blacklisted"
        root.reason = errors.reason_text(kind, detail)
        root.reason_location = location
        root.entry.state = "armed" if root.variants else "off"
        root.entry.threshold = self.limits.max_backoff_calls
        log.artifact("driver", "%s blacklisted: %s at %s", root.name, root.reason, location)

    def _disarm(self, root: Root) -> None:
        """Functions of this code lose their prologue at their next call."""
        if not root.variants:
            root.entry.state = "off"
            root.entry.disarm = root.kind == "function"

    # ------------------------------------------------------------ compiling

    def _compile(self, root: Root, root_count: int, recording: Recording) -> None:
        graph, guards, template = recording.graph, recording.guards, recording.template
        assert graph is not None and guards is not None and template is not None
        wanted = [*recording.inputs, *recording.leaves, *template.sources]
        lowered = guards.lower(root_count, wanted)
        try:
            program = runtime.native.GuardProgram(lowered.instructions, root_count)
        except ValueError as error:
            self._give_up(root, "tensor_kind", str(error), root.location)
            return
        recording.checked = tuple(map(misses.remembered, lowered.guard_of))
        guards.release()
        slots = lowered.slots
        needed = [slots[id(source)] for source in template.sources]
        finish = template.builder(lambda source: slots[id(source)])
        inputs = [slots[id(source)] for source in recording.inputs]
        recording.leaf_slots = tuple(slots[id(source)] for source in recording.leaves)
        result = result_plan(template, finish, needed)
        log.artifact("graph", "%s: %s", root.name, graph)
        self.counters.add("segments")
        self._submit(root, recording, program, inputs, result)

    def _submit(
        self,
        root: Root,
        recording: Recording,
        program: Any,
        inputs: list[int],
        result: tuple[Any, ...],
    ) -> None:
        """Hands a recording's graph to the compiler, to be installed when it is done."""
        assert recording.graph is not None
        root.pending += 1
        root.state = "compiling"
        root.entry.state = "count" if not root.variants else "armed"
        root.entry.threshold = 1

        def done(segment: CompiledSegment) -> None:
            root.pending -= 1
            try:
                if segment.error:
                    raise errors.CompileError(segment.error)
                self._install(root, recording, program, inputs, result, segment)
            except (errors.CompileError, OSError, ValueError) as error:
                if self._retries_static(root, recording, str(error)):
                    return
                if branching.leave_operation(root, recording, str(error)):
                    return
                if "compiler" in str(error):
                    log.notice_once(f"running eagerly: {error}", "compiler")
                self._give_up(root, "compile_failed", str(error), root.location)

        self.progress.compiling(root.name)
        self.service.submit(recording.graph, root.backend or self.config.backend, done)
        if self.config.sync or self.config.deterministic:
            self.service.idle(None)

    def _retries_static(self, root: Root, recording: Recording, why: str) -> bool:
        """A graph for several sizes cannot be compiled: the next one is for one size."""
        if recording.graph is None or recording.graph.sizes is None or root.variation is None:
            return False
        root.variation.refused = errors.reason_text("dynamic", why)
        root.history.append(root.variation.refused)
        log.artifact("driver", "%s: %s", root.name, root.variation.refused)
        root.state = "compiled" if root.variants else "cold"
        root.entry.threshold = 1
        return True

    def _install(
        self,
        root: Root,
        recording: Recording,
        program: Any,
        inputs: list[int],
        result: tuple[Any, ...],
        segment: CompiledSegment,
    ) -> None:
        self.counters.add("seconds_compiling", segment.seconds)
        gradient = None
        executor: Any
        graph = recording.graph
        is_family = segment.kind == "plan" and graph is not None and graph.sizes is not None
        if is_family:
            assert segment.plan is not None and graph is not None
            executor = Family(graph, segment.plan, segment.library_path)
        elif segment.kind == "plan":
            assert segment.plan is not None
            executor = runtime.native.Executor(segment.plan, segment.library_path)
            if graph is not None and graph.gradients is not None:
                again = functools.partial(
                    self._compile_backward, recording, program, inputs, result
                )
                gradient = self._gradient(root, graph, segment, executor, again)
        else:
            executor = segment.callable
        variant = runtime.native.Variant(
            program, recording.ambient, executor, inputs, result, gradient, _numbers(recording)
        )
        variant.landing = recording.landing
        installed = Installed(variant, recording, program, segment.key, recording.operations)
        # The eager backend is there to look for errors with; it cannot win.
        if not self.config.deterministic and (root.backend or self.config.backend) != "eager":
            variant.probe_every, variant.review_at = 1, trial.FIRST_REVIEW
            if not root.variants:
                installed.trial.eager_ns.extend(root.eager_ns)
        if root.kind != "node":  # whose trial and events are its own, see accel.metering
            root.eager_ns.clear()
            root.entry.on_event = functools.partial(self._tell, weakref.ref(root))
        branching.watch(root, installed)
        # Variants for one size come first: they know more.
        root.variants.insert(len(root.variants) if is_family else 0, installed)
        branching.order(root.variants)
        self.counters.add("variants")
        root.publish()
        root.entry.state = "armed"
        root.ops_per_call = recording.operations
        if len(root.variants) >= self.config.max_variants:
            root.state = "full"
            self._full(root)
            root.entry.threshold = self.limits.max_backoff_calls
        else:
            root.state = "compiled"
            root.entry.threshold = self.config.threshold
        self._set_patience(root)
        self.progress.done(root.name)

    def _gradient(
        self,
        root: Root,
        graph: SegmentGraph,
        segment: CompiledSegment,
        executor: Any,
        again: Callable[[Root, tuple[str, ...]], None],
    ) -> Any:
        """What makes the autograd nodes of a differentiable variant; `again(root, names)`
        compiles it for gradients that arrive at the outputs `names`."""
        assert segment.plan is not None
        spec = segment.plan["gradient"]
        backward = runtime.native.Executor(spec["plan"], segment.library_path)
        reference = weakref.ref(root)

        def on_recompute(why: str, tangents: tuple[str, ...]) -> None:
            self.counters.add("backwards_recomputed")
            root = reference()
            if root is None or root.state == "blacklisted" or root.pending:
                return
            if tangents and root.backward_patterns < self.limits.max_backward_patterns:
                again(root, tangents)
                return
            root.retire(root.variants)
            self._give_up(root, "derivatives", why, root.location)

        return runtime.native.Gradient(
            spec, executor, backward, gradients.recomputation(graph, spec, on_recompute)
        )

    def _compile_backward(
        self,
        recording: Recording,
        program: Any,
        inputs: list[int],
        result: tuple[Any, ...],
        root: Root,
        tangents: tuple[str, ...],
    ) -> None:
        """Gradients arrive at other outputs than the variant was compiled for: a new one."""
        assert recording.graph is not None and recording.graph.gradients is not None
        root.backward_patterns += 1
        root.retire(v for v in root.variants if v.program is program)
        wanted = replace(recording.graph.gradients, tangents=tangents)
        recording = replace(recording, graph=replace(recording.graph, gradients=wanted))
        self._submit(root, recording, program, inputs, result)

    # --------------------------------------------------------------- trials

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
        for installed in list(root.variants):
            if installed.native.review_at == 0:
                self._review(root, installed)

    def _drop_failed(self, root: Root, message: str) -> None:
        """Variants that native dispatch has dropped for their errors; another recording of such
        a call would give another of the kind."""
        dropped = [v for v in root.variants if v.native not in root.entry.variants]
        if not dropped:
            return
        root.retire(dropped)
        self._give_up(root, "executor_failed", message, root.location)

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

    # -------------------------------------------------------------- control

    def set_stance(self, name: str) -> str:
        """What calls do from now on, a row of `stance.STANCES`; answers what it was."""
        before, self.stance = self.stance, name
        if "force_eager" in (before, name):
            runtime.native.set_enabled(name != "force_eager")
        if "fail_on_recompile" in (before, name):
            for root in self.roots.values():
                self._set_patience(root)
        return before

    def _set_patience(self, root: Root) -> None:
        """After how many calls that no variant served the driver is asked about a root."""
        if not root.variants:
            return
        if self.stance == "fail_on_recompile":
            root.entry.threshold = 1
        elif root.state == "compiled":
            root.entry.threshold = self.config.threshold
        elif root.state in SETTLED:
            root.entry.threshold = self.limits.max_backoff_calls

    def enable_package(self, name: str) -> None:
        """Modules of package `name`, imported and to come, get prologues."""
        self._packages.add(name)
        self._denied.discard(name)
        self.install_hook()
        for module_name, module in list(sys.modules.items()):
            if module is not None and _inside(module_name, {name}):
                hook.rewrite_loaded_module(module, self.assign_index)

    def disable(self, target: Any) -> None:
        """A package name, a function, a method or a module runs eagerly from now on."""
        if isinstance(target, types.ModuleType):
            target = target.__name__
        if isinstance(target, str):
            self._packages.discard(target)
            self._denied.add(target)
            for module_name, module in list(sys.modules.items()):
                if module is not None and _inside(module_name, {target}):
                    hook.restore_module(module)
            return
        if isinstance(target, torch.nn.Module):
            root = self.root_of_module(target)
        else:
            function = target.__func__ if isinstance(target, types.MethodType) else target
            if not isinstance(function, types.FunctionType):
                raise TypeError(f"accel.disable() takes a package, function or module: {target!r}")
            root = self.root_of_function(function)
            prologue.remove_prologue(function)
            left_to_python.functions.add(function)
            for other in self.roots.values():
                if other.state != "disabled":
                    self.forget(other)  # it may have been recorded as a part of these
        self.forget(root)
        root.state = "disabled"
        root.entry.state = "off"

    def reset(self) -> None:
        """Forgets what was recorded; arms every root again."""
        self.service.idle(None)
        for root in self.roots.values():
            if root.state != "disabled":
                self.forget(root)
            root.retired_hits = root.retired_failures = root.recordings = 0
        self.counters.reset()
        branches.both_ways.clear()
        branches.untraceable.clear()
        self._base_calls = {index: root.entry.calls for index, root in self.roots.items()}

    def forget(self, root: Root) -> None:
        """Makes a root as it was before its first call, but for its counts."""
        self.service.idle(None)  # what is being compiled belongs to the past
        self.splitter.restore(root)
        root.begin_again()
        root.entry.threshold = 1 if root.forced else self.config.threshold

    def selects(self, name: str, path: str | None) -> bool:
        """Whether a module about to be imported gets prologues."""
        if _inside(name, self._denied | set(self.config.deny)):
            return False
        if name in self._functions and path is not None:
            self._first_calls[path] = self._functions[name]
            return True
        if _inside(name, self._packages | set(self.config.packages) | set(self.config.modules)):
            return True
        if self.script_directory is None or path is None or self.config.packages:
            return False
        return _is_beside(str(self.script_directory), os.path.dirname(path))

    def install_hook(self) -> None:
        hook.install(self.selects, self.assign_index, self._code_cache)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until nothing is being compiled; False when the time ran out first."""
        return bool(self.service.idle(timeout_s))

    def read_counters(self) -> dict[str, float]:
        values = self.counters.snapshot()
        compiled = eager = ops_compiled = ops_eager = failed = deopts = backwards = 0
        served = split = 0
        for root in self.roots.values():
            hits = root.hits
            compiled += hits
            backwards += sum(v.native.gradient.runs for v in root.variants if v.native.gradient)
            ops_compiled += sum(v.native.hits * v.operations for v in root.variants)
            ops_compiled += root.retired_hits * root.ops_per_call
            if root.split is not None:
                split_hits, split_ops, split_missed, split_calls, failures = root.split.totals(root)
                served += split_hits
                ops_compiled += split_ops
                ops_eager += split_missed
                split += split_calls
                deopts += failures
            if root.state == "plain" or (not root.recordings and root.state == "cold"):
                continue  # without torch operations, part of another root's calls, or called once
            calls = root.entry.calls - self._base_calls.get(root.entry.index, 0)
            misses = max(calls - hits - (split_calls if root.split is not None else 0), 0)
            eager += misses
            ops_eager += misses * root.ops_per_call
            refused = sum(getattr(v.native.executor, "refusals", 0) for v in root.variants)
            missed = sum(v.native.misspeculations for v in root.variants) - refused
            missed += root.retired_failures
            failed += missed
            deopts += missed + sum(v.native.errors for v in root.variants)
        values.update(
            backwards_compiled=backwards,
            calls_compiled=compiled,
            calls_eager=eager,
            calls_split=split,
            segments_served=served,
            ops_compiled=ops_compiled,
            ops_eager=ops_eager,
            speculations_failed=failed,
            deopts=deopts,
        )
        return values

    def close(self) -> None:
        """Nothing new is recorded; installed variants go on."""
        self._closed = True


def functions_by_module(names: Iterable[str]) -> dict[str, set[str]]:
    """{module: qualified names} of `package.module:name`s. Errors: ConfigError."""
    found: dict[str, set[str]] = {}
    for text in names:
        module, colon, name = text.partition(":")
        if not (module and colon and name):
            raise errors.ConfigError(f"functions: {text!r} is no `package.module:name`")
        found.setdefault(module, set()).add(name)
    return found


@functools.lru_cache(4096)
def _is_beside(program: str, directory: str) -> bool:
    """True when the modules in `directory` belong to the program in the folder `program`."""
    path = Path(directory).resolve()
    return (path == Path(program) or Path(program) in path.parents) and (
        "site-packages" not in path.parts
    )


def _own_forward(root: Root) -> types.FunctionType | None:
    """The `forward` of a root's module, which may be split in its place; None if it is torch's."""
    module = root.module() if root.module is not None else None
    forward = class_lookup(type(module), "forward")
    if isinstance(forward, types.FunctionType) and not _inside(forward.__module__ or "", {"torch"}):
        return forward
    return None


def _is_forward_of(root: Root, enclosing: Root) -> bool:
    """True when a function root is the `forward` of the module that is being called."""
    module = enclosing.module() if enclosing.module is not None else None
    forward = class_lookup(type(module), "forward")
    return (
        isinstance(forward, types.FunctionType)
        and root.code is not None
        and (prologue.original_code(forward.__code__) == root.code)
    )


def _inside(name: str, packages: set[str]) -> bool:
    """True when module `name` is one of `packages` or lies in one."""
    return any(name == p or name.startswith(p + ".") for p in packages)


def _under_a_mode() -> bool:
    """True under transforms, tracing and modes, where tensors are not what they seem."""
    return (
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def argument_names(code: types.CodeType) -> list[str]:
    """The names of a function's argument locals, in co_varnames order."""
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return list(code.co_varnames[:count])


def starred_positions(code: types.CodeType) -> tuple[int, ...]:
    """Where *args and **kwargs are among the argument locals."""
    first = code.co_argcount + code.co_kwonlyargcount
    return tuple(range(first, first + bool(code.co_flags & 4) + bool(code.co_flags & 8)))


def call_arguments(
    code: types.CodeType, values: list[Any]
) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    """The (args, kwargs) that bind to these argument locals."""
    positional, kwonly = code.co_argcount, code.co_kwonlyargcount
    names = code.co_varnames
    args = tuple(values[:positional])
    kwargs = dict(zip(names[positional : positional + kwonly], values[positional:], strict=False))
    rest = positional + kwonly
    if code.co_flags & 4:
        args += values[rest]
        rest += 1
    if code.co_flags & 8:
        kwargs.update(values[rest])
    return args, kwargs or None


def _module_arguments(values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    module, args, kwargs = values
    return (module, *args), kwargs


def _parameters(root: Root) -> tuple[str, ...]:
    """What a module's `forward` calls its positional arguments."""
    forward = class_lookup(type(root.module()), "forward") if root.module is not None else None
    if not isinstance(forward, types.FunctionType):
        return ()
    code = forward.__code__
    return code.co_varnames[1 : code.co_argcount]


def _numbers(recording: Recording) -> tuple[Any, ...] | None:
    """What native code is told of the numbers that differ between calls."""
    program = recording.numbers
    return None if program is None else (program, recording.leaf_slots, program.dtypes)


def result_plan(template: Any, finish: Callable[..., Any], needed: list[int]) -> tuple[Any, ...]:
    """The shortest of the native result forms that builds this result; `needed` are the guard
    slots that `finish` is given."""
    spec = template.result
    if not template.effects:
        if spec[0] == "output":
            return ("tensor", spec[1])
        if spec[0] == "make" and spec[2][:2] == ("sequence", tuple):
            parts = spec[2][2]
            if all(part[0] == "output" for part in parts):
                return ("tuple", [part[1] for part in parts])
        if spec[0] == "const":
            return ("const", spec[1])
    return ("call", finish, needed)


current: Driver | None = None


def start(config: Config) -> Driver:
    """The process's driver, made at the first call."""
    global current
    if current is None:
        current = Driver(config)
        if config.packages or config.modules or config.functions:
            current.install_hook()
    return current


def prepare_script(code: types.CodeType, path: str) -> types.CodeType:
    """The script's module code with prologues in its functions; modules beside it follow."""
    assert current is not None
    current.script_directory = Path(path).resolve().parent
    current.install_hook()
    current.selects("__main__", path)
    return hook.rewrite_module_code(code, current.assign_index)


def finish() -> None:
    """The end of a program: nothing new starts."""
    assert current is not None
    current.close()


__all__ = ["Driver", "Installed", "Recording", "finish", "prepare_script", "start"]
