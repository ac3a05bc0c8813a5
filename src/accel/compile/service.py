"""Compilation for the driver: cache, worker process, other backends.

In: segment graphs. Out: `CompiledSegment`s, delivered by `poll` in the caller's thread.
Invariants: each distinct graph is compiled once; every submission is answered once, if only
with an error; the native backend compiles in the program's process only when the settings
turn the worker off.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import platform
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import accel
from accel import log, runtime
from accel.cache import DiskCache
from accel.compile import backends
from accel.compile.gpu_trials import GpuTrials
from accel.compile.worker import Worker
from accel.config import Config
from accel.errors import AccelError, CacheError, MissingError
from accel.trace import SegmentGraph

_POLL_S = 0.05


@dataclass
class CompiledSegment:
    """A compiled graph: a plan with its library, or a callable; or an error.

    `seconds` is what compiling took, 0 from the cache; `error` is one readable text, and
    `is_missing` says that it is a `MissingError`'s.
    """

    kind: str  # "plan" | "callable"
    key: str
    plan: dict[str, Any] | None = None
    library_path: str | None = None
    callable: Callable[..., Any] | None = None
    seconds: float = 0.0
    from_cache: bool = False
    error: str = ""
    is_missing: bool = False


Done = Callable[[CompiledSegment], None]


def cpu_features() -> str:
    """What machine code built for "this CPU" depends on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return " ".join(sorted(line.split(":", 1)[1].split()))
    except OSError:
        pass
    return platform.processor()


@functools.cache
def environment_key() -> str:
    """What a cached plan depends on besides its graph and options."""
    digest = hashlib.sha256()
    sources = Path(__file__).parent.parent / "codegen"
    for path in sorted(p for p in sources.rglob("*") if p.suffix in (".py", ".h", ".cpp")):
        digest.update(path.read_bytes())
    facts = [accel.__version__, torch.__version__, sys.version_info[:2], cpu_features()]
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


_BLOCK_THREADS = 256  # of ATen's kernels that draw


@functools.cache
def _triton_version() -> str:
    """What images for GPUs depend on; asked without importing the compiler or Triton."""
    import importlib.metadata

    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def gpus_of(graph: SegmentGraph) -> list[str]:
    """The GPUs that it runs on; graphs on several are refused when they are compiled."""
    metas = [*(meta for _, meta in graph.inputs), *graph.output_metas]
    return sorted({meta.device for meta in metas if meta.device.startswith("cuda")})


def gpu_options(graph: SegmentGraph) -> dict[str, Any]:
    """For a graph on a GPU: its architecture and name, which only this process can ask for, and where random
    numbers are drawn how many of ATen's blocks are resident on it.

    Errors: MissingError when torch cannot ask the GPU."""
    for device in gpus_of(graph):
        try:
            options: dict[str, Any] = {
                "gpu": "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
                "gpu_name": torch.cuda.get_device_name(device),
            }
            if graph.is_random:
                facts = torch.cuda.get_device_properties(device)
                each = facts.max_threads_per_multi_processor // _BLOCK_THREADS
                options["gpu_blocks"] = facts.multi_processor_count * each
        except (AssertionError, RuntimeError) as error:  # no driver, no GPU, or one that is lost
            why = (str(error) or "no reason").splitlines()[0]
            text = f"torch cannot use the GPU ({why}); `python -m accel doctor` looks at it"
            raise MissingError(text) from error
        return options
    return {}


def _key(graph: SegmentGraph, options: dict[str, Any]) -> str:
    parts = [graph.key(), environment_key(), json.dumps(options, sort_keys=True)]
    if "gpu" in options:
        parts.append(_triton_version())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


