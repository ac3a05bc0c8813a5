"""Random numbers on a GPU: torch's own stream, computed by the kernels that use them.

In: an operation that draws, on fake tensors of a GPU. Out: `accel::philox_state`, which takes a
part of the generator's stream when the plan runs, and `accel::philox_uniform`, numbers in (0, 1]
as a function of that and of an element's place: it may be computed again in a backward.
Invariants: bits are those of ATen's kernels and the generator ends where they would leave it; a
draw of which that is not certain keeps its ATen operation, and the graph is refused.

Where each fact is from ("header": as in the wheel of torch 2.13, below torch/include/ATen):
- Philox4x32-10, key = seed, counter = (offset / 4, thread): header core/PhiloxRNGEngine.h. That
  `curand_init` makes the same of seed, subsequence and offset, and that `curand4` takes one block
  of four and goes on by one: cuRAND's curand_kernel.h, which is not in the wheel, from memory.
- Blocks of 256 threads, at most as many as are resident at once; elements dealt out to threads,
  four (float64: two) a round, and by how much the offset advances: headers native/cuda/
  DistributionTemplates.h (`calc_execution_policy`, `distribution_elementwise_grid_stride_kernel`).
  Elements count in the order of memory, as TensorIterator sorts dimensions. Tensors for which
  positions need more than 32 bits are split there, and refused here.
- bits to (0, 1]: `curand_uniform4`, `curand_uniform2_double`, from memory.
- What becomes of them: headers native/cuda/DistributionTemplates.h (`uniform_kernel`: reversed
  bounds; `bernoulli_kernel`), core/TransformationHelper.h. Whether nvcc contracts
  `rand * range + from` does not matter for the ranges that are taken here.
- Dropout: native/cuda/Dropout.cu, not in the wheel, as in torch's repository. A thread takes as many neighbours at once as
  16 bytes hold (with CUDA before 12.8 four), as the tensor's first address allows and as divide the number of
  elements; for each four a block, for two the first half of one. For one element at a time as above.
- Normal numbers are refused: cuRAND's Box-Muller uses approximate sines.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from accel.codegen.affine import Affine, address
from accel.codegen.builder import Builder, Unsupported
from accel.codegen.decompositions_activations import cast as converted
from accel.codegen.loop_ir import VALUE_TYPE, Const, Expr, Iota, RunNumber, cast, op
from accel.codegen.scalar_ops import SCALAR_OPS
from accel.codegen.tensor_graph import Node, View

aten = torch.ops.aten

_DEVICE = "cuda"
_BLOCK_THREADS = 256
_LANES = 4  # of a Philox block; offsets count lanes, counters blocks
_POSITIONS = (1 << 31) - 1

_STATE = "philox_state(int advance, Device device) -> (Tensor, Tensor)"
_UNIFORM = (
    "philox_uniform(int[] size, int[] stride, Tensor seed, Tensor counter, int threads,"
    " int neighbours, ScalarType dtype) -> Tensor"
)
# Recorded operations that draw on a GPU by what they are traced as. Others, such as attention, have
# kernels there that draw otherwise.
_ORIGINS = frozenset({
    "bernoulli", "bernoulli_", "rand", "rand_like", "uniform_", "native_dropout", "dropout",
    "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_dropout_", "alpha_dropout",
    "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_",
})  # fmt: skip


def draws_in_order(target: str) -> bool:
    """Whether a recorded operation may draw on a GPU by kernels of accel, in the order of a tensor's memory."""
    return target.rsplit(".", 1)[-1] in _ORIGINS


@functools.cache
def _library() -> Any:
    library = torch.library.Library("accel", "FRAGMENT")
    library.define(_STATE, tags=(torch.Tag.nondeterministic_seeded,))
    library.define(_UNIFORM)
    # There is no stream that is drawn from here: outside of kernels it is only traced.
    torch.library.register_fake("accel::philox_state", _empty_state, lib=library)
    library.impl("philox_uniform", _empty_uniform, "Meta")
    library.impl("philox_uniform", _uniform, "CPU")
    return library


def state_operator() -> Any:
    _library()
    return torch.ops.accel.philox_state.default


def uniform_operator() -> Any:
    _library()
    return torch.ops.accel.philox_uniform.default


