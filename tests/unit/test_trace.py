"""What a recorded operation may write: a doubt is a yes."""

from __future__ import annotations

import pytest

from accel.trace import Operation, Ref

WRITING = [
    ("call_method", "add_", (Ref("a"), 1), {}),
    ("call_method", "__setitem__", (Ref("a"), 0, 1), {}),
    ("call_function", "_operator.iadd", (Ref("a"), 1), {}),
    ("call_function", "_operator.setitem", (Ref("a"), 0, 1), {}),
    ("call_function", "torch.add", (Ref("a"), 1), {"out": Ref("b")}),
    ("call_function", "torch.nn.functional.relu", (Ref("a"),), {"inplace": True}),
    ("call_function", "torch.nn.functional.relu", (Ref("a"), True), {}),
    ("call_function", "torch.embedding_bag", (Ref("a"), Ref("b")), {}),
    ("call_function", "torch.nn.functional.embedding_bag", (Ref("a"), Ref("b"), None, 1.0), {}),
    ("call_function", "torch.nn.functional.embedding", (Ref("a"), Ref("b")), {"max_norm": 0}),
    ("call_function", "torch.nn.functional.batch_norm", (Ref("a"), *3 * [None], None, True), {}),
    (
        "call_function",
        "torch.nn.functional.batch_norm",
        (Ref("a"), None, None),
        {"training": Ref("b")},
    ),
    ("call_function", "torch.ops.a_library.an_operator", (Ref("a"),), {}),
]
READING = [
    ("call_method", "add", (Ref("a"), 1), {}),
    ("call_function", "_operator.add", (Ref("a"), 1), {}),
    ("call_function", "torch.add", (Ref("a"), 1), {"out": None}),
    ("call_function", "torch.nn.functional.relu", (Ref("a"),), {"inplace": False}),
    ("call_function", "torch.ops.aten.relu.default", (Ref("a"),), {}),
    ("call_function", "torch.nn.functional.embedding", (Ref("a"), Ref("b"), 0, None, 2.0), {}),
    ("call_function", "torch.nn.functional.embedding_bag", (Ref("a"), Ref("b")), {}),
    ("call_function", "torch.nn.functional.batch_norm", (Ref("a"), Ref("b"), Ref("c")), {}),
]


@pytest.mark.parametrize(("kind", "target", "args", "kwargs"), WRITING)
def test_may_write(kind: str, target: str, args: tuple, kwargs: dict) -> None:  # type: ignore[type-arg]
    assert Operation("v0", kind, target, args, kwargs).may_write


@pytest.mark.parametrize(("kind", "target", "args", "kwargs"), READING)
def test_certainly_only_reads(kind: str, target: str, args: tuple, kwargs: dict) -> None:  # type: ignore[type-arg]
    assert not Operation("v0", kind, target, args, kwargs).may_write
