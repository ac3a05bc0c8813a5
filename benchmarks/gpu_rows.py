"""The rows that a GPU has, their targets, and the table of what was measured of them.

In: nothing, and a folder of results (`gpu-<row>.json`). Out: `GPU_ROWS`, and a Markdown table in which a
group that nobody has measured has one empty row. Invariant: a number in the table was measured on
the GPU that stands beside it.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_kernels import KERNELS
from calls import Subject, bert, gpt2, resnet50, tiny, vit
from measure import interval_text

MB = 1 << 20
SIZES = {"1M": MB, "16M": 16 * MB, "256M": 256 * MB, "1G": 1024 * MB}  # bytes of the first tensor
COLUMNS = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALVES = ("fp16", "bf16")
COMPETITORS = ("eager", "torch.compile", "max-autotune", "copy", "accel")


@dataclass(frozen=True)
class Group:
    """Rows that have one target: `over[name]` times the speed of competitor `name`, of each row or of
    their geometric mean."""

    name: str
    title: str
    target: str
    over: dict[str, float]
    geomean: bool = False


@dataclass(frozen=True)
class GpuRow:
    """One row. `make` gives what is called, made on the device that is torch's default then; `trains`:
    it gives a model and a step instead, as rows of run_training.py do."""

    name: str
    group: str
    make: Callable[[], Any]
    rounds: int = 21
    dtype: torch.dtype = torch.float32
    trains: bool = False
    clock: str = "events"  # a key of CLOCKS in bench_gpu.py


GROUPS = (
    Group(
        "kernels",
        "pointwise, softmax, layernorm, RMSNorm, cross-entropy, 1 MB to 1 GB",
        "90% of the copy's bandwidth, 1.0x torch.compile",
        {"copy": 0.9, "torch.compile": 1.0},
    ),
    Group("tiny", "processor time of a call of a tiny function", "10 us", {}),
    Group(
        "models",
        "BERT-base, GPT-2, Llama-1B-like, ViT, ResNet-50, fp16 and bf16, inference",
        "1.1x torch.compile (geometric mean)",
        {"torch.compile": 1.1},
        geomean=True,
    ),
    Group(
        "steps",
        "training steps of the same",
        "1.05x torch.compile (geometric mean)",
        {"torch.compile": 1.05},
        geomean=True,
    ),
    Group("first", "time to the first result", "eager's + 0.5 s", {}),
)
TINY_US, FIRST_S = 10.0, 0.5


def cross_entropy(rows: int, dtype: torch.dtype) -> Subject:
    def kernel(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels)

    logits = torch.randn(rows, COLUMNS).to(dtype)
    return Subject(kernel, (logits, torch.randint(0, COLUMNS, (rows,))))


def llama() -> Subject:
    """The sizes of Llama 3.2 1B, 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    return Subject(LlamaForCausalLM(config).eval(), (torch.randint(0, 128000, (1, 512)),))


def resnet50_batch() -> Subject:
    subject = resnet50()
    return Subject(subject.target, (torch.rand(32, 3, 224, 224),))


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "resnet50": resnet50_batch}


def in_dtype(make: Callable[[], Subject], dtype: torch.dtype) -> Subject:
    """A model and its inputs in another dtype."""
    subject = make()

    def cast(value: Any) -> Any:
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floats else value

    kwargs = {k: cast(v) for k, v in (subject.kwargs or {}).items()}
    return Subject(subject.target.to(dtype), tuple(cast(a) for a in subject.args), kwargs)


def training_step(make: Callable[[], Subject]) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """A model and a whole step of it: forward and loss under autocast, backward, AdamW."""
    subject = make()
    model = subject.target.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # so that losses can be compared
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    device = next(model.parameters()).device.type

    def step(called: Any) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            result = called(*subject.args, **(subject.kwargs or {}))
            out = result if isinstance(result, torch.Tensor) else result[0]
            loss = out.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, step


