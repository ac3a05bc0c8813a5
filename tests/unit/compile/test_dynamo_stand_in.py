"""The stand-in for torch._dynamo makes way, whatever asks for the real package first."""

from __future__ import annotations

import subprocess
import sys

import pytest

ASKING = {
    "an attribute": "torch._dynamo.allow_in_graph",
    "a submodule": "import torch._dynamo.source",
    "a name of a submodule": "from torch._dynamo.source import GlobalSource",
}


@pytest.mark.parametrize("asks", ASKING.values(), ids=ASKING)
def test_the_real_package_comes_when_it_is_asked_for(asks: str) -> None:
    program = f"""
import sys
import torch
from accel.compile import dynamo_stand_in
assert "torch._dynamo" not in sys.modules
dynamo_stand_in.install()
assert torch._dynamo.disable(len) is len
assert type(sys.modules["torch._dynamo"]).__name__ == "_StandIn"
{asks}
import torch._dynamo.source
assert type(torch._dynamo).__name__ == "module"
assert sys.modules["torch._dynamo"] is torch._dynamo
assert sys.modules["torch._dynamo.source"].get_global_source_name
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
