"""The native executor on hand-written plans: eager is the truth."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_builder import Builder, build_library

from accel import _native

EIGHT = torch.zeros(8)
FLAG = torch.zeros((), dtype=torch.bool)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_library(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def run_extern(target: str, args: list[Any], tensors: list[torch.Tensor], results: int = 1) -> Any:
    """Runs one operation as a plan; an integer `n` among `args` means tensors[n]."""
    b = Builder()
    ids = [b.input(t) for t in tensors]
    made = tuple(b.dynamic() for _ in range(results))
    b.extern(target, *args, results=made)
    assert ids == list(range(len(tensors)))
    return _native.Executor(b.plan(*made)).run(tensors)


class TestKernels:
    def test_chain_through_arena(self, library: str) -> None:
        b = Builder()
        x, middle, out = b.input(EIGHT), b.arena(EIGHT), b.output(EIGHT)
        b.kernel("add_one", x, middle)
        b.kernel("twice", middle, out)
        executor = _native.Executor(b.plan(out), library)
        a = torch.randn(8)
        (first,) = executor.run([a])
        (second,) = executor.run((a * 2,))
        torch.testing.assert_close(first, (a + 1) * 2)
        torch.testing.assert_close(second, (a * 2 + 1) * 2)
        assert executor.describe()["kernels"] == 2
        assert executor.describe()["arena_bytes"] == 64
        times = executor.profile([a])
        assert len(times) == 2 and all(ns >= 0 for ns in times)
        with pytest.raises(TypeError):
            executor.profile([None])
        assert len(executor.profile([a])) == 2

    def test_views_of_every_kind(self, library: str) -> None:
        big = torch.zeros(2, 8)
        b = Builder()
        x, arena, out = b.input(big), b.arena(big), b.output(big)
        for base, (source, target) in enumerate([(x, arena), (arena, out)]):
            for row in range(2):
                s = b.view(source, EIGHT, 8 * row)
                nested = b.view(b.view(target, big.view(16)), EIGHT, 8 * row)
                b.kernel("add_one" if base == 0 else "twice", s, nested)
        a = torch.randn(2, 8)
        (result,) = _native.Executor(b.plan(out), library).run([a])
        torch.testing.assert_close(result, (a + 1) * 2)

    def test_input_with_offset(self, library: str) -> None:
        b = Builder()
        x, out = b.input(EIGHT), b.output(EIGHT)
        b.kernel("add_one", x, out)
        a = torch.randn(32)[5:13]
        torch.testing.assert_close(_native.Executor(b.plan(out), library).run([a])[0], a + 1)

    def test_threads(self, library: str) -> None:
        number = torch.zeros((), dtype=torch.int64)
        b = Builder()
        many, one, team = b.output(number), b.output(number), b.output(number)
        b.kernel("threads", many, parallel=True)
        b.kernel("threads", one)
        b.kernel("team", team, parallel=True)
        executor = _native.Executor(b.plan(many, one, team), library)
        before = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert [int(t) for t in executor.run([])] == [count, 1, count]
        finally:
            torch.set_num_threads(before)
        with open("/proc/self/maps") as maps:
            gomps = {line.split()[-1] for line in maps if "libgomp" in line}
        assert len(gomps) == 1


class TestArguments:
    """Every encoding of an extern's argument."""

    @pytest.mark.parametrize(
        ("argument", "number"),
        [
            ({"i": 3}, 3),
            ({"f": (0.5).hex()}, 0.5),
            ({"bool": True}, True),
            ({"c": [(0.5).hex(), (-2.0).hex()]}, 0.5 - 2j),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.complex64])
    def test_a_number_for_a_tensor_counts_less_than_tensors(
        self, argument: dict[str, Any], number: Any, dtype: torch.dtype
    ) -> None:
        a = torch.arange(4).to(dtype)
        (result,) = run_extern("aten::mul.Tensor", [{"b": 0}, argument], [a])
        assert result.dtype == (a * number).dtype and torch.equal(result, a * number)

    def test_tensor_scalar_and_default(self) -> None:
        a, b = torch.randn(3), torch.randn(3)
        assert torch.equal(run_extern("aten::add.Tensor", [{"b": 0}, {"b": 1}], [a, b])[0], a + b)
        args = [{"b": 0}, {"b": 1}, {"f": (0.25).hex()}]
        assert torch.equal(
            run_extern("aten::add.Tensor", args, [a, b])[0], torch.add(a, b, alpha=0.25)
        )
        flag = run_extern("aten::mul.Scalar", [{"b": 0}, {"bool": True}], [a])
        assert torch.equal(flag[0], a)
        args = [{"b": 0}, {"i": 3}]
        assert torch.equal(run_extern("aten::mul.Scalar", args, [a])[0], a * 3)

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf", (-0.1).hex()])
    def test_floats(self, value: str) -> None:
        a = torch.zeros(2)
        (result,) = run_extern("aten::full_like", [{"b": 0}, {"f": value}], [a])
        expected = torch.full_like(a, float.fromhex(value))
        assert torch.equal(result, expected) or (result.isnan() & expected.isnan()).all()

    def test_lists(self) -> None:
        a, b = torch.randn(2, 6), torch.randn(2, 6)
        (result,) = run_extern("aten::cat", [{"bl": [0, 1]}, {"i": 1}], [a, b])
        assert torch.equal(result, torch.cat([a, b], 1))
        (result,) = run_extern("aten::permute", [{"b": 0}, {"il": [1, 0]}], [a])
        assert torch.equal(result, a.t())
        index = torch.tensor([1, 0])
        (result,) = run_extern("aten::index.Tensor", [{"b": 0}, {"bl": [None, 1]}], [a, index])
        assert torch.equal(result, a[:, index])
        image = torch.randn(1, 1, 4, 4)
        args = [{"b": 0}, {"none": True}, {"bool": False}, {"fl": [(2.0).hex(), (2.0).hex()]}]
        (result,) = run_extern("aten::upsample_bilinear2d.vec", args, [image])
        torch.testing.assert_close(result, F.interpolate(image, scale_factor=2.0, mode="bilinear"))

    def test_bool_list_and_optional(self) -> None:
        grad, x = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4)
        weight = torch.randn(2, 3, 1, 1)
        args = [
            {"b": 0},
            {"b": 1},
            {"b": 2},
            {"none": True},
            {"il": [1, 1]},
            {"il": [0, 0]},
            {"il": [1, 1]},
            {"bool": False},
            {"il": [0, 0]},
            {"i": 1},
            {"boollist": [True, True, False]},
        ]
        b = Builder()
        ids = [b.input(t) for t in (grad, x, weight)]
        made = [b.dynamic(), b.dynamic()]
        b.extern("aten::convolution_backward", *args, results=(*made, None))
        result = _native.Executor(b.plan(*made)).run([grad, x, weight])
        expected = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        assert len(ids) == 3
        torch.testing.assert_close(result, list(expected[:2]))

    def test_strings_and_types(self) -> None:
        a = torch.randn(3, 4, 2, 2)
        args = [{"b": 0}, {"b": 0}]
        b = Builder()
        b.input(a)
        out = [b.dynamic() for _ in range(5)]
        b.extern("aten::div.Tensor_mode", *args, rounding_mode={"s": "floor"}, results=(out[0],))
        b.extern(
            "aten::_to_copy",
            {"b": 0},
            dtype={"dtype": "bfloat16"},
            layout={"layout": "strided"},
            device={"device": "cpu"},
            results=(out[1],),
        )
        b.extern(
            "aten::clone",
            {"b": 0},
            memory_format={"memory_format": "channels_last"},
            results=(out[2],),
        )
        b.extern("aten::sum.dim_IntList", {"b": 0}, {"i": 1}, results=(out[3],))
        b.extern("aten::gelu", {"b": 0}, approximate={"s": "tanh"}, results=(out[4],))
        result = _native.Executor(b.plan(*out)).run([a])
        expected = [
            torch.div(a, a, rounding_mode="floor"),
            a.to(torch.bfloat16),
            a.clone(memory_format=torch.channels_last),
            a.sum(1),
            F.gelu(a, approximate="tanh"),
        ]
        for got, want in zip(result, expected, strict=True):
            assert got.dtype == want.dtype
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want)

    def test_several_and_listed_results(self) -> None:
        a = torch.randn(3, 6)
        result = run_extern("aten::topk", [{"b": 0}, {"i": 2}], [a], results=2)
        torch.testing.assert_close(result, list(torch.topk(a, 2)))
        result = run_extern("aten::split.Tensor", [{"b": 0}, {"i": 4}, {"i": 1}], [a], results=2)
        torch.testing.assert_close(result, list(a.split(4, 1)))

    def test_constant_lists_are_not_shared(self) -> None:
        b = Builder()
        out = b.dynamic()
        b.extern("aten::zeros", {"il": [2, 3]}, results=(out,))
        executor = _native.Executor(b.plan(out))
        assert [executor.run([])[0].shape for _ in range(3)] == [(2, 3)] * 3


