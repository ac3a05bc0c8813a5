"""Whether a product of a GPU is faster as one kernel with what surrounds it: measured, once.

In: a `Site` and the GPU's name. Out: the fastest blocks, or None where ATen's call with kernels of their
own is faster. Both ways are made as plans of a few steps, which a process of its own
(`compile/measuring_main.py`) runs on the GPU: this one, a compiler, never uses CUDA, and a kernel
that fails there harms nobody. Invariant: what was measured is kept beside the libraries, under the
digest of all kernels' texts, the GPU's name and the versions of torch and Triton; where nothing can be
measured, the answer is the likely one.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import accel
from accel import log
from accel.codegen import trial_files, triton_versions
from accel.codegen.build import digest
from accel.codegen.fusion import Group
from accel.codegen.loop_ir import RunNumber, leaves
from accel.codegen.options import CodegenOptions, CompileError
from accel.codegen.product_blocks import Blocks, candidates, seconds_apart, seconds_with
from accel.codegen.products_triton import Choose, Site, likely, take_products
from accel.codegen.program import Program, reads, writes
from accel.codegen.tensor_graph import TensorGraph
from accel.trace import SegmentGraph

_MOST_BLOCKS = 3  # ways to cut a product that are tried
_CLEAR = 4.0  # an estimate that is so many times better is believed
_BUDGET_S = 20.0  # for the products of one graph; the others are chosen as is likely
_ANSWER_S = 60.0  # with the start of the process
MAIN = Path(__file__).parent.parent / "compile" / "measuring_main.py"
_BLOCKS = "blocks"


class MeasuringError(Exception):
    """Nothing could be measured."""


def chooser(options: CodegenOptions, out_dir: Path) -> Choose:
    """How a compilation chooses: by measurements where they are wanted and possible."""
    if not options.measure or options.gpu_name is None:
        return likely
    until = time.monotonic() + _BUDGET_S
    return functools.partial(measured, options=options, out_dir=out_dir, until=until)


def measured(site: Site, options: CodegenOptions, out_dir: Path, until: float) -> Blocks | None:
    """The faster way; no measurement begins after `until`, of `time.monotonic`."""
    if not _is_measurable(site):
        return likely(site)
    tried = _tried(site)
    try:
        ways = [_Way(site, blocks, options) for blocks in (None, *tried)]
        path = trial_files.path_of(out_dir, _key(ways, options))
        record = trial_files.kept(path)
        best = None if record is None else _blocks_of(record, tried)
        if record is None or best is None:
            if time.monotonic() > until:
                return likely(site)
            record = _measure(ways, tried, options)
            trial_files.keep(path, record)
            best = _blocks_of(record, tried)
    except (CompileError, MeasuringError, OSError) as why:
        log.artifact("worker", "a product is not measured: %s", why)
        return likely(site)
    return best if record["ours_s"] <= record["aten_s"] else None


def _is_measurable(site: Site) -> bool:
    """Whether the answer is open, and steps can run alone with made-up numbers."""
    one = seconds_with(site.blocks, site.work, site.gpu)
    apart = seconds_apart(site.work, site.gpu)
    if not apart / _CLEAR <= one <= apart * _CLEAR or site.program.graph.symbols is not None:
        return False
    groups = [s for s in site.steps if isinstance(s, Group)]
    found = [e for g in groups for n in g.nodes for e in leaves(n.expr)]
    hosts = any(site.program.graph.buffers[b].host for g in groups for b in g.reads())
    return not hosts and not any(isinstance(e, RunNumber) for e in found)


def _tried(site: Site) -> list[Blocks]:
    """The likely best first."""
    found = sorted(
        candidates(site.work, site.gpu), key=lambda b: seconds_with(b, site.work, site.gpu)
    )
    return list(dict.fromkeys([site.blocks, *found]))[:_MOST_BLOCKS]


def _blocks_of(record: dict[str, Any], tried: Sequence[Blocks]) -> Blocks | None:
    """The fastest of those tried; None of a damaged record."""
    return next((b for b in tried if asdict(b) == record.get(_BLOCKS)), None)


def _key(ways: list[_Way], options: CodegenOptions) -> str:
    """Of all that the answer depends on, the way of measuring included."""
    texts = [text for way in ways for text in way.compilation.texts]
    versions = (torch.__version__, str(triton_versions.version()), str(options.gpu_name))
    calls = [str(way.compilation.plan["steps"]) for way in ways]
    return digest(*texts, *calls, *versions, str(options.gpu), MAIN.read_text())


class _Way:
    """A site's steps as a plan of their own: ATen's call and its neighbours, or one kernel."""

    def __init__(self, site: Site, blocks: Blocks | None, options: CodegenOptions) -> None:
        from accel.codegen import pipeline

        program, steps = _alone(site)
        options = replace(options, dump_dir=None, measure=False)
        if blocks is not None:
            kept = set(site.visible)
            steps = take_products(program, steps, kept, options, lambda _site: blocks)
        source = SegmentGraph([], [], [], [])
        self.compilation = pipeline.Compilation(source, options, Path(), program.graph, program)
        self.compilation.steps = steps
        self.compilation.stored = pipeline.stored_buffers(self.compilation)
        passes = [p for p in pipeline.PASSES if p[0] in ("schedule", "emit", "plan")]
        pipeline.run(self.compilation, passes)

    def build(self, folder: Path) -> dict[str, Any]:
        """The plan, and where its kernels are. Errors: CompileError."""
        c = self.compilation
        if c.texts:
            c.plan |= c.target.build(c.texts, folder, c.options)
        library = c.plan["library"]
        return {"plan": c.plan, "library": library and str(folder / library)}


def _alone(site: Site) -> tuple[Program, list[Any]]:
    """The site's steps as a program, with what others have made as its inputs."""
    steps = copy.deepcopy(list(site.steps))
    graph = site.program.graph
    read, written = set[int](), set[int]()
    for s in steps:
        read |= s.reads() if isinstance(s, Group) else reads(s)
        written |= s.writes() if isinstance(s, Group) else writes(s)
    inputs, outputs = sorted(read - written), sorted(site.visible)
    position = {b: i for i, b in enumerate(inputs)}
    buffers = [replace(b, input=position.get(b.id)) for b in graph.buffers]
    own = TensorGraph(
        buffers,
        inputs=inputs,
        outputs=[buffers[b].view for b in outputs],
        output_identity=list(range(len(outputs))),
        output_severed=[None] * len(outputs),
        input_identity=list(range(len(outputs), len(outputs) + len(inputs))),
        device=graph.device,
        tf32=graph.tf32,
    )
    program = Program(own, dict(site.program.sizes), _names=site.program._names)
    return program, steps


