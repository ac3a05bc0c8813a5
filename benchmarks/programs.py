"""Rows measured from outside: whole processes, with cold and warm caches.

In: how often to repeat. Out: JSON facts per row. Invariant: `python` and
`python -m accel run` take turns, and every cold run has a cache directory of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import bootstrap

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "scripts"


class NotMeasured(Exception):
    """A row that cannot be measured here, and why."""


@dataclass(frozen=True)
class ProgramRow:
    """One row of the table that needs processes of its own."""

    name: str
    title: str
    measure: Callable[[int, int], dict[str, Any]]  # (repeats, threads) -> facts
    repeats: int
    target: str


def run(command: list[str], cache: Path | None, threads: int) -> tuple[float, str]:
    """Seconds and standard output of a process."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    # Without its .pyc files Python would compile our sources in each process and, unlike a
    # user's installation, not those of the installed packages.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if cache is not None:
        environment["ACCEL_CACHE_DIR"] = str(cache / "accel")
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - start
    if done.returncode:
        raise NotMeasured(
            f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-800:]}"
        )
    return elapsed, done.stdout


def with_cache(action: Callable[[Path], Any]) -> Any:
    """`action` with an empty cache directory that is removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="accel-bench-"))
    try:
        return action(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def one_call(repeats: int, threads: int) -> dict[str, Any]:
    """`python -m accel run` over `python` for a script that makes one BERT-base call."""
    script = str(SCRIPTS / "one_bert_call.py")
    plain_command = [sys.executable, script]
    accel_command = [sys.executable, "-m", "accel", "run", script]
    seconds: dict[str, list[float]] = {"python": [], "cold": [], "warm": []}
    run(plain_command, None, threads)  # the operating system's file cache

    def one_round(cache: Path) -> None:
        seconds["python"].append(run(plain_command, None, threads)[0])
        for state in ("cold", "warm"):
            seconds[state].append(run(accel_command, cache, threads)[0])

    for _ in range(repeats):
        with_cache(one_round)
    plain = seconds["python"]
    return {
        "s": {name: bootstrap(values).to_json() for name, values in seconds.items()},
        "added_s": {
            state: bootstrap([s - p for s, p in zip(seconds[state], plain, strict=True)]).to_json()
            for state in ("cold", "warm")
        },
    }


def _from_cold(how: str, cache: Path, threads: int, calls: int, limit_s: float) -> dict[str, Any]:
    script = str(SCRIPTS / "bert_from_cold.py")
    command = [sys.executable, script, how, str(calls), str(limit_s), str(threads)]
    return json.loads(run(command, cache, threads)[1].splitlines()[-1])


def from_cold(repeats: int, threads: int) -> dict[str, Any]:
    """A loop of BERT-base calls: first call, slowest call, seconds until served compiled."""
    rows: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}

    def note(key: str, value: float | None) -> None:
        if value is not None:
            rows.setdefault(key, []).append(value)

    def one_round(cache: Path) -> None:
        eager = _from_cold("eager", cache, threads, 12, 30)["seconds"]
        note("eager first call", eager[0])
        median = statistics.median(eager[1:])
        note("eager call", median)
        note("eager slowest later call", max(eager[1:]))
        for state in ("cold", "warm"):
            got = _from_cold("accel", cache, threads, 400, 8)
            note(f"accel {state}: first call", got["seconds"][0])
            note(f"accel {state}: served compiled after", got["served_after_s"])
            compiling = got["seconds"][1 : got["calls_before"]]
            if not compiling:  # the second call was served
                continue
            note(f"accel {state}: slowest later call", max(compiling))
            ratios.setdefault(f"{state}: slowest", []).append(max(compiling) / median)

    for _ in range(repeats):
        with_cache(one_round)
    return {
        "s": {name: bootstrap(values).to_json() for name, values in rows.items()},
        "ratio": {name: bootstrap(values).to_json() for name, values in ratios.items()},
    }


def from_cold_torch_compile(repeats: int, threads: int) -> dict[str, Any]:
    """The same loop under torch.compile."""
    rows: dict[str, list[float]] = {}

    def one_round(cache: Path) -> None:
        for state in ("cold", "warm"):
            got = _from_cold("torch.compile", cache, threads, 3, 300)
            rows.setdefault(f"torch.compile {state}: served compiled after", []).append(
                got["served_after_s"]
            )

    for _ in range(repeats):
        with_cache(one_round)
    return {"s": {name: bootstrap(values).to_json() for name, values in rows.items()}}


def call_heavy(repeats: int, threads: int) -> dict[str, Any]:
    """Pure Python in an allowlisted module: `python -m accel run` over `python`, CPU time.

    The ratio is of the fastest of 30 rounds; what the first 30 rounds take longer, being looked
    at and recorded, is paid once and given in seconds.
    """
    package = importlib.util.find_spec("pyperformance")
    if package is None or package.origin is None:
        raise NotMeasured("needs the programs of pyperformance: pip install pyperformance")
    programs = Path(package.origin).parent / "data-files" / "benchmarks"
    facts: dict[str, Any] = {"ratio": {}, "s": {}}

    def measure(cache: Path) -> None:
        directory = cache / "program"
        directory.mkdir()
        shutil.copy(SCRIPTS / "call_heavy.py", directory)
        for name in ("richards", "deltablue"):
            source = programs / f"bm_{name}" / "run_benchmark.py"
            shutil.copy(source, directory / f"{name}_program.py")
            arguments = [str(directory / "call_heavy.py"), name, "30"]
            seconds: dict[str, list[float]] = {"python": [], "accel": []}
            totals: dict[str, list[float]] = {"python": [], "accel": []}
            for _ in range(repeats):
                for how, prefix in (("python", []), ("accel", ["-m", "accel", "run"])):
                    output = run([sys.executable, *prefix, *arguments], cache, threads)[1]
                    values = json.loads(output.splitlines()[-1])["seconds"]
                    seconds[how].append(min(values))
                    totals[how].append(sum(values))
            for how, values in seconds.items():
                facts["s"][f"{name} {how}"] = bootstrap(values).to_json()
            pairs = zip(seconds["accel"], seconds["python"], strict=True)
            facts["ratio"][name] = bootstrap([a / p for a, p in pairs]).to_json()
            pairs = zip(totals["accel"], totals["python"], strict=True)
            facts["s"][f"{name} paid once"] = bootstrap([a - p for a, p in pairs]).to_json()

    with_cache(measure)
    return facts


def capture(repeats: int, threads: int) -> dict[str, Any]:
    """Cold recording against Dynamo's capture."""
    script = str(SCRIPTS / "capture_from_cold.py")
    facts: dict[str, Any] = {"s": {}, "ratio": {}}
    for model in ("bert", "llama", "t5"):
        found: list[dict[str, Any]] = []
        for _ in range(repeats):
            command = [sys.executable, script, model, str(threads)]
            output = with_cache(lambda cache, command=command: run(command, cache, threads)[1])
            found.append(json.loads(output.splitlines()[-1]))
        if not all(f["whole"] for f in found):
            raise NotMeasured(f"accel did not record {model} as one graph")
        for who in ("accel", "dynamo"):
            facts["s"][f"{model} {who}"] = bootstrap([f[who] for f in found]).to_json()
        ratios = [f["accel"] / f["dynamo"] for f in found]
        facts["ratio"][f"{model}: accel over Dynamo"] = bootstrap(ratios).to_json()
    return facts


