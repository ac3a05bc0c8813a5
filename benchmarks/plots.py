"""Draws what bench.py measured: kernels by size, models beside their competitors.

In: the records of kernel rows. Out: `kernels.svg` and `models.svg` in the folder of results. Invariant: a bar is a
median of that folder, its whisker the 95% interval; what was not measured is not drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

SIZES = ("4K", "256K", "16M", "256M")
OTHERS = ("eager", "torch.compile", "freezing", "cpp_wrapper")
COLOURS = {"eager": "#9a9a9a", "torch.compile": "#4878a8", "freezing": "#6ab0c0", "cpp_wrapper": "#b08a4a"}  # fmt: skip
# Files of equal numbers are equal.
plt.rcParams.update({"svg.hashsalt": "accel", "font.size": 9})


def write_plots(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Both pages, as far as there is something on them."""
    kernels = [r for r in records if "bytes" in r["facts"].get("copy", {})]
    models = [r for r in records if r not in kernels and not r["row"].startswith("linear")]
    pages = [("kernels.svg", kernels, _kernels), ("models.svg", models, _models)]
    return [draw(rows, folder / name) for name, rows, draw in pages if rows]


def _kernels(records: list[dict[str, Any]], path: Path) -> Path:
    """A panel for each dtype and number of threads: how much faster than torch.compile, by size."""
    panels = sorted({(_is_bf16(r), r["threads"]) for r in records})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, (bf16, threads) in zip(axes[0], panels, strict=True):
        chosen = [r for r in records if (_is_bf16(r), r["threads"]) == (bf16, threads)]
        for name in dict.fromkeys(r["row"].split("-")[0] for r in chosen):
            of_size = {r["row"].split("-")[1]: r["speedup"].get("torch.compile") for r in chosen if r["row"].split("-")[0] == name}  # fmt: skip
            points = [(s, of_size[s]["median"]) for s in SIZES if of_size.get(s)]
            axis.plot([SIZES.index(s) for s, _ in points], [m for _, m in points], "o-", label=name, ms=4, lw=1.2)  # fmt: skip
        targets = {r["row"].split("-")[1]: r["target"] for r in chosen}
        axis.plot([SIZES.index(s) for s in SIZES if s in targets], [targets[s] for s in SIZES if s in targets], "k_", ms=18, label="target")  # fmt: skip
        axis.axhline(1, color="#888888", lw=0.8)
        axis.set_yscale("log")
        axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        axis.set_xticks(range(len(SIZES)), [f"{s}B" for s in SIZES])
        axis.set_title(f"{'bfloat16' if bf16 else 'float32'}, {threads} thread(s)")
        axis.grid(axis="y", alpha=0.25)
    axes[0][0].set_ylabel("times as fast as torch.compile")
    axes[0][-1].legend(fontsize=8, frameon=False)
    return _save(figure, path)


def _models(records: list[dict[str, Any]], path: Path) -> Path:
    """Bars for each model: how much faster than each competitor."""
    records = sorted(records, key=lambda r: (r["threads"], _is_bf16(r)))
    figure, axis = plt.subplots(figsize=(max(5.0, 1.1 * len(records)), 3.8))
    width = 0.8 / len(OTHERS)
    for k, other in enumerate(OTHERS):
        shown = [(i, r["speedup"][other]) for i, r in enumerate(records) if other in r["speedup"]]
        low = [v["median"] - v["low"] for _, v in shown]
        high = [v["high"] - v["median"] for _, v in shown]
        axis.bar(
            [i + (k - 1.5) * width for i, _ in shown], [v["median"] - 1 for _, v in shown], width, 1,
            yerr=[low, high], color=COLOURS[other], label=other, error_kw={"lw": 0.8},
        )  # fmt: skip
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks(
        range(len(records)),
        [f"{r['row']}\n{r['threads']} thr." for r in records],
        fontsize=8,
    )
    axis.set_ylabel("times as fast as")
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="upper left")
    axis.set_yscale("log")
    ticks = (0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50)
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.25)
    axis.set_ylim(0.8, max(v["median"] for r in records for v in r["speedup"].values()) * 1.8)
    return _save(figure, path)


def _is_bf16(record: dict[str, Any]) -> bool:
    return str(record["row"]).endswith("-bf16")


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
