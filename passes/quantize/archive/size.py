"""The size of coded weights as a differentiable function of the transform that prunes and quantizes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SHARPNESS = 0.1
"""Width, in steps, of the soft edge of the dead zone that gradients see."""


@dataclass
class Layer:
    """One weight on its way to integers.

    Attributes:
        values: float32 [n], the weight flattened, or a sample of it.
        importance: of the squared error of each, scaled so that the error of zeroing everything is 1; [n].
        count: numbers in the whole weight (``values`` may be a sample).
        log_step: learned; the step is its exponential.
        dead: learned; magnitudes below ``(0.5 + softplus(dead)) * step`` become zero.
    """

    values: Tensor
    importance: Tensor
    count: int
    log_step: Tensor = field(repr=False)
    dead: Tensor = field(repr=False)

    def transform(self) -> tuple[Tensor, Tensor]:
        """The weight after the transform and its integers, both with gradients to step and dead zone.

        Values are those of the hard transform; gradients are straight through the rounding, and through a soft edge
        of the dead zone.
        """
        step, edge = self.log_step.exp(), self.edge()
        scaled = self.values / step
        rounded = scaled + (torch.round(scaled) - scaled).detach()
        soft = torch.sigmoid((scaled.abs() - edge) / SHARPNESS)
        hard = (scaled.abs() >= edge).to(scaled.dtype)
        kept = soft + (hard - soft).detach()
        integers = rounded * kept
        return integers * step, integers

    def edge(self) -> Tensor:
        """Where the dead zone ends, in steps; at least 0.5, where rounding itself begins to give zero."""
        return 0.5 + torch.nn.functional.softplus(self.dead)

    def distortion(self) -> Tensor:
        """Weighted squared error relative to that of zeroing the layer."""
        made, _ = self.transform()
        return (self.importance * (made - self.values).square()).sum()

    def bits(self) -> Tensor:
        """Bits of the whole weight under the best static code of its integers, with gradients."""
        _, integers = self.transform()
        return soft_bits(integers) * (self.count / len(self.values))


def soft_bits(integers: Tensor) -> Tensor:
    """``-sum c log2(c / n)`` over the counts c of integer values, with the gradient of moving each number up or down.

    The value is that of the rounded integers. A number at k that moves by d changes the size by d times half the
    difference of what k + 1 and k - 1 cost (the logarithms of their shares; an integer that does not occur costs what
    one that occurs once does): moving from a rare to a common integer lowers the size.
    """
    whole = torch.round(integers.detach())
    low = int(whole.min()) - 1
    at = (whole - low).long()
    counts = torch.bincount(at, minlength=int(at.max()) + 2).double()
    price = torch.log2(counts.sum() / counts.clamp(min=1))
    slope = (price[at + 1] - price[at - 1]) / 2
    return (counts * price).sum() + (slope * (integers - integers.detach())).sum()
