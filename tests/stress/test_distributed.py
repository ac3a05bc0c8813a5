"""Distributed data parallel training with gloo on one machine, as torchrun starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RANKS = 2
# An ordinary script; only its last lines know of accel, when that runs it. The ranks drift apart,
# so that they record and compile at different moments. It leaves without Python's finalisation, in
# which gloo's threads, with accel or without, may drop a tensor and abort the process
# (pytorch/pytorch issues 179291 and 190489).
SCRIPT = """
import json, os, sys, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
layers = [nn.Linear(16, 48), nn.ReLU(), nn.BatchNorm1d(48), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 4)]
model = DistributedDataParallel(nn.Sequential(*layers))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(rank)
losses = []
for step in range(60):
    x = torch.randn(24, 16, generator=generator)
    y = (x.sum(1) > 0).long() + 2 * (x[:, 0] > 0).long()
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if rank == 1 and step % 7 == 0:
        time.sleep(0.02)
    if step == 10 + 5 * rank and "accel" in sys.modules:
        sys.modules["accel"].wait(60)
facts = {"rank": rank, "losses": losses}
facts["parameters"] = [p.detach().double().sum().item() for p in model.parameters()]
if "accel" in sys.modules:
    facts["counters"] = sys.modules["accel"].counters()
with open(f"{sys.argv[1]}.{rank}", "w") as file:
    json.dump(facts, file)
dist.barrier()
del model, optimizer, loss
dist.destroy_process_group()
os._exit(0)
"""


def _train(folder: Path, name: str, *prefix: str) -> list[dict[str, Any]]:
    script = folder / "train_parallel.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCEL_CACHE_DIR=str(folder / "cache"))
    done = subprocess.run(
        [*launcher, "--standalone", *prefix, str(script), str(folder / name)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{folder / name}.{rank}").read_text()) for rank in range(RANKS)]


def _farthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_ranks_train_as_without_accel(tmp_path: Path) -> None:
    expected = _train(tmp_path, "eager")
    got = _train(tmp_path, "accel", "-m", "accel", "run", "--quiet")
    for without, under in zip(expected, got, strict=True):
        assert "counters" not in without
        assert _farthest(without["losses"], under["losses"]) < 1e-4
        assert _farthest(without["parameters"], under["parameters"]) < 1e-3
        counters = under["counters"]
        assert counters["calls_compiled"] >= 30 and counters["backwards_compiled"] >= 30
        assert counters["optimizer_steps"] >= 55
    assert _farthest(got[0]["parameters"], got[1]["parameters"]) == 0  # the ranks agree
