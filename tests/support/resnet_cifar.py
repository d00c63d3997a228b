"""The classic CIFAR ResNets (He et al., 2015, section 4.2): 6n+2 layers, option-A zero-padded shortcuts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """conv1 bn1 relu conv2 bn2, plus the input: subsampled and zero-padded in its channels where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.subsample = stride != 1 or width_in != width
        self.padding = width // 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.subsample:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNetCifar(nn.Module):
    """A 3x3 stem of 16 channels, three stages of n blocks with 16/32/64 channels, global average pool, one linear.

    Input [N, 3, 32, 32] float32, output [N, classes].
    """

    def __init__(self, n: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(width_in: int, width: int, n: int, stride: int) -> nn.Sequential:
        blocks = [BasicBlock(width_in, width, stride)]
        blocks += [BasicBlock(width, width, 1) for _ in range(n - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


def resnet20() -> ResNetCifar:
    """20 layers, 0.27 M parameters, 40.6 M multiply-accumulates at 32x32."""
    return ResNetCifar(3)


def resnet56() -> ResNetCifar:
    """56 layers, 0.85 M parameters, 125.5 M multiply-accumulates at 32x32."""
    return ResNetCifar(9)
