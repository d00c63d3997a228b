"""What is learned of one weight: AdaRound, AdaQuant, FlexRound, LRQ; each a differentiable quantized weight.

Sources: "Up or Down? Adaptive Rounding for Post-Training Quantization"; "Improving Post Training Neural Quantization:
Layer-wise Calibration and Integer Programming" (AdaQuant); "FlexRound: Learnable Rounding based on Element-wise
Division for Post-Training Quantization"; "LRQ: Optimizing Post-Training Quantization for Large Language Models by
Learning Low-Rank Weight-Scaling Matrices".
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .grid import Grid, round_ste


class Variable(ABC):
    """A weight under reconstruction.

    Attributes:
        rate: learning rate that suits a few hundred steps of Adam.
    """

    rate = 1e-2
    scale_rate = 1e-3

    def __init__(self, weight: Tensor, grid: Grid, start: Tensor | None = None, learn_scale: bool = True) -> None:
        self.weight, self.grid = weight, grid
        # A positive scale whatever the steps: the old one times exp(t), exact at t = 0.
        self.log_scale = torch.zeros_like(grid.scale, requires_grad=learn_scale)
        self.learn_scale = learn_scale

    @property
    def scale(self) -> Tensor:
        return self.grid.scale * torch.exp(self.log_scale) if self.learn_scale else self.grid.scale

    @abstractmethod
    def variables(self) -> list[Tensor]:
        """What is learned besides the scale."""

    @abstractmethod
    def soft(self) -> Tensor:
        """The quantized weight as it is now, differentiable in the variables."""

    @abstractmethod
    def integers(self) -> Tensor:
        """The stored integers that belong to it, float32."""

    def penalty(self, progress: float) -> Tensor | None:
        """What is added to the loss, ``progress`` of the way (0 to 1); per weight element."""
        return None

    def groups(self, rate: float | None) -> list[dict[str, object]]:
        """Parameter groups for an optimizer."""
        found: list[dict[str, object]] = [{"params": self.variables(), "lr": self.rate if rate is None else rate}]
        if self.learn_scale:
            found.append({"params": [self.log_scale], "lr": self.scale_rate})
        return found

    def count(self) -> int:
        """How many numbers are learned, the scales aside."""
        return sum(v.numel() for v in self.variables())

    def hard(self) -> Tensor:
        """The weight that the stored integers stand for."""
        with torch.no_grad():
            return self.grid.real(self.integers(), self.scale)


class AdaRound(Variable):
    """Up or down: w = s (floor + h(V)), h the rectified sigmoid, pushed to 0 or 1 by a penalty that sharpens.

    No integer is more than one away from the nearest. Given integers to start from, each weight chooses between its
    own and the neighbour on the side of the float value.
    """

    rate = 2e-2
    ZETA, GAMMA = 1.1, -0.1
    WARM = 0.2

    def __init__(self, weight: Tensor, grid: Grid, start: Tensor | None = None, learn_scale: bool = False) -> None:
        super().__init__(weight, grid, start, False)
        steps = weight / grid.scale + grid.zero
        if start is None:
            self.floor = torch.floor(steps)
            rest = steps - self.floor
        else:
            self.floor = torch.where(steps >= start, start, start - 1)
            # 0.5 is the border between the two: keep the start on its side of it.
            rest = torch.where(steps >= start, (steps - start).clamp(0, 0.4), (steps - start + 1).clamp(0.6, 1))
        share = (rest.clamp(1e-4, 1 - 1e-4) - self.GAMMA) / (self.ZETA - self.GAMMA)
        self.v = torch.log(share / (1 - share)).requires_grad_()

    def variables(self) -> list[Tensor]:
        return [self.v]

    def up(self) -> Tensor:
        """h(V) in [0, 1]."""
        return torch.clamp(torch.sigmoid(self.v) * (self.ZETA - self.GAMMA) + self.GAMMA, 0, 1)

    def soft(self) -> Tensor:
        return self.grid.real(torch.clamp(self.floor + self.up(), self.grid.low, self.grid.high))

    def integers(self) -> Tensor:
        with torch.no_grad():
            return torch.clamp(self.floor + (self.up() >= 0.5).float(), self.grid.low, self.grid.high)

    def penalty(self, progress: float) -> Tensor | None:
        """mean of 1 - |2h - 1|^beta, beta from 20 to 2, after a warm-up without it."""
        if progress < self.WARM:
            return None
        t = (progress - self.WARM) / (1 - self.WARM)
        beta = 2 + 18 * (1 - t)
        return (1 - (2 * self.up() - 1).abs().pow(beta)).mean()


class AdaQuant(Variable):
    """w = s clamp(round(W / s + V)): an offset per weight and the scale, straight through the rounding."""

    rate = 1e-2
    scale_rate = 1e-3

    def __init__(self, weight: Tensor, grid: Grid, start: Tensor | None = None, learn_scale: bool = True) -> None:
        super().__init__(weight, grid, start, learn_scale)
        self.base = weight / grid.scale
        if start is not None:
            # Between the start's own centre and the float value, within its cell.
            centre = start - grid.zero
            self.base = torch.clamp(self.base, centre - 0.4, centre + 0.4)
        self.v = torch.zeros_like(weight, requires_grad=True)

    def variables(self) -> list[Tensor]:
        return [self.v]

    def _steps(self) -> Tensor:
        # The scale's gradient is that of s * integers, as for a learned step; the cells do not move with it.
        return self.base + self.v

    def soft(self) -> Tensor:
        q = torch.clamp(round_ste(self._steps()) + self.grid.zero, self.grid.low, self.grid.high)
        return self.grid.real(q, self.scale)

    def integers(self) -> Tensor:
        with torch.no_grad():
            return torch.clamp(torch.round(self._steps()) + self.grid.zero, self.grid.low, self.grid.high)


class FlexRound(Variable):
    """w = s1 round(W / (s1 S2 s3 s4)): a divisor per weight, per output channel and (convolutions) per input channel.

    Begins bit-equal to rounding to nearest. S2, s3 and s4 serve the choice of the integers only.
    """

    rate = 3e-3
    scale_rate = 1e-3

    def __init__(self, weight: Tensor, grid: Grid, start: Tensor | None = None, learn_scale: bool = True) -> None:
        super().__init__(weight, grid, start, learn_scale)
        self.s2 = torch.ones_like(weight, requires_grad=True)
        self.s3 = torch.ones(weight.shape[0], *[1] * (weight.dim() - 1), requires_grad=True)
        self.s4: Tensor | None = None
        if weight.dim() > 2:
            self.s4 = torch.ones(1, weight.shape[1], *[1] * (weight.dim() - 2), requires_grad=True)

    def variables(self) -> list[Tensor]:
        return [self.s2, self.s3] if self.s4 is None else [self.s2, self.s3, self.s4]

    def _divisor(self) -> Tensor:
        d = self.s2 * self.s3
        return d if self.s4 is None else d * self.s4

    def _steps(self) -> Tensor:
        # Divisors stay positive: a weight may shrink or grow, not change its sign.
        return self.weight / (self.scale * self._divisor().clamp_min(1e-3))

    def soft(self) -> Tensor:
        q = torch.clamp(round_ste(self._steps()) + self.grid.zero, self.grid.low, self.grid.high)
        return self.grid.real(q, self.scale)

    def integers(self) -> Tensor:
        with torch.no_grad():
            return torch.clamp(torch.round(self._steps()) + self.grid.zero, self.grid.low, self.grid.high)


class LRQ(FlexRound):
    """w = s1 round(W / (s1 exp(L U + r + c))), L [m, rank], U [rank, n], r [m], c [n] for a weight of m x n.

    Begins bit-equal to rounding to nearest (L, r and c are 0); rank (m + n) + m + n numbers are learned, the scale
    aside.
    """

    rate = 3e-3

    def __init__(
        self,
        weight: Tensor,
        grid: Grid,
        start: Tensor | None = None,
        learn_scale: bool = True,
        rank: int = 8,
        seed: int = 0,
    ) -> None:
        Variable.__init__(self, weight, grid, start, learn_scale)
        m, n = weight.shape[0], weight[0].numel()
        generator = torch.Generator().manual_seed(seed)
        self.left = torch.zeros(m, rank, requires_grad=True)
        self.right = (torch.randn(rank, n, generator=generator) / rank**0.5).requires_grad_()
        self.row = torch.zeros(m, 1, requires_grad=True)
        self.column = torch.zeros(1, n, requires_grad=True)

    def variables(self) -> list[Tensor]:
        return [self.left, self.right, self.row, self.column]

    def _divisor(self) -> Tensor:
        exponent = self.left @ self.right + self.row + self.column
        return torch.exp(exponent).reshape(self.weight.shape)


def variable(
    kind: str, weight: Tensor, grid: Grid, start: Tensor | None, learn_scale: bool, rank: int, seed: int
) -> Variable:
    """The variable of that kind; ``start`` holds integers to begin with (``adaround``, ``adaquant``)."""
    if kind == "lrq":
        return LRQ(weight, grid, None, True, rank, seed)
    kinds: dict[str, type[Variable]] = {"adaround": AdaRound, "adaquant": AdaQuant, "flexround": FlexRound}
    return kinds[kind](weight, grid, start, learn_scale)