def direct_cases() -> dict[str, tuple[Any, ...]]:
    m, n, bias = torch.randn(4, 5), torch.randn(5, 6), torch.randn(6)
    batch = [torch.randn(2, 4, 6), torch.randn(2, 4, 5), torch.randn(2, 5, 6)]
    image, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    conv = [
        {"il": [1, 1]},
        {"il": [0, 0]},
        {"il": [1, 1]},
        {"bool": False},
        {"il": [0, 0]},
        {"i": 1},
    ]
    half = {"f": (0.5).hex()}
    return {
        # name: (arguments, tensors, example of the out tensor or None, expected)
        "aten::addmm.out": ([{"b": 0}, {"b": 1}, {"b": 2}, half, {"i": 2}], [bias, m, n],
                            torch.addmm(bias, m, n, beta=0.5, alpha=2)),
        "aten::mm.out": ([{"b": 0}, {"b": 1}], [m, n], m @ n),
        "aten::bmm.out": ([{"b": 0}, {"b": 1}], batch[1:], torch.bmm(*batch[1:])),
        "aten::baddbmm.out": ([{"b": 0}, {"b": 1}, {"b": 2}], batch, torch.baddbmm(*batch)),
        "aten::index_select.out": ([{"b": 0}, {"i": 0}, {"b": 1}], [m, torch.tensor([2, 0])],
                                   m[[2, 0]]),
        "aten::_softmax.out": ([{"b": 0}, {"i": 1}, {"bool": False}], [m], m.softmax(1)),
        "aten::convolution": ([{"b": 0}, {"b": 1}, {"b": 2}, *conv],
                              [image, weight, torch.randn(4)], None),
        "aten::embedding": ([{"b": 0}, {"b": 1}], [n, torch.tensor([[1, 2], [0, 4]])], None),
        "aten::native_layer_norm": ([{"b": 0}, {"il": [5]}, {"none": True}, {"none": True},
                                     {"f": (1e-5).hex()}], [m], None),
        "aten::_scaled_dot_product_flash_attention_for_cpu": (
            [{"b": 0}, {"b": 1}, {"b": 2}, {"f": (0.0).hex()}, {"bool": True}], [q, k, v], None),
    }  # fmt: skip


