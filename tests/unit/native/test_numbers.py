"""Numbers of their own identity, and guards that leave a tensor's layout open."""

from __future__ import annotations

import pytest
import torch

from accel import _native


@pytest.mark.parametrize("value", [0, 1, -1, 5, 256, -5, 1 << 29, 1 << 30, 1 << 62, -(1 << 100)])
def test_an_int_of_its_own(value: int) -> None:
    own = _native.own_number(value)
    assert own is not value
    assert _native.own_number(value) is not own
    assert type(own) is int
    assert own == value
    assert hash(own) == hash(value)
    assert repr(own) == repr(value)
    assert own + 1 == value + 1
    assert own.bit_length() == value.bit_length()
    assert {value: "found"}[own] == "found"


def test_a_float_of_its_own() -> None:
    value = 2.5
    own = _native.own_number(value)
    assert own is not value
    assert own == value
    assert type(own) is float


@pytest.mark.parametrize("value", [True, None, "1", 1j, torch.ones(1)])
def test_nothing_else(value: object) -> None:
    with pytest.raises(TypeError, match="takes an int or a float"):
        _native.own_number(value)


def program(tensor: torch.Tensor) -> _native.GuardProgram:
    return _native.GuardProgram([("TENSOR_KIND", -1, 0, tensor)], 1)


HOLDS = [
    torch.randn(3, 5),
    torch.randn(9, 1),
    torch.randn(0, 5),
    torch.randn(5, 3).t(),
    torch.randn(1, 5).expand(4, 5),
]
FAILS = [
    torch.randn(3),
    torch.randn(3, 5, 1),
    torch.randn(3, 5, dtype=torch.float64),
    torch.randn(3, 5, requires_grad=True),
    torch.nn.Parameter(torch.randn(3, 5)),
    torch.randn(3, 5).to_sparse(),
    torch.randn(3, 5, device="meta"),
    5,
]


@pytest.mark.parametrize("value", HOLDS, ids=str)
def test_any_sizes_and_strides(value: torch.Tensor) -> None:
    checked = program(torch.randn(3, 5))
    for _ in range(4):  # with and without a line
        assert checked.check((value,)) == -1


@pytest.mark.parametrize("value", FAILS, ids=lambda v: str(type(v)))
def test_another_kind(value: object) -> None:
    checked = program(torch.randn(3, 5))
    assert checked.check((torch.randn(3, 5),)) == -1
    for _ in range(4):
        assert checked.check((value,)) == 0
    assert checked.explain(0, (value,))


def test_a_tensor_that_is_resized_keeps_its_kind() -> None:
    x = torch.randn(3, 5)
    checked = program(x)
    for n in (3, 7, 2, 9):
        x.resize_(n, n)
        assert checked.check((x,)) == -1
    x.resize_(4)
    assert checked.check((x,)) == 0
    assert "sizes are [4]" in checked.explain(0, (x,))
