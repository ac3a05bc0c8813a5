"""What models do between their matrix products, over shapes that nobody has tuned: eager and accel.

    python benchmarks/bench_shapes.py [--only TEXT] [--limit 1.1] [--dtype float32]

In: nothing. Out: each expression and shape where accel takes longer than eager (by more than `limit`
times and 2 us), with both medians in us, whether accel itself noticed, and how many there were. One thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import accel

# Expressions of x (and w, a vector of x's last size; k, weights of 3x3, which have zeros behind relu), by the number of x's dimensions they need.
ANY = """x + 1 | x.abs().max() | x.sum() | x.mean() | (x * x).sum() | x.std() | x.norm() | x.argmax() | x.min()
x.flip(-1) | torch.where(x > 0, x, 0.5) | x.clamp(-1, 1) | (x > 0).sum() | (x > 0).any() | x.cumsum(-1)
x.softmax(-1) | x.log_softmax(-1) | x.logsumexp(-1) | x.sum(-1) | x.amax(-1) | x.mean(-1) | x.var(-1) | x.argmax(-1)
x / x.norm(dim=-1, keepdim=True) | x - x.mean(-1, keepdim=True) | F.layer_norm(x, w.shape, w, w)
x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w | F.gelu(x) * x | torch.cat([x, x + 1], -1)
torch.stack([x, -x]) | x.repeat_interleave(2, -1) | F.pad(x, (1, 2)) | x.roll(1, -1) | x.median() | x.max(-1).values
x.topk(2, -1).values | x.sort(-1).values | torch.cat(x.chunk(2, -1)[::-1], -1) | x.bfloat16() | x.double() * 2
x.masked_fill(x > 1, 0.0) | x.unfold(-1, 2, 1).sum(-1) | x.diff(dim=-1) | x.tril() if x.dim() > 1 else x.neg()"""
TWO = """x.t().contiguous() | x.t() + 1 | x.sum(0) | x.mean(0) | x.amax(0) | x.softmax(0) | x.var(0) | x.argmax(0)
x.cumsum(0) | x - x.mean(0) | x.transpose(-1, -2).softmax(-1) | x[:, ::2] * 2 | x[::2] * 2 | x[1:] - x[:-1]
x.index_select(0, i) | x[i] * 2 | torch.cat([x, x]) | x.expand(3, *x.shape).sum(0) | F.embedding(i, x) + 1
x.reshape(-1).view(x.shape[1], x.shape[0]) + x.t() | (x.unsqueeze(0) * x.new_ones(3, 1, 1)).sum(-1)
F.cross_entropy(x, i % x.shape[1]) | F.one_hot(i % 7, 7) | x @ w | F.linear(x, v, w[:8]) | x.t() @ x[:, :8]
torch.cdist(x[:50], x[:50]) | x.scatter_add(0, i.unsqueeze(1).expand_as(x) % x.shape[0], x) | x.gather(0, i[:, None])
torch.zeros_like(x).index_add(0, i, x[i] * 2) | x.index_put((i,), x, accumulate=True) | F.layer_norm(F.embedding(i, x), w.shape)"""
MORE = """x.transpose(1, 2) + 1 | x.transpose(1, 2).contiguous() | x.flatten(1).sum(-1) | x.mean((0, 1)) | x.sum(1)
x.permute(2, 0, 1).contiguous() | x.amax(1) | x.softmax(1) | x.var((1, 2)) | x.mean(1, keepdim=True) * x
x.movedim(-1, 0).sum(-1) | x.flatten(0, 1).amax(0) | x.transpose(1, 2).reshape(x.shape[0], -1) * 2 | x[:, :, ::2] + 1
x[:, 0] * 2 | x[:, -1:].expand_as(x) + x | torch.bmm(x, x.transpose(1, 2)) | torch.einsum('bij,bkj->bik', x, x)
F.group_norm(x, 1) | F.avg_pool1d(x, 2) | F.max_pool1d(x, 3, 2, 1) | F.scaled_dot_product_attention(x, x, x)"""
IMAGES = """F.max_pool2d(x, 2) | F.avg_pool2d(x, 3, 2, 1) | F.adaptive_avg_pool2d(x, 1) | F.interpolate(x, scale_factor=2)
F.interpolate(x, scale_factor=2, mode='bilinear') | F.batch_norm(x, z, z + 1) | F.group_norm(x, 1) | F.relu(x) + x
F.instance_norm(x) | x.mean((2, 3)) | x.permute(0, 2, 3, 1).contiguous() | x.flatten(2).transpose(1, 2) + 1
F.pad(x, (1, 1, 1, 1)) | F.pixel_unshuffle(x[..., :8, :8], 2) | F.unfold(x, 3) | x.roll((1, 1), (2, 3))
F.pad(x, (1, 1, 1, 1), mode='reflect') | F.softmax(x, 1) | F.normalize(x, dim=1) | x.flip(3) | F.dropout(x, 0.0)
F.conv2d(x, k, padding=1).relu() | F.conv2d(x, k.relu(), padding=1).relu() | F.conv2d(x, k, stride=2)"""
SHAPES: dict[tuple[int, ...], str] = {
    (1000,): ANY, (65_537,): ANY, (1_000_003,): ANY,
    (7, 33): ANY + "|" + TWO, (85, 768): ANY + "|" + TWO, (1000, 77): ANY + "|" + TWO,
    (50_257, 3): ANY + "|" + TWO, (3, 50_257): ANY + "|" + TWO, (64, 1000): ANY + "|" + TWO,
    (4, 100, 50): ANY + "|" + MORE, (2, 197, 384): ANY + "|" + MORE, (30, 7, 129): ANY + "|" + MORE,
    (2, 12, 197, 64): ANY + "|" + IMAGES, (3, 3, 97, 101): IMAGES, (2, 64, 28, 28): IMAGES, (1, 512, 7, 7): IMAGES,
}  # fmt: skip
ROUNDS, SECONDS = 25, 0.25


def cases() -> Iterator[tuple[tuple[int, ...], str]]:
    for shape, texts in SHAPES.items():
        for text in texts.replace("\n", "|").split("|"):
            yield shape, text.strip()


def arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    channels = shape[min(1, len(shape) - 1)]
    w, v = torch.randn(shape[-1]).to(dtype), torch.randn(min(8, shape[-1]), shape[-1]).to(dtype)
    return (
        x,
        w,
        v,
        torch.randint(0, shape[0], (shape[0],)),
        torch.zeros(channels),
        torch.randn(2 * channels, channels, 3, 3).to(dtype) if len(shape) == 4 else w,
    )


def made(text: str) -> Callable[..., Any]:
    """A new function each time: `accel.optimize` rewrites the one it is given."""
    return eval(f"lambda x, w, v, i, z, k: {text}", {"torch": torch, "F": F})  # type: ignore[no-any-return]


def compare(text: str, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float, str] | None:
    """Medians of eager and accel in us, and what accel says; None where eager cannot do it."""
    eager, function = made(text), made(text)
    try:
        eager(*inputs)
    except (RuntimeError, ValueError, IndexError, NotImplementedError):
        return None
    ours = accel.optimize(function, dynamic=False)
    for _ in range(5):
        ours(*inputs)
        accel.wait(60)
    before = accel.counters()["calls_compiled"]
    times: tuple[list[float], list[float]] = [], []
    end = time.perf_counter() + SECONDS
    while len(times[0]) < ROUNDS or (time.perf_counter() < end and len(times[0]) < 10 * ROUNDS):
        for f, into in zip((eager, ours), times, strict=True):
            f(*inputs)
            start = time.perf_counter()
            f(*inputs)
            into.append(time.perf_counter() - start)
    served = accel.counters()["calls_compiled"] - before
    state = "" if served >= 1.9 * len(times[1]) else "served eagerly"
    return statistics.median(times[0]) * 1e6, statistics.median(times[1]) * 1e6, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="shapes or expressions with this text")
    parser.add_argument("--limit", type=float, default=1.1)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, slow, ratios = 0, 0, []
    with torch.no_grad():
        for shape, text in cases():
            if options.only not in f"{shape} {text}":
                continue
            found = compare(text, arguments(shape, getattr(torch, options.dtype)))
            if found is None:
                continue
            eager_us, our_us, state = found
            count += 1
            ratios.append(eager_us / our_us)
            if (our_us > options.limit * eager_us and our_us > eager_us + 2) or state:
                slow += not state
                print(
                    f"{shape}  {text:60s} eager {eager_us:9.1f}  accel {our_us:9.1f}  {state}",
                    flush=True,
                )
            accel.reset()
    mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else 0.0
    print(f"{count} cases, {slow} slower than eager; {mean:.2f} times as fast (geometric mean)")


if __name__ == "__main__":
    main()
