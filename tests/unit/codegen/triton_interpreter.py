"""Test support: Triton kernels run by Triton's interpreter, in a process of its own.

In: the text of kernels as `emit_triton` writes them, and tensors. Out: the tensors, changed
in place (they lie in shared memory). Triton decides when it is imported whether it
interprets, so this process can compile and the other one interpret.

The interpreter differs from the compiler where it says so below; what it lacks is put in its
place there, from torch.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from accel.codegen.build import digest
from accel.codegen.emit_triton import POINTER_TYPE
from accel.codegen.targets import TARGETS, Target


def interpreted() -> Target:
    """The target of GPUs, but that its libraries are files of the kernels' texts by name."""
    return replace(TARGETS["cuda"], build=_write_texts)


def _write_texts(texts: dict[str, str], out_dir: Path, options: Any) -> dict[str, Any]:
    content = json.dumps({symbol: text for text, symbol in texts.items()})
    name = f"k_{digest(content)}.json"
    (out_dir / name).write_text(content)
    return {"library": name}


class TritonInterpreter:
    """The process, started when first used."""

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            self.process = context.Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        atexit.register(self.close)

    def close(self) -> None:
        if self.process.is_alive():
            self.connection.send(None)
            self.process.join(5)

    def launch(self, text: str, grid: int, memory: list[torch.Tensor], numbers: list[int]) -> None:
        """Runs the kernel `@` of a text on flat tensors; every tensor must be shareable."""
        self.connection.send((text, grid, memory, numbers))
        failure = self.connection.recv()
        if failure is not None:
            raise AssertionError(f"Triton's interpreter failed on\n{text}\n{failure}")


@functools.cache
def interpreter() -> TritonInterpreter:
    return TritonInterpreter()


# ---------------------------------------------------------------- the process


def _serve(connection: Any) -> None:
    torch.set_num_threads(1)
    _mend_interpreter()
    folder = tempfile.TemporaryDirectory(prefix="accel-interpreted-")
    modules: dict[str, Any] = {}
    while True:
        job = connection.recv()
        if job is None:
            return
        try:
            _run(modules, Path(folder.name), *job)
            connection.send(None)
        except Exception:  # the other side raises it
            connection.send(traceback.format_exc(limit=-6))


def _run(
    modules: dict[str, Any],
    folder: Path,
    text: str,
    grid: int,
    memory: list[torch.Tensor],
    numbers: list[int],
) -> None:
    import numpy as np

    from accel.codegen.build_triton import kernels_of, load_module, module_text

    kernels = kernels_of({text: "kernel"})
    if text not in modules:
        modules[text] = load_module(module_text(kernels), folder / f"kernel{len(modules)}.py")
        modules[text].libdevice = _DeviceLibrary()
    pointers = [_seen_as(t, type_) for t, type_ in zip(memory, kernels[0].signature)]
    with np.errstate(all="ignore"):
        modules[text].kernel[(grid,)](*pointers, *numbers)


def _seen_as(tensor: torch.Tensor, pointer: str) -> torch.Tensor:
    """The memory of a tensor as a kernel's parameter sees it."""
    dtype = getattr(torch, next(d for d, p in POINTER_TYPE.items() if p == pointer))
    if tensor.dtype == dtype:
        return tensor
    offset = tensor.storage_offset() * tensor.element_size() // dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(tensor.untyped_storage(), offset, (1,), (1,))


# The device library's functions, by torch. Names that torch has as well are not listed.
_LIBRARY = {"rint": torch.round, "rsqrt": lambda x: 1 / torch.sqrt(x)}


class _DeviceLibrary:
    """Stands for triton.language.extra.libdevice, which only exists on the device."""

    def __getattr__(self, name: str) -> Any:
        function = _LIBRARY.get(name) or getattr(torch, name, None) or getattr(torch.special, name)

        def call(*operands: Any) -> Any:
            import triton.language as tl
            from triton.runtime.interpreter import TensorHandle

            first = operands[0]
            values = [torch.from_numpy(o.handle.data.copy()) for o in operands]
            result = function(*torch.broadcast_tensors(*values)).numpy()
            type_ = tl.block_type(first.dtype, list(result.shape)) if first.shape else first.type
            return tl.tensor(TensorHandle(result, first.dtype), type_)

        return call


def _mend_interpreter() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter as ti

    cast = ti.InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, type_: Any) -> Any:
        """bfloat16 is rounded, where the interpreter truncates."""
        scalar = type_.scalar
        if source.dtype.scalar == tl.float32 and scalar == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return ti.TensorHandle(values.view(torch.int16).numpy().view(np.uint16), scalar)
        if source.dtype.scalar == tl.bfloat16 and scalar == tl.float32:
            bits = np.ascontiguousarray(source.data).astype(np.uint32) << 16
            return ti.TensorHandle(bits.view(np.float32), scalar)
        return cast(self, source, type_)

    def generic_reduce(self: Any, inputs: Any) -> Any:
        """By halves, where the interpreter goes through elements one by one."""
        (block,) = inputs
        data = np.moveaxis(block.handle.data, self.axis, 0)
        while len(data) > 1:
            half = len(data) // 2
            first, second = (self.to_tensor(d, block.dtype) for d in (data[:half], data[half:]))
            data = self.combine_fn.fn(first, second).handle.data
        result = data[0]
        if self.keep_dims:
            result = np.expand_dims(result, self.axis)
        return (self.to_tensor(result, block.dtype),)

    atomic = ti.InterpreterBuilder.create_atomic_rmw

    def atomic_rmw(self: Any, op: Any, *handles: Any) -> Any:
        """Of what is broadcast too, which the interpreter takes for dense memory."""
        dense = [
            ti.TensorHandle(np.ascontiguousarray(h.data), h.dtype)
            if isinstance(h, ti.TensorHandle)
            else h
            for h in handles
        ]
        return atomic(self, op, *dense)

    ti.InterpreterBuilder.create_atomic_rmw = atomic_rmw

    def create_dot(self: Any, a: Any, b: Any, sums: Any, precision: Any, most: Any) -> Any:
        """In float32, also of bfloat16, whose bits the interpreter multiplies."""
        wide = (cast_impl(self, x, tl.float32).data for x in (a, b))
        return ti.TensorHandle(np.matmul(*wide, dtype=np.float32) + sums.data, sums.dtype.scalar)

    ti.InterpreterBuilder.create_dot = create_dot
    patch = ti._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        """Bounds of loops, of which newer numpys make no int by themselves."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    ti._patch_lang_tensor = patch_tensor
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui"):
        setattr(ti.InterpreterBuilder, f"create_{name}", cast_impl)
    ti.InterpreterBuilder.cast_impl = cast_impl
    ti.ReduceOps.generic_reduce = generic_reduce
