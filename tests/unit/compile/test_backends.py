"""Third parties' backends: what they are given."""

from __future__ import annotations

import resource

import torch

import accel
from accel.compile.backends import _MAPPED_ELEMENTS, _zeros
from accel.trace import TensorMeta


def test_examples_are_of_the_recorded_kind_and_take_no_memory() -> None:
    rows = 4 * _MAPPED_ELEMENTS
    for dtype in ("float32", "bfloat16", "bool", "int64", "complex64"):
        example = _zeros(TensorMeta((rows, 3), (5, 1), dtype))
        assert example.shape == (rows, 3) and example.stride() == (5, 1)
        assert str(example.dtype) == f"torch.{dtype}" and not example._is_view()
        assert not example[-1].any()
        example[-1] = 1  # may be written
        assert example.sum() == 3 or dtype == "bool"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [_zeros(TensorMeta((1 << 28,), (1,), "float32")) for _ in range(32)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10_000
    assert float(held[-1][-1]) == 0


def test_a_backend_may_run_its_examples() -> None:
    seen = []

    def backend(gm, examples):  # type: ignore[no-untyped-def]
        seen.append([tuple(e.shape) for e in examples])
        gm(*examples)
        return gm.forward

    layer = torch.nn.Linear(1024, 512)
    f = accel.optimize(lambda x: layer(x).relu(), backend=backend)
    x = torch.randn(3, 1024)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(f(x), layer(x).relu())
    assert seen and (512, 1024) in seen[0]
