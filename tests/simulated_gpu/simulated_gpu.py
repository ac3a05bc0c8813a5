"""Test support: a GPU that is not there, for a torch without CUDA.

In: `install()`, before torch is imported. Out: tensors on "cuda:0" whose memory is the processor's
(`device.cpp`), and launches that Triton's interpreter runs in this process. Plans carry kernels'
texts where they would carry machine code; everything between a program and a launch is accel's own. What a GPU does
beside the program (streams, waiting, faults) is not simulated.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_HERE = Path(__file__).parent
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
_PARAMETERS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)
ASSERTED = 710
launches: list[str] = []  # the names of kernels that have run
_alive: list[Any] = []


def install() -> None:
    assert "torch" not in sys.modules, "torch looks for GPUs when it is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["SIMULATED_GPU"] = "1"
    os.environ["PYTHONPATH"] = f"{_HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    keep_texts()
    library = load()
    launcher, parameters = _LAUNCHER(_launch), _PARAMETERS(_parameters)
    library.simulated_gpu_launcher(launcher, parameters)
    _alive.extend([library, launcher, parameters])
    _patch_torch()


def load() -> ctypes.CDLL:
    """Before torch is imported: the device exists."""
    folder = _build()
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    _alive.append(ctypes.CDLL(str(folder / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL))
    return library


# ---------------------------------------------------------------- building


def _build() -> Path:
    """The folder with both libraries, made once for a source and a torch."""
    source = _HERE / "device.cpp"
    key = f"{importlib.metadata.version('torch')}-{source.stat().st_mtime_ns}"
    folder = Path(tempfile.gettempdir()) / f"accel-simulated-gpu-{os.getuid()}-{key}"
    if (folder / "libtorch_cuda.so").exists():
        return folder
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    headers = Path(torch.origin).parent / "include"
    with tempfile.TemporaryDirectory() as made:
        flags = [
            "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{headers}",
            f"-L{headers.parent / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{headers.parent / 'lib'}",
        ]  # fmt: skip
        driver = Path(made) / "libcuda.so.1"
        command = ["g++", str(source), *flags, "-Wl,-soname,libcuda.so.1", "-o", str(driver)]
        subprocess.run(command, check=True)
        # What looks for symbols in the one finds those of the other.
        command = ["g++", "-shared", "-Wl,--no-as-needed", str(driver)]
        command += ["-Wl,-soname,libtorch_cuda.so", "-o", f"{made}/libtorch_cuda.so"]
        subprocess.run(command, check=True)
        folder.mkdir(exist_ok=True)
        for name in ("libcuda.so.1", "libtorch_cuda.so"):
            os.replace(Path(made) / name, folder / name)
    return folder


# ---------------------------------------------------------------- torch's side


def _patch_torch() -> None:
    import draws
    import torch

    used: list[bool] = []

    facts = SimpleNamespace(
        max_threads_per_multi_processor=2048,
        multi_processor_count=108,
        name="simulated",
        major=8,
        minor=0,
        total_memory=1 << 34,
    )
    state = torch.cuda
    state._lazy_init = lambda: used.append(True) if not used else None
    state.is_initialized = lambda: bool(used)
    state._lazy_call = lambda call, **_: call()  # seeds
    state.is_available = lambda: True
    state.device_count = lambda: 1
    state.current_device = lambda: 0
    state.get_device_name = lambda device=None: "simulated"
    state.get_device_capability = lambda device=None: (8, 0)
    state.get_device_properties = lambda device=None: facts
    state.synchronize = lambda device=None: None
    state.is_bf16_supported = lambda including_emulation=True: True
    state.is_current_stream_capturing = lambda: False
    state.default_generators = (torch.Generator("cuda"),)
    for name in ("_lazy_call", "_lazy_init", "current_device", "device_count", "is_initialized"):
        setattr(torch.cuda.random, name, getattr(state, name))
    _alive.append(draws.register())


# ---------------------------------------------------------------- compiling


class _Finder(importlib.abc.MetaPathFinder):
    """Has the compiler put kernels' texts where machine code would be, and torch say that it has CUDA."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        change = _CHANGES.get(name)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def keep_texts() -> None:
    """In this process and its copies."""
    sys.meta_path.insert(0, _Finder())


def _write_texts(module: Any) -> None:
    def content(text: str, kernels: list[Any], gpu: str) -> bytes:
        index, images, offset = [], [], 0
        for kernel in kernels:
            image = (
                json.dumps({"text": kernel.text, "signature": kernel.signature}).encode() + b"\0"
            )
            place = {"alignment": 1, "offset": offset, "size": len(image), "shared_bytes": 0}
            index.append({"symbol": kernel.symbol, "threads": 128, "images": [place]})
            images.append(image)
            offset += len(image)
        return json.dumps(index).encode() + b"\n" + b"".join(images)

    module._content = content


def _say_cuda(module: Any) -> None:
    module.cuda = "13.0"


_CHANGES = {"accel.codegen.build_triton": _write_texts, "torch.version": _say_cuda}


# ---------------------------------------------------------------- launching

_modules: dict[str, Any] = {}


def _launch(image: bytes, symbol: bytes, grid: int, arguments: Any) -> int:
    try:
        return _run(image.decode(), symbol.decode(), grid, arguments)
    except Exception:
        traceback.print_exc()
        return 999


def _parameters(image: bytes, symbol: bytes) -> int:
    return len(json.loads(image.decode())["signature"])


def _run(image: str, symbol: str, grid: int, arguments: Any) -> int:
    import numpy as np
    import torch

    from accel.codegen.emit_triton import POINTER_TYPE

    kernel, signature = _interpreted(image, symbol)
    values: list[Any] = []
    for i, type_ in enumerate(signature):
        if type_.startswith("*"):
            address = ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_uint64)).contents.value
            dtype = getattr(torch, next(d for d, p in POINTER_TYPE.items() if p == type_))
            memory = (ctypes.c_char * dtype.itemsize).from_address(address)
            values.append(torch.frombuffer(memory, dtype=dtype, count=1))
        else:
            number = {"i64": ctypes.c_int64, "i32": ctypes.c_int32, "u64": ctypes.c_uint64}
            values.append(ctypes.cast(arguments[i], ctypes.POINTER(number[type_])).contents.value)
    launches.append(symbol)
    with np.errstate(all="ignore"):
        try:
            kernel[(grid,)](*values)
        except Exception as error:
            if "out of bounds" not in f"{error!r} {error.__cause__!r} {error.__context__!r}":
                raise
            return ASSERTED
    return 0


def _assert_on_the_device() -> None:
    import numpy as np
    from triton.runtime import interpreter as ti

    def create_assert(self: Any, condition: Any, message: str) -> None:
        assert np.all(condition.data), message

    ti.InterpreterBuilder.create_assert = create_assert
    ti.interpreter_builder.options = dataclasses.replace(ti.interpreter_builder.options, debug=True)


def _interpreted(image: str, symbol: str) -> Any:
    if image not in _modules:
        import triton_interpreter

        from accel.codegen.build_triton import PREAMBLE, load_module

        if not _modules:
            triton_interpreter._mend_interpreter()
            _assert_on_the_device()
            _alive.append(tempfile.TemporaryDirectory(prefix="accel-simulated-"))
        kept = json.loads(image)
        path = Path(_alive[-1].name) / f"kernel{len(_modules)}.py"
        module = load_module("\n\n".join([PREAMBLE.read_text(), kept["text"]]), path)
        module.libdevice = triton_interpreter._DeviceLibrary()
        _modules[image] = getattr(module, symbol), kept["signature"]
    return _modules[image]
