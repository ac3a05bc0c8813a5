"""The stand-in for Dynamo in a process of its own: what asks for more gets the real package."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WANTED = {
    "its settings come without the package": (
        "import torch._dynamo.config as c; print(c.__name__, 'stand_in' in repr(type(D())))",
        "torch._dynamo.config True",
    ),
    "a part that imports others in a circle": (
        "import torch._dynamo.source as s; print(D() is s.__spec__ or s.ConstantSource('x').name)",
        "x",
    ),
    "a part by `from`": (
        "from torch._dynamo.exc import TorchDynamoException as e; print(e.__name__)",
        "TorchDynamoException",
    ),
    "torch's shape environment": (
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv; ShapeEnv(); print('made')",
        "made",
    ),
    "the real package is whole": (
        "import torch._dynamo.exc; print('stand_in' in repr(type(D())), callable(D().optimize))",
        "False True",
    ),
}
HEAD = (
    "import sys, torch\n"
    "from accel.compile import dynamo_stand_in\n"
    "dynamo_stand_in.install()\n"
    "D = lambda: sys.modules['torch._dynamo']\n"
)


@pytest.mark.parametrize("name", WANTED)
def test_what_is_wanted(name: str) -> None:
    code, answer = WANTED[name]
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code],
        capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == answer
