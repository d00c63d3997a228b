"""Learned transforms in torch: orthogonal matrices by the Cayley map, rounding with straight-through gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..quantize.spec import TensorFormat

if TYPE_CHECKING:
    from torch import Tensor


def cayley(free: Tensor) -> Tensor:
    """``(I - A)(I + A)^-1`` with ``A = (free - free^T) / 2``: an orthogonal matrix near I for small ``free`` [n, n]."""
    import torch

    skew = (free - free.T) / 2
    eye = torch.eye(len(free), dtype=free.dtype, device=free.device)
    return torch.linalg.solve(eye + skew, eye - skew)


def fake_quantize(x: Tensor, form: TensorFormat | None, *, per_row: bool = False, clip: Tensor | None = None) -> Tensor:
    """x as its integers stand for it, gradients straight through the rounding (and exact through the range).

    Args:
        form: None leaves x as it is.
        per_row: one range per row (output channels of a weight [out, in], tokens); blocks follow ``form.block``.
        clip: share of the range used, 0..1, per tensor or per row.
    """
    import torch

    if form is None:
        return x
    if form.block and per_row:
        rows, columns = x.shape
        whole = torch.nn.functional.pad(x, (0, -columns % form.block))  # zeros belong to every range anyway
        cut = clip if clip is None or clip.ndim == 0 else clip.repeat_interleave(whole.shape[1] // form.block, 0)
        made = _rounded(whole.reshape(-1, form.block), form, (-1,), cut)
        return made.reshape(rows, -1)[:, :columns]
    return _rounded(x, form, (-1,) if per_row else tuple(range(x.ndim)), clip)


def _rounded(x: Tensor, form: TensorFormat, dims: tuple[int, ...], clip: Tensor | None) -> Tensor:
    import torch

    low_q, high_q = form.limits
    low, high = x.amin(dims, keepdim=True).clamp(max=0.0), x.amax(dims, keepdim=True).clamp(min=0.0)
    if clip is not None:
        low, high = low * clip, high * clip
    if form.is_float:
        scale = torch.maximum(-low, high).clamp(min=1e-12) / high_q
        steps = x / scale
        rounded = steps.detach().clamp(low_q, high_q).to(getattr(torch, form.dtype)).to(steps.dtype)
        return ((rounded - steps).detach() + steps) * scale
    if form.symmetric:
        scale = torch.maximum(-low, high).clamp(min=1e-12) / (high_q - form.centre)
        zero = torch.full_like(scale, float(form.centre))
    else:
        scale = (high - low).clamp(min=1e-12) / (high_q - low_q)
        zero = (low_q - low / scale).detach().round()
    steps = x / scale + zero
    rounded = (steps.round() - steps).detach() + steps
    return (rounded.clamp(low_q, high_q) - zero) * scale


def qsur(rows: np.ndarray) -> float:
    """Quantization space utilization rate of rows [n, d], as its d-th root (a volume ratio per dimension).

    Volume of the data's ellipsoid (from the covariance's eigenvalues) over that of the cube that its largest magnitude
    spans; eigenvalues are floored at 1e-9 of the largest. (OstQuant's measure; higher is better.)
    """
    x = rows.astype(np.float64) - rows.mean(0)
    d = x.shape[1]
    values = np.maximum(np.linalg.eigvalsh(x.T @ x / max(len(x) - 1, 1)), 0)
    values = np.maximum(values, max(values.max(), 1e-30) * 1e-9)
    ball = (d / 2) * math.log(math.pi) - math.lgamma(d / 2 + 1) + (d / 2) * math.log(d)  # radius sqrt(d)
    volume = ball + 0.5 * float(np.log(values).sum())
    return math.exp(volume / d - math.log(2 * max(float(np.abs(x).max()), 1e-30)))
