"""How toys are built: a registry per family, seeded weights, seeded inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

Toy: TypeAlias = tuple[nn.Module, tuple[torch.Tensor, ...]]
Shape: TypeAlias = tuple[int, ...]


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights of a sane scale for every parameter and statistic; the module in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype) * std + mean

    for name, p in module.named_parameters():
        if p.dim() > 1:
            fan_in = p[0].numel()
            p.copy_(normal(p, fan_in**-0.5 * 1.3))
        elif name.endswith("bias") or "bias_" in name:
            p.copy_(normal(p, 0.2))
        else:  # gains: mostly near one, about one in seven negative
            sign = torch.where(torch.rand(p.shape, generator=generator) < 0.15, -1.0, 1.0)
            p.copy_((0.6 + torch.rand(p.shape, generator=generator)) * sign)
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(normal(b, 0.3))
        elif name.endswith("running_var"):
            b.copy_(0.4 + 1.6 * torch.rand(b.shape, generator=generator))
    return module.eval()


def inputs(*shapes: Shape, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Seeded standard-normal float32 inputs."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def tokens(vocabulary: int, shape: Shape, seed: int = 1) -> torch.Tensor:
    """Seeded int64 token numbers below ``vocabulary``."""
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


class Registry(dict[str, Callable[[], Toy]]):
    """Toys of one family: decorate a class whose constructor takes nothing with the shapes of its inputs."""

    def takes(self, *shapes: Shape) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """Register a module class under its name in snake case, called with inputs of these shapes."""

        def register(cls: type[nn.Module]) -> type[nn.Module]:
            def build() -> Toy:
                return fill(cls()), inputs(*shapes)

            build.__doc__ = cls.__doc__
            self[snake(cls.__name__)] = build
            return cls

        return register

    def reads(self, vocabulary: int, shape: Shape) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """Register a module class that reads token numbers."""

        def register(cls: type[nn.Module]) -> type[nn.Module]:
            self[snake(cls.__name__)] = lambda: (fill(cls()), (tokens(vocabulary, shape),))
            return cls

        return register


def snake(name: str) -> str:
    """``ResidualCnn`` -> ``residual_cnn``."""
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))
