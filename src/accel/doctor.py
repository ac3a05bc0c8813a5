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
from accel.errors import AccelError
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

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
    return f"{', '.join(names)}; programs on it run eagerly: only the processor is recorded"


def _cache() -> str:
    from accel.cache import DiskCache

    cache = DiskCache(Path(config.load().cache_dir) / "plans")
    if cache.reason:
        raise _Broken(cache.reason, "set ACCEL_CACHE_DIR to a directory that only you can write to")
    usage = cache.usage()
    return f"{cache.directory}: {usage.plans} plans, {usage.size_bytes / 2**20:.1f} MiB"


# ------------------------------------------------------------------------------ kernels

_F = "torch.nn.functional."
_X = TensorMeta((4, 8), (8, 1), "float32")
_W = TensorMeta((8, 8), (8, 1), "float32")
_IMAGE = TensorMeta((1, 3, 8, 8), (192, 64, 8, 1), "float32")
_FILTER = TensorMeta((4, 3, 3, 3), (27, 9, 3, 1), "float32")
_INDEX = TensorMeta((5,), (1,), "int64")

Row = tuple[list[TensorMeta], list[tuple[str, tuple[Any, ...], dict[str, Any]]]]
_A, _B, _T = Ref("a0"), Ref("a1"), Ref("t0")

# One small graph for each kind of kernel: inputs, and calls that see each other as t0, t1, ...
KERNELS: dict[str, Row] = {
    "pointwise": ([_X, _X], [("torch.mul", (_A, _B), {}), ("torch.tanh", (_T,), {})]),
    "reduction": ([_X], [("torch.sum", (_A, -1), {})]),
    "softmax": ([_X], [(_F + "softmax", (_A,), {"dim": -1})]),
    "normalisation": ([_X], [(_F + "layer_norm", (_A, (8,)), {})]),
    "product": ([_X, _W], [(_F + "linear", (_A, _B), {}), (_F + "relu", (_T,), {})]),
    "attention": ([_IMAGE], [(_F + "scaled_dot_product_attention", (_A, _A, _A), {})]),
    "convolution": ([_IMAGE, _FILTER], [(_F + "conv2d", (_A, _B), {})]),
    "gather": ([_INDEX, _W], [(_F + "embedding", (_A, _B), {})]),
    "views": ([_X], [("torch.transpose", (_A, 0, 1), {}), ("torch.cat", ([_T, _T],), {})]),
    "scan": ([_W], [("torch.cumsum", (_A, 0), {})]),
    "ATen": ([_W], [("torch.logcumsumexp", (_A, 0), {})]),
}


def graph_of(kind: str) -> SegmentGraph:
    """The graph of a row of KERNELS."""
    metas, calls = KERNELS[kind]
    inputs = [(f"a{i}", meta) for i, meta in enumerate(metas)]
    operations = [
        Operation(f"t{i}", "call_function", target, args, kwargs)
        for i, (target, args, kwargs) in enumerate(calls)
    ]
    graph = SegmentGraph(inputs, operations, [operations[-1].name], [])
    (out,) = graph.to_fx()(*_inputs(graph))
    name = str(out.dtype).removeprefix("torch.")
    meta = TensorMeta(tuple(out.shape), tuple(out.stride()), name)
    return replace(graph, output_metas=[meta])


def _inputs(graph: SegmentGraph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 8, meta.sizes, generator=generator)
        if meta.dtype == "int64"
        else torch.randn(meta.sizes, generator=generator)
        for _, meta in graph.inputs
    ]


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
    with _service() as service:
        answers: dict[str, Any] = {}
        for kind in KERNELS:
            service.submit(graph_of(kind), "native", functools.partial(answers.__setitem__, kind))
        service.idle(_COMPILE_S)
        for kind in KERNELS:
            yield kind, functools.partial(_run_kernel, graph_of(kind), answers.get(kind))


def _run_kernel(graph: SegmentGraph, segment: Any) -> str:
    if segment is None:
        raise _Broken(
            f"the worker process gave no answer in {_COMPILE_S:.0f} s",
            "run again with ACCEL_LOG=worker, which shows what the worker says",
        )
    if segment.error:
        advice = "see the lines above; ACCEL_LOG=worker shows what the worker says"
        raise _Broken(segment.error, advice)
    executor = runtime.native.Executor(segment.plan, segment.library_path)
    inputs = _inputs(graph)
    (got,), (wanted,) = executor.run(inputs), graph.to_fx()(*inputs)
    if not torch.allclose(got, wanted, rtol=1e-5, atol=1e-5):
        raise _Broken("its result is not eager's", "please report this machine's CPU and compiler")
    kinds = [step["op"] for step in segment.plan["steps"]]
    ours, aten = kinds.count("kernel"), kinds.count("extern")
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
