"""The worker forked at import: when it is, when it is not, and what the program sees of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPORT = """
from accel.compile import prefork
assert not [finder for finder in sys.meta_path if type(finder).__module__ == prefork.__name__]
assert torch.__loader__ is torch.__spec__.loader
assert type(torch.__loader__).__module__ == "_frozen_importlib_external"
forked = prefork._waiting
print("forked" if forked else "not forked")
"""

COMPILES = """
def f(x):
    return torch.relu(x * 2 + 1)
accel.optimize(f)
x = torch.ones(8)
want = torch.full((8,), 3.0)
for _ in range(4):
    assert f(x).equal(want)
    assert accel.wait(60)
counters = accel.counters()
assert counters["calls_compiled"] >= 1, counters
from accel import driver
print("taken" if forked and driver.current.service.worker.pid == forked.process.pid else "started")
"""


def run(program: str, tmp_path: Path, **variables: str) -> list[str]:
    environment = {**os.environ, "ACCEL_CACHE_DIR": str(tmp_path / "cache"), **variables}
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + program],
        capture_output=True, text=True, check=False, timeout=120, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


IMPORTS = {
    "torch first": "import torch\nimport accel",
    "accel first": "import accel\nimport torch",
    "asked for before": "import importlib.util, accel\n"
    "assert importlib.util.find_spec('torch').origin\nimport torch",
    "by another module": "import accel\nimport torch.nn.functional\nimport torch",
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_the_copy_serves_the_first_worker(imports: str, tmp_path: Path) -> None:
    assert run(f"{imports}\n{REPORT}{COMPILES}", tmp_path) == ["forked", "taken"]


TOUCHED = {
    "a thread": "import threading\n"
    "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "another default dtype": "torch.set_default_dtype(torch.float64)",
    "another default device": "torch.set_default_device('meta')",
    "a mode": "torch.overrides.BaseTorchFunctionMode().__enter__()",
    "a function replaced": "torch.relu = lambda x: x.clamp(min=0)",
    "a method replaced": "torch.Tensor.mean = lambda self: self.sum() / self.numel()",
    "much memory": "big = torch.ones(150_000_000)",
}


@pytest.mark.parametrize("touch", TOUCHED.values(), ids=TOUCHED)
def test_no_copy_of_what_the_program_has_changed(touch: str, tmp_path: Path) -> None:
    assert run(f"import torch\n{touch}\nimport accel\n{REPORT}", tmp_path) == ["not forked"]


SETTINGS = {"no worker": {"ACCEL_WORKER": "0"}, "another backend": {"ACCEL_BACKEND": "eager"}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_copy_where_the_settings_want_none(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(f"import torch\nimport accel\n{REPORT}", tmp_path, **settings) == ["not forked"]


def test_a_wrong_setting_is_told_at_the_first_use(tmp_path: Path) -> None:
    (tmp_path / "accel.toml").write_text("thresold = 3\n")
    program = (
        "import torch\nimport accel\n"
        "try:\n    accel.optimize(lambda x: x)\nexcept accel.ConfigError as error:\n"
        "    print('threshold' in str(error))\n"
    )
    assert run(program, tmp_path) == ["True"]


def test_a_child_of_multiprocessing_makes_none(tmp_path: Path) -> None:
    (tmp_path / "spawning.py").write_text(
        "import multiprocessing, sys\nimport torch\nimport accel\n"
        "from accel.compile import prefork\n"
        "def child(_):\n    return prefork._waiting is not None\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(prefork._waiting is not None, *pool.map(child, [0]))\n"
    )
    program = "import runpy\nsys.path.insert(0, '.')\nrunpy.run_path('spawning.py')"
    run(program, tmp_path)
    done = subprocess.run(
        [sys.executable, "spawning.py"], capture_output=True, text=True, check=False, timeout=120,
        cwd=tmp_path, env={**os.environ, "ACCEL_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "True False\n"), done.stderr


def test_it_ends_with_a_program_that_never_compiles_and_forks_itself(tmp_path: Path) -> None:
    """A forked child that lives on does not keep the parent's worker."""
    program = (
        "import os, time\nimport torch\nimport accel\n"
        f"{REPORT}"
        "print(forked.process.pid, flush=True)\n"
        "ends = os.fork()\n"
        "if ends == 0:\n"
        "    assert prefork._waiting is None\n"
        "    os.close(1); os.close(2); time.sleep(30); os._exit(0)\n"
        "print(ends)\n"
    )
    _, worker, child = run(program, tmp_path)
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{worker}").exists()
    finally:
        os.kill(int(child), 9)
