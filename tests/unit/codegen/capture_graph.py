"""Test support: callables -> SegmentGraphs, and plans run beside eager.

In: a function of tensors. Out: the `SegmentGraph` of its torch calls, as a recording would
give it, and a comparison of the compiled plan with eager.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from accel.codegen import pipeline
from accel.codegen.options import CodegenOptions
from accel.trace import Operation, Ref, SegmentGraph, TensorMeta, resolve

# Whether plans may be run by the native executor: not while Triton's interpreter runs kernels.
NATIVE = True
_OUT_DIR = Path(tempfile.mkdtemp(prefix="accel_codegen_tests_"))


class _Recorder(TorchFunctionMode):
    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.names: dict[int, str] = {id(t): f"x{i}" for i, t in enumerate(inputs)}
        self.alive: list[Any] = list(inputs)
        self.sources = list(inputs)
        self.inputs = [(f"x{i}", TensorMeta.of(t)) for i, t in enumerate(inputs)]
        self.operations: list[Operation] = []

    def ref(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.names:  # a weight: it becomes an input
                name = f"x{len(self.inputs)}"
                self.names[id(value)] = name
                self.inputs.append((name, TensorMeta.of(value)))
                self.alive.append(value)
                self.sources.append(value)
            return Ref(self.names[id(value)])
        if isinstance(value, (list, tuple)):
            items = [self.ref(v) for v in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {k: self.ref(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(self.ref(value.start), self.ref(value.stop), self.ref(value.step))
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = self.ref(args), self.ref(kwargs)
        out = func(*args, **kwargs)
        tensors = out if isinstance(out, (tuple, list)) else [out]
        writes = getattr(func, "__name__", "") == "__setitem__"
        if not writes and not any(isinstance(t, torch.Tensor) for t in tensors):
            return out
        self.alive.append(out)
        if isinstance(out, torch.Tensor) and id(out) in self.names and _is_getter(func):
            return out
        kind, target = _name(func)
        name = f"v{len(self.operations)}"
        self.operations.append(Operation(name, kind, target, *inputs))
        if out is None:
            return out
        if isinstance(out, torch.Tensor):
            self.names[id(out)] = name
        else:
            for i, t in enumerate(out):
                if isinstance(t, torch.Tensor):
                    item = f"v{len(self.operations)}"
                    self.operations.append(
                        Operation(item, "call_function", "_operator.getitem", (Ref(name), i))
                    )
                    self.names[id(t)] = item
                    self.alive.append(t)
        return out


def _is_getter(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _name(func: Any) -> tuple[str, str]:
    if _is_getter(func):
        return "getter", func.__self__.__name__
    if isinstance(func, torch._ops.OpOverload):
        return "call_function", f"torch.ops.{func}"
    name = resolve_name(func) or f"{func.__module__}.{func.__name__}"
    short = func.__name__
    if getattr(torch.Tensor, short, None) is func or name.startswith("torch.Tensor."):
        return "call_method", short
    assert resolve(name) is func or callable(resolve(name)), name
    return "call_function", name


def capture(
    function: Callable[..., Any],
    inputs: list[torch.Tensor],
    speculate: Callable[[Any], Any] | None = None,
) -> tuple[SegmentGraph, list[torch.Tensor], list[torch.Tensor]]:
    """The graph of `function(*inputs)`, all its inputs (weights included), its outputs."""
    recorder = _Recorder(inputs)
    with torch.no_grad(), recorder:
        out = function(*inputs)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    operations = []
    for o in recorder.operations:
        if o.kind == "getter":
            target = "builtins.getattr"
            operations.append(Operation(o.name, "call_function", target, (o.args[0], o.target)))
        else:
            operations.append(o)
    graph = SegmentGraph(
        recorder.inputs,
        operations,
        [recorder.ref(t).name for t in outs],
        [TensorMeta.of(t) for t in outs],
    )
    return graph, recorder.sources, outs


def compile_it(graph: SegmentGraph, **options: Any) -> pipeline.Compilation:
    # Which products are ATen's must not depend on the machine that tests run on.
    options = {"verify": True, "measure": False, **options}
    return pipeline.run_passes(
        SegmentGraph.from_json(graph.to_json()), _OUT_DIR, CodegenOptions(**options)
    )


def library_of(compilation: pipeline.Compilation) -> Path | None:
    name = compilation.plan["library"]
    return None if name is None else _OUT_DIR / name


def check(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    kernels: int | None = None,
    externs: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    native: bool = False,
    **options: Any,
) -> pipeline.Compilation:
    """Asserts that the plan gives what eager gives: values, layout, aliasing, writes."""
    from plan_runner import run_plan

    sources = [t.clone(memory_format=torch.preserve_format) if _own(t) else t for t in inputs]
    graph, all_inputs, expected = capture(function, list(inputs))
    compilation = compile_it(graph, **options)
    mine = sources + all_inputs[len(sources) :]
    if native and NATIVE:
        from accel import runtime

        library = library_of(compilation)
        executor = runtime.native.Executor(compilation.plan, library and str(library))
        actual = executor.run(mine)
    else:
        actual = run_plan(compilation.plan, library_of(compilation), mine, threads=2)
    assert actual is not None
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        assert got.stride() == want.stride(), (got.stride(), want.stride())
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)
        assert got.untyped_storage().nbytes() == want.untyped_storage().nbytes()
    for got, want in zip(mine, all_inputs, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)
    _check_aliasing(actual, mine, expected, all_inputs)
    rows = compilation.plan["steps"]
    if kernels is not None:
        assert sum(r["op"] in ("kernel", "launch") for r in rows) == kernels, rows
    if externs is not None:
        assert sum(r["op"] == "extern" for r in rows) == externs, rows
    return compilation


def _own(t: torch.Tensor) -> bool:
    return t.untyped_storage().nbytes() == t.numel() * t.element_size()


def _check_aliasing(
    actual: list[torch.Tensor],
    actual_inputs: list[torch.Tensor],
    expected: list[torch.Tensor],
    expected_inputs: list[torch.Tensor],
) -> None:
    def shape(tensors: list[torch.Tensor]) -> list[list[bool]]:
        keys = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
        return [[a == b for b in keys] for a in keys]

    assert shape([*actual, *actual_inputs]) == shape([*expected, *expected_inputs])
