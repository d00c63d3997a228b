"""Small networks for tests of corrections after quantization, with uneven channels so that there is something to do."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from foldline.graph.fx import load_torch
from foldline.graph.ir import Graph
from foldline.graph.onnx import load_onnx
from torch import nn


class ConvNet(nn.Module):
    """Two convolutions, batch norm between where asked for, a mean, a linear head."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=not norm)
        self.bn = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Mlp(nn.Module):
    """Token ids to logits through two residual MLPs with the norm asked for: "layer", "plain" (no bias) or "rms"."""

    def __init__(self, kind: str = "layer", width: int = 16, vocabulary: int = 80) -> None:
        super().__init__()
        make: Any = {
            "layer": lambda: nn.LayerNorm(width),
            "plain": lambda: nn.LayerNorm(width, bias=False),
            "rms": lambda: RMSNorm(width),
        }[kind]
        self.embed = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList([make() for _ in range(3)])
        self.ups = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(2)])
        self.downs = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(2)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.norms[2](x))


def conv_net(norm: bool = False) -> tuple[nn.Module, list[torch.Tensor]]:
    """In eval mode, with statistics as if trained, and three batches whose channels have means."""
    torch.manual_seed(3)
    model = ConvNet(norm).eval()
    batches = [torch.randn(8, 3, 10, 10) + torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1) for _ in range(3)]
    if norm:
        with torch.no_grad():
            seen = model.conv1(torch.cat(batches))
            model.bn.running_mean.copy_(seen.mean((0, 2, 3)))
            model.bn.running_var.copy_(seen.var((0, 2, 3)))
            model.bn.weight.copy_(torch.rand(8) + 0.5)
            model.bn.bias.copy_(torch.randn(8) / 2)
    return model, batches


def graph_of(model: nn.Module, example: torch.Tensor, front: str) -> Graph:
    """The model's graph in FX or, through the exporter, in ONNX (batch dynamic)."""
    if front == "fx":
        return load_torch(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch", min=1, max=512)},)
        program = torch.onnx.export(
            model, (example,), dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False
        )
    return load_onnx(program.model_proto)
