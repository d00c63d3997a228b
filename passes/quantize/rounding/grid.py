"""The grid of one tensor in torch: scale and zero point spread over it, rounding that lets gradients through."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..numerics import QuantParams


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest, ties to even, with the gradient of the identity (straight-through estimator)."""
    return x + (torch.round(x) - x).detach()


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp with the gradient of the identity."""
    return x + (torch.clamp(x, low, high) - x).detach()


@dataclass
class Grid:
    """Integers times scale, for one tensor shape.

    Attributes:
        params: where it comes from.
        scale, zero: float32 tensors that broadcast against the tensor.
        low, high: stored integers used.
    """

    params: QuantParams
    shape: tuple[int, ...]
    scale: Tensor
    zero: Tensor
    low: float
    high: float

    @staticmethod
    def of(params: QuantParams, shape: tuple[int, ...]) -> Grid:
        """The grid of a tensor of this shape. The params' dtype must be an integer one (see :func:`is_integer`)."""
        scale = torch.from_numpy(np.array(params.spread(params.scale.astype(np.float32), shape)))
        zero = torch.from_numpy(np.array(params.spread(params.zero_point.astype(np.float32), shape)))
        low, high = params.limits
        return Grid(params, shape, scale, zero, float(low), float(high))

    def integers(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Nearest stored integers of real numbers, as float32."""
        return torch.clamp(torch.round(x / (self.scale if scale is None else scale)) + self.zero, self.low, self.high)

    def real(self, q: Tensor, scale: Tensor | None = None) -> Tensor:
        """What stored integers stand for."""
        return (q - self.zero) * (self.scale if scale is None else scale)

    def compress(self, scale: Tensor) -> np.ndarray:
        """A scale of the spread form back in the params' shape (every entry of a block holds the same number)."""
        data = scale.detach().numpy()
        p = self.params
        if p.axis is None or p.scale.ndim == 0:
            return np.asarray(data.reshape(()), np.float32)
        axis = p.axis % len(self.shape)
        if p.block:
            at = np.arange(p.scale.shape[axis]) * p.block
            return np.ascontiguousarray(np.take(data, at, axis=axis)).astype(np.float32)
        return np.ascontiguousarray(data.reshape(-1)).astype(np.float32)

    def rescaled(self, scale: Tensor) -> QuantParams:
        """The params with another scale (spread form), in the scale's stored dtype."""
        new = self.compress(scale)
        return replace(self.params, scale=new.astype(self.params.scale.dtype))

    def reduce(self, x: Tensor) -> Tensor:
        """Sum of a full-size tensor over all elements that share a scale, in the spread form."""
        p = self.params
        if p.axis is None or p.scale.ndim == 0:
            return x.sum().reshape(())
        axis = p.axis % len(self.shape)
        if not p.block:
            return x.sum([i for i in range(x.dim()) if i != axis], keepdim=True)
        size, count = self.shape[axis], p.scale.shape[axis]
        moved = torch.nn.functional.pad(x.movedim(axis, -1), (0, count * p.block - size))
        sums = moved.unflatten(-1, (count, p.block)).sum(-1).repeat_interleave(p.block, -1)[..., :size]
        return sums.movedim(-1, axis)

    def stored(self, q: Tensor) -> np.ndarray:
        """Integers as numpy, in the stored dtype."""
        data = q.detach().numpy()
        kind = self.params.zero_point.dtype
        if str(kind) in ("int4", "int2", "uint4", "uint2"):
            return data.astype(np.int8 if str(kind).startswith("int") else np.uint8).astype(kind)
        return data.astype(kind)


def is_integer(params: QuantParams) -> bool:
    """Whether the stored values are integers, evenly spaced; floating formats are not."""
    return "float" not in params.dtype
