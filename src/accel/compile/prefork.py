"""The worker as a copy of this process, made when `import accel` and torch have both happened.

In: the import of accel, the import of torch, in either order. Out: a process and our end of its
socket, for the first `Worker`. Invariants: the copy is made only while this process is as
torch's import has left it (see `is_untouched`): what the program has changed in torch would
compile something else there; a program that never compiles notices nothing but 20 ms.

A worker that starts by itself takes a second of processor time to import torch, on a machine
that the program wants for itself by then. Only the standard library up here: accel can be
imported without torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# A copy shares its pages with the program, but those that the program writes afterwards exist
# twice while it runs: a model's parameters in training. torch alone takes some 300 MiB.
_MOST_RESIDENT_MB = 512


@dataclass
class Forked:
    """The process, our end of its socket, and the file that takes its stderr, if one does."""

    process: Any
    socket: Any
    errors: IO[bytes] | None

    def abandon(self) -> None:
        """It ends when nobody holds the other end of its socket."""
        for handle in (self.socket, self.errors):
            if handle is not None:
                with contextlib.suppress(OSError):
                    handle.close()


_waiting: Forked | None = None


class _Arrival(importlib.abc.MetaPathFinder):
    """Runs `action` when the module `name` has been imported, and goes away."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action
        self._is_asking = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name or self._is_asking:
            return None
        self._is_asking = True  # the other finders
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.arrived)
        return spec

    def arrived(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.action()


class _Loader(importlib.abc.Loader):
    """The module's own loader, with an action behind it."""

    def __init__(self, loader: Any, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        # Nobody is to see that there was another one.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.action()


def arm() -> None:
    """Forks as soon as torch is there: now, or when it is imported."""
    if "torch" in sys.modules:
        fork_if_untouched()
    else:
        sys.meta_path.insert(0, _Arrival("torch", fork_if_untouched))


def disarm() -> None:
    """For processes that make their worker themselves, or are one."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Arrival)]


def take() -> Forked | None:
    """The worker that was forked and that nobody has taken yet."""
    global _waiting
    forked, _waiting = _waiting, None
    return forked


def fork_if_untouched() -> None:
    """Whatever stands against it: the first job will start a worker in the other way."""
    with contextlib.suppress(Exception):
        if _waiting is None and is_untouched() and (preload := _wanted()) is not None:
            fork(preload)


def fork(preload: bool) -> None:
    """Forks, for the next `take`. `preload`: it is going to be needed, and prepares itself at
    once. Errors: OSError when the system has no room for another process."""
    from accel import log
    from accel.compile import forked_worker, worker_main

    global _waiting
    if not forked_worker.is_possible():
        return
    errors = None if log.is_enabled("worker") else tempfile.TemporaryFile()
    serve = functools.partial(worker_main.serve_forked, preload=preload)
    try:
        process, ours = forked_worker.fork_worker(serve, errors)
    except OSError:
        if errors is not None:
            errors.close()
        raise
    log.artifact("worker", "forked process %d", process.pid)
    _waiting = Forked(process, ours, errors)


def _wanted() -> bool | None:
    """Whether it is to prepare itself; None where the settings want no worker."""
    from accel import config

    settings = config.load()
    if not settings.worker or settings.backend != "native":
        return None
    from accel import runtime
    from accel.cache import DiskCache

    if not runtime.available:
        return None
    return DiskCache(Path(settings.cache_dir) / "plans", settings.cache_size_mb << 20).is_fresh


def is_untouched() -> bool:
    """True while torch is as its import left it, in a small process with one thread of Python."""
    return all(check() for check in _CHECKS)


def _is_main() -> bool:
    """Children of multiprocessing are many, and mostly do small things."""
    here = sys.modules.get("multiprocessing.process")
    if here is not None and (
        here.parent_process() is not None
        # Its parent's script is being imported again; the parent is not known yet.
        or getattr(here.current_process(), "_inheriting", False)
    ):
        return False
    return threading.current_thread() is threading.main_thread()


def _is_alone() -> bool:
    """No thread of Python that could hold a lock. Those of NumPy and OpenMP are idle."""
    return threading.active_count() == 1


def _is_small() -> bool:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") < _MOST_RESIDENT_MB << 20


def _has_defaults() -> bool:
    import torch

    return (
        torch.get_default_dtype() is torch.float32
        and torch.get_default_device().type == "cpu"
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_initialized()
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
    )


def _is_original() -> bool:
    """No function of torch has been replaced: the copy would trace the replacement."""
    import torch

    # Torch's own decorators and overloads come from these modules.
    names = ("contextlib", "functools", "typing", "typing_extensions")
    files = [getattr(sys.modules.get(name), "__file__", None) for name in names]
    homes = (os.path.dirname(torch.__file__) + os.sep, *filter(None, files))
    return all(f.__code__.co_filename.startswith(homes) for f in _functions_of(torch))


def _functions_of(torch: Any) -> Iterator[types.FunctionType]:
    places = (torch, torch.nn.functional, torch.Tensor, torch.nn.Module, torch.linalg,
              torch.special, torch.fft, torch.autograd.Function)  # fmt: skip
    for place in places:
        for value in vars(place).values():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                yield function


_CHECKS = (_is_main, _is_alone, _is_small, _has_defaults, _is_original)


def _after_fork_in_child() -> None:
    """The worker is the parent's."""
    if (forked := take()) is not None:
        forked.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
