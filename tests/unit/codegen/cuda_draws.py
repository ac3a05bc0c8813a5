"""Test support: ATen's CUDA kernels that draw, thread by thread as a GPU would run them.

In: a seed, the generator's offset, how many elements, how many blocks of 256 threads are resident.
Out: the numbers, and by how much the offset advances. Shares nothing with the compiler: numpy and
loops over threads, written beside ATen's DistributionTemplates.h and what is known of Dropout.cu.
"""

from __future__ import annotations

import numpy as np

BLOCK = 256


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10, on Python's integers."""
    x, k = list(counter), list(key)
    for step in range(10):
        if step:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
    return x


class State:
    """A thread's curandStatePhilox4_32_10_t."""

    def __init__(self, seed: int, subsequence: int, offset: int) -> None:
        assert offset % 4 == 0
        self.key = (seed % 2**32, seed // 2**32 % 2**32)
        self.counter = subsequence * 2**64 + offset // 4

    def words(self) -> list[int]:
        parts = tuple(self.counter >> (32 * i) & (2**32 - 1) for i in range(4))
        self.counter += 1
        return philox(parts, self.key)

    def uniform4(self) -> list[float]:
        scale, half = np.float32(2.0**-32), np.float32(2.0**-33)
        return [float(np.float32(np.uint32(w)) * scale + half) for w in self.words()]

    def uniform2_double(self) -> list[float]:
        a, b, c, d = self.words()
        return [
            float(a ^ (b << 21)) * 2.0**-53 + 2.0**-54,
            float(c ^ (d << 21)) * 2.0**-53 + 2.0**-54,
        ]


def policy(numel: int, resident: int, unroll: int) -> tuple[int, int]:
    """How many blocks run, and by how much the offset advances."""
    grid = min(resident, (numel + BLOCK - 1) // BLOCK)
    return grid, ((numel - 1) // (BLOCK * grid * unroll) + 1) * 4


def nullary(
    seed: int, offset: int, numel: int, resident: int, double: bool = False
) -> tuple[np.ndarray, int]:
    """`distribution_nullary_kernel` with curand_uniform4, or curand_uniform2_double."""
    out = np.full(numel, np.nan, np.float64)
    if numel == 0:
        return out, 0
    unroll = 2 if double else 4
    grid, advance = policy(numel, resident, unroll)
    stride = BLOCK * grid
    rounded = ((numel - 1) // (stride * unroll) + 1) * stride * unroll
    for block in range(grid):
        for thread in range(BLOCK):
            index = block * BLOCK + thread
            state = State(seed, index, offset)
            for linear in range(index, rounded, stride * unroll):
                drawn = state.uniform2_double() if double else state.uniform4()
                for i in range(unroll):
                    if linear + stride * i < numel:
                        out[linear + stride * i] = drawn[i]
    return out, advance


def dropout(
    seed: int, offset: int, numel: int, resident: int, vector: int
) -> tuple[np.ndarray, int]:
    """The numbers of `fused_dropout_kernel` (vector 1) or `fused_dropout_kernel_vec` (2, 4, 8)."""
    if vector == 1:
        return nullary(seed, offset, numel, resident)
    out = np.full(numel, np.nan, np.float64)
    grid, advance = policy(numel, resident, 4)
    for index in range(grid * BLOCK):
        state = State(seed, index, offset)
        for linear in range(index * vector, numel, grid * BLOCK * vector):
            drawn = [state.uniform4() for _ in range((vector + 3) // 4)]
            out[linear : linear + vector] = [n for four in drawn for n in four][:vector]
    return out, advance


def vector_size(itemsize: int, numel: int, first: int = 0) -> int:
    """`get_vector_size` of Dropout.cu, built with CUDA 12.8 or later, for memory that begins `first` bytes
    behind a multiple of 512."""
    vector = next(v for v in (8, 4, 2, 1) if first % (v * itemsize) == 0)  # can_vectorize_up_to
    vector = min(vector, 16 // itemsize)
    while vector > 1 and numel % vector:
        vector //= 2
    return vector