def training(row: str, repeats: int, threads: int) -> dict[str, Any]:
    """A row of run_training.py, in a process of its own."""
    command = [sys.executable, str(HERE / "run_training.py"), row, "--threads", str(threads)]
    _, output = run([*command, "--rounds", str(repeats)], None, threads)
    facts: dict[str, Any] = json.loads(output.splitlines()[-1])
    wrong = [name for name, agrees in facts["agrees"].items() if not agrees]
    if wrong:
        raise NotMeasured(f"losses differ from eager's: {', '.join(wrong)}")
    return facts


def training_from_cold(repeats: int, threads: int) -> dict[str, Any]:
    """BERT-base training steps: seconds until compiled ones, and peak memory."""
    ready: dict[str, list[float]] = {"eager": [], "torch.compile": [], "accel": []}
    peak: dict[str, list[float]] = {name: [] for name in ready}
    script = str(SCRIPTS / "bert_training_step.py")

    def one_round(cache: Path) -> None:
        for way, seconds in ready.items():
            facts = json.loads(run([sys.executable, script, way], cache, threads)[1])
            if facts["ready_s"] is None:
                raise NotMeasured(f"{way} was never compiled")
            seconds.append(facts["ready_s"])
            peak[way].append(facts["peak_mb"])

    for _ in range(repeats):
        with_cache(one_round)
    pairs = list(zip(ready["accel"], ready["torch.compile"], strict=True))
    memory = list(zip(peak["accel"], peak["torch.compile"], strict=True))
    return {
        "s": {name: bootstrap(values).to_json() for name, values in ready.items()},
        "mb": {name: bootstrap(values).to_json() for name, values in peak.items()},
        "ratio": {
            "ready: accel over torch.compile": bootstrap([a / b for a, b in pairs]).to_json(),
            "peak memory: accel over torch.compile": bootstrap(
                [a / b for a, b in memory]
            ).to_json(),
        },
    }


