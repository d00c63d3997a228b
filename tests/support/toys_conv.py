"""Toy convolutional networks: residual, dense, split and concat, shuffles, grouped and transposed, gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .toys_base import Registry

TOYS = Registry()


def conv_bn(c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out))


def head(channels: int, classes: int = 5) -> nn.Sequential:
    """Global average pool and a linear."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@TOYS.takes((2, 3, 10, 10))
class PlainCnn(nn.Module):
    """conv-bn-relu chain, max pool, flatten into an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8), nn.ReLU(), nn.MaxPool2d(2), conv_bn(8, 12), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(12 * 25, 14), nn.ReLU(), nn.Linear(14, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


@TOYS.takes((2, 3, 12, 12))
class ResidualCnn(nn.Module):
    """Two residual blocks, the second with a projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.a1, self.a2 = conv_bn(8, 6), conv_bn(6, 8)
        self.b1, self.b2, self.short = conv_bn(8, 10, stride=2), conv_bn(10, 12), conv_bn(8, 12, 1, stride=2)
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        x = F.relu(self.short(x) + self.b2(F.relu(self.b1(x))))
        return self.head(x)


@TOYS.takes((2, 3, 8, 8))
class DenseConcat(nn.Module):
    """DenseNet: pre-activation layers, each output appended to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (6, 10, 14))
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1, bias=False) for c in (6, 10, 14))
        self.norm = nn.BatchNorm2d(18)
        self.head = head(18)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.head(F.relu(self.norm(x)))


@TOYS.takes((2, 3, 8, 8))
class Res2Net(nn.Module):
    """Res2Net block: split in four, each part adds the one before, concat, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 10)
        self.reduce = conv_bn(10, 16, 1)
        self.parts = nn.ModuleList(conv_bn(4, 4) for _ in range(3))
        self.expand = conv_bn(16, 10, 1)
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        first, *rest = torch.split(F.relu(self.reduce(x)), 4, 1)
        outs, last = [first], None
        for part, conv in zip(rest, self.parts, strict=True):
            last = F.relu(conv(part if last is None else part + last))
            outs.append(last)
        return self.head(F.relu(x + self.expand(torch.cat(outs, 1))))


@TOYS.takes((2, 3, 8, 8))
class C2f(nn.Module):
    """YOLOv8's C2f: chunk in two, bottlenecks on the second half, all concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cv1 = conv_bn(3, 6), conv_bn(6, 16, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv_bn(8, 5), nn.SiLU(), conv_bn(5, 8)) for _ in range(2))
        self.cv2 = conv_bn(32, 10, 1)
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.cv1(F.silu(self.stem(x)))).chunk(2, 1))
        for block in self.blocks:
            y.append(y[-1] + block(y[-1]))
        return self.head(F.silu(self.cv2(torch.cat(y, 1))))


@TOYS.takes((2, 3, 8, 8))
class ShuffleBlock(nn.Module):
    """ShuffleNetV2: half the channels pass, half are convolved, concat, channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.branch = nn.Sequential(conv_bn(6, 10, 1), nn.ReLU(), conv_bn(10, 10, groups=10), conv_bn(10, 6, 1))
        self.last = conv_bn(12, 14, 1)
        self.head = head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for _ in range(1):
            a, b = x.chunk(2, 1)
            x = torch.cat([a, F.relu(self.branch(b))], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.last(x)))


@TOYS.takes((2, 3, 8, 8))
class InvertedResidual(nn.Module):
    """MobileNetV2: expand, depthwise, project, residual; ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.block = nn.Sequential(
            conv_bn(6, 15, 1), nn.ReLU6(), conv_bn(15, 15, groups=15), nn.ReLU6(), conv_bn(15, 6, 1)
        )
        self.multiplier = nn.Conv2d(6, 18, 3, padding=1, groups=6)  # depth multiplier 3
        self.head = head(18)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        return self.head(F.relu(self.multiplier(x + self.block(x))))


@TOYS.takes((2, 3, 8, 8))
class GroupedConvs(nn.Module):
    """Grouped convolutions in sequence: 4 groups, then 2, then coprime group counts (2 after 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.g4, self.g2 = conv_bn(16, 24, groups=4), conv_bn(24, 12, groups=2)
        self.g3, self.h2 = conv_bn(12, 18, groups=3), conv_bn(18, 8, groups=2)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.g4, self.g2, self.g3, self.h2):
            x = F.relu(layer(x))
        return self.head(x)


