"""The doctor: checks everything accel needs, through the real path.

In: nothing. Out: one line per check, and an exit code that is 1 when something needed is
broken. Invariant: each failing line says what to do.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from accel import config, runtime
from accel.errors import AccelError

Check = Callable[[], str]


class _Broken(Exception):
    """A check failed; the text says what to do."""


def _native() -> str:
    if not runtime.available:
        raise _Broken(runtime.reason)
    return "built for this Python and torch"


def _compiler() -> str:
    from accel.codegen.build import find_compiler
    from accel.codegen.options import CodegenOptions

    return find_compiler(CodegenOptions())


def _threads() -> str:
    if not torch.backends.openmp.is_available():
        raise _Broken("torch was built without OpenMP; kernels would run on one thread")
    return f"OpenMP, {torch.get_num_threads()} threads"


def _cache() -> str:
    from accel.cache import DiskCache

    cache = DiskCache(Path(config.load().cache_dir) / "plans")
    if cache.reason:
        raise _Broken(f"{cache.reason}; set ACCEL_CACHE_DIR to a directory of your own")
    return str(cache.directory)


def _triton() -> str:
    found = importlib.util.find_spec("triton") is not None
    return "installed" if found else "not installed (needed for GPUs only)"


def _worker() -> str:
    from accel.compile.worker import Worker

    worker = Worker()
    with tempfile.TemporaryDirectory() as directory:
        worker.submit({"id": "doctor", "graph": _graph().to_json(), "out_dir": directory})
        for _ in range(600):
            answers = worker.poll()
            if answers:
                if "error" in answers[0]:
                    raise _Broken(answers[0]["error"])
                return "compiles"
            worker.wait(0.1)
    raise _Broken("the worker process does not answer; ACCEL_LOG=worker shows its errors")


def _graph() -> object:
    from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

    meta = TensorMeta((4, 8), (8, 1), "float32")
    weight = TensorMeta((8, 8), (8, 1), "float32")
    f = "torch.nn.functional."
    return SegmentGraph(
        [("a", meta), ("w", weight)],
        [
            Operation("l", "call_function", f + "linear", (Ref("a"), Ref("w"))),
            Operation("g", "call_function", f + "gelu", (Ref("l"),)),
            Operation("s", "call_function", f + "softmax", (Ref("g"),), {"dim": -1}),
            Operation("n", "call_function", f + "layer_norm", (Ref("s"), (8,))),
        ],
        ["n"],
        [meta],
    )


def _kernels() -> str:
    from accel.codegen import compile_graph

    graph = _graph()
    with tempfile.TemporaryDirectory() as directory:
        plan = compile_graph(graph, out_dir=Path(directory))  # type: ignore[arg-type]
        executor = runtime.native.Executor(plan, str(Path(directory) / plan["library"]))
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(n, 8, generator=generator) for n in (4, 8)]
        (got,) = executor.run(inputs)
        (wanted,) = graph.to_fx()(*inputs)  # type: ignore[attr-defined]
    if not torch.allclose(got, wanted, rtol=1e-5, atol=1e-5):
        raise _Broken("a kernel's result is wrong; please report this machine's CPU")
    kinds = [step["op"] for step in plan["steps"]]
    return (
        f"{kinds.count('kernel')} kernels and {kinds.count('extern')} ATen calls agree with eager"
    )


CHECKS: dict[str, Check] = {
    "native module": _native,
    "C++ compiler": _compiler,
    "threads": _threads,
    "disk cache": _cache,
    "Triton": _triton,
    "worker": _worker,
    "kernels": _kernels,
}


def run() -> int:
    """Runs every check. 0 when all that is needed works."""
    print(f"accel doctor: torch {torch.__version__}")
    failed = False
    for name, check in CHECKS.items():
        try:
            answer, mark = check(), "ok  "
        except (_Broken, AccelError, OSError) as error:
            answer, mark, failed = str(error), "FAIL", True
        print(f"  {mark} {name}: {answer}")
    return 1 if failed else 0
