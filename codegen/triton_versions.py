"""Everything that depends on which Triton is installed, in one place.

In: nothing. Out: what compiled kernels look like to the driver, and whether the installed
Triton is one of which that is known. Imports no Triton. The combination to support on GPU
machines is torch 2.11 with CUDA 13 and Triton 3.6.
"""

from __future__ import annotations

import importlib.metadata

from accel.errors import MissingError

# Behind its own parameters a kernel takes pointers to scratch memory, null where it needs none:
# global and profile scratch (triton/backends/nvidia/driver.py). The tests' kernels were compiled by
# each of these versions.
SCRATCH_POINTERS = {(3, 5): 2, (3, 6): 2, (3, 7): 2, (3, 8): 2, (3, 9): 2}
# Of GPUs that these versions compile for; LLVM ends the process at one it does not know.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
# What one program may have of a multiprocessor's shared memory (CUDA programming guide, table
# "Technical specifications per compute capability").
SHARED_BYTES = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
}


def version() -> tuple[int, int] | None:
    """The installed Triton's version, None when there is none."""
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def missing() -> str | None:
    """Why no Triton kernel can be compiled here, None when one can."""
    found = version()
    if found is None:
        return "Triton is not installed (pip install triton==3.6.*)"
    if found not in SCRATCH_POINTERS:
        known = ", ".join("{}.{}".format(*v) for v in SCRATCH_POINTERS)
        text = "Triton {}.{} is not supported, only {} (pip install triton==3.6.*)"
        return text.format(*found, known)
    return None


def scratch_pointers() -> int:
    """How many null pointers a launch passes behind the kernel's parameters.

    Errors: MissingError when there is no supported Triton.
    """
    why = missing()
    if why is not None:
        raise MissingError(why)
    found = version()
    assert found is not None
    return SCRATCH_POINTERS[found]
