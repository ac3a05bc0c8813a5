"""The compile service and its worker, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel import config
from accel.codegen import triton_versions
from accel.compile.channel import Decoder, encode
from accel.compile.service import CompiledSegment, CompileService, gpu_options
from accel.compile.worker import Worker, WorkerLimits
from accel.compile.worker_main import check_targets
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta

META = TensorMeta((4, 8), (8, 1), "float32")


def graph(number: float = 2.0, target: str = "torch.mul") -> SegmentGraph:
    operations = [Operation("t", "call_function", target, (Ref("a"), number))]
    return SegmentGraph([("a", META)], operations, ["t"], [META])


def service_in(directory: Path, **changes: Any) -> CompileService:
    return CompileService(replace(config.Config(), cache_dir=str(directory), **changes))


def compiled(service: CompileService, *graphs: SegmentGraph, backend: Any = "native") -> Any:
    answers: list[CompiledSegment] = []
    for g in graphs:
        service.submit(g, backend, answers.append)
    assert service.idle(120)
    return answers


def test_equal_graphs_are_compiled_once_and_cached(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    first, second, other = compiled(service, graph(), graph(), graph(3.0))
    assert not first.error and first is second and other.key != first.key
    assert first.library_path is not None and Path(first.library_path).exists()
    service.close()
    later = service_in(tmp_path)
    (again,) = compiled(later, graph())
    assert again.from_cache and again.plan == first.plan
    assert later.worker.pid is None, "a warm cache needs no worker"
    later.close()


@pytest.mark.parametrize("worker", [True, False])
def test_errors_are_answers(worker: bool, tmp_path: Path) -> None:
    service = service_in(tmp_path, worker=worker)
    (segment,) = compiled(service, graph(target="os.getpid"))
    assert "os.getpid is not an operation of torch" in segment.error
    service.close()


def test_graphs_cannot_reach_beyond_torch() -> None:
    for target in ("os.system", "subprocess.run", "user.f", "torchfake.f"):
        with pytest.raises(LookupError):
            check_targets(graph(target=target).to_json())
    check_targets(graph().to_json())


def test_a_backend_of_the_user(tmp_path: Path) -> None:
    seen: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(gm)
        return gm.forward

    def broken(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        raise KeyError("x")

    service = service_in(tmp_path)
    (segment,) = compiled(service, graph(), backend=backend)
    (out,) = segment.callable([torch.ones(4, 8)])
    assert torch.equal(out, torch.full((4, 8), 2.0)) and len(seen) == 1
    (segment,) = compiled(service, graph(), backend=broken)
    assert segment.error == "backend broken: KeyError: 'x'"
    service.close()


def test_random_numbers_stay_the_programs_own(tmp_path: Path) -> None:
    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        torch.manual_seed(5)
        return gm.forward

    service = service_in(tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    compiled(service, graph(), backend=backend)
    assert torch.equal(torch.get_rng_state(), before)
    service.close()


def test_graphs_on_gpus_are_compiled_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    architectures = {"cuda:0": (8, 0), "cuda:1": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", architectures.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)

    def on(device: str) -> SegmentGraph:
        meta = replace(META, device=device)
        return replace(graph(), inputs=[("a", meta)], output_metas=[meta])

    service = service_in(tmp_path)
    answers: list[CompiledSegment] = []
    for device in architectures:  # which kernels there agree with eager nobody can say here
        service.compile(on(device), answers.append)
    assert service.idle(120)
    first, second = answers
    service.close()
    assert not first.error and not second.error, (first.error, second.error)
    assert [s.plan["device"] for s in (first, second)] == ["cuda:0", "cuda:1"]
    assert first.library_path != second.library_path
    for segment in (first, second):
        assert [row["op"] for row in segment.plan["steps"]] == ["launch"]
        assert Path(segment.library_path).exists()


def test_a_worker_killed_again_and_again(tmp_path: Path) -> None:
    service = service_in(tmp_path)
    service.worker.limits = WorkerLimits(max_starts=2, max_tries=2)
    answers: list[CompiledSegment] = []
    service.submit(graph(), "native", answers.append)
    for _ in range(2):
        deadline = time.monotonic() + 60
        while service.worker.pid is None and not answers and time.monotonic() < deadline:
            service.poll()
        if service.worker.pid is not None:
            os.kill(service.worker.pid, signal.SIGKILL)
            dead = service.worker.pid
            while service.worker.pid == dead and time.monotonic() < deadline:
                service.poll()
                time.sleep(0.01)
    assert service.idle(60)
    assert len(answers) == 1 and "the worker process died" in answers[0].error
    service.close()


def test_a_worker_ends_with_its_program() -> None:
    worker = Worker()
    worker.start()
    pid = worker.pid
    assert pid is not None and os.getpgid(pid) == pid
    assert os.getpriority(os.PRIO_PROCESS, os.getpid()) >= 0
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_messages_in_any_pieces() -> None:
    messages = [{"id": str(i), "text": "x" * i} for i in range(50)]
    data = b"".join(map(encode, messages))
    for size in (1, 3, 7, 1000):
        decoder = Decoder()
        got = [m for i in range(0, len(data), size) for m in decoder.feed(data[i : i + size])]
        assert got == messages
    with pytest.raises(ValueError):
        Decoder().feed(b"\xff\xff\xff\xff")


def test_a_graph_that_draws_on_a_gpu_says_how_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(multi_processor_count=132, max_threads_per_multi_processor=1536)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    meta = TensorMeta((3,), (1,), "float32", "cuda:0")
    graph = SegmentGraph([("x", meta)], [], ["x"], [meta])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    asked = {"gpu": "sm_90", "gpu_name": "NVIDIA H100"}
    assert gpu_options(graph) == asked
    graph.is_random = True
    assert gpu_options(graph) == {**asked, "gpu_blocks": 132 * 6}


def of_a_gpu() -> SegmentGraph:
    meta = replace(META, device="cuda:0")
    operation = Operation("t", "call_function", "torch.mul", (Ref("a"), 2.0))
    return SegmentGraph([("a", meta)], [operation], ["t"], [meta])


def test_what_is_missing_for_gpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", str)

    def answer(asked: SegmentGraph) -> CompiledSegment:
        service = service_in(tmp_path, worker=False)  # each asks anew
        (segment,) = compiled(service, asked)
        service.close()
        return segment

    segment = answer(of_a_gpu())
    assert segment.is_missing and "architecture sm_75, only for sm_80, " in segment.error
    monkeypatch.setattr(triton_versions, "version", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    segment = answer(of_a_gpu())
    assert segment.is_missing and segment.error.startswith("Triton is not installed (pip install")

    def raises(device: str) -> None:
        raise RuntimeError("CUDA driver initialization failed\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", raises)
    segment = answer(of_a_gpu())
    assert segment.is_missing
    assert segment.error == (
        "torch cannot use the GPU (CUDA driver initialization failed); "
        "`python -m accel doctor` looks at it"
    )
    segment = answer(graph(target="os.getpid"))
    assert segment.error and not segment.is_missing


@pytest.mark.parametrize("missing", [True, False])
def test_the_user_is_told_once_and_calls_run_eagerly(missing: bool, tmp_path: Path) -> None:
    script = f"""
import sys, torch, accel
from accel import driver
from accel.compile.service import CompiledSegment, CompileService

def submit(self, graph, backend, on_done):
    self._ready.append((on_done, CompiledSegment("plan", "", error="no x; get x", is_missing={missing})))

CompileService.submit = submit

def f(x): return x * 2 + 1
def g(x): return x * 3 + 1

accel.optimize(f), accel.optimize(g)
x = torch.arange(4.0)
for _ in range(6):
    assert torch.equal(f(x), x * 2 + 1) and torch.equal(g(x), x * 3 + 1)
    accel.wait(10)
print([root.state for root in driver.current.roots if root.name in ("f", "g")])
"""
    file = tmp_path / "program.py"
    file.write_text(script)
    environment = {**os.environ, "ACCEL_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(file)], capture_output=True, text=True, env=environment, check=True
    )
    told = [line for line in done.stderr.splitlines() if "running eagerly" in line]
    assert told == ["accel: running eagerly on GPUs: no x; get x"] * missing
    assert done.stdout.count("blacklisted") == 2, done.stdout
