"""Pruned CIFAR ResNet-56 as plain data: a state dict from which it is rebuilt without any pruning library.

A pruned network keeps the class of ``tests/support/resnet_cifar.py``; widths follow from the weights' shapes. Its two
zero-padded shortcuts become one of: other numbers of zero channels, a gather of channels, or (the peer's variant) a
1x1 convolution. Needs torch only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.resnet_cifar import BasicBlock, ResNetCifar, resnet56

BLOCKS = 9
CHANGES = ("layer2.0", "layer3.0")
"""The blocks whose shortcut subsamples and pads."""


class PaddedShortcut(nn.Module):
    """Every second pixel, with ``left`` and ``right`` zero channels around: the option-A shortcut, any widths."""

    def __init__(self, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.left, self.right))


class GatheredShortcut(nn.Module):
    """Every second pixel; output channel i is input channel ``sources[i]``, or zero where that is -1."""

    def __init__(self, sources: list[int]) -> None:
        super().__init__()
        self.register_buffer("sources", torch.tensor(sources), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 1))
        return padded.index_select(1, self.sources % padded.shape[1])


class Block(BasicBlock):
    """The block of tests/support with its shortcut as a module of its own."""

    shortcut: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def with_convolutions(model: ResNetCifar) -> ResNetCifar:
    """The same function, both shortcuts written as bias-free 1x1 convolutions of zeros and ones (in place)."""
    for name in CHANGES:
        block = model.get_submodule(name)
        assert isinstance(block, BasicBlock)
        conv = nn.Conv2d(block.conv1.in_channels, block.conv2.out_channels, 1, 2, bias=False)
        with torch.no_grad():
            conv.weight.zero_()
            for i in range(conv.in_channels):
                conv.weight[block.padding + i, i] = 1
        block.__class__ = Block
        block.shortcut = conv
    return model


def rebuild(state: Mapping[str, torch.Tensor], shortcuts: Mapping[str, list[int]]) -> ResNetCifar:
    """The network that a state dict belongs to; ``shortcuts``: per block of CHANGES the source of each channel."""
    model = resnet56()
    for name, old in list(model.named_modules()):
        new: nn.Module
        if isinstance(old, nn.Conv2d):
            out, inside = state[f"{name}.weight"].shape[:2]
            new = nn.Conv2d(inside, out, old.kernel_size, old.stride, old.padding, bias=f"{name}.bias" in state)
        elif isinstance(old, nn.BatchNorm2d):
            new = nn.BatchNorm2d(len(state[f"{name}.weight"]))
        elif isinstance(old, nn.Linear):
            new = nn.Linear(state[f"{name}.weight"].shape[1], old.out_features)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    for name in CHANGES:
        block = model.get_submodule(name)
        block.__class__ = Block
        weight = state.get(f"{name}.shortcut.weight")
        block.shortcut = _shortcut(shortcuts.get(name, []), weight)
    model.load_state_dict(dict(state))
    return model.eval()


def _shortcut(sources: list[int], weight: torch.Tensor | None) -> nn.Module:
    if weight is not None:
        return nn.Conv2d(weight.shape[1], weight.shape[0], 1, 2, bias=False)
    inner = [s for s in sources if s >= 0]
    left = next((i for i, s in enumerate(sources) if s >= 0), len(sources))
    right = len(sources) - left - len(inner)
    if sources == [-1] * left + list(range(len(inner))) + [-1] * right:
        return PaddedShortcut(left, right)
    return GatheredShortcut(sources)


def sources(kept_in: list[int], kept_out: list[int], padding: int) -> list[int]:
    """Source of each kept output channel of an option-A shortcut: a position among the kept inputs, or -1 (zero)."""
    at = {channel: i for i, channel in enumerate(kept_in)}
    return [at.get(channel - padding, -1) for channel in kept_out]


def shortcuts_of(model: ResNetCifar) -> dict[str, list[int]]:
    """The sources of both padded shortcuts of a network whose blocks are those of tests/support."""
    blocks = {name: model.get_submodule(name) for name in CHANGES}
    return {
        name: sources(list(range(b.conv1.in_channels)), list(range(b.conv2.out_channels)), b.padding)
        for name, b in blocks.items()
    }


def cost(model: nn.Module) -> tuple[int, int]:
    """Multiply-accumulates of convolutions and linears for one image, and parameters."""
    macs = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        macs += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return macs, sum(p.numel() for p in model.parameters())


def widths(model: ResNetCifar) -> dict[str, list[int]]:
    """Channels of the stem and stages between blocks, and inside each block."""
    stages = [model.layer1, model.layer2, model.layer3]
    return {
        "between": [model.conv1.out_channels, *(s[0].conv2.out_channels for s in stages)],
        "inside": [b.conv1.out_channels for s in stages for b in s],
    }


def reinitialize(model: ResNetCifar, seed: int) -> ResNetCifar:
    """Fresh weights of the usual distributions (Kaiming normal convolutions), same shapes."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(m, nn.Linear):
            nn.init.kaiming_uniform_(m.weight, a=5**0.5, generator=generator)
            nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
    return model