def _empty_state(advance: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.empty((), dtype=torch.int64, device=device)
    return seed, torch.empty_like(seed)


def _empty_uniform(
    size: Any, stride: Any, seed: Any, counter: Any, threads: int, neighbours: int, dtype: Any
) -> torch.Tensor:
    return seed.new_empty_strided(size, stride, dtype=dtype)


def _uniform(
    size: Any, stride: Any, seed: Any, counter: Any, threads: int, neighbours: int, dtype: Any
) -> torch.Tensor:
    """What the kernels compute, by torch's operations."""
    row = _ROWS[dtype]
    places = torch.arange(math.prod(size))
    divide = functools.partial(torch.div, rounding_mode="floor")
    thread, block, lane = _share(places, threads, neighbours, _LANES // row.words, divide)
    values = SCALAR_OPS[row.name].torch(seed, counter + block, thread, lane)
    out = _empty_uniform(size, stride, seed, counter, threads, neighbours, dtype)
    out.as_strided(places.shape, (1,)).copy_(values)
    return out


@dataclass(frozen=True)
class _Row:
    """The scalar operation that makes numbers of a dtype, and how many words each takes."""

    name: str
    words: int


_ROWS = {
    torch.float32: _Row("philox_uniform", 1),
    torch.float64: _Row("philox_uniform_wide", 2),
}


def _share(
    place: Any, threads: int, neighbours: int, lanes: int, divide: Callable[[Any, int], Any]
) -> tuple[Any, Any, Any]:
    """Which thread of ATen's kernel computes an element, of which block of its own, and which lane:
    threads take `neighbours` elements side by side, with a block for each `lanes` of them or fewer."""
    if neighbours == 1:
        step = divide(place, threads)
        block = divide(step, lanes)
        return place - step * threads, block, step - block * lanes
    group = divide(place, neighbours)
    turn = divide(group, threads)
    thread, lane = group - turn * threads, place - group * neighbours
    if neighbours <= lanes:
        return thread, turn, lane
    block = divide(lane, lanes)
    return thread, turn * (neighbours // lanes) + block, lane - block * lanes


# ---------------------------------------------------------------- what draws


class Draws:
    """The operations of one graph that draw, as operations on numbers in (0, 1].

    `blocks` of 256 threads are resident on the GPU at once; `origin` names the recorded operation
    that is being traced; `is_fresh` says whether a tensor lies in memory that the graph allocates,
    which begins at a multiple of every vector's size.
    """

    def __init__(
        self,
        blocks: int,
        origin: Callable[[], str],
        is_fresh: Callable[[torch.Tensor], bool],
    ) -> None:
        self.blocks, self.origin, self.is_fresh = blocks, origin, is_fresh

    def table(self) -> dict[Any, Callable[..., Any]]:
        """By functional operation; NotImplemented leaves a call as it is."""
        return {
            aten.bernoulli.p: self._bernoulli,
            aten.uniform.default: self._uniform,
            aten.rand.default: self._rand,
            aten.rand_like.default: self._rand_like,
            aten.native_dropout.default: self._dropout,
        }

    def _numbers(self, out: Any, dtype: torch.dtype, neighbours: int = 1) -> Any:
        """A number for each element of `out`, whose strides they have; None where that is not sure."""
        known = out.device.type == _DEVICE and draws_in_order(self.origin())
        sizes, strides = tuple(out.shape), tuple(out.stride())
        if not known or not all(type(n) is int for n in (*sizes, *strides)) or not _is_dense(out):
            return None
        numel, lanes = math.prod(sizes), _LANES // _ROWS[dtype].words
        threads = _BLOCK_THREADS * max(1, min(self.blocks, -(-numel // _BLOCK_THREADS)))
        advance = -(-numel // (threads * lanes)) * _LANES
        seed, counter = state_operator()(advance, out.device)
        return uniform_operator()(sizes, strides, seed, counter, threads, neighbours, dtype)

    def _bernoulli(self, x: Any, p: Any = 0.5, *, generator: Any = None) -> Any:
        wide = _wide(x.dtype)
        # In place it draws in the order of memory, else for a tensor that lies by rows.
        if generator is not None or not x.is_contiguous() or _name(x.dtype) not in VALUE_TYPE:
            return NotImplemented
        numbers = self._numbers(x, wide)
        return NotImplemented if numbers is None else converted(numbers < _exact(p, wide), x.dtype)

    def _uniform(self, x: Any, low: Any = 0.0, high: Any = 1.0, *, generator: Any = None) -> Any:
        if generator is not None or not x.is_contiguous():
            return NotImplemented
        return self._between(x, low, high)

    def _rand(
        self,
        size: Any,
        *,
        dtype: Any = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
    ) -> Any:
        if layout not in (None, torch.strided) or pin_memory:
            return NotImplemented
        return self._between(torch.empty(size, dtype=dtype, device=device), 0.0, 1.0)

    def _rand_like(self, x: Any, **how: Any) -> Any:
        if how.get("layout") not in (None, torch.strided) or how.get("pin_memory"):
            return NotImplemented
        return self._between(torch.empty_like(x, **how), 0.0, 1.0)

    def _between(self, out: Any, low: float, high: float) -> Any:
        """As `uniform_kernel`: bounds in the tensor's dtype, what rounds to the upper is the lower."""
        if out.dtype not in _FLOATS:
            return NotImplemented
        low, high = _exact(low, out.dtype), _exact(high, out.dtype)
        width = _exact(high - low, out.dtype)
        if low != 0 and math.frexp(abs(width))[0] not in (0.0, 0.5):
            return NotImplemented  # contracted or not, it would be rounded otherwise
        numbers = self._numbers(out, _wide(out.dtype))
        if numbers is None:
            return NotImplemented
        values = converted(numbers * width + low, out.dtype)
        return torch.where(values == high, torch.full_like(values, low), values)

    def _dropout(self, x: Any, p: float, train: bool | None) -> Any:
        neighbours = self._neighbours(x)
        if train is False or not 0 < p < 1 or neighbours is None or x.dtype not in _FLOATS:
            return NotImplemented
        numbers = self._numbers(x, torch.float32, neighbours)  # also for float64
        if numbers is None:
            return NotImplemented
        wide = _wide(x.dtype)
        kept = _exact(1.0 - p, wide)
        mask = converted(numbers, wide) < kept
        scaled = converted(x, wide) * converted(mask, wide) * _exact(1.0 / kept, wide)
        return converted(scaled, x.dtype), mask

    def _neighbours(self, x: Any) -> int | None:
        """How many elements a thread of ATen's dropout takes side by side; None: not known."""
        numel = x.numel()
        if type(numel) is not int or numel == 0 or not _is_dense(x):
            return None
        most = math.gcd(numel, _widest(x.element_size()))
        if most > 1 and not self.is_fresh(x):
            return None  # where it begins is not guarded
        neighbours = math.gcd(most, x.storage_offset()) if most > 1 else 1
        # One at a time they count in the order of rows.
        return neighbours if neighbours > 1 or x.is_contiguous() else None


def _widest(itemsize: int) -> int:
    """The most neighbours that a thread of ATen's dropout takes."""
    cuda = tuple(map(int, (torch.version.cuda or "13.0").split(".")[:2]))
    return 16 // itemsize if cuda >= (12, 8) else 4


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that ATen's kernels draw and compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exact(value: float, dtype: torch.dtype) -> float:
    """A number as a variable of this type holds it."""
    with _disable_current_modes():
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def _is_dense(out: torch.Tensor) -> bool:
    """Every place of its memory is one element's, and 32 bits suffice for all of them."""
    expected = 1
    for n, stride in sorted(zip(out.shape, out.stride(), strict=True), key=lambda d: d[1]):
        if n != 1 and out.numel() and stride != expected:
            return False
        expected *= n
    return bool(out.numel() * out.element_size() <= _POSITIONS)


# ---------------------------------------------------------------- kernels


def lower_state(b: Builder, node: Node, outs: list[View | None]) -> None:
    """The seed and this draw's first block: numbers that a launch is given."""
    if not b.draws:
        raise Unsupported("a stream of random numbers that kernels do not share")
    blocks, b.program.drawn = b.program.drawn // _LANES, b.program.drawn + node.args[0]
    for out, number in zip(outs, (RunNumber(None), RunNumber(blocks)), strict=True):
        if out is not None:
            b.pointwise(out, lambda _, number=number: number)  # type: ignore[misc]


def lower_uniform(b: Builder, node: Node, out: View) -> None:
    _, _, seed, counter, threads, neighbours, _ = node.args
    row = _ROWS[getattr(torch, out.dtype)]

    def divide(a: Expr, n: int) -> Expr:
        return op("truncate_divide", a, Const(n, "i32"))

    def value(index: list[Affine]) -> Expr:
        place = Iota(address(0, out.strides, index), "i32")
        shared = _share(place, threads, neighbours, _LANES // row.words, divide)
        thread, block, lane = (cast(part, "i64") for part in shared)
        first, at = b.load(seed, []), b.load(counter, [])
        return op(row.name, first, at + block, thread, lane)

    b.pointwise(out, value, inlined=False)
