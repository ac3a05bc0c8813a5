"""A process in which torch.compile has run before: its patches of torch change nothing here."""

from __future__ import annotations

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
