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
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from accel import (
    arming,
    backward_calls,
    branching,
    checkpoints,
    deferral,
    errors,
    log,
    misses,
    optimizers,
    other_tracers,
    runtime,
    teardown,
)
from accel.binding import (
    argument_names,
    call_arguments,
    module_arguments,
    parameter_names,
    starred_positions,
)
from accel.capture import branches, left_to_python
from accel.capture.recorder import Recorder, Recording
from accel.capture.twins import TwinFactory
from accel.capture.variation import Variation
from accel.compile.service import CompileService
from accel.config import Config
from accel.counting import Counters, Totals
from accel.installing import Installer
from accel.report import Progress
from accel.rewriter import hook, prologue, twin
from accel.rewriter.cache import CodeCache
from accel.root_table import RootTable
from accel.roots import SETTLED, Installed, Limits, Root, Tally
from accel.selection import Selection, inside
from accel.splitting import Splitter

# Voids that say nothing about the root: another try costs only time.
TRANSIENT = frozenset({"foreign_frame", "interrupted", "escaped_operation"})
# Voids that hang on how the root was called: it is tried again, ever more rarely.
PASSING = frozenset(
    """requires_grad ambient_changed raised tensor_kind first_use interrupted
    no_operations""".split()  # on the way that this call took
)


