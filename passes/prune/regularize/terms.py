"""Penalties on the slabs of an axis group, on the live parameters of a module: value, gradient, proximal step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Kind: TypeAlias = Literal["group_lasso", "bn_l1", "masked_l1", "growing"]
Rate: TypeAlias = Callable[[nn.Parameter], float]
"""Learning rate of a parameter."""


@dataclass
class Place:
    """One (parameter, axis) of a group.

    Attributes:
        at: int64, length of the axis: the group index each position stands for, -1 for none.
    """

    parameter: nn.Parameter
    axis: int
    at: Tensor

    def squares(self, size: int) -> Tensor:
        """float32 [size]: sum of squares of each index's slab."""
        p = self.parameter.float()
        others = [i for i in range(p.dim()) if i != self.axis]
        sums = p.square().sum(others) if others else p.square()
        at = self.at.to(p.device)
        return torch.zeros(size, device=p.device).index_add(0, at[at >= 0], sums[at >= 0])

    def counts(self, size: int) -> Tensor:
        """float32 [size]: number of elements of each index's slab."""
        per = self.parameter.numel() / max(self.parameter.shape[self.axis], 1)
        return torch.bincount(self.at[self.at >= 0], minlength=size).float() * per

    def spread(self, vector: Tensor, elsewhere: float) -> Tensor:
        """One number per group index as a tensor that broadcasts against the parameter."""
        p, at = self.parameter, self.at.to(self.parameter.device)
        values = torch.where(at >= 0, vector.to(p.device)[at.clamp(min=0)], vector.new_tensor(elsewhere).to(p.device))
        return values.view([-1 if i == self.axis else 1 for i in range(p.dim())]).to(p.dtype)


@dataclass
class Term:
    """The penalty of one axis group.

    Attributes:
        name: of the axis group.
        size: number of indices.
        places: where the penalised slabs are.
        masked: bool [size]: the indices that are penalised, those that are to go; all of them for kinds without a
            preset mask.
    """

    name: str
    size: int
    places: list[Place]
    masked: Tensor
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.stack([p.counts(self.size) for p in self.places]).sum(0)

    def norms(self) -> Tensor:
        """float32 [size]: Euclidean norm of each index's slab over all places."""
        device = self.places[0].parameter.device
        return torch.stack([p.squares(self.size).to(device) for p in self.places]).sum(0).sqrt()

    def value(self, kind: Kind, strength: float) -> Tensor:
        """The penalty, differentiable; 0 has the subgradient 0."""
        chosen = self.masked.to(self.places[0].parameter.device)
        squares = torch.stack([p.squares(self.size).to(chosen.device) for p in self.places]).sum(0)
        if kind == "growing":
            return 0.5 * strength * squares[chosen].sum()
        if kind == "group_lasso":
            positive = chosen & (squares > 0)
            return strength * (self.counts.to(chosen.device)[positive].sqrt() * squares[positive].sqrt()).sum()
        parts = [(p.parameter.float() * p.spread(chosen.float(), 0.0).float()).abs().sum() for p in self.places]
        return strength * torch.stack([part.to(chosen.device) for part in parts]).sum()

    @torch.no_grad()
    def add_gradient(self, kind: Kind, strength: float, only: set[int], scale: float = 1.0) -> None:
        """Add the (sub)gradient to ``.grad`` of the parameters whose id is in ``only`` and that have a gradient."""
        for p, factor in self._factors(kind, only):
            if p.parameter.grad is not None:
                direction = p.parameter.sign() if kind in ("bn_l1", "masked_l1") else p.parameter
                p.parameter.grad.add_((factor * direction).to(p.parameter.grad.dtype), alpha=strength * scale)

    def _factors(self, kind: Kind, only: set[int]) -> Iterable[tuple[Place, Tensor]]:
        per_index = self.masked.float()
        if kind == "group_lasso":
            norms = self.norms()
            weight = self.counts.to(norms.device).sqrt() / norms.clamp(min=1e-30)
            per_index = torch.where(norms > 0, weight, 0) * per_index.to(norms.device)
        return [(p, p.spread(per_index, 0.0)) for p in self.places if id(p.parameter) in only]

    @torch.no_grad()
    def proximal(self, kind: Kind, strength: float, only: set[int], rate: Rate) -> None:
        """One proximal step after the optimizer's: soft thresholds, which reach zero, or decay.

        Exact for one group. Slabs that overlap (a weight's rows are in one group, its columns in another) are treated
        in turn, as is usual.
        """
        norms = self.norms() if kind == "group_lasso" else None
        for p in self.places:
            if id(p.parameter) not in only:
                continue
            step, data = rate(p.parameter) * strength, p.parameter
            if norms is not None:
                shrunk = 1 - step * self.counts.to(norms.device).sqrt() / norms.clamp(min=1e-30)
                keep = torch.where(self.masked.to(norms.device), shrunk.clamp(min=0), 1.0)
                data.mul_(p.spread(keep, 1.0))
            elif kind == "growing":
                data.div_(1 + step * p.spread(self.masked.float(), 0.0))
            else:
                threshold = step * p.spread(self.masked.float(), 0.0)
                data.copy_(data.sign() * (data.abs() - threshold).clamp(min=0))
