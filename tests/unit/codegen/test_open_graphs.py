"""Graphs for several sizes: one library, plans for sizes that the compiler never saw."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plan_runner import run_plan

from accel import expressions
from accel.codegen import CodegenOptions, CompileError, compile_graph
from accel.compile.blueprint import instantiate
from accel.trace import Operation, Ref, SegmentGraph, Sizes, Symbol, TensorMeta

X, Y = Ref("a0"), Ref("a1")
LENGTHS = (2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100)


def call(name: str, target: str, *args: Any, **kwargs: Any) -> Operation:
    return Operation(name, "call_function", target, args, kwargs)


def method(name: str, target: str, *args: Any, **kwargs: Any) -> Operation:
    return Operation(name, "call_method", target, args, kwargs)


def graph(
    operations: list[Operation],
    inputs: list[torch.Tensor],
    open_dims: list[tuple[int, int]],
    results: list[torch.Tensor],
    names: list[str],
    **more: Any,
) -> SegmentGraph:
    symbols = tuple(Symbol(("size", i, d), inputs[i].size(d)) for i, d in open_dims)
    return SegmentGraph(
        [(f"a{i}", TensorMeta.of(t)) for i, t in enumerate(inputs)],
        operations,
        names,
        [TensorMeta.of(t) for t in results],
        sizes=Sizes(symbols, **more),
    )


# name: (operations, what eager does, open dimensions of the first input)
GRAPHS: dict[str, tuple[list[Operation], Callable[..., Any], tuple[int, ...]]] = {
    "pointwise": (
        [call("v0", "torch.nn.functional.gelu", X), call("v1", "_operator.mul", "v0", 2.0)],
        lambda x: F.gelu(x) * 2.0,
        (0, 1),
    ),
    "softmax": ([call("v0", "torch.softmax", X, -1)], lambda x: torch.softmax(x, -1), (0, 1)),
    "softmax, columns": (
        [call("v0", "torch.softmax", X, 0)], lambda x: torch.softmax(x, 0), (0, 1),
    ),
    "log softmax": (
        [call("v0", "torch.log_softmax", X, 1)], lambda x: torch.log_softmax(x, 1), (1,),
    ),
    "mean": ([method("v0", "mean", X, 0)], lambda x: x.mean(0), (0, 1)),
    "sum of all": ([method("v0", "sum", X)], lambda x: x.sum(), (0, 1)),
    "variance": ([method("v0", "var", X, 1)], lambda x: x.var(1), (0, 1)),
    "maximum": ([method("v0", "amax", X, 1)], lambda x: x.amax(1), (0, 1)),
    "transposed": (
        [method("v0", "t", X), method("v1", "contiguous", "v0")],
        lambda x: x.t().contiguous(),
        (0, 1),
    ),
    "joined": (
        [call("v0", "torch.cat", [X, X], 0), call("v1", "torch.cat", ["v0", "v0"], 1)],
        lambda x: torch.cat([torch.cat([x, x], 0)] * 2, 1),
        (0, 1),
    ),
    "padded": (
        [call("v0", "torch.nn.functional.pad", X, (1, 2, 3, 0))],
        lambda x: F.pad(x, (1, 2, 3, 0)),
        (0, 1),
    ),
    "triangle": ([call("v0", "torch.tril", X, 1)], lambda x: torch.tril(x, 1), (0, 1)),
    "its own product": (
        [method("v0", "t", X), call("v1", "torch.matmul", X, "v0")],
        lambda x: x @ x.t(),
        (0, 1),
    ),
    "expanded": (
        [method("v0", "unsqueeze", X, 0), method("v1", "expand", "v0", 3, -1, -1),
         call("v2", "_operator.add", "v1", 1)],
        lambda x: x.unsqueeze(0).expand(3, -1, -1) + 1,
        (0, 1),
    ),
}  # fmt: skip


def named(operations: list[Operation]) -> list[Operation]:
    """The same with `Ref`s for names among the arguments."""
    known = {o.name for o in operations}

    def ref(value: Any) -> Any:
        if isinstance(value, list):
            return [ref(v) for v in value]
        return Ref(value) if isinstance(value, str) and value in known else value

    return [
        Operation(o.name, o.kind, o.target, tuple(map(ref, o.args)), o.kwargs) for o in operations
    ]


@pytest.mark.parametrize("name", GRAPHS)
def test_one_library_for_all_sizes(name: str, tmp_path: Path) -> None:
    operations, eager, dims = GRAPHS[name]
    torch.manual_seed(3)
    example = torch.randn(6, 9)
    made = graph(
        named(operations),
        [example],
        [(0, d) for d in dims],
        [eager(example)],
        [operations[-1].name],
    )
    assert SegmentGraph.from_json(json.loads(json.dumps(made.to_json()))) == made
    blueprint = compile_graph(made, out_dir=tmp_path, options=CodegenOptions(verify=True))
    blueprint = json.loads(json.dumps(blueprint))
    library = tmp_path / blueprint["library"] if blueprint["library"] else None
    for a, b in itertools.product(LENGTHS, repeat=2):
        sizes = [n if d in dims else example.size(d) for d, n in enumerate((a, b))]
        values = [sizes[d] for d in dims]
        assert all(expressions.holds(t, values) for t in blueprint["sizes"]["tests"]), values
        x = torch.randn(sizes)
        plan = instantiate(blueprint, values)
        found = run_plan(plan, library, [x, torch.tensor(values)])
        assert found is not None
        wanted = eager(x)
        assert found[0].shape == wanted.shape
        assert found[0].stride() == wanted.stride()
        torch.testing.assert_close(found[0], wanted, equal_nan=True)


def test_numbers_that_the_graph_returns(tmp_path: Path) -> None:
    x = torch.randn(6, 9)
    operations = [
        method("n0", "size", X, 0),
        call("n1", "_operator.mul", Ref("n0"), 3),
        call("n2", "_operator.floordiv", Ref("n1"), 4),
        call("v0", "_operator.add", X, Ref("n2")),
    ]
    made = graph(
        operations, [x], [(0, 0)], [x + 4], ["v0"],
        hints=(("n0", 6), ("n1", 18), ("n2", 4)), outputs=("n2", "n0"),
    )  # fmt: skip
    blueprint = compile_graph(made, out_dir=tmp_path)
    values = [expressions.evaluate(e, [11]) for e in blueprint["sizes"]["outputs"]]
    assert values == [8, 11]
    y = torch.randn(11, 9)
    plan = instantiate(blueprint, [11])
    found = run_plan(plan, tmp_path / plan["library"], [y, torch.tensor([11])])
    assert found is not None
    torch.testing.assert_close(found[0], y + 8)


def test_predicates_become_tests(tmp_path: Path) -> None:
    x = torch.randn(6, 9)
    operations = [
        method("n0", "size", X, 0),
        call("n1", "_operator.gt", Ref("n0"), 4),
        call("v0", "_operator.mul", X, 2),
    ]
    made = graph(
        operations, [x], [(0, 0)], [x * 2], ["v0"],
        hints=(("n0", 6), ("n1", True)), predicates=(("n1", True),),
    )  # fmt: skip
    tests = compile_graph(made, out_dir=tmp_path)["sizes"]["tests"]
    assert [n for n in range(12) if all(expressions.holds(t, [n]) for t in tests)] == [
        5, 6, 7, 8, 9, 10, 11,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("hints", "predicates", "message"),
    [
        ((("n0", 7),), (), "was 7 when recorded, traces as 6"),
        ((("n0", 6),), (("n0", False),), "another truth"),
    ],
)
def test_a_recording_that_tracing_contradicts_is_refused(
    hints: Any, predicates: Any, message: str, tmp_path: Path
) -> None:
    x = torch.randn(6, 9)
    operations = [method("n0", "size", X, 0), call("v0", "_operator.mul", X, 2)]
    made = graph(operations, [x], [(0, 0)], [x * 2], ["v0"], hints=hints, predicates=predicates)
    with pytest.raises(CompileError, match=message):
        compile_graph(made, out_dir=tmp_path)


def test_equal_sizes_are_not_one_symbol(tmp_path: Path) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    free = graph(
        [call("v0", "torch.cat", [X, Y], 0)], [x, y], [(0, 0), (1, 0)], [torch.cat([x, y])], ["v0"]
    )
    bound = graph([call("v0", "_operator.add", X, Y)], [x, y], [(0, 0), (1, 0)], [x + y], ["v0"])
    tests = [compile_graph(g, out_dir=tmp_path)["sizes"]["tests"] for g in (free, bound)]
    assert [all(expressions.holds(t, [5, 7]) for t in found) for found in tests] == [True, False]
    assert all(expressions.holds(t, [5, 5]) for found in tests for t in found)


def test_a_size_of_one_has_no_symbol(tmp_path: Path) -> None:
    x = torch.randn(1, 4)
    made = graph([call("v0", "_operator.mul", X, 2)], [x], [(0, 0)], [x * 2], ["v0"])
    with pytest.raises(CompileError, match="a graph of its own"):
        compile_graph(made, out_dir=tmp_path)


def test_an_arena_is_laid_out_for_each_size(tmp_path: Path) -> None:
    x = torch.randn(6, 5)
    operations = [call("v0", "torch.matmul", X, Y), call("v1", "torch.matmul", Ref("v0"), Y)]
    y = torch.randn(5, 5)
    made = graph(operations, [x, y], [(0, 0)], [x @ y @ y], ["v1"])
    blueprint = compile_graph(made, out_dir=tmp_path)
    small, big = instantiate(blueprint, [6]), instantiate(blueprint, [6000])
    assert 6 * 5 * 4 <= small["arena_bytes"] < 6000 * 5 * 4 <= big["arena_bytes"]
    assert blueprint["arena_bytes"] == 0
    assert "sizes" not in small
