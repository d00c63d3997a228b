"""Quantized activations in torch: the grid as it is, or with a scale that is learned (LSQ), dropped out at random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..numerics import QuantParams
from .grid import Grid, is_integer


class _Learned(torch.autograd.Function):
    """Quantize and dequantize; gradients for the input (where it is not clipped) and for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: float, low: float, high: float) -> Tensor:
        steps = x / scale
        whole = torch.clamp(torch.round(steps), low - zero, high - zero)
        ctx.save_for_backward(steps, whole)
        ctx.ends = (low - zero - 0.5, high - zero + 0.5)
        return whole * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        steps, whole = ctx.saved_tensors
        inside = (steps >= ctx.ends[0]) & (steps <= ctx.ends[1])
        along = torch.where(inside, whole - steps, whole)
        return grads[0] * inside, (grads[0] * along).sum(), None, None, None


class Activation:
    """Quantizes and dequantizes one tensor; callable on tensors of any shape.

    Without gradients it computes what the stored grid computes, ties included. With gradients it lets them through
    where nothing is clipped. While ``scale`` requires a gradient it gets that of Learned Step Size Quantization.

    Attributes:
        params: the grid it began with.
        scale: 0-d float32 parameter for per-tensor integer grids, else None (such grids are never learned).
        drop: share of elements that stay float in an execution with gradients ("QDrop: Randomly Dropping
            Quantization for Extremely Low-bit Post-Training Quantization").
        generator: draws which.
    """

    def __init__(self, params: QuantParams) -> None:
        self.params = params
        self.scale: Tensor | None = None
        if is_integer(params) and params.scale.ndim == 0:
            self.scale = torch.tensor(float(params.scale), dtype=torch.float32)
        self.zero = float(params.zero_point) if params.zero_point.ndim == 0 and is_integer(params) else 0.0
        self.low, self.high = params.limits
        self.drop = 0.0
        self.generator: torch.Generator | None = None

    def __call__(self, x: Tensor) -> Tensor:
        quantized = self._quantized(x)
        if self.drop and torch.is_grad_enabled():
            keep = torch.rand(x.shape, generator=self.generator) < self.drop
            return torch.where(keep, x, quantized)
        return quantized

    def _quantized(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return self._fixed(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad):
            found: Tensor = _Learned.apply(x, self.scale, self.zero, self.low, self.high)
            return found
        scale = self.scale.detach()
        q = torch.clamp(torch.round(x / scale) + self.zero, self.low, self.high)
        return (q - self.zero) * scale

    def _fixed(self, x: Tensor) -> Tensor:
        """Grids per axis or of floating types: as stored, gradients straight through."""
        with torch.no_grad():
            if is_integer(self.params):
                grid = Grid.of(self.params, tuple(x.shape))
                found = grid.real(grid.integers(x))
            else:
                found = torch.from_numpy(np.array(self.params.apply(x.numpy()), np.float32))
        return x + (found - x).detach() if x.requires_grad else found

    def learned(self) -> QuantParams:
        """The grid with the scale as it is now."""
        if self.scale is None:
            return self.params
        scale = self.scale.detach().numpy()
        return replace(self.params, scale=np.asarray(scale, dtype=self.params.scale.dtype))
