"""Models as people write them without a library: what `architectures.py` measures besides.

In: nothing. Out: `HANDWRITTEN`, rows of a model (or a function) and the arguments of its calls.
Invariant: `make` is deterministic after a seed, and inputs come from torch's generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer(
            "mask", torch.tril(torch.ones(context, context)).view(1, 1, context, -1)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(c, dim=2)
        q, k, v = (u.view(b, t, self.heads, c // self.heads).transpose(1, 2) for u in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class NanoGPT(nn.Module):
    """As in nanoGPT: weight tying, a loss when there are targets, a loop that samples."""

    def __init__(self, vocabulary: int = 65, width: int = 32, context: int = 16) -> None:
        super().__init__()
        self.context = context
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(width),
                    "attention": CausalAttention(width, 4, context),
                    "ln2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(
                        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                }
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, t = ids.size()
        assert t <= self.context, f"{t} tokens in a context of {self.context}"
        x = self.tokens(ids) + self.places(torch.arange(0, t, dtype=torch.long))
        for block in self.blocks:
            x = x + block["attention"](block["ln1"](x))
            x = x + block["mlp"](block["ln2"](x))
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int = 6) -> Tensor:
        for _ in range(count):
            shown = ids if ids.size(1) <= self.context else ids[:, -self.context :]
            logits, _ = self(shown)
            best, _ = torch.topk(logits[:, -1, :], 5)
            kept = logits[:, -1, :].masked_fill(logits[:, -1, :] < best[:, [-1]], -float("inf"))
            drawn = torch.multinomial(F.softmax(kept, dim=-1), num_samples=1)
            ids = torch.cat((ids, drawn), dim=1)
        return ids


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Llama(nn.Module):
    """RoPE, RMS norm, SwiGLU, grouped heads, and a cache that grows by concatenation."""

    def __init__(self, vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 64, bias=False), nn.Linear(width, 64, bias=False)
        self.down = nn.Linear(64, width, bias=False)
        self.scale = nn.Parameter(torch.ones(2, width))
        self.register_buffer("rates", 1.0 / (100.0 ** (torch.arange(0, 4).float() / 4)))

    def norm(self, x: Tensor, which: int) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale[which]

    def forward(self, ids: Tensor, cache: list[tuple[Tensor, Tensor]] | None = None) -> Any:
        b, t = ids.shape
        start = 0 if not cache else cache[0][0].shape[1]
        x = self.tokens(ids)
        h = self.norm(x, 0)
        angles = torch.outer(torch.arange(start, start + t).float(), self.rates)
        q = rotate(self.q(h).view(b, t, 4, 8), angles)
        k, v = self.kv(h).view(b, t, 4, 8).chunk(2, dim=2)
        k = rotate(k, angles)
        if cache:
            k, v = torch.cat([cache[0][0], k], 1), torch.cat([cache[0][1], v], 1)
        wide_k, wide_v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), wide_k.transpose(1, 2), wide_v.transpose(1, 2), is_causal=t > 1
        )
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        h = self.norm(x, 1)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return x @ self.tokens.weight.T, [(k, v)]

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int = 6) -> Tensor:
        logits, cache = self(ids)
        for _ in range(count):
            token = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
            logits, cache = self(token, cache)
        return ids


def double_convolution(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n in (before, after):
        layers += [nn.Conv2d(n, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([double_convolution(3, 8), double_convolution(8, 16)])
        self.middle = double_convolution(16, 32)
        self.ups = nn.ModuleList(
            [nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)]
        )
        self.after = nn.ModuleList([double_convolution(32, 16), double_convolution(16, 8)])
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, block, skip in zip(self.ups, self.after, reversed(skips), strict=True):
            x = up(x)
            if x.shape[-2:] != skip.shape[-2:]:
                x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = block(torch.cat([skip, x], dim=1))
        return torch.sigmoid(self.last(x))


class GraphNetwork(nn.Module):
    """Messages along edges, gathered by index and summed by index_add and scatter."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * width, width), nn.GRUCell(width, width)
        self.readout = nn.Linear(width, 3)

    def forward(self, nodes: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        source, target = edges
        for _ in range(3):
            told = F.relu(self.message(torch.cat([nodes[source], nodes[target]], -1)))
            heard = torch.zeros_like(nodes).index_add_(0, target, told)
            degree = torch.zeros(nodes.size(0)).scatter_add_(0, target, torch.ones(target.numel()))
            nodes = self.update(heard / degree.clamp(min=1).unsqueeze(-1), nodes)
        pooled = torch.zeros(2, nodes.size(1)).index_add(0, batch, nodes)
        best = torch.full((2, nodes.size(1)), -1e9).scatter_reduce(
            0, batch[:, None].expand_as(nodes), nodes, "amax"
        )
        return self.readout(pooled + best)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.lstm = nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.out = nn.Linear(32, 7)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        return F.log_softmax(self.out(hidden), dim=-1)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(36, 24), nn.ReLU())
        self.mean, self.spread = nn.Linear(24, 8), nn.Linear(24, 8)
        self.decode = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 36), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        hidden = self.encode(x)
        mean, log_variance = self.mean(hidden), self.spread(hidden)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        again = self.decode(z)
        apart = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        return again, F.binary_cross_entropy(again, x, reduction="sum") + apart