def _rows() -> tuple[GpuRow, ...]:
    rows = []
    kernels = {k: v for k, v in KERNELS.items() if not k.startswith("sum")}
    for name, make in (kernels | {"cross-entropy": cross_entropy}).items():
        for size, nbytes in SIZES.items():
            for mark in ("fp32", "bf16"):
                dtype = DTYPES[mark]
                made = functools.partial(make, nbytes // COLUMNS // dtype.itemsize, dtype)
                rows.append(GpuRow(f"{name}-{size}-{mark}", "kernels", made, dtype=dtype))
    rows.append(GpuRow("tiny", "tiny", tiny, 60, clock="enqueue"))
    rows.append(GpuRow("first", "first", bert, 5, clock="processes"))
    for name, model in MODELS.items():
        for mark in HALVES:
            cast = functools.partial(in_dtype, model, DTYPES[mark])
            rows.append(GpuRow(f"{name}-{mark}", "models", cast, 15, DTYPES[mark]))
        stepped = functools.partial(training_step, model)
        rows.append(GpuRow(f"step-{name}", "steps", stepped, 15, torch.bfloat16, trains=True))
    return tuple(rows)


GPU_ROWS = {row.name: row for row in _rows()}


# ---------------------------------------------------------------- table


def gpu_table(folder: Path) -> str:
    """What was measured on GPUs; groups without a record are empty rows."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    head = ["what", "machine", *(f"{n} us" for n in COMPETITORS)]
    head += ["x eager", "x torch.compile", "x max-autotune", "x copy", "target", "met"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for group in GROUPS:
        mine = [r for r in records if r["group"] == group.name]
        if not mine:
            cells = [group.title, *[""] * (len(head) - 3), group.target, ""]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [_line(r, group) for r in mine]
        if group.geomean and mine:
            lines.append(_mean_line(mine, group, len(head)))
    return "\n".join(lines)


def _line(record: dict[str, Any], group: Group) -> str:
    start = [record["row"], record["machine"]["gpu"]]
    if "not_measured" in record:
        reason = record["not_measured"].replace("|", "/")
        return "| " + " | ".join([*start, f"not measured: {reason}"]) + " |"
    us, ratios = record["us"], record["speedup"]
    cells = [*start, *(interval_text(us.get(n), 1) for n in COMPETITORS)]
    cells += [
        interval_text(ratios.get(n), 2) for n in ("eager", "torch.compile", "max-autotune", "copy")
    ]
    return "| " + " | ".join([*cells, group.target, _verdict(record, group)]) + " |"


def _verdict(record: dict[str, Any], group: Group) -> str:
    facts = record["facts"].get("accel", {})  # nothing of processes: a first call is the body's
    if not facts.get("served_compiled", True):
        return "**no** (not compiled)"
    if not facts.get("agrees", True):
        return "**no** (another result)"
    if group.name == "tiny":
        met = record["us"]["accel"]["low"] <= TINY_US
    elif group.name == "first":
        met = (record["us"]["accel"]["median"] - record["us"]["eager"]["median"]) / 1e6 <= FIRST_S
    elif group.geomean:
        return ""
    else:
        # Met where the interval holds the target.
        met = all(record["speedup"][n]["high"] >= least for n, least in group.over.items())
    return "yes" if met else "**no**"


def _mean_line(records: list[dict[str, Any]], group: Group, width: int) -> str:
    cells = [f"**{group.name}, geometric mean**", *[""] * (width - 1)]
    columns = {"eager": -6, "torch.compile": -5, "max-autotune": -4}
    measured = [r for r in records if "speedup" in r]
    met = bool(measured)
    for name, column in columns.items():
        ratios = [r["speedup"][name]["median"] for r in measured if name in r["speedup"]]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            cells[column] = f"{mean:.2f}"
            met = met and mean >= group.over.get(name, 0.0)
    served = all(_served(r) for r in measured)
    cells[-2:] = [group.target, "yes" if met and served else "**no**"]
    return "| " + " | ".join(cells) + " |"


def _served(record: dict[str, Any]) -> bool:
    facts = record["facts"]["accel"]
    return bool(facts["served_compiled"] and facts["agrees"])
