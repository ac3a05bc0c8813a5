"""The loop IR: interpreter beside C++, verifier, affine addresses, memory placement."""

from __future__ import annotations

import ctypes
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from capture_graph import capture, compile_it, library_of

from accel.codegen import loop_ir as ir
from accel.codegen.affine import Affine, combined, invert, match
from accel.codegen.fusion import Group
from accel.codegen.interpreter import interpret
from accel.codegen.memory import Life, place
from accel.codegen.options import CompileError
from accel.codegen.schedule import LONGEST_ROW
from accel.codegen.verifier import verify

FUNCTIONS = {
    "pointwise": lambda x: F.gelu(x * 2 + 1).sigmoid(),
    "softmax": lambda x: F.softmax(x, -1) * 3,
    "softmax over rows": lambda x: F.softmax(x, 0),
    "norm": lambda x: F.layer_norm(x.exp(), x.shape[-1:]),
    "sums": lambda x: (x.sum(0), (x * x).sum(1), x.sum()),
    "extremes": lambda x: (x.amax(1), x.amin(0), (x > 1).any(1), (x < 9).all()),
    "permuted": lambda x: (x.t() + 1).contiguous() * 2,
    "integers": lambda x: (x * 10).to(torch.int64) % 7 + torch.arange(37),
    "half": lambda x: x.bfloat16() * 3 + x.half().tanh(),
    "mask": lambda x: x.masked_fill(torch.ones(20, 37).triu().bool(), -1e9).softmax(-1),
    "write": lambda x: torch.cat([x[:, :5], x * 2], 1),
    "table": lambda x: x[:, :3] * torch.tensor([1.0, 2.0, 4.0]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("fuse", [True, False])
def test_interpreter_and_cpp_agree(name: str, fuse: bool) -> None:
    torch.manual_seed(5)
    graph, _, _ = capture(FUNCTIONS[name], [torch.randn(20, 37)])
    c = compile_it(graph, fuse=fuse)
    library = ctypes.CDLL(str(library_of(c)))
    for step in c.steps:
        if not isinstance(step, Group):
            continue
        scheduled = c.scheduled[id(step)]
        memory = [
            fill(c.graph.buffers[b].numel, p.dtype)
            for b, p in zip(scheduled.buffers, scheduled.kernel.params, strict=True)
        ]
        expected = [m.clone() for m in memory]
        interpret(scheduled.kernel, expected)
        pointers = (ctypes.c_void_p * len(memory))(*(m.data_ptr() for m in memory))
        getattr(library, c.kernels[id(step)].symbol)(pointers, ctypes.c_long(1))
        for got, want in zip(memory, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_row_buffers_fit_the_stack() -> None:
    """A cheap value of three operands, which is rather kept than computed again."""
    graph, _, _ = capture(
        lambda x, y, z: torch.addcmul(x, y, z).softmax(-1), [torch.randn(16, 9000)] * 3
    )
    kept = [
        length
        for s in compile_it(graph).scheduled.values()
        for length, _ in s.kernel.scratch.values()
    ]
    assert all(length <= LONGEST_ROW for length in kept)
    short, _, _ = capture(
        lambda x, y, z: torch.addcmul(x, y, z).softmax(-1), [torch.randn(16, 90)] * 3
    )
    assert any(s.kernel.scratch for s in compile_it(short).scheduled.values())


def fill(numel: int, dtype: str) -> torch.Tensor:
    values = torch.randn(numel)
    return (values > 0) if dtype == "bool" else values.to(getattr(torch, dtype))


def kernel(body: list[object], **more: object) -> ir.Kernel:
    params = [ir.Param("float32", False), ir.Param("float32", True)]
    return ir.Kernel("k", params, [("i", 4)], body, **more)  # type: ignore[arg-type]


X = ir.Load(0, Affine.var("i"), "float32")
BROKEN = {
    "not bound": [ir.Let("a", ir.Load(0, Affine.var("j"), "float32"))],
    "used as": [ir.Let("a", ir.Local("b", "f32"))],
    "never begun": [ir.Accumulate("a", "sum", X)],
    "bound twice": [ir.Loop("i", 4, False, [])],
    "vector loop": [ir.Loop("j", 4, True, [])],
    "a store of": [ir.Store(0, Affine.var("i"), X, "float32")],
    "gives": [ir.Let("a", ir.Op("eq", (X, X), "f32"))],
    "add of": [ir.Let("a", ir.Op("add", (X, ir.Const(1, "i32")), "f32"))],
    "unknown operation": [ir.Let("a", ir.Op("frobnicate", (X,), "f32"))],
    "a load of": [ir.Let("a", ir.Load(0, Affine.var("i"), "float64"))],
    "no row buffer": [ir.Keep("r", Affine.var("i"), X)],
    "unknown reduction": [ir.Begin("a", "median", "f32")],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_verifier_finds(fault: str) -> None:
    with pytest.raises(CompileError, match=fault):
        verify(kernel(BROKEN[fault]))


def test_verifier_accepts() -> None:
    verify(kernel([ir.Let("a", X), ir.Store(1, Affine.var("i"), ir.Local("a", "f32"), "float32")]))


# ---------------------------------------------------------------- addresses


def value(a: Affine, at: dict[str, int]) -> int:
    return a.const + sum(c * at[v] for v, c in a.terms)


def test_match_finds_common_variables() -> None:
    names = (f"t{i}" for i in itertools.count())
    sizes = {"a": 6, "b": 20, "c": 3, "d": 8, "e": 5}
    first = Affine.make(0, {"a": 20, "b": 1})
    second = Affine.make(0, {"c": 40, "d": 5, "e": 1})
    split = match(first, sizes, second, sizes, lambda: next(names))
    assert split is not None
    left = first.substitute({v: combined(p) for v, p in split.first.items()})
    right = second.substitute({v: combined(p) for v, p in split.second.items()})
    assert left == right


@pytest.mark.parametrize(
    "second",
    [
        Affine.make(1, {"c": 8, "d": 1}),  # another offset
        Affine.make(0, {"c": 1, "d": 8}),  # other sizes at a coefficient
        Affine.make(0, {"d": 1}),  # smaller
    ],
)
def test_match_refuses_what_differs(second: Affine) -> None:
    sizes = {"a": 4, "b": 8, "c": 3, "d": 8}
    assert match(Affine.make(0, {"a": 8, "b": 1}), sizes, second, sizes, lambda: "t") is None


def test_invert_is_the_inverse_of_an_address() -> None:
    generator = random.Random(6)
    for _ in range(300):
        extents = [generator.choice([1, 2, 3, 5, 8]) for _ in range(3)]
        order = generator.sample(range(3), 3)
        strides, step = [0] * 3, 1
        for d in order:
            strides[d] = step
            step *= extents[d]
        sizes = {f"v{d}": extents[d] for d in range(3)}
        address = Affine.make(0, {f"v{d}": strides[d] for d in range(3) if extents[d] > 1})
        index = invert(address, sizes, strides, extents)
        assert index is not None
        for at in itertools.product(*(range(n) for n in extents)):
            point = {f"v{d}": at[d] for d in range(3)}
            assert [value(i, point) for i in index] == list(at)


def test_arena_keeps_living_buffers_apart() -> None:
    generator = random.Random(7)
    for _ in range(50):
        lives = []
        for b in range(30):
            first = generator.randrange(40)
            lives.append(
                Life(b, generator.randrange(1, 5000), first, first + generator.randrange(8))
            )
        offsets, total = place(lives)
        for a, b in itertools.combinations(lives, 2):
            together = a.first <= b.last and b.first <= a.last
            apart = (
                offsets[a.buffer] + a.size_bytes <= offsets[b.buffer]
                or offsets[b.buffer] + b.size_bytes <= offsets[a.buffer]
            )
            assert apart or not together
            assert offsets[a.buffer] % 64 == 0 and offsets[a.buffer] + a.size_bytes <= total