class TestDirectCalls:
    @pytest.mark.parametrize("name", list(direct_cases()))
    def test_equals_eager(self, name: str) -> None:
        args, tensors, expected = direct_cases()[name]
        b = Builder()
        for t in tensors:
            b.input(t)
        if expected is not None:
            out = [b.output(expected)]
            b.extern(name, *args, out={"b": out[0]})
            wanted = [expected]
        else:
            eager = resolve(name)(*[decode(a, tensors) for a in args])
            wanted = list(eager) if isinstance(eager, tuple) else [eager]
            out = [b.dynamic() for _ in wanted]
            b.extern(name, *args, results=tuple(out))
        executor = _native.Executor(b.plan(*out))
        assert executor.describe()["direct_externs"] == 1
        for _ in range(2):
            torch.testing.assert_close(executor.run(tensors), wanted, rtol=0, atol=0)


def resolve(name: str) -> Any:
    namespace, operation = name.split("::")
    packet, _, overload = operation.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def decode(argument: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    ((tag, value),) = argument.items()
    if tag == "b":
        return tensors[value]
    return None if tag == "none" else float.fromhex(value) if tag == "f" else value


class TestExterns:
    def test_out_into_arena_and_view_arguments(self, library: str) -> None:
        weight, bias = torch.randn(4, 8), torch.randn(4)
        x = torch.randn(2, 8)
        product = torch.zeros(2, 4)
        b = Builder()
        ids = [b.input(t) for t in (x, weight, bias)]
        transposed = b.view(ids[1], weight.t())
        arena, out = b.arena(product), b.output(product)
        flat, out_flat = b.view(arena, product.view(8)), b.view(out, product.view(8))
        b.extern("aten::addmm.out", {"b": 2}, {"b": 0}, {"b": transposed}, out={"b": arena})
        b.kernel("twice", flat, out_flat)
        executor = _native.Executor(b.plan(out), library)
        for _ in range(3):
            weight = torch.randn(4, 8)
            (result,) = executor.run([x, weight, bias])
            torch.testing.assert_close(result, 2 * F.linear(x, weight, bias))

    def test_dynamic_feeds_kernel_and_is_freed(self, library: str) -> None:
        a = torch.randn(8)
        b = Builder()
        x, made, out = b.input(EIGHT), b.dynamic(), b.output(EIGHT)
        b.extern("aten::sin", {"b": x}, results=(made,))
        b.kernel("twice", made, out)
        b.free(made)
        executor = _native.Executor(b.plan(out), library)
        torch.testing.assert_close(executor.run([a])[0], a.sin() * 2)

    def test_dynamic_of_other_strides_is_rearranged(self, library: str) -> None:
        a = torch.randn(4, 2)
        b = Builder()
        x = b.input(a)
        made = b.dynamic(torch.zeros(2, 4))
        flat, out = b.view(made, EIGHT), b.output(EIGHT)
        b.extern("aten::t", {"b": x}, results=(made,))
        b.kernel("twice", flat, out)
        executor = _native.Executor(b.plan(out), library)
        torch.testing.assert_close(executor.run([a])[0], a.t().reshape(8) * 2)

    def test_dynamic_of_other_sizes_is_an_error(self) -> None:
        b = Builder()
        x, made = b.input(EIGHT), b.dynamic(torch.zeros(4))
        b.extern("aten::sin", {"b": x}, results=(made,))
        with pytest.raises(_native.ExecutorError, match="expects"):
            _native.Executor(b.plan(made)).run([EIGHT])

    def test_error_commits_nothing(self, library: str) -> None:
        b = Builder()
        table, index, state = b.input(torch.zeros(3, 2)), b.input(torch.zeros(1).long()), 0
        made, state = b.dynamic(), b.input(EIGHT)
        b.extern("aten::embedding", {"b": table}, {"b": index}, results=(made,))
        b.kernel("add_one", state, state, commit=True)
        executor = _native.Executor(b.plan(made), library)
        values, target = torch.randn(3, 2), torch.zeros(8)
        with pytest.raises(_native.ExecutorError, match="index out of range"):
            executor.run([values, torch.tensor([9]), target])
        assert target.sum() == 0
        assert target._version == 0
        assert torch.equal(executor.run([values, torch.tensor([2]), target])[0], values[2:])
        assert target.sum() == 8

    def test_failure_inside_the_commit_is_told_apart(self, library: str) -> None:
        b = Builder()
        state, index, value = b.input(EIGHT), b.input(torch.zeros(1).long()), b.input(EIGHT[:1])
        b.kernel("add_one", state, state, commit=True)
        b.extern("aten::index_put_", {"b": state}, {"bl": [index]}, {"b": value}, commit=True)
        executor = _native.Executor(b.plan(), library)
        with pytest.raises(_native.TornCommitError):
            executor.run([torch.zeros(8), torch.tensor([99]), torch.ones(1)])

    def test_warnings_are_python_warnings(self) -> None:
        b = Builder()
        x, out = b.input(EIGHT), b.output(torch.zeros(4))
        b.extern("aten::sin.out", {"b": x}, out={"b": out})
        executor = _native.Executor(b.plan(out))
        with pytest.warns(UserWarning, match="resized"):
            executor.run([EIGHT])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(_native.ExecutorError, match="resized"):
                executor.run([EIGHT])

    def test_under_autocast_the_plan_decides(self) -> None:
        m, n = torch.randn(4, 5), torch.randn(5, 6)
        b = Builder()
        b.input(m), b.input(n)
        made = b.dynamic()
        b.extern("aten::matmul", {"b": 0}, {"b": 1}, results=(made,))
        executor = _native.Executor(b.plan(made))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert executor.run([m, n])[0].dtype == torch.float32

    def test_composite_with_parameters(self) -> None:
        q = torch.randn(1, 2, 4, 8)
        p = torch.nn.Parameter(q)
        args = [{"b": 0}, {"b": 0}, {"b": 0}]
        with torch.enable_grad():
            (result,) = run_extern("aten::scaled_dot_product_attention", args, [p])
        assert not result.requires_grad
        torch.testing.assert_close(result, F.scaled_dot_product_attention(q, q, q))


class TestOutputs:
    def test_input_is_returned_as_itself(self) -> None:
        b = Builder()
        x = b.input(EIGHT)
        a = torch.nn.Parameter(torch.randn(8))
        first, second = _native.Executor(b.plan(x, x)).run([a])
        assert first is a
        assert second is a

    def test_output_storage_is_its_own(self, library: str) -> None:
        b = Builder()
        x, out = b.input(EIGHT), b.output(EIGHT)
        b.kernel("add_one", x, out)
        executor = _native.Executor(b.plan(out, out), library)
        first, again = executor.run([EIGHT])
        assert first is again
        assert first.untyped_storage().nbytes() == 32
        kept = first.clone()
        executor.run([EIGHT + 5])
        assert torch.equal(first, kept)
        first.resize_(1000).fill_(3)
        assert first.untyped_storage().nbytes() == 4000
        assert not first.is_inference()
        assert first._version == 2

    @pytest.mark.parametrize(
        "like",
        [
            torch.zeros(()),
            torch.zeros(0),
            torch.zeros(3, 0, 2),
            torch.zeros(1, 5),
            torch.zeros(4, 3).t(),
            torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.zeros(1).expand(4),
            torch.zeros(3, dtype=torch.complex64),
            torch.zeros(3, 3, dtype=torch.bool),
        ],
    )
    def test_layouts(self, like: torch.Tensor) -> None:
        b = Builder()
        out = b.output(like)
        (result,) = _native.Executor(b.plan(out)).run([])
        assert result.shape == like.shape
        assert result.stride() == like.stride()
        assert result.dtype == like.dtype
        assert result.is_contiguous() == like.is_contiguous()
        assert (
            result.untyped_storage().nbytes()
            == torch.empty_strided(like.size(), like.stride(), dtype=like.dtype)
            .untyped_storage()
            .nbytes()
        )

    def test_views_as_outputs(self, library: str) -> None:
        b = Builder()
        x, out = b.input(EIGHT), b.output(EIGHT)
        of_input, of_output = b.view(x, EIGHT.view(2, 4).t()), b.view(out, EIGHT[2:4], 2)
        b.kernel("add_one", x, out)
        executor = _native.Executor(b.plan(out, of_input, of_output), library)
        a = torch.randn(16)[3:11]
        result, first, second = executor.run([a])
        assert first._base is a._base
        assert second._base is result
        torch.testing.assert_close(first, a.view(2, 4).t())
        torch.testing.assert_close(second, (a + 1)[2:4])
        version = a._version
        first.add_(1)
        assert a._version == version + 1

    def test_nothing_aliases_the_arena(self, library: str) -> None:
        b = Builder()
        x, arena = b.input(EIGHT), b.arena(EIGHT)
        view, made = b.view(arena, EIGHT.view(2, 4)), b.dynamic()
        b.kernel("add_one", x, arena)
        b.extern("aten::slice.Tensor", {"b": view}, {"i": 1}, {"i": 2}, results=(made,))
        executor = _native.Executor(b.plan(made, arena, view), library)
        results = executor.run([EIGHT])
        before = [t.clone() for t in results]
        executor.run([EIGHT + 3])
        assert all(torch.equal(r, k) for r, k in zip(results, before, strict=True))
        assert [t.shape for t in results] == [(2, 2), (8,), (2, 4)]

    def test_extern_returning_its_argument(self) -> None:
        a = torch.randn(2, 4)
        b = Builder()
        x = b.input(a)
        view = b.view(x, a.view(8))
        same, other, alias = b.dynamic(), b.dynamic(), b.dynamic()
        b.extern("aten::contiguous", {"b": x}, results=(same,))
        b.extern("aten::contiguous", {"b": view}, results=(other,))
        b.extern("aten::select.int", {"b": x}, {"i": 0}, {"i": 1}, results=(alias,))
        executor = _native.Executor(b.plan(same, other, alias))
        first, flat, row = executor.run([a])
        assert first is a
        assert flat.data_ptr() == a.data_ptr()
        assert row._base is a
        executor.run([torch.zeros(2, 4)])
        torch.testing.assert_close(flat, a.view(8))

    def test_inference_mode(self, library: str) -> None:
        b = Builder()
        x, out, made = b.input(EIGHT), b.output(EIGHT), b.dynamic()
        view = b.view(x, EIGHT.view(2, 4))
        b.kernel("add_one", x, out)
        b.extern("aten::sin", {"b": view}, results=(made,))
        executor = _native.Executor(b.plan(out, made), library)
        for _ in range(2):
            with torch.inference_mode():
                inside = executor.run([torch.ones(8)])
            assert all(t.is_inference() for t in inside)
            outside = executor.run([torch.ones(8)])
            assert not any(t.is_inference() for t in outside)
            assert outside[0]._version == 0
            torch.testing.assert_close(inside, outside)


class TestCommit:
    def test_kernel_bumps_the_version(self, library: str) -> None:
        b = Builder()
        state, step = b.input(EIGHT), b.input(EIGHT)
        b.kernel("add", state, step, state, commit=True, writes=[state])
        executor = _native.Executor(b.plan(state), library)
        a, delta = torch.zeros(8), torch.ones(8)
        view = a[:4]
        (result,) = executor.run([a, delta])
        assert result is a
        assert a.sum() == 8
        assert (a._version, view._version, delta._version) == (1, 1, 0)

    def test_without_writes_every_input_counts(self, library: str) -> None:
        b = Builder()
        state = b.input(EIGHT)
        b.kernel("add_one", b.view(state, EIGHT), b.view(state, EIGHT), commit=True)
        a = torch.zeros(8)
        _native.Executor(b.plan(), library).run([a])
        assert a._version == 1

    def test_extern_bumps_the_version(self) -> None:
        b = Builder()
        state, value, made = b.input(EIGHT), b.input(EIGHT), b.dynamic()
        b.extern("aten::sin", {"b": value}, results=(made,))
        b.extern("aten::copy_", {"b": state}, {"b": made}, commit=True)
        b.extern("aten::add_.Tensor", {"b": b.view(state, EIGHT)}, {"b": value}, commit=True)
        executor = _native.Executor(b.plan())
        a, other = torch.zeros(8), torch.randn(8)
        assert executor.run([a, other]) == []
        torch.testing.assert_close(a, other.sin() + other)
        assert (a._version, other._version) == (2, 0)

    def test_speculation_guards_the_commit(self, library: str) -> None:
        b = Builder()
        x, flag, state, out = b.input(EIGHT), b.arena(FLAG), b.input(EIGHT), b.output(EIGHT)
        b.kernel("positive", x, flag)
        b.kernel("add_one", x, out)
        b.kernel("add_one", state, state, commit=True)
        b.speculate(flag, True)
        executor = _native.Executor(b.plan(out), library)
        state_tensor = torch.zeros(8)
        assert executor.run([-torch.ones(8), state_tensor]) is None
        assert state_tensor.sum() == 0
        assert state_tensor._version == 0
        assert executor.run([torch.ones(8), state_tensor])[0].sum() == 16
        assert state_tensor.sum() == 8

    @pytest.mark.parametrize(
        "dtype",
        [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
         torch.float16, torch.bfloat16, torch.float32, torch.float64],
    )  # fmt: skip
    def test_truth_of_every_dtype(self, dtype: torch.dtype) -> None:
        for value in (0, 1):
            b = Builder()
            x, made = b.input(torch.zeros(1, dtype=dtype)), b.dynamic()
            b.extern("aten::clone", {"b": x}, results=(made,))
            b.speculate(x, bool(value))
            b.speculate(made, bool(value))
            executor = _native.Executor(b.plan())
            assert executor.run([torch.full((1,), value, dtype=dtype)]) == []
            assert executor.run([torch.full((1,), 1 - value, dtype=dtype)]) is None

    def test_inference_tensor_outside_inference_mode(self, library: str) -> None:
        b = Builder()
        state = b.input(EIGHT)
        b.kernel("add_one", state, state, commit=True)
        executor = _native.Executor(b.plan(), library)
        with torch.inference_mode():
            a = torch.zeros(8)
            executor.run([a])
        assert a.sum() == 8
        with pytest.raises(_native.ExecutorError, match="inference tensor"):
            executor.run([a])
        assert a.sum() == 8

    def test_random_stream(self) -> None:
        b = Builder()
        x, flag, made = b.input(EIGHT), b.input(FLAG), b.dynamic()
        b.extern("aten::rand_like", {"b": x}, results=(made,))
        b.speculate(flag, True)
        executor = _native.Executor(b.plan(made))
        torch.manual_seed(3)
        before = torch.get_rng_state()
        assert executor.run([EIGHT, torch.tensor(False)]) is None
        assert torch.equal(torch.get_rng_state(), before)
        (drawn,) = executor.run([EIGHT, torch.tensor(True)])
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        assert torch.equal(drawn, torch.rand_like(EIGHT))
        assert torch.equal(torch.get_rng_state(), after)

    def test_lazily_cloned_input(self, library: str) -> None:
        b = Builder()
        state = b.input(EIGHT)
        b.kernel("add_one", state, state, commit=True)
        original = torch.zeros(8)
        clone = torch._lazy_clone(original)
        _native.Executor(b.plan(), library).run([clone])
        assert clone.sum() == 8
        assert original.sum() == 0


class TestRefusedInputs:
    def test_counts_and_types(self, library: str) -> None:
        b = Builder()
        x, out = b.input(EIGHT), b.output(EIGHT)
        b.kernel("add_one", x, out)
        executor = _native.Executor(b.plan(out), library)
        with pytest.raises(_native.ExecutorError, match="takes 1 inputs"):
            executor.run([EIGHT, EIGHT])
        with pytest.raises(TypeError, match="plain tensor"):
            executor.run([3])
        with pytest.raises(TypeError, match="list or tuple"):
            executor.run(iter([EIGHT]))
        with pytest.raises(_native.ExecutorError, match="negated"):
            executor.run([torch._neg_view(EIGHT)])
        emptied = torch.zeros(8)
        emptied.untyped_storage().resize_(0)
        with pytest.raises(_native.ExecutorError, match="memory"):
            executor.run([emptied])


def valid_plan() -> dict[str, Any]:
    b = Builder()
    x, arena, out, made = b.input(EIGHT), b.arena(EIGHT), b.output(EIGHT), b.dynamic()
    b.view(x, EIGHT)
    b.kernel("add_one", x, arena)
    b.extern("aten::sin", {"b": x}, results=(made,))
    b.kernel("twice", arena, out)
    b.speculate(b.output(FLAG), False)
    return b.plan(out)


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda p: p.update(version=2), "version 1"),
    "missing": (lambda p: p.pop("steps"), "'steps' is missing"),
    "kind": (lambda p: p["buffers"][0].update(kind="gpu"), "unknown name 'gpu'"),
    "input index": (lambda p: p["buffers"][0].update(index=4), "no input 4"),
    "dtype": (lambda p: p["buffers"][1].update(dtype="float7"), "float7"),
    "strides": (lambda p: p["buffers"][1].update(strides=[1, 1]), "differ in length"),
    "arena end": (lambda p: p["buffers"][1].update(offset=64), "behind the arena"),
    "alignment": (lambda p: p["buffers"][1].update(offset=4), "multiple of 64"),
    "base": (lambda p: p["buffers"][4].update(base=9), "come before"),
    "view end": (lambda p: p["buffers"][4].update(base=2, offset=3), "behind its base"),
    "symbol": (lambda p: p["steps"][0].update(symbol="nope"), "no symbol 'nope'"),
    "buffer id": (lambda p: p["steps"][0].update(buffers=[0, 77]), "no buffer 77"),
    "op": (lambda p: p["steps"][0].update(op="jump"), "unknown op"),
    "target": (lambda p: p["steps"][1].update(target="aten::no_such"), "no operation"),
    "argument": (lambda p: p["steps"][1].update(args=[]), "argument is missing"),
    "tag": (lambda p: p["steps"][1].update(args=[{"q": 1}]), "tag"),
    "constant for a tensor": (lambda p: p["steps"][1].update(args=[{"s": "x"}]), "wants Tensor"),
    "parts of a complex": (lambda p: p["steps"][1].update(args=[{"c": ["0x1p+0"]}]), "two parts"),
    "none for a tensor": (lambda p: p["steps"][1].update(args=[{"none": True}]), "wants Tensor"),
    "constant's type": (
        lambda p: p["steps"][1].update(
            target="aten::softmax.int", args=[{"b": 0}, {"s": "x"}], kwargs={}
        ),
        "wants int, not str",
    ),
    "too many": (lambda p: p["steps"][1].update(args=[{"b": 0}, {"i": 0}]), "too many"),
    "keyword": (lambda p: p["steps"][1].update(kwargs={"x": {"i": 0}}), "does not have"),
    "results": (lambda p: p["steps"][1].update(results=[3, 3]), "1 results"),
    "bound": (lambda p: p["steps"][1].update(results=[2]), "dynamic buffers only"),
    "write": (lambda p: p["steps"][1].update(target="aten::sin_", results=[]), "before the commit"),
    "free": (lambda p: p["steps"].append({"op": "free", "buffer": 0}), "only dynamic"),
    "unmade": (lambda p: p["steps"].insert(0, {**p["steps"][0], "buffers": [3, 1]}), "before a"),
    "speculation": (lambda p: p["speculations"][0].update(buffer=2), "one element"),
    "outputs": (lambda p: p.update(outputs=[55]), "no buffer 55"),
}


