"""Toy transformers: fused and separate qkv, grouped-query attention with RoPE, windows, patch merging, gated MLPs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .toys_base import Registry

TOYS = Registry()


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FusedQkv(nn.Module):
    """timm's attention: one linear for q, k and v, split by reshape and unbind, explicit softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))


@TOYS.takes((2, 3, 16, 16))
class VisionTransformer(nn.Module):
    """ViT: patch embedding, class token, position embedding, two pre-norm blocks with fused qkv."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 24))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 24))
        self.norm1 = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.attn = nn.ModuleList(FusedQkv(24, 3) for _ in range(2))
        self.norm2 = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
        self.mlp = nn.ModuleList(Mlp(24, 40) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        for norm1, attn, norm2, mlp in zip(self.norm1, self.attn, self.norm2, self.mlp, strict=True):
            x = x + attn(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x)[:, 0])


@TOYS.takes((2, 7, 24))
class SeparateQkv(nn.Module):
    """BERT-like post-norm layer: separate q, k, v, scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(24), nn.LayerNorm(24), Mlp(24, 50)
        self.head = nn.Linear(24, 5)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 4, 6).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        x = self.norm1(x + self.o(y.transpose(1, 2).flatten(2)))
        return self.head(self.norm2(x + self.mlp(x)))


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) on the halves of the last axis."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


@TOYS.reads(50, (2, 9))
class GroupedQueryRope(nn.Module):
    """Llama-like: RMS norm, 6 query heads on 2 key-value heads with RoPE, SwiGLU MLP, causal, tied output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 36)
        self.norm1, self.norm2, self.norm = (nn.RMSNorm(36) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(36, h * 8, bias=False) for h in (6, 2, 2))
        self.o = nn.Linear(48, 36, bias=False)
        self.gate, self.up = nn.Linear(36, 44, bias=False), nn.Linear(36, 44, bias=False)
        self.down = nn.Linear(44, 36, bias=False)
        self.lm_head = nn.Linear(36, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        frequency = 100.0 ** (-torch.arange(0, 8, 2) / 8)
        angle = torch.outer(torch.arange(16.0), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, n, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(b, n, 6, 8).transpose(1, 2)
        k = self.k(y).view(b, n, 2, 8).transpose(1, 2)
        v = self.v(y).view(b, n, 2, 8).transpose(1, 2)
        cos, sin = self.cos[:n], self.sin[:n]
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k = k[:, :, None].expand(b, 2, 3, n, 8).reshape(b, 6, n, 8)
        v = v[:, :, None].expand(b, 2, 3, n, 8).reshape(b, 6, n, 8)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, 48))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.lm_head(self.norm(x))


@TOYS.takes((2, 6, 10))
class GluMlp(nn.Module):
    """Gated MLPs: F.glu, and one fused linear chunked into gate and value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 28), nn.Linear(14, 10)
        self.fused, self.down = nn.Linear(10, 36), nn.Linear(18, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(F.glu(self.a(x), -1))
        gate, value = self.fused(x).chunk(2, -1)
        return self.down(F.gelu(gate) * value)


@TOYS.takes((2, 8, 8, 6))
class PatchMerging(nn.Module):
    """Swin's patch merging: four strided slices concatenated on channels, norm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 10), nn.LayerNorm(40)
        self.reduction, self.head = nn.Linear(40, 14, bias=False), nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.embed(x))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduction(self.norm(x)).mean((1, 2)))


@TOYS.takes((2, 8, 8, 12))
class WindowAttention(nn.Module):
    """Swin's shifted windows: roll, partition into 4x4 windows, attention with a position bias, reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.position_bias_table = nn.Parameter(torch.zeros(49, 3))
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        offset = grid[:, :, None] - grid[:, None, :] + 3
        self.register_buffer("index", offset[0] * 7 + offset[1])
        self.mlp = Mlp(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.position_bias_table[self.index.view(-1)].view(16, 16, 3).permute(2, 0, 1)
        attn = (q @ k.transpose(-2, -1) * 0.5 + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((attn @ v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        return x + self.mlp(x)


@TOYS.takes((2, 7, 16))
class TorchMha(nn.Module):
    """nn.MultiheadAttention, batch first, self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attn(x, x, x, need_weights=False)
        return self.head(self.norm(x + y))
