"""A slow plan runner: the contract of docs/architecture.md in Python.

In: a plan, its library, input tensors. Out: output tensors, or None when a speculation
failed. Kernels are called through ctypes, or by Triton's interpreter where the library is a
file of their texts (`triton_interpreter`); externs through torch.ops.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import torch


def run_plan(
    plan: dict[str, Any], library: Path | None, inputs: list[torch.Tensor], threads: int = 1
) -> list[torch.Tensor] | None:
    return _Runner(plan, library, inputs, threads).run()


class _Runner:
    def __init__(
        self, plan: dict[str, Any], library: Path | None, inputs: list[torch.Tensor], threads: int
    ) -> None:
        self.plan, self.inputs, self.threads = plan, inputs, threads
        interpreted = library is not None and library.suffix == ".json"
        self.texts = json.loads(library.read_text()) if interpreted and library else {}
        self.library = ctypes.CDLL(str(library)) if library and not interpreted else None
        self.arena = torch.full((max(plan["arena_bytes"], 1),), 0xAB, dtype=torch.uint8)
        self.tensors: dict[int, torch.Tensor] = {}

    def run(self) -> list[torch.Tensor] | None:
        with torch.no_grad():
            for step in self.plan["steps"]:
                self.step(step)
            for s in self.plan["speculations"]:
                if bool(self.tensor(s["buffer"])) != s["expected"]:
                    return None
            for step in self.plan["commit"]:
                self.step(step)
            return [self.tensor(b) for b in self.plan["outputs"]]

    def tensor(self, b: int) -> torch.Tensor:
        if b not in self.tensors:
            self.tensors[b] = self._make(self.plan["buffers"][b])
        return self.tensors[b]

    def _make(self, row: dict[str, Any]) -> torch.Tensor:
        if row["kind"] == "input":
            return self.inputs[row["index"]]
        assert row["kind"] != "dynamic", "a dynamic buffer is read before it is bound"
        dtype = getattr(torch, row["dtype"])
        sizes, strides = row["sizes"], row["strides"]
        if row["kind"] == "view":
            base = self.tensor(row["base"])
            offset = base.storage_offset() * base.element_size() // dtype.itemsize + row["offset"]
            if base.dtype != dtype:
                base = torch.empty(0, dtype=dtype).set_(base.untyped_storage())
            return base.as_strided(sizes, strides, offset)
        if row["kind"] == "output":
            return torch.empty_strided(sizes, strides, dtype=dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(sizes, strides)) if 0 not in sizes else 0
        assert row["offset"] + span * dtype.itemsize <= self.plan["arena_bytes"]
        flat = torch.empty(0, dtype=dtype).set_(self.arena.untyped_storage())
        return flat.as_strided(sizes, strides, row["offset"] // dtype.itemsize)

    def step(self, step: dict[str, Any]) -> None:
        if step["op"] == "free":
            del self.tensors[step["buffer"]]
        elif step["op"] == "kernel":
            pointers = [self.tensor(b).data_ptr() for b in step["buffers"]]
            memory = (ctypes.c_void_p * len(pointers))(*pointers)
            threads = self.threads if step["parallel"] else 1
            getattr(self.library, step["symbol"])(memory, ctypes.c_long(threads))
        elif step["op"] == "launch":
            self.launch(step)
        else:
            self.extern(step)

    def launch(self, step: dict[str, Any]) -> None:
        from triton_interpreter import interpreter

        memory = [self.tensor(b) for b in step["buffers"]]
        flat = [t.as_strided((1,), (1,)) for t in memory]
        interpreter().launch(self.texts[step["symbol"]], step["grid"], flat, step["numbers"])

    def extern(self, step: dict[str, Any]) -> None:
        namespace, rest = step["target"].split("::")
        name, _, overload = rest.partition(".")
        op = getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
        kwargs = {k: self.argument(v) for k, v in step["kwargs"].items()}
        out = op(*(self.argument(a) for a in step["args"]), **kwargs)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        for b, t in zip(step["results"], outs):
            if b is not None:
                row = self.plan["buffers"][b]
                assert list(t.shape) == row["sizes"], (step["target"], t.shape, row)
                if list(t.stride()) != row["strides"] and t.numel() > 1:
                    t = torch.empty_strided(row["sizes"], row["strides"], dtype=t.dtype).copy_(t)
                self.tensors[b] = t

    def argument(self, a: dict[str, Any]) -> Any:
        ((tag, v),) = a.items()
        if tag == "b":
            return self.tensor(v)
        if tag == "bl":
            return [None if b is None else self.tensor(b) for b in v]
        if tag == "f":
            return _float(v)
        if tag == "fl":
            return [_float(x) for x in v]
        if tag in ("dtype", "layout", "memory_format"):
            return getattr(torch, v)
        return {"none": None, "device": torch.device(v) if tag == "device" else v}.get(tag, v)


def _float(text: str) -> float:
    return float(text) if text in ("nan", "inf", "-inf") else float.fromhex(text)
