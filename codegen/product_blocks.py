"""Matrix products on a GPU: how long they take by which blocks, as far as that can be said unmeasured.

In: the extents of a product with what is fused to it, and an architecture. Out: the blocks a
kernel should use, and whether it is likely faster than the vendor's product with kernels of their own
around it. Everything is estimated from a few facts of each GPU (`GPUS`): the longest of arithmetic,
memory and second-level cache, and a launch each. Invariant: nothing here changes what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from accel.codegen.triton_versions import SHARED_BYTES

_LAUNCH_S = 3e-6
_LATENCY_S = 7e-7  # from a load's beginning to what it brings, once for all stages under way
_VENDORS_SHARE = 0.8  # of what a GPU can do at most, that the vendor's products reach
_VENDORS_PLAIN_SHARE = 0.9  # ... without tensor cores
_MEMORY_SHARE = 0.85
_MARGIN = 1.05  # by which our estimate has to be better: both are estimates
_EQUAL = 1.02
_SQUARE = 64.0  # a block this good reads operands as slowly as it multiplies them
_MOST_STAGES, _LEAST_STAGES = 4, 3
_MOST_RESIDENT = 4  # programs at once on a multiprocessor that hide each other's waiting
_COMPUTED = 16  # numbers of an operand that a thread can compute in a round without spilling


@dataclass(frozen=True)
class GPU:
    """Facts of data sheets, in numbers a second, and what share of them our kernels reach."""

    processors: int
    memory_bytes: float
    cache_bytes: float
    multiplications: dict[str, float]
    share: float
    plain: float  # multiplications without tensor cores, which are also a unit of scalar work

    def fastest(self, kind: str) -> float:
        return self.multiplications.get(kind, self.plain)


GPUS = {
    "sm_80": GPU(
        108,
        1.55e12,
        4.0e12,
        {"float16": 1.56e14, "bfloat16": 1.56e14, "tf32": 0.78e14},
        share=0.65,
        plain=9.7e12,
    ),
    "sm_90": GPU(
        132,
        3.3e12,
        5.5e12,
        {"float16": 4.9e14, "bfloat16": 4.9e14, "tf32": 2.4e14},
        share=0.5,  # the tensor memory accelerator is not used
        plain=33e12,
    ),
}
_ITEM_BYTES = {"float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Blocks:
    """What one program computes: `rows` x `columns`, in steps of `inner`."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8  # blocks of rows that are walked together, so that columns are met in the cache

    def shared_bytes(self, item: int) -> int:
        return self.stages * self.inner * (self.rows + self.columns) * item


@dataclass(frozen=True)
class Operand:
    """One side: bytes of memory that it is read from, and the work for each of its numbers."""

    size_bytes: int
    cost: float = 0.0  # vector additions, see scalar_ops
    numel: int = 0


@dataclass(frozen=True)
class Work:
    """A product and what surrounds it. `kind` is its dtype, "tf32" or "float32".

    `around_bytes` are what an epilogue reads and writes besides the product, which stays in registers;
    `apart_bytes` what the vendor's product and `apart_kernels` others move in its place, the
    product's own operands as they would be then included.
    """

    batch: int
    m: int
    n: int
    k: int
    kind: str
    left: Operand
    right: Operand
    around_bytes: int
    apart_bytes: int
    apart_kernels: int

    @property
    def multiplications(self) -> float:
        return float(self.batch) * self.m * self.n * self.k


def item_bytes(kind: str) -> int:
    return _ITEM_BYTES.get(kind, 4)


