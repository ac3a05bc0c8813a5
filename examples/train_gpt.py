"""A small GPT that learns to continue corpus.txt, byte by byte: AdamW, warm-up, clipping."""

from __future__ import annotations

import pathlib
import time

import torch
import torch.nn.functional as F
from reporting import parse_arguments, report
from torch import nn

CORPUS = pathlib.Path(__file__).with_name("corpus.txt")
VOCABULARY = 256


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        parts = self.qkv(x).split(dim, 2)
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.dropout(
            self.out(y.transpose(1, 2).reshape(batch, length, dim)), self.dropout, self.training
        )


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int, length: int, dropout: float) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY, bias=False)
        self.apply(self._initialise)
        self.head.weight = self.embed.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    arguments = parse_arguments(__doc__)
    length, batch = (16, 4) if arguments.tiny else (64, 8)
    dim, heads, layers = (32, 2, 2) if arguments.tiny else (192, 6, 4)
    model = GPT(dim, heads, layers, length, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    text = torch.tensor(list(CORPUS.read_bytes()))

    losses, seconds = [], []
    for _ in range(arguments.steps):
        starts = torch.randint(0, len(text) - length - 1, (batch, 1))
        window = text[starts + torch.arange(length + 1)]
        start = time.perf_counter()
        _logits, loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.detach())
    weights = [p.detach() for p in model.parameters()]
    report("train_gpt", [torch.stack(losses), *weights], seconds, arguments)


if __name__ == "__main__":
    main()
