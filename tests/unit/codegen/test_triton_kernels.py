"""The cases of the C++ emitter's tests, with kernels of Triton run by its interpreter.

Without ACCEL_TRITON_TESTS=full only a part of them runs (conftest.py).
"""

from __future__ import annotations

from typing import Any

import capture_graph
import pytest
import test_loop_ir
import test_open_graphs
import test_random_graphs
import torch
from capture_graph import capture, compile_it
from test_compiled_programs import (  # noqa: F401
    test_a_cache_is_written_in_its_region_only,
    test_a_failed_speculation_commits_nothing,
    test_a_row_is_one_kernel,
    test_batch_norm_in_training_updates_its_statistics,
    test_branches_of_a_chain_are_one_kernel,
    test_equal_outputs_stay_apart,
    test_one_tensor_returned_twice_and_a_view_of_it,
    test_outputs_that_are_inputs_or_views,
    test_outputs_that_share_a_base_which_is_not_returned,
    test_pointwise_chains_are_one_kernel,
    test_writes,
    test_writes_to_two_inputs,
)
from test_lowerings import (  # noqa: F401
    test_elementwise_rows_equal_eager,
    test_integer_reductions,
    test_long_sums_are_accurate,
    test_reductions_equal_eager,
    test_shapes_equal_eager,
    test_sizes,
    test_what_a_reduction_begins_with,
)
from test_open_graphs import *  # noqa: F403
from test_random_graphs import test_random_graph  # noqa: F401
from test_random_masks import test_kernels_draw_what_torch_s_operations_draw  # noqa: F401
from test_training import *  # noqa: F403
from triton_blocks import BLOCKS
from triton_interpreter import interpreted, interpreter

from accel.codegen.fusion import Group
from accel.codegen.interpreter import interpret
from accel.codegen.targets import TARGETS

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "cpu", interpreted())
    monkeypatch.setattr(capture_graph, "NATIVE", False)
    monkeypatch.setattr(test_open_graphs, "LENGTHS", (2, 5, 16, 33))


@pytest.mark.parametrize("name", test_loop_ir.FUNCTIONS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("fuse", [True, False])
def test_kernels_do_what_the_loop_ir_says(
    name: str, blocks: str, fuse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    BLOCKS[blocks](monkeypatch)
    torch.manual_seed(5)
    graph, _, _ = capture(test_loop_ir.FUNCTIONS[name], [torch.randn(20, 37)])
    c = compile_it(graph, fuse=fuse)
    texts = {symbol: text for text, symbol in c.texts.items()}
    for step in c.steps:
        if not isinstance(step, Group):
            continue
        scheduled, use = c.scheduled[id(step)], c.kernels[id(step)]
        memory = [
            test_loop_ir.fill(c.graph.buffers[b].numel, p.dtype)
            for b, p in zip(scheduled.buffers, scheduled.kernel.params)
        ]
        expected = [m.clone() for m in memory]
        interpret(scheduled.kernel, expected)
        assert use.launch is not None
        interpreter().launch(texts[use.symbol], use.launch.grid, memory, [])
        for got, want in zip(memory, expected):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5, equal_nan=True)


def emitted(function: Any, *inputs: torch.Tensor) -> str:
    graph, _, _ = capture(function, list(inputs))
    return "\n".join(compile_it(graph).texts)


def test_blocks_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(x: torch.Tensor) -> torch.Tensor:
        return (x.exp().sin() - x.exp().sin().amax(-1, keepdim=True)).softmax(-1)

    x = torch.randn(20, 37)
    assert "for first" not in emitted(row, x)
    BLOCKS["small"](monkeypatch)
    assert "for first" not in emitted(row, x)  # what is kept needs whole rows
    assert "for first" in emitted(lambda x: x.sum(-1), x)
    BLOCKS["long rows"](monkeypatch)
    assert "for first" in emitted(row, x) and "debug_barrier" in emitted(row, x)
    assert "int64" not in emitted(row, x)
    BLOCKS["64 bits"](monkeypatch)
    assert "int64" in emitted(row, x)


@pytest.mark.parametrize("seed", range(1000, 1040))
@pytest.mark.parametrize("blocks", ["small", "long rows"])
def test_random_graph_in_small_blocks(
    seed: int, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    BLOCKS[blocks](monkeypatch)
    test_random_graphs.run(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_signs_of_zeros_and_nans_are_eagers(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 5.5], dtype=dtype)
    y = x[:, None].expand(8, 8).contiguous()

    # Which of two zeros eager's maximum takes depends on how its operands lie.
    def function(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        values = [
            -x, x.relu(), x.abs(), x.clamp(-1, 1),
            torch.div(x, y, rounding_mode="floor"), torch.div(x, y, rounding_mode="trunc"),
            x.remainder(2.0), x.remainder(-2.0), torch.fmod(x, y), x.round(), x.trunc(), x.sign(),
            torch.copysign(x, y), y.amax(1), y.amin(1), y.sum(1), x.sqrt(), x.sigmoid(),
        ]  # fmt: skip
        return [v if v.dim() == 2 else v[None].expand(8, 8).contiguous() for v in values]

    c = capture_graph.check(lambda a, b: [1 / v for v in function(a, b)], x, y)
    assert all(row["op"] == "launch" for row in c.plan["steps"]), c.plan["steps"]
    capture_graph.check(function, x, y)
    capture_graph.check(lambda a, b: [torch.maximum(a, b), torch.minimum(a, b)], x, y)
