"""The doctor: checks everything accel needs, through the real path.

In: the settings in force. Out: a line for each check, and an exit code that is 1 when something
needed is broken. Invariant: each failing line is followed by what to do about it.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import accel
from accel import config, runtime
from accel.compile.trial_graphs import GPU_KERNELS, KERNELS, agrees, graph_of
from accel.errors import AccelError
from accel.trace import SegmentGraph

_COMPILE_S = 120.0


class _Broken(Exception):
    """A check failed. The text says how, `advice` what to do."""

    def __init__(self, text: str, advice: str) -> None:
        super().__init__(text)
        self.advice = advice


class _Absent(Exception):
    """Something that is not needed is not there. `advice`: how to get it."""

    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.advice = advice


# ------------------------------------------------------------------------ surroundings


def _versions() -> str:
    python = "{}.{}.{}".format(*sys.version_info[:3])
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        raise _Broken(f"Python {python} is not supported", "use Python 3.11 or 3.12")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not (2, 11) <= version < (2, 14):
        advice = "install torch>=2.11,<2.14 and reinstall accel"
        raise _Broken(f"torch {torch.__version__} is not supported", advice)
    return f"accel {accel.__version__}, Python {python}, torch {torch.__version__}"


def _native() -> str:
    if not runtime.available:
        reason, _, advice = runtime.reason.partition("; ")
        raise _Broken(reason, advice)
    return "built for this Python and this torch"


def _compiler() -> str:
    from accel.codegen.build import find_compiler
    from accel.codegen.options import CodegenOptions

    advice = "install one (Debian, Ubuntu: apt-get install g++), or name one in CXX"
    try:
        path = find_compiler(CodegenOptions())
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=60, check=True
        )
    except (AccelError, OSError, subprocess.SubprocessError) as error:
        raise _Broken(str(error), advice) from error
    return f"{path}: {done.stdout.splitlines()[0] if done.stdout else 'without a version'}"


def _openmp() -> str:
    if not torch.backends.openmp.is_available():
        raise _Broken("torch was built without OpenMP", "install a wheel of torch from PyPI")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        names = {Path(line.split()[-1]).name for line in maps if "omp" in line}
    libraries = sorted(name for name in names if name.startswith(("libgomp", "libomp", "libiomp")))
    return f"{torch.get_num_threads()} threads, {', '.join(libraries) or 'linked into torch'}"


def _triton() -> str:
    from accel.codegen import triton_versions

    why = triton_versions.missing()
    if why is not None:
        raise _Absent(f"{why}; only graphs on a GPU need it")
    return "{}.{}, compiles kernels for GPUs".format(*triton_versions.version() or ())


def _has_gpus() -> bool:
    try:
        _gpu()
    except _Absent:
        return False
    return True


def _gpu() -> str:
    """The GPUs, or the first thing that is missing to use one."""
    from accel.codegen.triton_versions import ARCHITECTURES

    if torch.version.cuda is None:
        raise _Absent("this torch is built without CUDA")
    if not runtime.available:
        raise _Absent("the native module, which asks the driver, is missing")
    try:
        facts = runtime.native.cuda_driver()
    except OSError as error:
        reason, _, advice = str(error).partition("; ")
        raise _Absent(reason, advice) from error
    if not facts["devices"] or not torch.cuda.is_available():
        text = "NVIDIA's driver is there, but torch finds no GPU that it can use"
        raise _Absent(text, "see what nvidia-smi lists, and CUDA_VISIBLE_DEVICES")
    names = []
    for number in range(facts["devices"]):
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(number))
        made = ", ".join(ARCHITECTURES)
        known = "" if architecture in ARCHITECTURES else f"; kernels are made for {made}"
        names.append(f"{torch.cuda.get_device_name(number)} ({architecture}{known})")
    return ", ".join(names)


def _cache() -> str:
    from accel.cache import DiskCache

    cache = DiskCache(Path(config.load().cache_dir) / "plans")
    if cache.reason:
        raise _Broken(cache.reason, "set ACCEL_CACHE_DIR to a directory that only you can write to")
    usage = cache.usage()
    return f"{cache.directory}: {usage.plans} plans, {usage.size_bytes / 2**20:.1f} MiB"


# ------------------------------------------------------------------------------ kernels


@contextlib.contextmanager
def _service() -> Iterator[Any]:
    """A compile service with a cache and a worker of its own."""
    from accel.compile.service import CompileService

    with tempfile.TemporaryDirectory(prefix="accel-doctor-") as directory:
        service = CompileService(replace(config.load(), cache_dir=directory, worker=True))
        try:
            yield service
        finally:
            service.close()


def _kernels() -> Iterator[tuple[str, Check]]:
    """One check for each kind of kernel; all are compiled by one worker process."""
    rows = [(kind, "cpu") for kind in KERNELS]
    if _has_gpus():
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        rows += [(kind, gpu) for gpu in gpus for kind in (*KERNELS, *GPU_KERNELS)]
    with _service() as service:
        answers: dict[tuple[str, str], Any] = {}
        for row in rows:
            service.compile(graph_of(*row), functools.partial(answers.__setitem__, row))
        service.idle(_COMPILE_S)
        for kind, device in rows:
            name = kind if device == "cpu" else f"{kind} on {device}"
            answer = answers.get((kind, device))
            yield name, functools.partial(_run_kernel, graph_of(kind, device), answer)


def _run_kernel(graph: SegmentGraph, segment: Any) -> str:
    if segment is None:
        raise _Broken(
            f"the worker process gave no answer in {_COMPILE_S:.0f} s",
            "run again with ACCEL_LOG=worker, which shows what the worker says",
        )
    if segment.error:
        advice = "see the lines above; ACCEL_LOG=worker shows what the worker says"
        raise _Broken(segment.error, advice)
    if not agrees(graph, segment.plan, segment.library_path):
        where = "GPU and driver" if "device" in segment.plan else "CPU and compiler"
        raise _Broken("its result is not eager's", f"please report this machine's {where}")
    kinds = [step["op"] for step in segment.plan["steps"]]
    ours = kinds.count("kernel") + kinds.count("launch")
    aten = kinds.count("extern")
    return f"agrees with eager ({ours} of our kernels, {aten} of ATen's)"


def _program() -> str:
    """Record, compile, guard and serve, as in a program."""
    from accel import driver

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 2.0 + 1.0)

    with tempfile.TemporaryDirectory(prefix="accel-doctor-") as directory:
        current = driver.current or driver.start(
            replace(config.load(), cache_dir=directory, sync=True, quiet=True)
        )
        accel.optimize(f)
        x = torch.randn(4, 8)
        for _ in range(6):
            got = f(x)
            accel.wait(_COMPILE_S)
        served = current.read_counters()["calls_compiled"]
        reasons = [root.reason for root in current.roots if root.reason]
        current.service.close()
    if not torch.equal(got, torch.relu(x * 2.0 + 1.0)):
        raise _Broken("compiled code gives another result", "please report this")
    if not served:
        raise _Broken(f"no call ran compiled: {'; '.join(reasons)}", "mend what failed above")
    return "a function was recorded, compiled and served"


# ------------------------------------------------------------------------------ the run

Check = Callable[[], str]

CHECKS: dict[str, Check] = {
    "versions": _versions,
    "native module": _native,
    "C++ compiler": _compiler,
    "OpenMP": _openmp,
    "Triton": _triton,
    "GPU": _gpu,
    "disk cache": _cache,
}


def run() -> int:
    """Runs every check. 0 when all that is needed works."""
    config.load()  # a wrong setting is an error of its own
    started = time.perf_counter()
    failed = [name for name, check in CHECKS.items() if not _report(name, check)]
    if runtime.available:
        failed += [name for name, check in _kernels() if not _report(f"kernel: {name}", check)]
        failed += [] if _report("program", _program) else ["program"]
    seconds = time.perf_counter() - started
    if failed:
        print(f"{len(failed)} of the checks failed ({seconds:.1f} s): {', '.join(failed)}")
        return 1
    print(f"everything that is needed works ({seconds:.1f} s)")
    return 0


_WIDTH = 23


def _report(name: str, check: Check) -> bool:
    """Prints what a check says; False when it failed."""
    try:
        answer, mark, advice = check(), "ok", ""
    except _Absent as absent:
        answer, mark, advice = str(absent), "--", absent.advice
    except _Broken as broken:
        answer, mark, advice = str(broken), "FAIL", broken.advice
    except Exception as error:  # a check must not end the others
        answer, mark = f"{type(error).__name__}: {error}", "FAIL"
        advice = "please report this"
    print(f"{mark:<4}  {name:<{_WIDTH}}{answer}", flush=True)
    if advice:
        print(f"{'':<{_WIDTH + 6}}-> {advice}", flush=True)
    return mark != "FAIL"