class Driver:
    """State of accel in one process."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.stance = "default"
        self.limits = Limits()
        self.service = CompileService(config)
        self.selection = Selection(config)
        left_to_python.packages = self.selection.denied
        self.totals = Totals()
        self.roots = RootTable(self.selection, self.on_call, config.threshold, self.totals.bury)
        self.progress = Progress(config)
        self.installer = Installer(
            config, self.limits, self.counters, self.service, self.progress, self._set_patience
        )
        self._code_cache = CodeCache(Path(config.cache_dir) / "code")
        self.twins = TwinFactory(self._build_twin)
        self.splitter = Splitter(
            self.twins.function,
            self.installer.compile,
            self._poll,
            self.counters.add,
            self._arm_inlined,
            self._variation,
        )
        self._closed = False
        self._module_call: types.CodeType | None = None
        native = runtime.native
        # Last of all handlers: what runs while the interpreter goes down is the program's alone.
        atexit.register(native.set_enabled, False)
        teardown.publish(
            __accel_prologue__=native.prologue,
            __accel_module_prologue__=native.module_prologue,
            __accel_backward_prologue__=native.backward_prologue,
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
        """The universal roots: nn.Module.__call__ gets its prologue, optimizers their updates,
        Tensor.backward its short way."""
        f = torch.nn.Module._wrapped_call_impl
        if prologue.original_code(f.__code__) is f.__code__:
            # The same code object each time: guards know it by identity.
            if self._module_call is None:
                self._module_call = prologue.insert_prologue(f.__code__, 0, kind="module")
            f.__code__ = self._module_call
        if not inside("torch.optim", self.config.deny):
            optimizers.install(
                lambda: self.counters.add("optimizer_steps"),
                lambda: self.stance == "force_eager" or _under_a_mode(),
            )

        if not inside("torch.autograd", self.config.deny):
            backward_calls.install()
            if self.config.checkpoints:
                checkpoints.install()

    def unpatch(self) -> None:
        prologue.remove_prologue(torch.nn.Module._wrapped_call_impl)
        optimizers.uninstall()
        backward_calls.uninstall()
        checkpoints.uninstall()

    # ------------------------------------------------------------- dispatch

    def on_module_call(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        return self._guarded(self._decide_module, entry, roots)

    def on_call(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        return self._guarded(self._decide_function, entry, roots)

    def _guarded(self, decide: Callable[..., Any], entry: Any, roots: tuple[Any, ...]) -> Any:
        """An error of ours turns accel off for that root; the program never sees it."""
        try:
            known = entry.variants
            self.service.poll()
            if entry.variants is not known:
                return None  # what was installed just now may serve the next call
            return decide(entry, roots)
        except errors.RecompileError:
            raise  # asked for
        except Exception as error:
            if self.config.strict:
                raise
            entry.state = "off"
            log.internal_error("driver", error)
            return None

    def _poll(self) -> None:
        """Takes up what was compiled meanwhile."""
        try:
            self.service.poll()
        except Exception as error:
            if self.config.strict:
                raise
            log.internal_error("driver", error)

    def _decide_module(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        module, args, kwargs = roots
        root = self.roots.of_entry(entry, module)
        function = torch.nn.Module._wrapped_call_impl
        if (times := self._wants_measuring(root)) is not None:
            return (times, function, (module, *args), kwargs)
        self._check_stance(root, roots)
        if not self._wants_recording(root):
            return None
        named = [("self", module), ("args", args), ("kwargs", kwargs)]
        return self._record(root, named, function, module_arguments, (1, 2))

    def _decide_function(self, entry: Any, roots: tuple[Any, ...]) -> Any:
        root = self.roots.by_index[entry.index]
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
        miss = misses.why_missed(root.variants, roots, parameter_names(root))[0]
        raise errors.RecompileError(root.name, miss.what, miss.old, miss.new, miss.location)

    def _wants_measuring(self, root: Root) -> list[int] | None:
        """Where this call's time goes when it is to run eagerly and be measured; or None."""
        sampled = root.entry.sampled
        if sampled is not None:
            for installed in root.variants:
                if installed.native is sampled:
                    return installed.trial.burst
            return []  # replaced meanwhile; the call must run all the same
        if root.pending and not root.variants and len(root.eager_ns) < self.limits.max_eager_times:
            return root.eager_ns
        return None

    def _wants_recording(self, root: Root) -> bool:
        entry = root.entry
        if self.stance != "default":
            return False
        if self._closed or root.state in SETTLED:
            if root.variants and root.serves_nothing():
                root.retire(root.variants)
                self._disarm(root)
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
        elif not root.forced and deferral.defers(root, self.roots.enclosing(root), self.limits):
            entry.threshold = 1
            return False
        if not root.turn.acquire(blocking=False):  # another thread was faster
            entry.threshold = 1
            return False
        if root.variants:
            self.counters.add("recompiles")
        return True

    # ------------------------------------------------------------ recording

    def _record(
        self,
        root: Root,
        named: list[tuple[str, Any]],
        function: types.FunctionType,
        bind: Callable[[list[Any]], tuple[tuple[Any, ...], dict[str, Any] | None]],
        starred: tuple[int, ...],
    ) -> Any:
        values = [value for _, value in named]
        if root.split is not None:
            try:
                run, run_twin = self.splitter.recorder(root, function)
            except BaseException:
                root.turn.release()
                raise
            self.counters.add("recordings")
            root.recordings += 1
            return (run, run_twin, *bind(values))
        twin_function = self.twins.function(function)
        if twin_function is None:
            root.turn.release()
            root.give_up("no_twin", function.__qualname__, root.location)
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
        found = misses.why_missed(root.variants, roots, parameter_names(root))
        root.miss = found[0]  # of the newest variant, which is tried first
        why = "; ".join(dict.fromkeys(map(str, found)))
        root.history.append(f"another variant, since {why}")
        log.artifact("recompiles", "%s recompiles: %s", root.name, why)

    def _variation(self, root: Root) -> Variation | None:
        """Which sizes are left open; only our own compiler takes such graphs."""
        if (root.backend or self.config.backend) != "native":
            return None
        if root.variation is None:
            dynamic = self.config.dynamic if root.dynamic is None else root.dynamic
            root.variation = Variation(dynamic)
        variation = root.variation
        many = len(root.variants) >= self.limits.max_fixed_variants and root.serves_few
        if many and variation.has_fixed and variation.leaves_numbers is False:
            variation.leaves_numbers = root.kind == "function" and not root.fullgraph
        return variation

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
                return self._voided(root, named, recording)
            recording.show(root.variation)
            if root.variation is not None and recording.graph is not None:
                # So that no recording is spent on finding that out.
                root.variation.no_gradients |= recording.graph.gradients is not None
            if branching.leave(root, branching.places_to_leave(root.variants, recording)):
                return None
            self.installer.compile(root, len(named), recording, [v for _, v in named])
        except Exception as error:
            if self.config.strict:
                raise
            log.internal_error("driver", error)
            root.give_up("recorder_error", repr(error), root.location)
        finally:
            root.turn.release()
        return None

    def _voided(
        self, root: Root, named: list[Any], recording: Recording
    ) -> errors.GraphBreakError | None:
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
        if root.fullgraph and void.kind not in ("raised", "no_operations"):
            self.counters.add("graph_breaks")
            return errors.graph_break(recording.location, void.kind, void.detail)
        if void.kind in PASSING:
            root.backoff = min(2 * root.backoff, self.limits.max_backoff_calls)
            root.entry.threshold = root.backoff
            return None
        function = named[-1][1]  # of a function's root; others are not split
        if root.serves_few and self.splitter.offer(root, function, recording):
            branching.drop_variants(root)
            root.state, root.entry.threshold = "split", 1
            return None
        if void.kind == "changes" and root.variation is not None:
            root.variation.leaves_numbers, root.entry.threshold = None, 1
            return None
        if void.kind == "branch" and deferral.own_forward(root) is None:
            root.assumes_all, root.entry.threshold = True, 1
            return None
        self.counters.add("graph_breaks")
        root.give_up(void.kind, void.detail, recording.location)
        if root.kind == "module":
            self._arm_forward(root)
        return None

    def _arm_forward(self, root: Root) -> None:
        """A module that cannot be recorded whole: its `forward` may be split."""
        forward = deferral.own_forward(root)
        if forward is not None:
            function_root = self.roots.of_function(forward)
            function_root.forced |= root.forced
            function_root.backend = function_root.backend or root.backend
            if root.forced and function_root.state == "cold":
                function_root.entry.threshold = 1

    def _arm_inlined(self, root: Root, codes: tuple[types.CodeType, ...]) -> None:
        """What the root calls at an exit runs as Python: those functions get their own turn."""
        for function in arming.functions_to_arm(self.twins, codes, self.selection.denies):
            try:
                inner = self.roots.of_function(function)
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

    def _disarm(self, root: Root) -> None:
        """Functions of this code lose their prologue at their next call."""
        if not root.variants:
            root.entry.state = "off"
            root.entry.disarm = root.kind == "function"

    # ------------------------------------------------------------ compiling

    # --------------------------------------------------------------- trials

    # -------------------------------------------------------------- control

    def set_stance(self, name: str) -> str:
        """What calls do from now on, a row of `stance.STANCES`; answers what it was."""
        before, self.stance = self.stance, name
        if "force_eager" in (before, name):
            runtime.native.set_enabled(name != "force_eager")
        if "fail_on_recompile" in (before, name):
            for root in self.roots:
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
        self.selection.allow(name)
        self.install_hook()
        for module_name, module in list(sys.modules.items()):
            if module is not None and inside(module_name, {name}):
                hook.rewrite_loaded_module(module, self.roots.index_of)
        for root in self.roots:
            if root.state == "disabled" and inside(root.module_name, {name}):
                self.forget(root)

    def disable(self, target: Any) -> None:
        """A package name, a function, a method or a module runs eagerly from now on."""
        if isinstance(target, types.ModuleType):
            target = target.__name__
        if isinstance(target, str):
            self.selection.deny(target)
            for module_name, module in list(sys.modules.items()):
                if module is not None and inside(module_name, {target}):
                    hook.restore_module(module)
            self._turn_off([r for r in self.roots if inside(r.module_name, {target})])
            return
        if isinstance(target, torch.nn.Module):
            root = self.roots.of_module(target)
            left_to_python.add_module(target)
        else:
            function = target.__func__ if isinstance(target, types.MethodType) else target
            if not isinstance(function, types.FunctionType):
                raise TypeError(f"accel.disable() takes a package, function or module: {target!r}")
            root = self.roots.of_function(function)
            prologue.remove_prologue(function)
            left_to_python.functions.add(function)
        self._turn_off([root])

    def _turn_off(self, roots: Iterable[Root]) -> None:
        for root in self.roots:
            if root.state != "disabled":
                self.forget(root)  # what is turned off may have been recorded as a part of it
        for root in roots:
            self.forget(root)
            root.turn_off()

    def reset(self) -> None:
        """Forgets what was recorded; arms every root again."""
        self.service.idle(None)
        for root in self.roots:
            if root.state != "disabled":
                self.forget(root)
            root.retired, root.recordings = Tally(), 0
        self.counters.reset()
        branches.both_ways.clear()
        branches.untraceable.clear()
        self.totals.begin_again(self.roots)

    def forget(self, root: Root) -> None:
        """Makes a root as it was before its first call, but for its counts."""
        self.service.idle(None)  # what is being compiled belongs to the past
        self.splitter.restore(root)
        root.begin_again()
        root.entry.threshold = 1 if root.forced else self.config.threshold

    def install_hook(self) -> None:
        hook.install(self.selection.selects, self.roots.index_of, self._code_cache)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until nothing is being compiled; False when the time ran out first."""
        return bool(self.service.idle(timeout_s))

    def read_counters(self) -> dict[str, float]:
        launched = {"cuda_graphs_launched": runtime.native.cuda_graphs()["launched"]}
        return self.counters.snapshot() | self.totals.read(self.roots) | launched

    def close(self) -> None:
        """Nothing new is recorded; installed variants go on."""
        self._closed = True


def _under_a_mode() -> bool:
    """True under transforms, tracing and modes, where tensors are not what they seem."""
    return (
        torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


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
    current.selection.script_directory = Path(path).resolve().parent
    current.install_hook()
    current.selection.selects("__main__", path)
    return hook.rewrite_module_code(code, current.roots.index_of)


def finish() -> None:
    """The end of a program: nothing new starts."""
    assert current is not None
    current.close()


__all__ = ["Driver", "Installed", "Recording", "finish", "prepare_script", "start"]
