"""Toy networks of other kinds: recurrent, embeddings, einsum, functional weights, shared modules, MLPs with norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .toys_base import Registry

TOYS = Registry()


@TOYS.takes((3, 11))
class NormMlp(nn.Module):
    """Linear, BatchNorm1d, ReLU, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(11, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 9, bias=False), nn.BatchNorm1d(9),
            nn.ReLU(), nn.Linear(9, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@TOYS.takes((2, 7, 6))
class Lstm(nn.Module):
    """Two-layer bidirectional LSTM between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.lstm = nn.Linear(6, 8), nn.LSTM(8, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(F.relu(self.inp(x)))
        return self.out(y)


@TOYS.takes((7, 2, 6))
class Gru(nn.Module):
    """One-layer GRU, time first, last state into a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gru, self.out = nn.Linear(6, 8), nn.GRU(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(F.relu(self.inp(x)))
        return self.out(y[-1])


@TOYS.reads(40, (2, 6))
class TiedEmbedding(nn.Module):
    """Embedding whose table is also the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(40, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.out = nn.Linear(12, 40, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(x + self.fc2(F.gelu(self.fc1(x))))


@TOYS.takes((2, 7, 10))
class Einsum(nn.Module):
    """Einsum with parameters outside any module: per-head projections and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.zeros(10, 3, 4)) for _ in range(3))
        self.wo = nn.Parameter(torch.zeros(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bhnd", x, w) for w in (self.wq, self.wk, self.wv))
        attn = torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1)
        return torch.einsum("bhnd,hdc->bnc", torch.einsum("bhnm,bhmd->bhnd", attn, v), self.wo)


@TOYS.takes((2, 3, 8, 8))
class FunctionalConv(nn.Module):
    """F.conv2d and F.linear with parameters of the model itself, a scale vector and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(8, 3, 3, 3))
        self.kernel2 = nn.Parameter(torch.zeros(6, 8, 1, 1), requires_grad=False)
        self.scale, self.out_bias = nn.Parameter(torch.ones(1, 8, 1, 1)), nn.Parameter(torch.zeros(4))
        self.matrix = nn.Parameter(torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, padding=1)) * self.scale
        x = F.relu(F.conv2d(x, self.kernel2)).mean((2, 3))
        return F.linear(x, self.matrix, self.out_bias)


@TOYS.takes((2, 3, 8, 8))
class SharedModule(nn.Module):
    """One conv-bn pair called twice, and one linear called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv, self.bn = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x))))))
        x = x.mean((2, 3))
        return self.out(F.relu(self.fc(F.relu(self.fc(x)))))


@TOYS.takes((2, 3, 8, 8))
class LayerScaleBlock(nn.Module):
    """ConvNeXt block: depthwise 7x7, channels-last layer norm, MLP, layer scale, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 10, 2, 2), nn.Conv2d(10, 10, 7, padding=3, groups=10)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(10), nn.Linear(10, 24), nn.Linear(24, 10)
        self.gamma, self.head = nn.Parameter(torch.ones(10)), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.fc2(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)
        return self.head((x + y).mean((2, 3)))
