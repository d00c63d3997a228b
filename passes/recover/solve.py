"""Ridge least squares on streaming Gram matrices: the weights that best give the wanted outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GRID = (1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges tried by ``ridge="auto"``."""
CAUTIOUS = 1e-2
"""The ridge where there is only one sample, so that none can be left out."""
TINY = 1e-12


class Normal:
    """The normal equations of a stream of rows, per channel group: counts, sums and products in float64.

    Memory: G * D * (D + O) * 8 bytes, whatever the number of rows.
    """

    def __init__(self, groups: int, columns: int, outputs: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64)

        self.rows = 0
        self.x, self.y, self.yy = zeros(columns), zeros(outputs), zeros(outputs)
        self.xx, self.xy = zeros(columns, columns), zeros(columns, outputs)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in rows: x [G, R, D], y [G, R, O]."""
        self.rows += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.yy += y.square().sum(1)
        self.xx += x.transpose(1, 2) @ x
        self.xy += x.transpose(1, 2) @ y

    def __add__(self, other: Normal) -> Normal:
        total = Normal(0, 0, 0)
        for name in ("rows", "x", "y", "yy", "xx", "xy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def moments(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(X^T X, X^T Y, |Y|^2), means per row; of the deviations from the mean if ``centred``."""
        n = max(self.rows, 1)
        xx, xy, yy = self.xx / n, self.xy / n, self.yy / n
        if centred:
            mx, my = self.x / n, self.y / n
            xx = xx - mx[:, :, None] * mx[:, None, :]
            xy = xy - mx[:, :, None] * my[:, None, :]
            yy = yy - my.square()
        return xx, xy, yy.clamp_min(0)


@dataclass
class Solution:
    """What least squares found.

    Attributes:
        matrix: [G, O, D].
        shift: [G, O], what to add to the output; zeros where there is no place for it.
        before, after: error of the old and of the new matrix, relative to the wanted outputs' variance (their mean
            square where there is no place for a shift); before: with the old shift.
        ridge: the ridge used, relative to the mean diagonal of the Gram matrix.
    """

    matrix: Tensor
    shift: Tensor
    before: float
    after: float
    ridge: float


def solve(folds: list[Normal], old: Tensor, ridge: float | str, centred: bool) -> Solution:
    """argmin over W and shift of mean |Y - X W^T - shift|^2 + ridge * d * |W - old|^2, d the mean diagonal of X^T X.

    Shrinking towards the old weights leaves alone what the data says nothing about.

    Args:
        folds: the rows, split in two lots that are independent (``ridge="auto"`` fits on one and judges on the other).
        old: [G, O, D] float64, the weights so far.
        ridge: relative to d, or ``"auto"``: the one of ``GRID`` with the least error on rows left out.
        centred: whether there is a place for the shift.
    """
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    chosen = _left_out(folds, old, centred) if ridge == "auto" else float(ridge)
    xx, xy, yy = total.moments(centred)
    delta = _step(xx, xy - xx @ old.transpose(1, 2), chosen)
    matrix = old + delta.transpose(1, 2)
    n = max(total.rows, 1)
    scale = float(yy.sum()) or 1.0
    shift = torch.zeros_like(total.y)
    drift = (total.y - (old @ total.x[:, :, None])[:, :, 0]) / n
    before = _error(xx, xy, yy, old) + (float(drift.square().sum()) if centred else 0.0)
    if centred:
        shift = (total.y - (matrix @ total.x[:, :, None])[:, :, 0]) / n
    return Solution(matrix, shift, before / scale, _error(xx, xy, yy, matrix) / scale, chosen)


def _step(xx: Tensor, rest: Tensor, ridge: float) -> Tensor:
    """(X^T X + ridge * d * I)^-1 rest, [G, D, O]; the ridge grows where that is singular."""
    eye = torch.eye(xx.shape[-1], dtype=xx.dtype)
    d = xx.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    added = max(ridge, TINY)
    while True:
        factor, failed = torch.linalg.cholesky_ex(xx + added * d * eye)
        if not bool(failed.any()):
            return torch.cholesky_solve(rest, factor)
        added *= 10


def _error(xx: Tensor, xy: Tensor, yy: Tensor, w: Tensor) -> float:
    """Sum over outputs of mean |y - w x|^2."""
    wt = w.transpose(1, 2)
    found = yy.sum() - 2 * (xy * wt).sum() + (wt * (xx @ wt)).sum()
    return max(float(found), 0.0)


def _left_out(folds: list[Normal], old: Tensor, centred: bool) -> float:
    """The ridge whose fit on the first fold does best on the second, outputs counted relative to their variance."""
    losses = torch.zeros(len(GRID), dtype=torch.float64)
    train, fold = folds
    if not fold.rows or not train.rows:
        return CAUTIOUS
    xx, xy, yy = train.moments(centred)
    txx, txy, tyy = fold.moments(centred)
    rest, held = xy - xx @ old.transpose(1, 2), txy - txx @ old.transpose(1, 2)
    weight = 1 / (tyy + yy).clamp_min(1e-30)[:, None, :]
    for k, ridge in enumerate(GRID):
        delta = _step(xx, rest, ridge)
        losses[k] = float((weight * (delta * (txx @ delta - 2 * held))).sum())
    return GRID[int(losses.argmin())]
