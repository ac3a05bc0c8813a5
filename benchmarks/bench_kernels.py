"""Times generated kernels, matrix products and whole models beside their competitors.

In: names of rows (default: all). Out: one JSON file for each row and number of threads, and a
Markdown table of medians and of ratios paired by round. Competitors: eager, torch.compile,
torch.compile with freezing, torch.compile with the C++ wrapper, accel; all interleaved in one
process for each row and number of threads. Beside a kernel runs a copy that moves as many bytes.

    python benchmarks/bench_kernels.py --only gelu-256K linear-32x768x768-gelu --threads 1
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from calls import CALL_ROWS, CallRow, Subject, bert, resnet50
from measure import Competitor, interval_text
from run_call import MAKERS, fresh, measure
from torch import nn

HERE = Path(__file__).resolve().parent
SIZES = {"4K": 1, "256K": 64, "16M": 4096, "256M": 65536}  # rows of 1024 floats
ROUNDS = {"4K": 31, "256K": 31, "16M": 21, "256M": 15}
TARGETS = {"4K": 10.0, "256K": 3.5, "16M": 1.3, "256M": 1.1}
PRODUCTS = [
    ((1, 768, 768), "gelu", 2.0),
    ((1, 768, 768), "add", 2.0),
    ((32, 768, 768), "gelu", 2.0),
    ((32, 768, 768), "add", 2.0),
    ((128, 768, 3072), "", 1.1),
    ((512, 1024, 4096), "", 1.1),
]
MODELS = {"bert": 1.2, "gpt2": 1.2, "vit": 1.2, "resnet50": 1.25, "mlp50": 6.0}
IN_BFLOAT16 = {"bert", "bert8", "gpt2", "vit"}


# ---------------------------------------------------------------- rows


def gelu_mul_add(rows: int, dtype: torch.dtype) -> Subject:
    def kernel(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return F.gelu(x) * y + z

    return Subject(kernel, tuple(torch.randn(rows, 1024).to(dtype) for _ in range(3)))


def softmax(rows: int, dtype: torch.dtype) -> Subject:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return F.softmax(x, dim=-1)

    return Subject(kernel, (torch.randn(rows, 1024).to(dtype),))


def layernorm(rows: int, dtype: torch.dtype) -> Subject:
    def kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (1024,), weight, bias)

    vectors = (torch.randn(1024).to(dtype), torch.randn(1024).to(dtype))
    return Subject(kernel, (torch.randn(rows, 1024).to(dtype), *vectors))


def rmsnorm(rows: int, dtype: torch.dtype) -> Subject:
    def kernel(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        wide = total.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * (wide * scale).to(x.dtype), total

    tensors = (torch.randn(rows, 1024).to(dtype) for _ in range(2))
    return Subject(kernel, (*tensors, torch.randn(1024).to(dtype)))


def sum_rows(rows: int, dtype: torch.dtype) -> Subject:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x.sum(-1)

    return Subject(kernel, (torch.randn(rows, 1024).to(dtype),))


def sum_columns(rows: int, dtype: torch.dtype) -> Subject:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x.sum(0)

    return Subject(kernel, (torch.randn(rows, 1024).to(dtype),))


def linear(shape: tuple[int, int, int], epilogue: str, dtype: torch.dtype) -> Subject:
    m, k, n = shape
    layer = nn.Linear(k, n).to(dtype).eval()
    x, other = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    def with_gelu(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(layer(x))

    def with_add(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return layer(x) + other

    if epilogue == "add":
        return Subject(with_add, (x, other))
    return Subject(with_gelu if epilogue else plain, (x,))


class CellLoop(nn.Module):
    """A sequence through an LSTMCell, step by step."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        h = c = steps.new_zeros(steps.shape[1], steps.shape[2])
        for x in steps:
            h, c = self.cell(x, (h, c))
        return h


def lstm_loop() -> Subject:
    return Subject(CellLoop().eval(), (torch.randn(32, 8, 64),))