@TOYS.takes((2, 3, 9, 9))
class TransposedConvs(nn.Module):
    """U-Net-like: down, transposed conv up with skip concat, grouped and depthwise transposed convs."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2 = conv_bn(3, 6), conv_bn(6, 10, stride=2)
        self.up = nn.ConvTranspose2d(10, 8, 3, stride=2, padding=1, bias=False)
        self.up_bn = nn.BatchNorm2d(8)
        self.grouped = nn.ConvTranspose2d(14, 4, 3, padding=1, groups=2)
        self.grouped_bn = nn.BatchNorm2d(4)
        self.depthwise = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.enc1(x))
        b = F.relu(self.up_bn(self.up(F.relu(self.enc2(a)))))
        y = F.relu(self.grouped_bn(self.grouped(torch.cat([a, b], 1))))
        return self.out(F.relu(self.depthwise(y)))


@TOYS.takes((2, 3, 8, 8))
class SqueezeExcite(nn.Module):
    """SE: channel gates from the pooled features, with hard-sigmoid, inside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv_bn(3, 12), conv_bn(12, 12)
        self.reduce, self.gate = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv(x)
        gate = F.hardsigmoid(self.gate(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.head(F.relu(x + y * gate))


@TOYS.takes((2, 3, 8, 8))
class Cbam(nn.Module):
    """CBAM's spatial attention: one-channel map from channel mean and max, broadcast over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 10)
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(x * torch.sigmoid(self.spatial(pooled)))


@TOYS.takes((2, 3, 6, 6))
class PixelShuffle(nn.Module):
    """Sub-pixel upsampling: conv to 4x the channels, PixelShuffle, conv; then back by PixelUnshuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.mid = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.last = nn.Conv2d(24, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.mid(F.pixel_shuffle(self.wide(x), 2)))
        return self.last(F.pixel_unshuffle(y, 2))


@TOYS.takes((2, 3, 12, 12))
class OptionAShortcut(nn.Module):
    """CIFAR ResNet's option-A shortcut: stride by slicing, zero channels padded on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = conv_bn(3, 8), conv_bn(8, 16, stride=2), conv_bn(16, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(short + self.conv2(F.relu(self.conv1(x)))))


@TOYS.takes((2, 3, 8, 8))
class FlipRollSelect(nn.Module):
    """Channel permutations inside a residual: flip, roll and index_select."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last = conv_bn(3, 9), conv_bn(9, 9), conv_bn(9, 11)
        self.register_buffer("order", torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5]))
        self.head = head(11)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.mid(torch.flip(x, [1])))
        y = torch.roll(y, 2, 1) + torch.index_select(x, 1, self.order)
        return self.head(F.relu(self.last(y)))


@TOYS.takes((2, 3, 8, 8))
class GroupNormNet(nn.Module):
    """Group norm with 3 groups between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(3, 12), nn.GroupNorm(5, 10)
        self.head = head(10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))))


@TOYS.takes((2, 3, 8, 8))
class InstanceNormNet(nn.Module):
    """Instance norm, affine, with and without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.norm1 = nn.InstanceNorm2d(12, affine=True)
        self.norm2 = nn.InstanceNorm2d(10, affine=True, track_running_stats=True)
        self.last = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))))


@TOYS.takes((2, 4, 20))
class Conv1dNet(nn.Module):
    """1-d convolutions with dilation and batch norm, and a linear over the length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(4, 9, 3, padding=2, dilation=2, bias=False), nn.BatchNorm1d(9)
        self.conv2, self.bn2 = nn.Conv1d(9, 6, 3, stride=2), nn.BatchNorm1d(6)
        self.out = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        return self.out(self.bn2(self.conv2(x)))
