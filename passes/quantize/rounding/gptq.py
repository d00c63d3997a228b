"""GPTQ: columns rounded one after the other, each error made up for by the columns still to come; then descent.

Sources: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (error feedback through
the Cholesky factor of the inverse Hessian, order by activity, blocks of columns, damping); coordinate descent on the
integers as in "QuantEase" and "COMQ", which repairs what one sweep leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Quadratic:
    """A layer's squared error as a function of its weight: tr (W - W*) H (W - W*)^T, per channel group.

    Attributes:
        hessian: [G, D, D], mean of x x^T over rows (about the mean where the layer has a bias to take it up).
        target: W*, [G, O, D]: the weight that does best without rounding.
    """

    hessian: Tensor
    target: Tensor

    def error(self, w: Tensor) -> Tensor:
        """Mean squared error per output channel beyond the best possible, [G, O]."""
        d = w - self.target
        return ((d @ self.hessian) * d).sum(-1)


@dataclass
class MatrixGrid:
    """The grid of a weight in matrix form: scale and zero point [G, O, D], integers low to high."""

    scale: Tensor
    zero: Tensor
    low: float
    high: float

    def integers(self, w: Tensor, at: slice | int = slice(None)) -> Tensor:
        s, z = self.scale[..., at], self.zero[..., at]
        return torch.clamp(torch.round(w / s) + z, self.low, self.high)

    def real(self, q: Tensor, at: slice | int = slice(None)) -> Tensor:
        return (q - self.zero[..., at]) * self.scale[..., at]


def damped(hessian: Tensor, share: float) -> Tensor:
    """H plus ``share`` of its mean diagonal; inputs that are always 0 get 1 on the diagonal."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    extra = share * mean.expand_as(diagonal) + (diagonal <= 0).to(hessian.dtype) * mean.clamp_min(1e-12)
    return hessian + torch.diag_embed(extra)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse; the damping grows where the matrix is singular."""
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    added = 0.0
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + added * mean * eye)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper
        added = max(10 * added, 1e-6)


def gptq(
    problem: Quadratic, grid: MatrixGrid, *, act_order: bool = True, columns: int = 128, damping: float = 0.01
) -> Tensor:
    """Stored integers [G, O, D] (float32) by one sweep over the columns.

    Args:
        act_order: columns of large inputs first.
        columns: how many are treated between two updates of the rest.
        damping: share of the mean diagonal added to the Hessian.
    """
    hessian = damped(problem.hessian.double(), damping)
    w, scale, zero = problem.target.float().clone(), grid.scale, grid.zero
    order: Tensor | None = None
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        hessian = _permuted(_permuted(hessian, order, 2), order, 1)
        w, scale, zero = (_permuted(t, order, 2) for t in (w, scale, zero))
    factor = _inverse_factor(hessian).float()
    sorted_grid = MatrixGrid(scale, zero, grid.low, grid.high)
    found = torch.empty_like(w)
    size = w.shape[2]
    for start in range(0, size, columns):
        stop = min(start + columns, size)
        errors = torch.empty_like(w[..., start:stop])
        for j in range(start, stop):
            column = w[..., j]
            q = sorted_grid.integers(column, j)
            found[..., j] = q
            error = (column - sorted_grid.real(q, j)) / factor[:, j, j, None]
            w[..., j:stop] -= error[..., None] * factor[:, None, j, j:stop]
            errors[..., j - start] = error
        if stop < size:
            w[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return found if order is None else _permuted(found, order.argsort(dim=1), 2)


def _permuted(t: Tensor, order: Tensor, axis: int) -> Tensor:
    """Each group's own order along one axis."""
    index = order[:, None, :] if axis == 2 else order[:, :, None]
    return t.gather(axis, index.expand_as(t))


def descend(problem: Quadratic, grid: MatrixGrid, q: Tensor, sweeps: int, damping: float = 0.0) -> Tensor:
    """Coordinate descent: each column in turn takes the integers that are best given all others; never worse.

    Args:
        q: integers to start from, [G, O, D].
        sweeps: passes over all columns at most; stops when nothing changes.
    """
    hessian = damped(problem.hessian.double(), damping).float()
    q = q.clone()
    slope = (grid.real(q) - problem.target.float()) @ hessian  # half the gradient
    diagonal = hessian.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    for _ in range(sweeps):
        changed = False
        for j in range(q.shape[2]):
            now = grid.real(q[..., j], j)
            better = grid.integers(now - slope[..., j] / diagonal[:, j, None], j)
            step = grid.real(better, j) - now
            if bool(step.any()):
                changed = True
                slope += step[..., None] * hessian[:, None, j]
                q[..., j] = better
        if not changed:
            break
    return q


def scale_factor(problem: Quadratic, grid: MatrixGrid, q: Tensor) -> Tensor:
    """What to multiply each output channel's scales by for the least error at these integers, [G, O].

    Per channel <w, H w*> / <w, H w> with w the rounded weight; 1 where that is not positive.
    """
    w = grid.real(q)
    along = w @ problem.hessian.float()
    top, bottom = (along * problem.target.float()).sum(-1), (along * w).sum(-1)
    return torch.where((top > 0) & (bottom > 1e-30), top / bottom.clamp_min(1e-30), torch.ones(()))