class Diffusion(nn.Module):
    """A denoiser and the loop that samples from it."""

    def __init__(self, steps: int = 8) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(8 + 16, 32), nn.SiLU(), nn.Linear(32, 8))
        beta = torch.linspace(1e-3, 0.2, steps)
        self.register_buffer("beta", beta)
        self.register_buffer("kept", torch.cumprod(1 - beta, 0))

    def time(self, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(100.0) * torch.arange(8) / 8)
        angles = t.float()[:, None] * rates[None]
        return torch.cat([angles.sin(), angles.cos()], -1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, self.time(t)], -1))

    @torch.no_grad()
    def generate(self, x: Tensor) -> Tensor:
        for step in reversed(range(self.steps)):
            t = torch.full((x.size(0),), step, dtype=torch.long)
            noise = self(x, t)
            kept, beta = self.kept[step], self.beta[step]
            x = (x - beta / torch.sqrt(1 - kept) * noise) / torch.sqrt(1 - beta)
            if step > 0:
                x = x + torch.sqrt(beta) * torch.randn_like(x)
        return x


class ViT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.ModuleList([layer])
        self.attend = nn.MultiheadAttention(width, 4, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        for layer in self.layers:
            x = layer(x)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(x[:, 0])


class Experts(nn.Module):
    """Each token to its two best experts, expert by expert, with index_select and index_add."""

    def __init__(self, width: int = 16, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.up = nn.Parameter(torch.randn(count, width, 32) * 0.1)
        self.down = nn.Parameter(torch.randn(count, 32, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        weights, chosen = torch.topk(F.softmax(self.router(flat), -1), 2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        rows = torch.arange(flat.size(0)).repeat_interleave(2)
        experts = chosen.reshape(-1)
        given = flat.index_select(0, rows)
        hidden = F.silu(torch.bmm(given.unsqueeze(1), self.up.index_select(0, experts)))
        made = torch.bmm(hidden, self.down.index_select(0, experts)).squeeze(1)
        out.index_add_(0, rows, made * weights.reshape(-1, 1))
        return out.view_as(x)


class Scan(nn.Module):
    """A selective state space: a loop over time with a state."""

    def __init__(self, width: int = 16, state: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, 3, groups=width, padding=2)
        self.parts = nn.Linear(width, 2 * state + 1)
        self.decay = nn.Parameter(torch.log(torch.arange(1, state + 1).float()).repeat(width, 1))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        u, gate = self.inner(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :length].transpose(1, 2))
        step, b, c = torch.split(self.parts(u), [1, 4, 4], dim=-1)
        step = F.softplus(step)
        state = torch.zeros(x.size(0), u.size(-1), 4)
        outputs = []
        for t in range(length):
            keep = torch.exp(step[:, t].unsqueeze(-1) * -torch.exp(self.decay))
            state = keep * state + (step[:, t] * u[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
            outputs.append((state * c[:, t].unsqueeze(1)).sum(-1))
        return self.out(torch.stack(outputs, 1) * F.silu(gate))


def edges() -> tuple[Tensor, Tensor, Tensor]:
    batch = torch.tensor([0, 0, 0, 1, 1, 1])
    return torch.randn(6, 16), torch.randint(0, 6, (2, 12)), batch


@dataclass(frozen=True)
class Handwritten:
    """`mode`: a call is "forward", "generate" (the model's own loop), or "train" (with backward)."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    mode: str = "forward"


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(1, high, shape)


HANDWRITTEN: dict[str, Handwritten] = {
    "nanogpt": Handwritten(NanoGPT, lambda: (ids(65, 2, 8), ids(65, 2, 8))),
    "nanogpt, sampling": Handwritten(NanoGPT, lambda: (ids(65, 1, 4),), "generate"),
    "nanogpt, training": Handwritten(NanoGPT, lambda: (ids(65, 2, 8), ids(65, 2, 8)), "train"),
    "llama by hand": Handwritten(Llama, lambda: (ids(64, 2, 6),)),
    "llama by hand, cache": Handwritten(Llama, lambda: (ids(64, 1, 4),), "generate"),
    "u-net": Handwritten(UNet, lambda: (torch.randn(2, 3, 16, 16),)),
    "u-net, training": Handwritten(UNet, lambda: (torch.randn(2, 3, 16, 16),), "train"),
    "graph network": Handwritten(GraphNetwork, edges),
    "graph network, training": Handwritten(GraphNetwork, edges, "train"),
    "lstm tagger": Handwritten(Tagger, lambda: (ids(50, 3, 6),)),
    "lstm tagger, training": Handwritten(Tagger, lambda: (ids(50, 3, 6),), "train"),
    "vae, training": Handwritten(VAE, lambda: (torch.rand(4, 6, 6),), "train"),
    "diffusion, sampling": Handwritten(Diffusion, lambda: (torch.randn(3, 8),), "generate"),
    "vit by hand": Handwritten(ViT, lambda: (torch.randn(2, 3, 16, 16),)),
    "vit by hand, training": Handwritten(ViT, lambda: (torch.randn(2, 3, 16, 16),), "train"),
    "mixture of experts": Handwritten(Experts, lambda: (torch.randn(2, 5, 16),)),
    "mixture of experts, training": Handwritten(Experts, lambda: (torch.randn(2, 5, 16),), "train"),
    "selective scan": Handwritten(Scan, lambda: (torch.randn(2, 7, 16),)),
    "selective scan, training": Handwritten(Scan, lambda: (torch.randn(2, 7, 16),), "train"),
}
