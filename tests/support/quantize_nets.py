"""Small networks that a quantizer's placement is tested on: attention with a mask, residuals, concatenations."""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.Module):
    """Multi-head attention written out, with an additive mask."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)) / (width // self.heads) ** 0.5 + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class Encoder(nn.Module):
    """Embeddings, one post-norm transformer block, mean pooling, a head: ids and 0/1 attention mask in, logits out."""

    def __init__(self, width: int = 32, words: int = 100) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(16, width)
        self.norm, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 7)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        where = torch.arange(ids.shape[1]) + 0 * ids[:, :1]
        x = self.norm(self.words(ids) + self.positions(where))
        added = (1 - mask[:, None, None, :].to(x.dtype)) * -3e38
        x = self.norm1(x + self.attention(x, added))
        x = self.norm2(x + self.down(nn.functional.gelu(self.up(x))))
        return self.head(x.mean(1))


def encoder(seed: int = 0) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The encoder with seeded weights, and three batches."""
    torch.manual_seed(seed)
    net = Encoder().eval()
    return net, [(torch.randint(0, 100, (2, 8)), torch.ones(2, 8, dtype=torch.int64)) for _ in range(3)]


class Residual(nn.Module):
    """A residual block with an identity skip and one with a strided 1x1 convolution, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a2(torch.relu(self.a1(x))) + x)
        x = torch.relu(self.b2(torch.relu(self.b1(x))) + self.short(x))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches of different ranges, concatenated, then a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return self.last(torch.cat([torch.relu(self.a(x)), 5 * torch.relu(self.b(x))[:, :4]], 1))


def images(count: int = 3, size: int = 8) -> list[torch.Tensor]:
    """Seeded batches of 4 images."""
    torch.manual_seed(1)
    return [torch.randn(4, 3, size, size) for _ in range(count)]
