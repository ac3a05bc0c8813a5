"""Test support: random numbers of the simulated GPU, from the model of ATen's kernels in `cuda_draws`.

In: the operations that ATen draws by. Out: its numbers, and a stream that goes on as far as ATen's would.
What has no model here draws from the processor's stream.
"""

from __future__ import annotations

import struct
from typing import Any

import cuda_draws
import torch

RESIDENT = 108 * 8  # blocks of 256 threads, as `simulated_gpu` says of its GPU


def register() -> Any:
    """The registration, to be kept."""
    (default,) = torch.cuda.default_generators

    def numbers(generator: Any, model: Any, numel: int, *more: Any, **named: Any) -> torch.Tensor:
        stream = generator or default
        seed, offset = (int(n) % (1 << 64) for n in stream.get_state().view(torch.int64))
        drawn, advance = model(seed, offset, numel, RESIDENT, *more, **named)
        state = torch.frombuffer(
            bytearray(struct.pack("QQ", seed, offset + advance)), dtype=torch.uint8
        )
        stream.set_state(state)
        return torch.from_numpy(drawn)

    def uniform_(self: Any, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Any:
        drawn = numbers(
            generator, cuda_draws.nullary, self.numel(), double=self.dtype == torch.float64
        )
        accurate = torch.float64 if self.dtype == torch.float64 else torch.float32
        values = (drawn.to(accurate) * (high - low) + low).to(self.dtype)
        return _fill(self, torch.where(values == high, torch.full_like(values, low), values))

    def bernoulli_(self: Any, p: float = 0.5, *, generator: Any = None) -> Any:
        drawn = numbers(
            generator, cuda_draws.nullary, self.numel(), double=self.dtype == torch.float64
        )
        return _fill(self, (drawn < p).to(self.dtype))

    def native_dropout(x: Any, p: float, train: bool | None) -> Any:
        if train is False or x.numel() == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        kept = torch.tensor(1 - p, dtype=wide)
        first = x.storage_offset() * x.element_size()
        vector = cuda_draws.vector_size(x.element_size(), x.numel(), first)
        drawn = numbers(None, cuda_draws.dropout, x.numel(), vector) < kept.item()
        keep = torch.empty_like(
            x, dtype=torch.bool
        )  # in the order of memory, as both kernels' for dense tensors
        keep.as_strided((x.numel(),), (1,)).copy_(drawn)
        scale = 1 / kept.double() if p < 1 else torch.tensor(0.0)
        scaled = (x.to(wide) * keep * scale.to(wide).item()).to(x.dtype)
        return scaled, keep

    made = torch.library.Library("aten", "IMPL")
    for name, f in (
        ("uniform_", uniform_),
        ("bernoulli_.float", bernoulli_),
        ("native_dropout", native_dropout),
    ):
        made.impl(name, f, "CUDA", allow_override=True)
    return made


def _fill(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """In the order of memory where the tensor is dense."""
    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    turned = tensor.permute(order)
    where = turned if turned.is_contiguous() else tensor
    where.copy_(values.reshape(where.shape))
    return tensor
