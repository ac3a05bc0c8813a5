"""The rewriter's tests under every other CPython that this machine has; none needs torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accel.rewriter import layout

HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "src"
# Pure Python, so this environment's copies run under any of them.
PACKAGES = ("bytecode", "pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")


def interpreters() -> dict[str, str]:
    """A `python` for each supported version besides our own."""
    found = {}
    wanted = [v for v in layout.SUPPORTED if v != sys.version_info[:2]]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in wanted:
        name = "{}.{}".format(*version)
        candidates = [str(p) for p in sorted(pyenv.glob(f"{name}.*/bin/python"))]
        on_path = shutil.which(f"python{name}")
        for candidate in [*([on_path] if on_path else []), *candidates]:
            probe = subprocess.run(
                [candidate, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"],
                capture_output=True,
                text=True,
                check=False,
            )  # a pyenv shim exists for versions that are not active
            if probe.stdout.strip() == name:
                found[name] = candidate
                break
    return found


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libraries")
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        (folder / source.name).symlink_to(source)
    return folder


@pytest.mark.parametrize(("name", "python"), sorted(interpreters().items()))
def test_rewriter_under(name: str, python: str, libraries: Path) -> None:
    files = [
        str(HERE / "test_opcodes.py"),
        str(HERE / "test_twin.py"),
        str(HERE / "test_islands.py"),
    ]
    ran = subprocess.run(
        [python, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
         "--rootdir", str(HERE), *files],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(libraries)]),
             "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None and int(passed[1]) > 80, ran.stdout[-500:]
