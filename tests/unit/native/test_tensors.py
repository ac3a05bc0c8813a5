"""Tensor services of accel._native: metadata guards, the table, ambient state, the watch."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from accel import _native


class TestPlainTensors:
    def test_types(self) -> None:
        class Sub(torch.Tensor):
            pass

        assert _native.is_plain_tensor(torch.ones(2))
        assert _native.is_plain_tensor(torch.nn.Parameter(torch.ones(2)))
        assert not _native.is_plain_tensor(torch.ones(2).as_subclass(Sub))
        assert not _native.is_plain_tensor([1])
        _native.register_tensor_type(Sub)
        assert _native.is_plain_tensor(torch.ones(2).as_subclass(Sub))
        with pytest.raises(TypeError):
            _native.register_tensor_type(int)

    def test_versions(self) -> None:
        x = torch.ones(2)
        before = _native.tensor_version(x)
        x.add_(1)
        assert _native.tensor_version(x) == before + 1 == x._version
        with torch.inference_mode():
            assert _native.tensor_version(torch.ones(2)) == 0

    def test_storage(self) -> None:
        x = torch.ones(4, 4)
        assert _native.storage_key(x) == _native.storage_key(x[1:])
        assert _native.storage_key(x) != _native.storage_key(x.clone())
        assert _native.storage_nbytes(x[1:]) == 64
        with pytest.raises(RuntimeError, match="storage"):
            _native.storage_key(torch.ones(2, 2).to_sparse())

    def test_overlap(self) -> None:
        x = torch.ones(4, 4)
        assert _native.storage_overlaps(x, x[3])
        assert not _native.storage_overlaps(x[0], x[1])
        assert _native.storage_overlaps(x[0], x[:, 1])
        assert not _native.storage_overlaps(x, x[:0])
        assert _native.storage_overlaps(x, torch.from_numpy(x.numpy())[2:])
        with pytest.raises(TypeError):
            _native.storage_overlaps(x, 3)


class TestMetaGuard:
    @pytest.mark.parametrize(
        ("other", "reason"),
        [
            (lambda x: x.double(), "dtype"),
            (lambda x: x.t(), "strides|sizes"),
            (lambda x: x.t().contiguous().t(), "strides"),
            (lambda x: x[:2], "sizes"),
            (lambda x: x[None], "sizes"),
            (lambda x: x.clone().requires_grad_(), "requires_grad"),
            (lambda x: torch.nn.Parameter(x.clone()), "type"),
            (lambda x: x.to_sparse(), "keys"),
            (lambda x: x.to("meta"), "keys|device"),
            (lambda x: 3, "type"),
            (torch._neg_view, "keys"),
        ],
    )
    def test_differences(self, other: Any, reason: str) -> None:
        x = torch.ones(3, 4)
        guard = _native.TensorMetaGuard(x)
        assert guard.check(x)
        assert guard.difference(x) == ""
        assert guard.check(torch.zeros(3, 4))
        changed = other(x)
        assert not guard.check(changed)
        assert any(word in guard.difference(changed) for word in reason.split("|"))

    def test_many_dimensions(self) -> None:
        x = torch.ones([2] * 9)
        guard = _native.TensorMetaGuard(x)
        assert guard.check(x.clone())
        assert not guard.check(torch.ones([2] * 8 + [3]))
        assert not guard.check(torch.ones([2] * 8))

    def test_offset_on_request(self) -> None:
        x = torch.ones(8)
        assert _native.TensorMetaGuard(x[:4]).check(x[4:])
        guard = _native.TensorMetaGuard(x[:4], storage_offset=True)
        assert guard.check(x[:4])
        assert guard.difference(x[4:]) == "storage offset"

    def test_inference_tensor_is_another(self) -> None:
        guard = _native.TensorMetaGuard(torch.ones(2))
        with torch.inference_mode():
            x = torch.ones(2)
        assert not guard.check(x)

    def test_grad_fn_counts_as_requires_grad(self) -> None:
        x = torch.ones(2, requires_grad=True)
        guard = _native.TensorMetaGuard(x)
        assert guard.check(x * 2)
        assert not guard.check(x.detach())

    def test_hooks(self) -> None:
        x = torch.ones(2, requires_grad=True)
        guard = _native.TensorMetaGuard(x)
        x.register_hook(lambda g: g)
        assert guard.difference(x) == "tensor hooks"

    def test_forward_ad(self) -> None:
        import torch.autograd.forward_ad as fwad

        guard = _native.TensorMetaGuard(torch.ones(2))
        with fwad.dual_level():
            dual = fwad.make_dual(torch.ones(2), torch.ones(2))
            assert not guard.check(dual)
            with pytest.raises(ValueError, match="tangent"):
                _native.TensorMetaGuard(dual)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.ones(2, 2).to_sparse(),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            lambda: torch._to_functional_tensor(torch.ones(2)),
            lambda: 3,
        ],
    )
    def test_refused(self, make: Any) -> None:
        with pytest.raises(ValueError, match="cannot guard"):
            _native.TensorMetaGuard(make())


class TestTensorTable:
    def test_identity(self) -> None:
        table = _native.TensorTable()
        x, y = torch.ones(2), torch.ones(2)
        table.set(x, 7)
        assert table.get(x) == 7
        assert table.get(y) is None
        table.set(x, 8)
        assert table.get(x) == 8
        assert len(table) == 1
        with pytest.raises(TypeError):
            table.get(3)

    def test_keeps_nothing_alive(self) -> None:
        table = _native.TensorTable()
        x = torch.ones(2)
        count = sys.getrefcount(x)
        table.set(x, 1)
        assert sys.getrefcount(x) == count
        died = weakref.ref(x)
        storage_died = weakref.ref(x.untyped_storage())
        del x
        gc.collect()
        assert died() is None
        assert storage_died() is None
        # The address cannot come back while the table remembers it.
        assert all(table.get(torch.ones(2)) is None for _ in range(100))


def _modes() -> dict[str, AbstractContextManager[Any]]:
    return {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "saved tensor hooks": torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "torch function disabled": torch._C.DisableTorchFunctionSubclass(),
        "device": torch.device("cpu"),
    }


class TestAmbient:
    @pytest.mark.parametrize("name", list(_modes()))
    def test_modes(self, name: str) -> None:
        ambient = _native.Ambient()
        assert ambient.matches()
        assert ambient.difference() == ""
        with _modes()[name]:
            assert not ambient.matches()
            assert ambient.difference()
        assert ambient.matches()

    def test_every_row_has_a_number(self) -> None:
        rows = _native.ambient()
        assert all(isinstance(value, int) for value in rows.values())
        assert rows["threads"] == torch.get_num_threads()

    @pytest.mark.parametrize(
        "change",
        [
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.use_deterministic_algorithms(True),
            lambda: torch.backends.cuda.enable_flash_sdp(False),
            lambda: torch.backends.cuda.enable_math_sdp(False),
            lambda: torch.set_float32_matmul_precision("medium"),
        ],
    )
    def test_process_flags(self, change: Any) -> None:
        torch.set_float32_matmul_precision("highest")
        ambient = _native.Ambient()
        try:
            change()
            assert not ambient.matches()
        finally:  # the state of a fresh process
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            torch.backends.cuda.enable_flash_sdp(True)
            torch.backends.cuda.enable_math_sdp(True)
            torch.set_float32_matmul_precision("highest")
        assert ambient.difference() == ""

    def test_other_autocast_dtype(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ambient = _native.Ambient()
            assert ambient.matches()
        with torch.autocast("cpu", dtype=torch.float16):
            assert "autocast" in ambient.difference()

    def test_a_new_push_of_a_mode_is_another(self) -> None:
        with torch.device("cpu"):
            ambient = _native.Ambient()
            assert ambient.matches()
        with torch.device("cpu"):
            assert "modes" in ambient.difference()

    def test_vmap_and_jit_tracing(self) -> None:
        ambient = _native.Ambient()
        seen = []

        def look(x: torch.Tensor) -> torch.Tensor:
            seen.append(ambient.matches())
            return x + 1

        torch.vmap(look)(torch.ones(3))
        torch.func.grad(lambda x: look(x).sum())(torch.ones(3))
        assert seen == [False, False]
        assert ambient.matches()

    def test_is_the_threads(self) -> None:
        with torch.no_grad():
            ambient = _native.Ambient()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(ambient.matches()))
        thread.start()
        thread.join()
        assert seen == [False]


class TestOperationWatch:
    def test_counts_outermost_only(self) -> None:
        x = torch.ones(2, 2)
        _native.op_watch_start()
        torch.nn.functional.linear(x, x)
        x + 1
        assert _native.op_watch_stop() == (2, "aten::linear")
        assert _native.op_watch_stop()[0] == 2

    def test_announced(self) -> None:
        x = torch.ones(2, 2)
        _native.op_watch_start()
        _native.announce_begin()
        _native.announce_begin()
        x + 1
        _native.announce_end()
        x + 1
        _native.announce_end()
        assert _native.op_watch_stop() == (0, None)

    def test_after_an_operation_raised(self) -> None:
        x, wrong = torch.ones(2, 2), torch.ones(3)
        _native.op_watch_start()
        with pytest.raises(RuntimeError):
            x @ wrong
        x.sin()
        assert _native.op_watch_stop() == (2, "aten::matmul")

    def test_other_threads_do_not_count(self) -> None:
        x = torch.ones(2, 2)
        _native.op_watch_start()
        thread = threading.Thread(target=lambda: x + 1)
        thread.start()
        thread.join()
        assert _native.op_watch_stop() == (0, None)

    def test_nothing_after_stop(self) -> None:
        _native.op_watch_start()
        _native.op_watch_stop()
        torch.ones(2).sin()
        assert _native.op_watch_stop() == (0, None)
