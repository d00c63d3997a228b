"""The demo's network, its data (scikit-learn's handwritten digits at 16x16) and its training loop."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitsCnn(nn.Module):
    """Stem, residual block, depthwise-separable block, strided residual block with projection, pooled linear head.

    Input [N, 1, 16, 16] float32, output [N, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 24)
        self.res1, self.res2 = conv_bn(24, 32), conv_bn(32, 24)
        self.depthwise, self.pointwise = conv_bn(24, 24, stride=2, groups=24), conv_bn(24, 48, k=1)
        self.down1, self.down2 = conv_bn(48, 64, stride=2), conv_bn(64, 64)
        self.shortcut = conv_bn(48, 64, k=1, stride=2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.res2(F.relu(self.res1(x))))
        x = F.relu(self.pointwise(F.relu(self.depthwise(x))))
        x = F.relu(self.shortcut(x) + self.down2(F.relu(self.down1(x))))
        return self.head(x.mean((2, 3)))


def conv_bn(c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm."""
    conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


@cache
def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """``"train"`` (1,198 images) or ``"test"`` (599): float32 [N, 1, 16, 16], roughly normalised, and int64 labels."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    bunch = load()
    parts = train_test_split(bunch.images, bunch.target, test_size=1 / 3, random_state=0, stratify=bunch.target)
    images, labels = (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])
    x = (torch.tensor(images, dtype=torch.float32)[:, None] / 16 - 0.305) / 0.376
    return F.interpolate(x, scale_factor=2, mode="bilinear"), torch.tensor(labels, dtype=torch.int64)


def calibration_batches(count: int = 8, size: int = 32) -> list[Tensor]:
    """The first training images in batches, as a quantizer needs them."""
    return list(load_digits("train")[0][: count * size].split(size))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images that the model gets right."""
    x, y = load_digits("test")
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())


def fit(model: nn.Module, epochs: int, rate: float, seed: int = 0) -> None:
    """SGD with Nesterov momentum, one-cycle rate, batch 32, images moved by up to two pixels."""
    x, y = load_digits("train")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * -(-len(x) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            dx, dy = torch.randint(-2, 3, (2,), generator=generator).tolist()
            images = torch.roll(x[batch], (dy, dx), (2, 3))
            loss = F.cross_entropy(model(images), y[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def finetune(model: nn.Module) -> None:
    """What the demo's pipeline calls after pruning: eight short epochs."""
    fit(model.train(), epochs=8, rate=0.03)
