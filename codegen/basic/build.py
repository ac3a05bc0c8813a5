"""Building: C++ text becomes a shared library, once for equal text.

In: source. Out: a file name in `out_dir`. Invariant: the name is a hash of text, flags and
CPU; a library appears whole (temporary name, atomic rename).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from accel.errors import CompileError

# -ffast-math is absent on purpose: it breaks the rounding inside exp.
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti", "-fopenmp", "-mprefer-vector-width=512"]


@functools.cache
def compiler() -> str:
    """The C++ compiler. Errors: CompileError when there is none."""
    named = os.environ.get("CXX")
    for name in (named, "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return name
    raise CompileError("no C++ compiler found; install g++")


@functools.cache
def _machine() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return ""


def build(source: str, out_dir: Path) -> str:
    """The library of `source`. Errors: CompileError with the compiler's first lines."""
    digest = hashlib.sha256(" ".join([source, *FLAGS, compiler(), _machine()]).encode())
    name = f"k_{digest.hexdigest()[:24]}.so"
    if (out_dir / name).exists():
        return name
    with tempfile.TemporaryDirectory(dir=out_dir) as directory:
        text = Path(directory) / "kernels.cpp"
        text.write_text(source)
        made = Path(directory) / name
        command = [compiler(), *FLAGS, "-o", str(made), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            first = "\n".join(done.stderr.splitlines()[:8])
            raise CompileError(f"{compiler()} failed:\n{first}")
        os.replace(made, out_dir / name)
    return name
