"""The worker's program: jobs from a socket, answers to it.

In: a greeting that says where accel and torch are, then jobs {"id", "key", "graph",
"cache_dir", "options"}. Out: for each {"id", "plan", "seconds"} or {"id", "error", "kind"}.
Invariant: nothing of the user's is imported; when the program's end of the socket closes,
this process ends, with every compiler it runs.

Run as a file, before `accel` can be imported: only the standard library up here.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

# The modules that a graph's targets may come from; they are importable without user code.
TARGET_ROOTS = frozenset({"torch", "_operator", "operator", "builtins", "math"})
_MAX_ERROR_CHARACTERS = 4000
# The program goes first. With equal rights, calls of a program that keeps every core busy took
# eight times as long, since OpenMP's threads spin while they wait for one that we displaced; at
# 5 about twice, and we are done after three or four seconds; at 7 less, and we take five.
_NICE = 5
_GRACE_S = 3.0  # for removing scratch files once the program has gone


def load_packages(files: dict[str, str]) -> None:
    """Imports packages from given files, whatever sys.path says."""
    for name, file in files.items():
        spec = importlib.util.spec_from_file_location(
            name, file, submodule_search_locations=[os.path.dirname(file)]
        )
        assert spec is not None and spec.loader is not None, file
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def check_targets(graph: dict[str, Any]) -> None:
    """Errors: LookupError for a target that would import something of the user's."""
    for operation in graph["operations"]:
        if operation["kind"] == "call_function":
            root = operation["target"].partition(".")[0]
            if root not in TARGET_ROOTS:
                raise LookupError(f"{operation['target']} is not an operation of torch")


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compiles one job; a failure becomes an answer too."""
    from accel.cache import DiskCache
    from accel.codegen import compile_graph
    from accel.codegen.options import CodegenOptions
    from accel.errors import CompileError
    from accel.trace import SegmentGraph

    started = time.perf_counter()
    options = dict(job["options"])
    if "dump_dir" in options:
        options["dump_dir"] = Path(options["dump_dir"]) / job["key"][:12]
    try:
        check_targets(job["graph"])
        cache = DiskCache(Path(job["cache_dir"]))
        with cache.building(job["key"]):
            plan = cache.get(job["key"])  # another process may have compiled it meanwhile
            if plan is None:
                plan = compile_graph(
                    SegmentGraph.from_json(job["graph"]),
                    out_dir=cache.directory,
                    options=CodegenOptions(**options),
                )
                cache.put(job["key"], plan)
    except Exception as error:  # whatever went wrong, the program must hear of it
        name = type(error).__name__
        text = str(error) if isinstance(error, CompileError) else f"{name}: {error}"
        return {"id": job["id"], "error": text[:_MAX_ERROR_CHARACTERS], "kind": name}
    return {"id": job["id"], "plan": plan, "seconds": time.perf_counter() - started}


def _read(connection: socket.socket, decoder: Any, jobs: queue.SimpleQueue[Any]) -> None:
    """Takes jobs in while another one is compiled, so that the program's sends never fill up."""
    while True:
        try:
            piece = connection.recv(1 << 20)
            messages = decoder.feed(piece)
        except (OSError, ValueError):
            piece, messages = b"", []
        for message in messages:
            jobs.put(message)
        if not piece:
            break
    # The program has gone. End the compilers; the job in hand fails and cleans up.
    jobs.put(None)
    os.killpg(0, signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(0)


def main(handle: int) -> None:
    """A new process, which is told by the greeting where accel and torch are."""
    _settle()
    connection = socket.socket(fileno=handle)
    length = int.from_bytes(_exactly(connection, 4), "big")
    import json

    greeting = json.loads(_exactly(connection, length))
    sys.path += [entry for entry in greeting["path"] if entry not in sys.path]
    load_packages({"accel": greeting["packages"]["accel"]})
    from accel.compile import prefork

    prefork.disarm()
    jobs = _jobs_from(connection)
    load_packages({"torch": greeting["packages"]["torch"]})
    _load()  # while the program still records
    _serve(connection, jobs, jobs.get())


def serve_forked(connection: socket.socket, preload: bool) -> None:
    """A copy of the program's process, which has imported torch and accel already."""
    _settle()
    jobs = _jobs_from(connection)
    if preload:  # most programs find all that they need in the cache
        _load()
        _warm_up()
    _serve(connection, jobs, jobs.get())


def _warm_up() -> None:
    """Imports what the first graph asks for: half a second of processor time."""
    import filelock  # noqa: F401  (the cache's lock)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # a normalisation's meta function asks for most of it
        torch.nn.functional.layer_norm(torch.empty(4, 4), (4,))


def _settle() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Our own group gets this at the end. A handler, because compilers would inherit SIG_IGN.
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    os.nice(_NICE)


def _jobs_from(connection: socket.socket) -> queue.SimpleQueue[Any]:
    from accel.compile.channel import Decoder

    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, Decoder(), jobs), daemon=True).start()
    return jobs


def _load() -> None:
    """What every job needs."""
    import torch

    torch.set_num_threads(1)
    _hide_gpus()
    from accel.compile import dynamo_stand_in

    dynamo_stand_in.install()
    import accel.cache
    import accel.codegen  # noqa: F401  (now, while the program still records)


def _hide_gpus() -> None:
    """Graphs for a GPU are compiled beside it: a context would take half a gigabyte of its memory.

    What torch asks about a GPU (which kernels of attention there are) needs none.
    """
    import torch
    from torch._subclasses import fake_tensor

    from accel import runtime

    if torch.version.cuda is not None and runtime.available:
        # autograd asks torch about each, which knows those that there are.
        runtime.native.hide_gpus(max(torch.cuda.device_count(), 1))
        fake_tensor.init_gpu_context = lambda device: None  # autograd asks for none any more


def _serve(connection: socket.socket, jobs: queue.SimpleQueue[Any], job: Any) -> None:
    """Answers jobs in their order; `job` is the first one, and has been taken."""
    _load()
    from accel.compile.channel import encode

    while job is not None:
        answer = encode(compile_job(job))
        try:
            connection.sendall(answer)
        except OSError:
            break
        job = jobs.get()
    os._exit(0)  # torch's teardown has nothing to save


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]))
