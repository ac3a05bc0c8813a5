"""torch.compile in the same process: its patches of torch change nothing here, nor we its work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import children

SOURCE = """
from torch import nn
torch.compile(nn.Linear(3, 3), backend="eager")(torch.randn(2, 3))
assert nn.Module.__init__.__module__ == "torch._dynamo.mutation_guard"  # else this shows nothing

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers[:2]:  # a slice of a ModuleList is a new module
            x = layer(x)
        return x

model = Layers().eval()
with torch.no_grad():
    truth = model(x)
    accel.optimize(model)
    for _ in range(5):
        torch.testing.assert_close(model(x), truth)
        assert accel.wait(60)
counters = accel.counters()
print(json.dumps({"breaks": counters["graph_breaks"], "served": counters["calls_compiled"]}))
"""


def test_modules_made_in_a_forward() -> None:
    done = children.run(SOURCE)
    assert done.code == 0, done.stderr
    assert done.facts["breaks"] == 0
    assert done.facts["served"] >= 3


SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 8)

    def forward(self, x):
        return self.a(x).relu()

def broken(x):
    x = x * 2
    torch._dynamo.graph_break()
    return plain(x).relu()

def plain(x):
    return (x * 2).exp()

def main():
    torch.manual_seed(0)
    net, function = torch.compile(Net(), backend="eager"), torch.compile(broken, backend="eager")
    x = torch.ones(2, 4)
    for _ in range(8):
        print(net(x).sum().item(), function(x).sum().item(), plain(x).sum().item())
    print(torch._dynamo.utils.counters["stats"]["unique_graphs"])

main()
"""


def test_torch_compile_in_a_program_that_accel_runs(tmp_path: Path) -> None:
    """Where Dynamo evaluates frames it does so alone: it traces none of ours, and no recording
    begins there."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "ACCEL_SYNC": "1", "OMP_NUM_THREADS": "1"}

    def output(*command: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, *command, str(script)],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    want, _ = output()
    got, errors = output("-m", "accel", "run")
    assert got == want
    assert "internal error" not in errors and "Dynamo does not know" not in errors
    assert " ran compiled" in errors  # `plain`, where main calls it


SPLIT = """
def f(x, flag):
    y = x.sin() + 1
    if flag:
        print(id(y) > 0)
    for k in range(2):
        y = y * 2
        if k:
            torch._dynamo.graph_break()
    with torch.no_grad():
        z = y.cos()
        print(id(z) > 0)
    return z + y

x = torch.randn(4)
truth = f(x, True)
f = accel.optimize(f)
for _ in range(8):
    torch.testing.assert_close(f(x, True), truth)
    assert accel.wait(60)
compiled = torch.compile(f, backend="eager")
for _ in range(3):
    torch.testing.assert_close(compiled(x, True), truth)
torch._dynamo.reset()
whole = torch.compile(lambda x: f(x, True) if x.dim() else x, backend="eager")
torch.testing.assert_close(whole(x), truth)
print(json.dumps({"split": accel.counters()["segments_served"]}))
"""


def test_torch_compile_of_a_function_that_is_split() -> None:
    done = children.run(SPLIT)
    assert done.code == 0, done.stderr
    assert done.facts["split"] > 0