def tiny_from_cold(repeats: int, threads: int) -> dict[str, Any]:
    """A tiny function from a cold start: how long until compiled code serves."""
    script = str(SCRIPTS / "tiny_from_cold.py")
    rows: dict[str, list[float]] = {}

    def one_round(cache: Path) -> None:
        for how in ("torch.compile", "accel"):
            for state in ("cold", "warm"):
                output = run([sys.executable, script, how, str(threads)], cache, threads)[1]
                got = json.loads(output.splitlines()[-1])
                key = f"{how} {state}: served compiled after"
                rows.setdefault(key, []).append(got["served_after_s"])

    for _ in range(repeats):
        with_cache(one_round)
    return {"s": {name: bootstrap(values).to_json() for name, values in rows.items()}}


def memory(repeats: int, threads: int) -> dict[str, Any]:
    """BERT-base: the most memory that the process held, ever and during settled calls."""
    script = str(SCRIPTS / "peak_memory.py")
    rows: dict[str, list[float]] = {}

    def measure(cache: Path) -> None:
        for _ in range(repeats):
            for how in ("eager", "torch.compile", "freezing", "accel"):
                output = run([sys.executable, script, how, str(threads)], cache, threads)[1]
                got = json.loads(output.splitlines()[-1])
                for when in ("process", "calls"):
                    rows.setdefault(f"{how}: {when}", []).append(got[when])

    with_cache(measure)
    return {"mb": {name: bootstrap(values).to_json() for name, values in rows.items()}}


PROGRAM_ROWS = [
    ProgramRow("one-call", "`python -m accel run` over `python`, one BERT-base call", one_call, 5,
               "+0.5 s cold, +0.2 s warm"),
    ProgramRow("from-cold", "BERT-base in a loop from a cold start", from_cold, 7,
               "first call 2x eager + 0.3 s; slowest 2x eager; served after 4 s, 1.5 s warm"),
    ProgramRow("from-cold-torch-compile", "the same loop under torch.compile",
               from_cold_torch_compile, 1, "(for comparison)"),
    ProgramRow("capture", "first call captured for the `eager` backend, over an eager call",
               capture, 6, "a quarter of Dynamo's"),
    *(
        ProgramRow(name, title, functools.partial(training, name), repeats, target)
        for name, title, repeats, target in (
            ("tiny-forward", "three pointwise ops on 8x16, grad enabled: forward", 40,
             "6 us"),
            ("tiny-backward", "the same, forward and backward", 40, "2x eager"),
            ("step-mlp", "training step: 10 x (Linear 256, ReLU), batch 64, AdamW", 30,
             "1.4x the best of the others"),
            ("step-bert", "training step: BERT, 4 layers of 768, 4x64, AdamW", 9,
             "1.1x the best of the others"),
            ("step-bert-dropout", "the same with dropout of 0.1, `fast_dropout`", 9, "(none)"),
            ("adamw", "AdamW step, 200 parameters of 64x64", 30,
             "3x eager, not slower than fused"),
        )
    ),
    ProgramRow("training-from-cold", "BERT-base training steps, 4x64, until compiled",
               training_from_cold, 3, "a quarter of torch.compile's; no more memory"),
    ProgramRow("tiny-from-cold", "a tiny function from a cold start", tiny_from_cold, 5,
               "served after 0.5 s"),
    ProgramRow("memory", "peak memory, BERT-base 1x128", memory, 3, "at most torch.compile's"),
    ProgramRow("call-heavy", "richards and deltablue under `run`", call_heavy, 7, "1.03x of plain"),
]  # fmt: skip
