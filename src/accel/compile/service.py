"""Compilation for the driver: cache, worker process, other backends.

In: segment graphs. Out: `CompiledSegment`s, delivered by `poll` in the caller's thread.
Invariant: the native backend never compiles in the program's process.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel import log
from accel.cache import DiskCache
from accel.compile import backends
from accel.compile.worker import Worker
from accel.config import Config
from accel.trace import SegmentGraph


@dataclass
class CompiledSegment:
    """A compiled graph: a plan with its library, or a callable; or an error."""

    kind: str  # "plan" | "callable"
    key: str
    plan: dict[str, Any] | None = None
    library_path: str | None = None
    callable: Callable[..., Any] | None = None
    seconds: float = 0.0
    from_cache: bool = False
    error: str = ""


Done = Callable[[CompiledSegment], None]


@functools.cache
def _environment_key() -> str:
    """What a cached plan depends on besides its graph."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent.parent / "codegen").glob("*.py")):
        digest.update(path.read_bytes())
    cpu = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                cpu = line
                break
    except OSError:
        cpu = platform.processor()
    digest.update(f"{torch.__version__} {sys.version_info[:2]} {cpu}".encode())
    return digest.hexdigest()


class CompileService:
    """Compiles graphs, each distinct one once."""

    def __init__(self, config: Config) -> None:
        self.cache = DiskCache(Path(config.cache_dir) / "plans")
        self.worker = Worker()
        self._waiting: dict[str, list[Done]] = {}
        self._started: dict[str, float] = {}
        self._ready: list[tuple[Done, CompiledSegment]] = []
        self._plans: dict[str, CompiledSegment] = {}

    def start(self) -> None:
        """Warms the worker up, in the background."""
        self.worker.start()

    def submit(self, graph: SegmentGraph, backend: Any, on_done: Done) -> None:
        """Compiles `graph`; `on_done` is called from a later `poll`."""
        key = graph.key()
        if backend != "native":
            self._ready.append((on_done, self._in_process(graph, key, backend)))
            return
        key = hashlib.sha256(f"{key} {_environment_key()}".encode()).hexdigest()
        if key in self._plans:
            self._ready.append((on_done, self._plans[key]))
            return
        if key in self._waiting:
            self._waiting[key].append(on_done)
            return
        plan = self.cache.get(key)
        if plan is not None:
            segment = self._plans[key] = self._segment(key, plan, 0.0, from_cache=True)
            self._ready.append((on_done, segment))
            return
        self._waiting[key] = [on_done]
        self._started[key] = time.perf_counter()
        self.worker.submit(
            {"id": key, "graph": graph.to_json(), "out_dir": str(self.cache.directory)}
        )

    def _segment(
        self, key: str, plan: dict[str, Any], seconds: float, from_cache: bool = False
    ) -> CompiledSegment:
        library = plan["library"]
        path = str(self.cache.directory / library) if library else None
        return CompiledSegment("plan", key, plan, path, None, seconds, from_cache)

    def _in_process(self, graph: SegmentGraph, key: str, backend: Any) -> CompiledSegment:
        started = time.perf_counter()
        try:
            compiled = backends.compile_with(backend, graph)
        except Exception as error:
            return CompiledSegment("callable", key, error=f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - started
        log.artifact("driver", "backend %s took %.2f s", backend, seconds)
        return CompiledSegment("callable", key, callable=compiled, seconds=seconds)

    def poll(self) -> None:
        """Delivers what is finished."""
        for answer in self.worker.poll():
            self._finished(answer)
        ready, self._ready = self._ready, []
        for on_done, segment in ready:
            on_done(segment)

    def _finished(self, answer: dict[str, Any]) -> None:
        key = answer["id"]
        seconds = time.perf_counter() - self._started.pop(key, time.perf_counter())
        if "plan" in answer:
            segment = self._plans[key] = self._segment(key, answer["plan"], seconds)
            self.cache.put(key, answer["plan"])
        else:
            segment = CompiledSegment("plan", key, error=answer["error"])
        for on_done in self._waiting.pop(key, []):
            self._ready.append((on_done, segment))

    def idle(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is pending; False when the time ran out first."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.poll()
            if not self._waiting and not self._ready:
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self.worker.wait(0.05)
