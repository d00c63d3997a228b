"""Integer arithmetic of quantization, bit for bit as ONNX defines it: scales, zero points, rounding, errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .spec import TensorFormat

LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}


@dataclass(frozen=True)
class QuantParams:
    """Scale (float32) and zero point (of the stored dtype): 0-d per tensor, 1-d along ``axis`` per channel."""

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None

    @property
    def dtype(self) -> str:
        return str(self.zero_point.dtype)

    def _spread(self, a: np.ndarray, rank: int) -> np.ndarray:
        return a if self.axis is None else a.reshape([-1 if i == self.axis else 1 for i in range(rank)])

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """clip(rint(x / scale) + zero_point): a float32 division, ties to even, as in QuantizeLinear."""
        low, high = LIMITS[self.dtype]
        ratio = x.astype(np.float32) / self._spread(self.scale, x.ndim)
        shifted = np.rint(ratio).astype(np.float64) + self._spread(self.zero_point, x.ndim).astype(np.float64)
        return np.clip(shifted, low, high).astype(self.dtype)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """(q - zero_point) * scale in float32."""
        centred = q.astype(np.int32) - self._spread(self.zero_point, q.ndim).astype(np.int32)
        return centred.astype(np.float32) * self._spread(self.scale, q.ndim)


def range_params(low: float, high: float, form: TensorFormat) -> QuantParams:
    """Parameters of one tensor with values in [low, high]; zero is always exactly representable."""
    qmin, qmax = LIMITS[form.dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    if form.symmetric:
        centre = 0 if qmin < 0 else 128
        scale = np.float32(max(-low, high) / (qmax - centre))
        zero = centre
        scale = scale if scale > 0 else np.float32(1)
    else:
        scale = np.float32((high - low) / (qmax - qmin))
        scale = scale if scale > 0 else np.float32(1)
        zero = int(np.clip(np.rint(qmin - low / float(scale)), qmin, qmax))
    return QuantParams(np.array(scale, np.float32), np.array(zero, form.dtype))


def weight_params(weight: np.ndarray, axis: int, form: TensorFormat, least: np.ndarray | None = None) -> QuantParams:
    """Symmetric parameters of a weight, per index of ``axis`` or for the whole tensor.

    Args:
        weight: float array.
        axis: output-channel axis.
        form: its format; symmetric, since no integer kernel takes another.
        least: lower bound on the scale per channel (keeps an int32 bias in range where the weights are tiny).
    """
    qmin, qmax = LIMITS[form.dtype]
    centre = 0 if qmin < 0 else 128
    if form.per_channel:
        peak = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(1)
    else:
        peak = np.abs(weight).max()
    scale = (peak.astype(np.float64) / (qmax - centre)).astype(np.float32)
    if least is not None:
        scale = np.maximum(scale, least if form.per_channel else least.max()).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    return QuantParams(scale, np.full(scale.shape, centre, form.dtype), axis if form.per_channel else None)


def bias_params(x: QuantParams, weight: QuantParams, channels: int) -> QuantParams:
    """int32 bias on the accumulator's scale, f32(scale of x * scale of the weight), zero point 0."""
    scale = (x.scale.astype(np.float32) * weight.scale.astype(np.float32)).astype(np.float32)
    scale = np.broadcast_to(scale, (channels,)) if weight.axis is not None else scale
    return QuantParams(np.array(scale), np.zeros(scale.shape, np.int32), 0 if weight.axis is not None else None)


def least_weight_scale(bias: np.ndarray, x: QuantParams) -> np.ndarray:
    """Smallest weight scale per channel for which the bias fits into half the int32 range."""
    return (np.abs(bias).astype(np.float64) / float(x.scale) / 2**30).astype(np.float32)


def sqnr_db(signal: np.ndarray, approximation: np.ndarray) -> float:
    """10 log10(sum s^2 / sum (s - a)^2) in decibel; inf when equal."""
    s = signal.astype(np.float64)
    noise = float(np.square(s - approximation.astype(np.float64)).sum())
    power = float(np.square(s).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else -math.inf
