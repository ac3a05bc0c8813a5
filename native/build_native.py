"""Builds ``accel._native`` against the installed torch.

In: the extension declared in pyproject.toml. Out: the shared object, and beside
it ``_native_build.json``, which names the Python and torch it was built for, so
that `accel.runtime` can refuse a stale build in one line instead of crashing; and
``_products/``, the objects of generated code that are the same for every program.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from setuptools.build_meta import *  # noqa: F403  (PEP 517: this module is the build backend)
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

# errno after a square root would keep loops with one from being vectorised.
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
]
LIBRARIES = ["c10", "torch", "torch_cpu", "torch_python"]


class BuildNative(BuildExtension):
    """setuptools ``build_ext`` with torch's include paths and our flags.

    Set ``ACCEL_SANITIZE=address,undefined`` in the environment for a sanitizer build.
    """

    def build_extensions(self) -> None:
        import pybind11

        sanitize = os.environ.get("ACCEL_SANITIZE")
        for extension in self.extensions:
            extension.include_dirs += [*include_paths(), pybind11.get_include(), "native"]
            extension.library_dirs += library_paths()
            extension.libraries += LIBRARIES
            extension.extra_compile_args += FLAGS
            extension.extra_link_args += ["-Wl,--as-needed"]
            extension.language = "c++"
            if sanitize:
                extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g1"]
                extension.extra_compile_args += extra
                extension.extra_link_args += extra
        super().build_extensions()

    def run(self) -> None:
        super().run()
        for extension in self.extensions:
            built = Path(self.get_ext_fullpath(extension.name))
            facts = {"python": list(sys.version_info[:2]), "torch": torch.__version__}
            targets = {built.parent}
            if self.inplace or self.editable_mode:
                targets.add(Path("src/accel"))
            for target in targets:
                if target.is_dir():
                    (target / "_native_build.json").write_text(json.dumps(facts))
                    prebuild_products(target / "_products")


def prebuild_products(folder: Path) -> None:
    """The matrix products of this machine; where that fails, they are made at first need."""
    sys.path.insert(0, "src")
    worker = os.environ.get("ACCEL_WORKER")
    os.environ["ACCEL_WORKER"] = "0"  # a build needs none, and not the module that was built
    try:
        from accel.codegen import CompileError, build, trials

        try:
            build.prebuild(folder.resolve())
            trials.prebuild(folder.resolve())
        except CompileError as error:
            raise RuntimeError(str(error)) from error
    except (ImportError, OSError, RuntimeError) as error:
        print(f"accel: matrix products are not built ahead: {error}", file=sys.stderr)
    finally:
        sys.path.remove("src")
        if worker is None:
            del os.environ["ACCEL_WORKER"]
        else:
            os.environ["ACCEL_WORKER"] = worker