def resnet50_batch() -> Subject:
    subject = resnet50()
    return Subject(subject.target, (torch.rand(8, 3, 224, 224),))


def bert_batch() -> Subject:
    subject = bert()
    mask = torch.ones(8, 128, dtype=torch.int64)
    mask[1::2, 100:] = 0
    tokens = torch.randint(0, 30000, (8, 128))
    return Subject(subject.target, (tokens,), {"attention_mask": mask})


MORE_MODELS = [
    ("lstm", "LSTMCell over 32 steps of 8x64", lstm_loop, 3.0),
    ("resnet50-8", "ResNet-50, eight images", resnet50_batch, 1.25),
    ("bert8", "BERT-base, 8x128, padding mask", bert_batch, 1.2),
]


def in_bfloat16(make: Callable[[], Subject]) -> Subject:
    """A model's row in bfloat16."""
    subject = make()
    target = subject.target.bfloat16()

    def narrow(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.bfloat16() if floats else value

    kwargs = {k: narrow(v) for k, v in (subject.kwargs or {}).items()}
    return Subject(target, tuple(narrow(a) for a in subject.args), kwargs)


KERNELS: dict[str, Callable[[int, torch.dtype], Subject]] = {
    "gelu": gelu_mul_add,
    "softmax": softmax,
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "sum0": sum_columns,
    "sum1": sum_rows,
}


def _rows() -> dict[str, CallRow]:
    rows = []
    for dtype, mark in ((torch.float32, ""), (torch.bfloat16, "-bf16")):
        for size, count in SIZES.items():
            for name, make in KERNELS.items():
                title = f"{name} {size}{mark}"
                maker = functools.partial(make, count, dtype)
                rows.append(_row(f"{name}-{size}{mark}", title, maker, ROUNDS[size], TARGETS[size]))
        for shape, epilogue, target in PRODUCTS:
            text = "x".join(map(str, shape)) + (f"-{epilogue}" if epilogue else "") + mark
            maker = functools.partial(linear, shape, epilogue, dtype)
            rows.append(_row(f"linear-{text}", f"Linear {text}", maker, 21, target))
    known = {row.name: row for row in CALL_ROWS}
    models = [(name, known[name].title, known[name].make, t) for name, t in MODELS.items()]
    for name, title, make, target in [*models, *MORE_MODELS]:
        rows.append(_row(name, title, make, 15, target))
        if name in IN_BFLOAT16:
            maker = functools.partial(in_bfloat16, make)
            rows.append(_row(f"{name}-bf16", f"{title}, bf16", maker, 15, 1.3))
    return {row.name: row for row in rows}


def _row(
    name: str, title: str, make: Callable[[], Subject], rounds: int, over_compile: float
) -> CallRow:
    target = f"{over_compile:g}x torch.compile"
    return CallRow(name, title, make, rounds, target, over_compile=over_compile)


ROWS = _rows()


# ---------------------------------------------------------------- competitors


def with_options(name: str, **settings: bool) -> Callable[[CallRow], Any]:
    """torch.compile with settings of TorchInductor."""

    def make(row: CallRow) -> tuple[Competitor, dict[str, Any]]:
        import torch._inductor.config as inductor

        subject = fresh(row)
        torch._dynamo.reset()
        with inductor.patch(settings):
            call = subject.bind(torch.compile(subject.target))
            start = time.perf_counter()
            call()
        return Competitor(name, call), {"first_call_s": time.perf_counter() - start}

    return make


def copy(row: CallRow) -> tuple[Competitor, dict[str, Any]]:
    """Moves as many bytes as the row's kernel reads and writes at least, half of them each way."""
    subject = fresh(row)
    out = subject.bind(subject.target)()
    tensors = [*subject.args, *(out if isinstance(out, tuple) else (out,))]
    size = sum(t.numel() * t.element_size() for t in tensors)
    source, target = (torch.zeros(size // 2, dtype=torch.uint8) for _ in range(2))
    competitor = Competitor("copy", functools.partial(target.copy_, source), answers=False)
    return competitor, {"bytes": size}


COMPETITORS = {
    "eager": MAKERS["eager"],
    "torch.compile": MAKERS["torch.compile"],
    "freezing": with_options("freezing", freezing=True),
    "cpp_wrapper": with_options("cpp_wrapper", cpp_wrapper=True),
    "copy": copy,
    "accel": MAKERS["accel"],
}


# ---------------------------------------------------------------- running


def run_here(
    names: list[str], competitors: list[str], threads: int, folder: Path, rounds: int
) -> None:
    """Measure rows in this process, one file for each."""
    torch.set_num_threads(threads)
    MAKERS.clear()
    MAKERS.update(COMPETITORS)  # `measure` takes the competitors from there
    for name in names:
        row = ROWS[name]
        moves = name.split("-")[0] in KERNELS
        result = measure(
            row, [c for c in competitors if moves or c != "copy"], rounds or row.rounds
        )
        result |= {"row": name, "title": row.title, "threads": threads, "target": row.over_compile}
        record_path(folder, name, threads).write_text(json.dumps(result, indent=1) + "\n")
        print(table_line(result), flush=True)


def record_path(folder: Path, name: str, threads: int) -> Path:
    return folder / f"kernel-{name}-{threads}.json"


def records_of(folder: Path) -> list[dict[str, Any]]:
    """What was measured, in the order of the rows."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("kernel-*.json"))]
    order = {name: i for i, name in enumerate(ROWS)}
    return sorted(results, key=lambda r: (order.get(r["row"], len(order)), r["threads"]))


def table_line(result: dict[str, Any]) -> str:
    if "not_measured" in result:
        return f"| {ROWS[result['row']].title} | {result['threads']} | not measured: {result['not_measured']} |"
    us = {name: value["median"] for name, value in result["us"].items()}
    cells = [result["title"], str(result["threads"])]
    cells += [f"{us[name]:.1f}" if name in us else "" for name in COMPETITORS]
    for name in list(COMPETITORS)[:-1]:
        cells.append(interval_text(result.get("speedup", {}).get(name), 2))
    ratio = result.get("speedup", {}).get("torch.compile")
    if ratio:
        cells += [f"{result['target']:g}", "yes" if ratio["high"] >= result["target"] else "no"]
    else:
        cells += [f"{result['target']:g}", ""]
    if not result["facts"].get("accel", {}).get("served_compiled", True):
        cells[-1] += " (not compiled)"
    return "| " + " | ".join(cells) + " |"


def table(folder: Path) -> str:
    results = records_of(folder)
    names = list(COMPETITORS)
    head = ["what", "threads", *(f"{n} us" for n in names), *(f"x {n}" for n in names[:-1])]
    head += ["target x torch.compile", "met"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    return "\n".join([*lines, *(table_line(r) for r in results)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--competitors", nargs="+", default=list(COMPETITORS))
    parser.add_argument("--rounds", type=int, default=0, help="0: as many as the row says")
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        (threads,) = arguments.threads
        run_here(arguments.only, arguments.competitors, threads, arguments.folder, arguments.rounds)
        return
    for name in arguments.only:
        for threads in arguments.threads:
            command = [sys.executable, __file__, "--here", "--threads", str(threads)]
            command += ["--folder", str(arguments.folder), "--only", name]
            command += ["--competitors", *arguments.competitors]
            command += ["--rounds", str(arguments.rounds)]
            environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
            done = subprocess.run(command, env=environment, check=False)
            if done.returncode:
                print(f"{name}, {threads} thread(s): not measured", file=sys.stderr)
    page = arguments.folder / "kernels.md"
    page.write_text(table(arguments.folder))
    print(page)


if __name__ == "__main__":
    main()