def candidates(work: Work, gpu: str) -> Iterator[Blocks]:
    """Blocks that make sense for these extents."""
    tensor_cores = work.kind != "float32"
    largest = 128 if tensor_cores else 64
    item = item_bytes(work.kind)
    heights = [n for n in (16, 32, 64, 128) if n <= largest and n < 2 * work.m] or [16]
    widths = [n for n in (16, 32, 64, 128) if n <= largest and n < 2 * work.n] or [16]
    for rows in heights:
        for columns in widths:
            for inner in (32, 64, 128) if tensor_cores else (16,):
                if inner * item > 256 or (inner > 32 and inner >= 2 * work.k):
                    continue
                warps = 8 if rows * columns > 8192 else 4 if rows * columns > 512 else 2
                stages = _stages(work, gpu, rows, columns, inner)
                computed = rows * bool(work.left.cost) + columns * bool(work.right.cost)
                enough = stages >= min(_LEAST_STAGES, max(-(-work.k // inner), 1))
                if enough and (computed * inner <= _COMPUTED * 32 * warps or inner <= 32):
                    yield Blocks(rows, columns, inner, warps, stages)


def _stages(work: Work, gpu: str, rows: int, columns: int, inner: int) -> int:
    """As many as help and fit, with a quarter of the memory left for what turns layouts around."""
    rounds = -(-work.k // inner)
    each = Blocks(rows, columns, inner, 1, 1).shared_bytes(item_bytes(work.kind))
    return min(_MOST_STAGES, max(rounds, 1), SHARED_BYTES[gpu] * 3 // 4 // each)


def seconds_with(blocks: Blocks, work: Work, gpu: str) -> float:
    """An estimate for one kernel that does all of it."""
    facts = GPUS[gpu]
    tall, wide = -(-work.m // blocks.rows), -(-work.n // blocks.columns)
    programs = work.batch * tall * wide
    # The last wave of programs leaves processors idle.
    filled = programs / (-(-programs // facts.processors) * facts.processors)
    padded = float(programs) * blocks.rows * blocks.columns * work.k
    square = blocks.rows * blocks.columns / (blocks.rows + blocks.columns)
    tensor_cores = work.kind != "float32"
    good = min(square / _SQUARE, 1.0) if tensor_cores else min(square / _SQUARE * 2, 1.0) * 0.7
    arithmetic = padded / (facts.fastest(work.kind) * facts.share * good * filled)
    # Each block of columns computes the left side anew, each block of rows the right one.
    extra = work.left.cost * work.left.numel * wide + work.right.cost * work.right.numel * tall
    arithmetic += extra / (facts.plain * 0.5 * filled)
    read = work.left.size_bytes + work.right.size_bytes
    # A processor alone cannot keep the whole memory busy.
    busy = min(1.0, programs / facts.processors)
    memory = (read + work.around_bytes) / (facts.memory_bytes * _MEMORY_SHARE * busy)
    again = work.left.size_bytes * wide + work.right.size_bytes * tall
    resident = SHARED_BYTES[gpu] // max(blocks.shared_bytes(item_bytes(work.kind)), 1)
    waves = -(-programs // (facts.processors * min(max(resident, 1), _MOST_RESIDENT)))
    waiting = waves * (-(-work.k // blocks.inner) / blocks.stages + 1) * _LATENCY_S
    longest = max(arithmetic, memory, again / (facts.cache_bytes * busy), waiting)
    # With few rounds under way loads and multiplications wait for each other.
    return _LAUNCH_S + longest + min(arithmetic, memory) / (4 * blocks.stages)


def seconds_apart(work: Work, gpu: str) -> float:
    """An estimate for the vendor's product with kernels before and behind it."""
    facts = GPUS[gpu]
    share = _VENDORS_PLAIN_SHARE if work.kind == "float32" else _VENDORS_SHARE
    arithmetic = work.multiplications / (facts.fastest(work.kind) * share)
    item = item_bytes(work.kind)
    own = work.batch * (work.m * work.k + work.k * work.n + work.m * work.n) * item
    memory = facts.memory_bytes * _MEMORY_SHARE
    others = max(work.apart_bytes - own, 0) / memory + work.apart_kernels * _LAUNCH_S
    return _LAUNCH_S + max(arithmetic, own / memory) + others


def best_blocks(work: Work, gpu: str) -> Blocks | None:
    """The fastest ones; of about the same, those with the fewest rounds, whose cost is not estimated."""
    found = [(seconds_with(b, work, gpu), b) for b in candidates(work, gpu)]
    least = min((seconds for seconds, _ in found), default=0.0)
    equals = [b for seconds, b in found if seconds <= least * _EQUAL]
    return max(equals, key=lambda b: (b.inner, b.rows * b.columns), default=None)


def gain(blocks: Blocks, work: Work, gpu: str) -> float:
    """Seconds by which one kernel is likely faster than the vendor's product with others around it."""
    return seconds_apart(work, gpu) - seconds_with(blocks, work, gpu) * _MARGIN