def _measure(ways: list[_Way], tried: Sequence[Blocks], options: CodegenOptions) -> dict[str, Any]:
    """Errors: CompileError, MeasuringError."""
    with tempfile.TemporaryDirectory(prefix="accel-measured-") as folder:
        runs = [way.build(Path(folder)) for way in ways]
        aten, *ours = _process().seconds({"gpu": options.gpu_name, "runs": runs})
    least = min(ours)
    best = tried[ours.index(least)]
    log.artifact(
        "worker",
        "measured a product: %.1f us as one kernel by %d x %d x %d, %.1f us with ATen's call",
        least * 1e6, best.rows, best.columns, best.inner, aten * 1e6,
    )  # fmt: skip
    return {"ours_s": least, "aten_s": aten, _BLOCKS: asdict(best)}


class _Process:
    """The measuring process: started at the first job; it ends by itself when there are no more."""

    def __init__(self) -> None:
        self.running: subprocess.Popen[bytes] | None = None
        self.failed = ""  # why there will be no further one
        atexit.register(self.close)

    def close(self) -> None:
        if self.running is not None:
            self.running.kill()
            self.running.communicate()
            self.running = None

    def seconds(self, job: dict[str, Any]) -> list[float]:
        """How long each of the job's runs takes. Errors: MeasuringError."""
        if self.failed:
            raise MeasuringError(self.failed)
        try:
            answer = self._ask(json.dumps(job).encode() + b"\n")
            times = [float(s) for s in answer.get("seconds", ())]
        except (OSError, ValueError) as error:
            self.close()
            self.failed = f"the measuring process fails: {error}"
            raise MeasuringError(self.failed) from error
        if len(times) != len(job["runs"]) or not all(t > 0 for t in times):
            raise MeasuringError(answer.get("error", "no times"))
        return times

    def _ask(self, message: bytes) -> dict[str, Any]:
        if self.running is None or self.running.poll() is not None:
            self._start()
        process = self.running
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(message)
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _ANSWER_S)
        line = process.stdout.readline() if ready else b""
        if not line.endswith(b"\n"):
            raise OSError("it gives no answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> None:
        greeting = {
            "packages": {"accel": accel.__file__, "torch": torch.__file__},
            "path": [entry for entry in sys.path[1:] if entry],
        }
        self.running = subprocess.Popen(
            [sys.executable, "-P", str(MAIN), json.dumps(greeting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if log.is_enabled("worker") else subprocess.DEVNULL,
        )


@functools.cache
def _process() -> _Process:
    return _Process()