class CompileService:
    """Compiles graphs, each distinct one once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = DiskCache(Path(config.cache_dir) / "plans", config.cache_size_mb << 20)
        self.worker = Worker()
        self._options: dict[str, Any] = {"verify": True} if config.verify else {}
        if not config.worker:  # measuring needs torch's threads for itself
            self._options["measure"] = False
        if config.fast_dropout:
            self._options["fast_dropout"] = True
        if not config.tiled_convolutions:
            self._options["tiled_convolutions"] = False
        if config.dump_dir:  # part of the key: what is in the cache would not be dumped
            self._options["dump_dir"] = os.path.abspath(config.dump_dir)
        self._lock = threading.RLock()  # over the tables; never held while calling out
        self._waiting: dict[str, list[Done]] = {}
        self._started: dict[str, float] = {}
        self._plans: dict[str, CompiledSegment] = {}
        self._ready: deque[tuple[Done, CompiledSegment]] = deque()
        self._gpu_trials = GpuTrials(self.compile, config.cuda_graphs)
        _SERVICES.add(self)
        atexit.register(_close, weakref.ref(self), os.getpid())

    def start(self) -> None:
        """Makes the worker, before the program starts; it prepares itself at once where every
        graph will be new. Later runs find theirs in the cache, and it only takes time from them."""
        if self.config.worker:
            self.worker.fork(preload=self.cache.is_fresh)

    @property
    def pending(self) -> int:
        """How many submissions have not been answered."""
        with self._lock:
            waiting = sum(map(len, self._waiting.values())) + len(self._ready)
            return waiting + self._gpu_trials.held

    def submit(self, graph: SegmentGraph, backend: Any, on_done: Done) -> None:
        """Compiles `graph`; `on_done` is called from a later `poll` or `idle`."""
        try:
            data = graph.to_json()
        except TypeError as error:
            segment = CompiledSegment("plan", "", error=f"the graph holds what is no data: {error}")
            self._ready.append((on_done, segment))
            return
        if backend != "native":
            self._ready.append((on_done, self._in_process(graph, backend)))
            return
        for device in gpus_of(graph):
            if not self.config.gpus:
                text = "programs on GPUs are left to eager (gpus = false)"
                self._ready.append((on_done, CompiledSegment("plan", "", error=text)))
                return
            refusal = self._gpu_trials.refusal(device, graph.is_random)
            if refusal is None:
                again = functools.partial(self.submit, graph, backend, on_done)
                self._gpu_trials.hold(device, again)
                return
            if refusal.text:
                segment = CompiledSegment("plan", "", error=refusal.text)
                self._ready.append((on_done, replace(segment, is_missing=refusal.is_missing)))
                return
        self._compile(graph, data, on_done)

    def compile(self, graph: SegmentGraph, on_done: Done) -> None:
        """As `submit`, by our generator and without asking whether a GPU can be trusted."""
        self._compile(graph, graph.to_json(), on_done)

    def _compile(self, graph: SegmentGraph, data: dict[str, Any], on_done: Done) -> None:
        try:
            options = {**self._options, **gpu_options(graph)}
        except MissingError as error:
            segment = CompiledSegment("plan", "", error=str(error), is_missing=True)
            self._ready.append((on_done, segment))
            return
        key = _key(graph, options)
        with self._lock:
            known = self._plans.get(key)
            if known is not None:
                self._ready.append((on_done, known))
                return
            listeners = self._waiting.setdefault(key, [])
            listeners.append(on_done)
            if len(listeners) > 1:
                return
            self._started[key] = time.perf_counter()
        try:
            self._begin(key, data, options)
        except BaseException as error:  # of a signal handler, say: nobody else will answer
            self._answer(key, CompiledSegment("plan", key, error=f"not begun: {error!r}"))
            raise

    def _begin(self, key: str, data: dict[str, Any], options: dict[str, Any]) -> None:
        try:
            plan = self.cache.get(key)
            if plan is not None:
                self._answer(key, self._segment(key, plan, 0.0, from_cache=True))
                return
            job = {
                "id": key,
                "key": key,
                "graph": data,
                "cache_dir": str(self.cache.directory),
                "options": options,
            }
        except CacheError as error:
            self._answer(key, CompiledSegment("plan", key, error=str(error)))
            return
        if self.config.worker:
            self.worker.submit(job)
        else:
            from accel.compile.worker_main import compile_job

            log.artifact("driver", "pausing to compile (the worker is turned off)")
            self._finished(compile_job(job))

    def _segment(
        self, key: str, plan: dict[str, Any], seconds: float, from_cache: bool = False
    ) -> CompiledSegment:
        library = plan["library"]
        path = str(self.cache.directory / library) if library else None
        return CompiledSegment("plan", key, plan, path, None, seconds, from_cache)

    def _in_process(self, graph: SegmentGraph, backend: Any) -> CompiledSegment:
        """A third-party backend: it pauses the program, at this call's boundary."""
        key, started = graph.key(), time.perf_counter()
        name = backend if isinstance(backend, str) else getattr(backend, "__name__", "a callable")
        log.artifact("driver", "pausing: backend %s compiles", name)
        try:
            compiled = backends.compile_with(backend, graph)
        except Exception as error:  # a third party's error is that backend's answer
            text = (
                str(error) if isinstance(error, AccelError) else f"{type(error).__name__}: {error}"
            )
            return CompiledSegment("callable", key, error=f"backend {name}: {text}")
        seconds = time.perf_counter() - started
        log.artifact("driver", "backend %s took %.2f s", name, seconds)
        return CompiledSegment("callable", key, callable=compiled, seconds=seconds)

    def poll(self) -> None:
        """Delivers what is finished, in this thread. Cheap when nothing is."""
        for answer in self.worker.poll():
            self._finished(answer)
        self._gpu_trials.poll()
        while self._ready:
            try:
                on_done, segment = self._ready.popleft()
            except IndexError:  # another thread was faster
                return
            on_done(segment)

    def _finished(self, answer: dict[str, Any]) -> None:
        key = answer["id"]
        if "plan" in answer:
            with self._lock:
                started = self._started.get(key, time.perf_counter())
            seconds = answer.get("seconds", time.perf_counter() - started)
            log.artifact("worker", "%s compiled in %.2f s", key[:12], seconds)
            segment = self._segment(key, answer["plan"], seconds)
        else:
            log.artifact("worker", "%s failed: %s", key[:12], answer["error"])
            missing = answer.get("kind") == "MissingError"
            segment = CompiledSegment("plan", key, error=answer["error"], is_missing=missing)
        self._answer(key, segment)

    def _answer(self, key: str, segment: CompiledSegment) -> None:
        with self._lock:
            if not segment.error:
                self._plans[key] = segment
            self._started.pop(key, None)
            for on_done in self._waiting.pop(key, []):
                self._ready.append((on_done, segment))

    def idle(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is pending; False when the time ran out first, or when a signal's
        handler waits for code of ours to end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not runtime.native.signal_waits():
            runtime.native.undisturbed(self.poll)
            if not self.pending:
                return True
            left = _POLL_S if deadline is None else min(_POLL_S, deadline - time.monotonic())
            if left <= 0:
                return False
            if self.worker.is_busy:
                self.worker.wait(left)
            else:
                time.sleep(left)  # another thread is delivering
        return False

    def close(self) -> None:
        """Ends the worker; nothing is compiled any more."""
        self.worker.close()
        self.cache.mark_used()


def _close(reference: weakref.ref[CompileService], owner: int) -> None:
    service = reference()
    if service is not None and os.getpid() == owner:
        service.close()


_SERVICES: weakref.WeakSet[CompileService] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for service in list(_SERVICES):
        service._lock = threading.RLock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)
