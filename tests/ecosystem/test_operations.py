"""Torch's own list of operations with arguments for each, run plainly and optimized.

A seeded sample runs by default: one dtype and one set of arguments of some operations.
`ACCEL_OPERATIONS_ALL=1` runs every operation with all of its dtypes and three sets of arguments;
`ACCEL_OPERATIONS_SEED` chooses another sample.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

import accel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")

ALL = os.environ.get("ACCEL_OPERATIONS_ALL") == "1"
SEED = int(os.environ.get("ACCEL_OPERATIONS_SEED", "1"))
SAMPLE = 90
CALLS = 4  # recorded, then served
# What is tried of an operation, as far as it takes it: dtype, and whether inputs require grad.
VARIETIES = (
    (torch.float32, False),
    (torch.float32, True),
    (torch.complex64, False),
    (torch.int64, False),
    (torch.bool, False),
)
# Other than the defaults of `assert_close`.
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.complex64: {"rtol": 1e-4, "atol": 1e-5},
}
SKIPPED = frozenset({
    # Uninitialised memory.
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    # For GPUs.
    "jiterator_2inputs_2outputs", "jiterator_4inputs_with_extra_args", "jiterator_binary",
    "jiterator_binary_return_by_ref", "jiterator_unary",
})  # fmt: skip
# Calls that Python makes, whole or in part, for some of the arguments at least. All others must be
# served compiled.
LEFT_TO_PYTHON = frozenset({
    # Sizes, or whether they raise, hang on values.
    "argwhere", "bincount", "combinations", "corrcoef", "cov", "index_put", "istft", "linalg.lstsq",
    "linalg.lstsq.grad_oriented", "masked_select", "nn.functional.ctc_loss",
    "nn.functional.one_hot", "nonzero", "repeat_interleave", "tensor_split", "unique",
    "unique_consecutive", "narrow",
    # They answer with Python's values, or with no tensor.
    "allclose", "broadcast_shapes", "equal", "item",
    # Storage, layouts, lazily conjugated results.
    "H", "as_strided", "as_strided.partial_views", "as_strided_copy", "as_strided_scatter", "chalf",
    "conj", "fft.ifft", "fft.ihfft", "fft.ihfft2", "fft.ihfftn", "imag", "mH", "real", "resize_",
    "sparse.mm.reduce", "sparse.sampled_addmm", "svd", "to_sparse", "view_as_real",
    # Too few elements give a warning; complex ones have another dtype in torch's meta function.
    "std", "std.unbiased", "var", "var.unbiased", "var_mean", "var_mean.unbiased",
    # Written in Python, in a way that is not recorded.
    "_batch_norm_with_update", "_native_batch_norm_legit",
    "nn.functional.linear_cross_entropy.chunked", "nn.functional.linear_cross_entropy.chunked_none",
    # torch.testing wraps them in a switch of torch's dispatcher, for their random numbers.
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "multinomial",
    "nn.functional.alpha_dropout", "nn.functional.dropout", "nn.functional.dropout2d",
    "nn.functional.dropout3d", "nn.functional.feature_alpha_dropout.with_train",
    "nn.functional.feature_alpha_dropout.without_train", "nn.functional.fractional_max_pool2d",
    "nn.functional.fractional_max_pool3d", "nn.functional.multi_head_attention_forward",
    "nn.functional.rrelu", "nn.functional.scaled_dot_product_attention", "normal",
    "normal.in_place", "normal.number_mean", "pca_lowrank", "rand_like", "randint", "randint_like",
    "randn", "randn_like", "svd_lowrank", "uniform",
})  # fmt: skip


def _name(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else str(info.name)


def _cases() -> list[Any]:
    rng = random.Random(SEED)
    infos = sorted((i for i in methods.op_db if _name(i) not in SKIPPED), key=_name)
    if not ALL:
        infos = rng.sample(infos, SAMPLE)
    cases = []
    for info in infos:
        fit = [
            (dtype, grad)
            for dtype, grad in VARIETIES
            if dtype in info.dtypes and (info.supports_autograd or not grad)
        ]
        for dtype, grad in fit if ALL else rng.sample(fit, min(1, len(fit))):
            text = f"{_name(info)}-{str(dtype)[6:]}{'-grad' if grad else ''}"
            cases.append(pytest.param(info, dtype, grad, id=text))
    return cases


def _fresh(arguments: Any) -> Any:
    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    return tree_map(copy, arguments)


def _outcome(function: Callable[..., Any], sample: Any, grad: bool) -> dict[str, Any]:
    """What a call gives, what it makes of its arguments, and their gradients."""
    torch.manual_seed(7)
    arguments = _fresh((sample.input, sample.args, sample.kwargs))
    try:
        out = function(*arguments)
    except Exception as error:
        return {"error": (type(error).__name__, str(error))}
    found = {"result": out, "arguments": arguments}
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.requires_grad]
    outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    if grad and leaves and outs:
        total = [(t.abs() if t.is_complex() else t).sum() for t in outs]
        found["gradients"] = torch.autograd.grad(total, leaves, allow_unused=True)
    return found


def _facts(tensor: torch.Tensor, what: str) -> tuple[Any, ...]:
    facts = (tensor.dtype, tuple(tensor.shape), tensor.layout)
    if what == "gradients" or tensor.layout != torch.strided:  # whoever adds them up lays them out
        return facts
    return (*facts, tensor.stride(), tensor.requires_grad, tensor.is_conj(), tensor.is_neg())


def _compare(expected: dict[str, Any], got: dict[str, Any], dtype: torch.dtype) -> None:
    assert expected.keys() == got.keys(), (expected.get("error"), got.get("error"))
    for what, wanted in expected.items():
        ours, theirs = tree_leaves(got[what]), tree_leaves(wanted)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert type(a) is type(b)
            if not isinstance(b, torch.Tensor):
                assert repr(a) == repr(b)  # nan too
                continue
            assert _facts(a, what) == _facts(b, what), what
            if b.layout == torch.strided:
                a, b = a.detach().resolve_conj(), b.detach().resolve_conj()
                assert_close(a, b, equal_nan=True, **TOLERANCES.get(dtype, {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("info", "dtype", "grad"), _cases())
def test_operation(info: Any, dtype: torch.dtype, grad: bool) -> None:
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=grad))
    count = 3 if ALL else 1
    for sample in samples[:: max(1, len(samples) // count)][:count]:
        accel.reset()

        def call(x: Any, args: Any, kwargs: Any) -> Any:
            return info.op(x, *args, **kwargs)

        expected = _outcome(call, sample, grad)
        before = accel.counters()["calls_compiled"]
        optimized = accel.optimize(call)
        for _ in range(CALLS):
            _compare(expected, _outcome(optimized, sample, grad), dtype)
            assert accel.wait(120)
        served = accel.counters()["calls_compiled"] - before
        if "error" in expected or _only_views(expected, grad):
            continue
        name = _name(info)
        # A function of torch.masked defines a class.
        if served or name in LEFT_TO_PYTHON or name.startswith("masked."):
            continue
        text = str(accel.explain(call)(*_fresh((sample.input, sample.args, sample.kwargs))))
        assert "it warns: " in text, text  # deprecated, mostly: the program's filters decide


def _only_views(outcome: dict[str, Any], grad: bool) -> bool:
    """Whether every result that requires grad is a view of an argument: nothing to compile."""
    if not grad:
        return False
    storages = {
        t.untyped_storage()._cdata
        for t in tree_leaves(outcome["arguments"])
        if isinstance(t, torch.Tensor) and t.layout == torch.strided
    }
    outs = [t for t in tree_leaves(outcome["result"]) if isinstance(t, torch.Tensor)]
    return all(
        t.layout == torch.strided and t.untyped_storage()._cdata in storages
        for t in outs
        if t.requires_grad
    )


def test_the_table_names_operations() -> None:
    assert {_name(i) for i in methods.op_db} >= LEFT_TO_PYTHON
