"""Training matrices through low-rank projections of their gradients, so that the optimizer's state is low-rank too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...graph.errors import ConfigError, ConstraintError


@dataclass(eq=False)
class _Projected:
    """A matrix [m, n] and what the optimizer sees instead: [rank, n], or [m, rank] where n is the shorter side."""

    weight: nn.Parameter
    proxy: nn.Parameter
    tall: bool
    basis: torch.Tensor | None = None

    def down(self, gradient: torch.Tensor) -> torch.Tensor:
        assert self.basis is not None
        return gradient @ self.basis if self.tall else self.basis.mT @ gradient

    def up(self, change: torch.Tensor) -> torch.Tensor:
        assert self.basis is not None
        return change @ self.basis.mT if self.tall else self.basis @ change


class ProjectedGradients:
    """An optimizer whose states live in a subspace of each matrix's gradient.

    The gradient G of a matrix is projected to P^T G (or G P), where P holds the leading singular vectors of the
    gradient on the shorter side, found anew every ``every`` steps; the optimizer makes its step on that, and the step
    is carried back: W += scale * P step. With ``rank`` the shorter side nothing is lost and plain SGD is unchanged (to
    rounding). This is the projection of "Gradient Weight-normalized Low-rank Projection for Efficient LLM Training",
    for the weights of its adapter (kind ``dora``: magnitude and direction) or for any others.

    Args:
        parameters: what trains. Matrices whose shorter side exceeds ``rank`` are projected; all else, vectors among it,
            is trained as it is.
        optimizer: makes the optimizer from a list of parameters: ``lambda p: torch.optim.AdamW(p, lr=1e-3)``. Weight
            decay of projected matrices must be 0, since the optimizer does not see them.
        rank: of the projection, at least 1.
        every: steps between two searches of the subspace.
        scale: factor on projected steps.

    Raises:
        ConfigError: a number is out of range. ConstraintError: weight decay was asked for on projected matrices.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        *,
        rank: int,
        every: int = 200,
        scale: float = 1.0,
    ) -> None:
        for name, value in (("rank", rank), ("every", every)):
            if value < 1:
                raise ConfigError("out of range", node=name, expected="at least 1", found=value)
        self.rank, self.every, self.scale = rank, every, scale
        self.steps = 0
        self.projected: list[_Projected] = []
        plain: list[nn.Parameter] = []
        for p in parameters:
            if p.ndim == 2 and min(p.shape) > rank:
                tall = p.shape[0] > p.shape[1]
                shape = (p.shape[0], rank) if tall else (rank, p.shape[1])
                self.projected.append(_Projected(p, nn.Parameter(p.new_zeros(shape)), tall))
            else:
                plain.append(p)
        self.optimizer = optimizer([*plain, *(q.proxy for q in self.projected)])
        self._refuse_decay()

    def _refuse_decay(self) -> None:
        proxies = {id(q.proxy) for q in self.projected}
        for group in self.optimizer.param_groups:
            if group.get("weight_decay") and any(id(p) in proxies for p in group["params"]):
                raise ConstraintError(
                    "weight decay acts on what the optimizer sees, which is no projected matrix",
                    value="weight_decay", expected="0", found=group["weight_decay"],
                    hint="decay the weights in the training loop, or train them unprojected",
                )  # fmt: skip

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad()
        for q in self.projected:
            q.weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step of the optimizer, projected matrices included; those without a gradient stay."""
        search = self.steps % self.every == 0
        for q in self.projected:
            q.proxy.grad = None
            gradient = q.weight.grad
            if gradient is None:
                continue
            if search or q.basis is None:
                q.basis = _leading(gradient, self.rank, q.tall)
            q.proxy.zero_()
            q.proxy.grad = q.down(gradient)
        self.optimizer.step()
        for q in self.projected:
            if q.proxy.grad is not None:
                q.weight.add_(q.up(q.proxy), alpha=self.scale)
                q.proxy.grad = None
        self.steps += 1

    def state_bytes(self) -> int:
        """Bytes of the optimizer's states, projections included."""
        tensors: list[Any] = [v for state in self.optimizer.state.values() for v in state.values()]
        tensors += [q.basis for q in self.projected]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _leading(gradient: torch.Tensor, rank: int, tall: bool) -> torch.Tensor:
    """Leading singular vectors on the shorter side: [side, rank], orthonormal columns."""
    u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    return (vh[:rank].mT if tall else u[:, :rank]).to(gradient.dtype)