class TestValidation:
    def test_the_plan_is_valid(self, library: str) -> None:
        _native.Executor(valid_plan(), library)

    @pytest.mark.parametrize("name", list(FAULTS))
    def test_fault_is_named(self, name: str, library: str) -> None:
        change, message = FAULTS[name]
        plan = copy.deepcopy(valid_plan())
        change(plan)
        with pytest.raises(ValueError, match=message):
            _native.Executor(plan, library)

    def test_library(self, tmp_path: Any) -> None:
        with pytest.raises(OSError, match="cannot load kernels"):
            _native.Executor(valid_plan(), str(tmp_path / "none.so"))
        with pytest.raises(ValueError, match="no library"):
            _native.Executor(valid_plan())

    def test_verify_mode(self, library: str) -> None:
        script = (
            "import torch, json, sys\nfrom accel import _native\n"
            "e = _native.Executor(json.loads(sys.argv[1]), sys.argv[2])\n"
            "try: e.run([torch.zeros(8).double()])\n"
            "except _native.ExecutorError as error: print(error)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, json.dumps(valid_plan()), library],
            env={**os.environ, "ACCEL_VERIFY": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "the plan expects Float" in result.stdout


class TestSharing:
    def test_eight_threads(self, library: str) -> None:
        b = Builder()
        x, middle, out = b.input(EIGHT), b.arena(EIGHT), b.output(EIGHT)
        big = b.arena(torch.zeros(100_000))  # makes the plan big: the GIL is released
        made = b.dynamic()
        b.extern("aten::sin", {"b": big}, results=(made,))
        b.kernel("slow_add_one", x, middle)
        b.kernel("twice", middle, out)
        executor = _native.Executor(b.plan(out), library)
        assert executor.describe()["releases_gil"]
        wrong: list[int] = []

        def work(number: int) -> None:
            for i in range(20):
                value = float(number * 100 + i)
                (result,) = executor.run([torch.full((8,), value)])
                if not torch.equal(result, torch.full((8,), (value + 1) * 2)):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_run_inside_a_run(self, library: str) -> None:
        inside: list[torch.Tensor] = []
        executor: Any = None

        with torch.library._scoped_library("accel_test", "DEF") as definitions:
            definitions.define("nested(Tensor x) -> Tensor")

            def nested(x: torch.Tensor) -> torch.Tensor:
                if not inside:
                    inside.append(x)
                    inside.append(executor.run([x + 10])[0])
                return x * 3

            definitions.impl("nested", nested, "CPU")
            b = Builder()
            x, arena, made, out = b.input(EIGHT), b.arena(EIGHT), b.dynamic(), b.output(EIGHT)
            b.kernel("add_one", x, arena)
            b.extern("accel_test::nested", {"b": x}, results=(made,))
            b.kernel("add", arena, made, out)
            executor = _native.Executor(b.plan(out), library)
            a = torch.randn(8)
            (result,) = executor.run([a])
        torch.testing.assert_close(result, a + 1 + a * 3)
        torch.testing.assert_close(inside[1], (a + 10) + 1 + (a + 10) * 3)

    def test_python_error_in_a_custom_operation(self) -> None:
        with torch.library._scoped_library("accel_test", "DEF") as definitions:
            definitions.define("broken(Tensor x) -> Tensor")

            def broken(x: torch.Tensor) -> torch.Tensor:
                raise KeyError("mine")

            definitions.impl("broken", broken, "CPU")
            with pytest.raises(_native.ExecutorError, match="mine"):
                run_extern("accel_test::broken", [{"b": 0}], [EIGHT])

    def test_interrupt_in_a_custom_operation(self) -> None:
        with torch.library._scoped_library("accel_test", "DEF") as definitions:
            definitions.define("interrupted(Tensor x) -> Tensor")

            def interrupted(x: torch.Tensor) -> torch.Tensor:
                raise KeyboardInterrupt

            definitions.impl("interrupted", interrupted, "CPU")
            with pytest.raises(KeyboardInterrupt):
                try:
                    run_extern("accel_test::interrupted", [{"b": 0}], [EIGHT])
                except _native.ExecutorError:
                    sum(range(10))  # the interrupt comes at the next check

    def test_an_operation_keeps_its_arguments(self, library: str) -> None:
        kept: list[torch.Tensor] = []
        with torch.library._scoped_library("accel_test", "DEF") as definitions:
            definitions.define("keeper(Tensor x, Tensor y, Tensor z) -> Tensor")

            def keeper(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
                kept.extend([x, y, z.view(2, 4)])
                return x * 3

            definitions.impl("keeper", keeper, "CPU")
            b = Builder()
            x, arena, made = b.input(EIGHT), b.arena(EIGHT), b.dynamic()
            view = b.view(x, EIGHT[:4], 2)
            b.kernel("add_one", x, arena)
            b.extern("accel_test::keeper", {"b": view}, {"b": arena}, {"b": arena}, results=(made,))
            executor = _native.Executor(b.plan(made), library)
            rounds = [torch.randn(8) for _ in range(3)]
            for a in rounds:
                executor.run([a])
        for i, a in enumerate(rounds):
            torch.testing.assert_close(kept[3 * i], a[2:6])
            torch.testing.assert_close(kept[3 * i + 1], a + 1)
            torch.testing.assert_close(kept[3 * i + 2], (a + 1).view(2, 4))

    def test_fork(self, library: str) -> None:
        script = f"""
import os, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from plan_builder import Builder
from accel import _native
torch.set_num_threads(2)
b = Builder()
number = torch.zeros((), dtype=torch.int64)
out = b.output(number)
b.kernel("team", out, parallel=True)
big = b.output(torch.zeros(1000000))
b.kernel("fill_million", big)
executor = _native.Executor(b.plan(out, big), {library!r})
assert int(executor.run([])[0]) == 2
pid = os.fork()
if pid == 0:
    count, filled = executor.run([])
    os._exit(0 if int(count) == 1 and float(filled.numpy().min()) == 7 else 1)
assert os.waitpid(pid, 0)[1] == 0
assert int(executor.run([])[0]) == 2
"""
        env = {**os.environ, "OMP_NUM_THREADS": "2"}
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=env)


def reused(executor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The second output of a plan, and one in the memory of the first, which was not given away
    while anybody held its storage."""
    (first,) = executor.run([])
    address = first.data_ptr()
    first.fill_(1)  # all of it is its own
    (second,) = executor.run([])
    assert second.data_ptr() != address and address % 64 == 0
    storage = first.untyped_storage()
    del first
    (third,) = executor.run([])
    assert third.data_ptr() != address
    del storage
    (fourth,) = executor.run([])
    assert fourth.data_ptr() == address
    return second, fourth


class TestMemory:
    def test_output_pool(self, library: str) -> None:
        b = Builder()
        out = b.output(torch.zeros(1_000_000))
        b.kernel("fill_million", out)
        executor = _native.Executor(b.plan(out), library)
        _native.trim_output_pool()
        _second, fourth = reused(executor)
        before = _native.output_pool()["free_blocks"]
        fourth.resize_(3_000_000)
        assert (fourth[:1_000_000] == 7).all()
        assert _native.output_pool()["free_blocks"] == before + 1
        assert fourth.untyped_storage().nbytes() == 12_000_000
        _native.trim_output_pool()
        assert _native.output_pool()["free_bytes"] == 0

    def test_small_addresses_come_back(self) -> None:
        _native.trim_output_pool()
        assert _native.output_pool()["small_bytes"] == 0
        sizes = [1, 63, 64, 65, 72, 73, 128, 129, 1000, 4096, 4097, 100_000, (1 << 20) - 1]
        for size in sizes:
            b = Builder()
            executor = _native.Executor(b.plan(b.output(torch.empty(size, dtype=torch.uint8))))
            second, fourth = reused(executor)
            assert int(second.fill_(2).min()) == 2
            assert int(fourth.fill_(3).sum(dtype=torch.int64)) == 3 * size
            fourth.resize_(size * 2)
            assert int(fourth[:size].sum(dtype=torch.int64)) == 3 * size
        kept = [executor.run([]) for _ in range(200)]
        del kept, second, fourth
        assert 0 < _native.output_pool()["small_bytes"] <= 8 << 20
        _native.trim_output_pool()
        assert _native.output_pool()["small_bytes"] == 0

    def test_pool_is_bounded(self) -> None:
        _native.trim_output_pool()
        b = Builder()
        outs = [b.output(torch.empty(40 << 20, dtype=torch.uint8)) for _ in range(20)]
        executor = _native.Executor(b.plan(*outs))
        results = [executor.run([]) for _ in range(3)]  # 2.4 GiB of pages never touched
        del results
        one_run = 20 * (40 << 20)
        assert 0 < _native.output_pool()["free_bytes"] <= one_run * 9 // 8
        _native.trim_output_pool()

    def test_flat_over_many_runs(self, library: str) -> None:
        weight = torch.randn(8, 8)
        b = Builder()
        x, w, out = b.input(torch.zeros(1, 8)), b.input(weight), b.output(torch.zeros(1, 8))
        arena, made = b.arena(torch.zeros(1, 8)), b.dynamic()
        b.extern("aten::mm.out", {"b": x}, {"b": b.view(w, weight.t())}, out={"b": arena})
        b.extern("aten::sin", {"b": arena}, results=(made,))
        b.kernel("add", arena, made, out)
        executor = _native.Executor(b.plan(out, x), library)
        a = torch.randn(1, 8)
        executor.run([a, weight])

        def resident() -> int:
            with open("/proc/self/statm") as statm:
                return int(statm.read().split()[1]) * 4096

        gc.collect()
        counts, memory = (sys.getrefcount(a), sys.getrefcount(weight)), resident()
        for _ in range(100_000):
            executor.run([a, weight])
        assert (sys.getrefcount(a), sys.getrefcount(weight)) == counts
        assert resident() - memory < 8 << 20

    def test_nothing_of_the_program_is_kept(self, library: str) -> None:
        weight = torch.randn(8, 8)
        b = Builder()
        x, w, out = b.input(torch.zeros(1, 8)), b.input(weight), b.output(torch.zeros(1, 8))
        b.extern("aten::mm.out", {"b": x}, {"b": b.view(w, weight.t())}, out={"b": out})
        executor = _native.Executor(b.plan(out), library)
        executor.run([torch.randn(1, 8), weight])
        died, storage_died = weakref.ref(weight), weakref.ref(weight.untyped_storage())
        del weight
        gc.collect()
        assert died() is None
        assert storage_died() is None


def test_severed_views_do_not_know_their_base() -> None:
    b = Builder()
    source = b.input(EIGHT)
    plain, kept, own, inner, again = (b.view(source, EIGHT) for _ in range(5))
    plan = b.plan(plain, kept, inner, own, again)
    plan["buffers"][kept]["severed"] = "detach"
    plan["buffers"][own]["severed"] = "data"
    plan["buffers"][inner]["of"] = own
    plan["buffers"][again] |= {"of": own, "severed": "detach"}
    x = torch.randn(8)
    count = x._use_count()
    first, second, third, fourth, fifth = _native.Executor(plan).run([x])
    assert first._base is x and second._base is None and fourth._base is None
    assert third._base is fourth and fifth._base is None
    second.add_(1)
    assert x._version == second._version == first._version == 1 and torch.equal(first, x)
    third.add_(1)
    assert x._version == 1 and third._version == fourth._version == fifth._version == 1
    assert torch.equal(third, x)
    del first
    assert x._use_count() == count


@pytest.mark.parametrize(
    ("change", "fault"),
    [({"severed": "cut"}, "severed"), ({"of": 0}, "no severed view"), ({"of": 9}, "no buffer 9")],
)
def test_severed_views_that_cannot_be(change: dict[str, object], fault: str) -> None:
    b = Builder()
    source = b.input(EIGHT)
    plan = b.plan(b.view(source, EIGHT))
    plan["buffers"][-1] |= change
    with pytest.raises(ValueError, match=fault):
        _native.Executor(plan)
