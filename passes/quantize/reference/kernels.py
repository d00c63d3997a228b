"""ONNX Runtime's integer kernels in numpy, bit for bit: products, sums, concatenation, pools, tables.

Each takes integer arrays with their scale (float32) and zero point (of the array's dtype; 0-d) and returns integers,
or float32 where its name says so. Accumulators are exact: sums of integers held in floats wide enough, so that BLAS
adds them up. Formulas were taken from the results of ONNX Runtime 1.31.1's CPU provider, ties included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .arithmetic import dequantize, f32, fma, requantize, saturate


@dataclass(frozen=True)
class Quantized:
    """An integer tensor and its grid. ``scale`` and ``zero`` are 0-d, or 1-d per output channel (weights)."""

    data: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def centred(self, axis: int | None = None) -> np.ndarray:
        """data - zero as int32; a 1-d zero point lies along ``axis``."""
        zero = self.zero.astype(np.int32)
        if zero.ndim and axis is not None:
            zero = zero.reshape([-1 if i == axis else 1 for i in range(self.data.ndim)])
        return self.data.astype(np.int32) - zero


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of a result."""

    scale: np.ndarray
    zero: np.ndarray


def _exact(terms: int) -> type:
    """A float type in which a sum of that many products of centred 8-bit numbers is exact."""
    return np.float32 if terms * 255 * 255 < 2**24 else np.float64


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix product of two arrays of small integers, exact, as int64."""
    kind = _exact(a.shape[-1])
    return np.asarray(np.matmul(a.astype(kind), b.astype(kind))).astype(np.int64)


def convolution(
    x: np.ndarray,
    weight: np.ndarray,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> np.ndarray:
    """The exact convolution of centred integers: x [N, C, ...], weight [O, C / groups, ...]; int64 [N, O, ...]."""
    spatial = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *padding])
    kernel = weight.shape[2:]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    axes = tuple(range(2, 2 + spatial))
    windows = sliding_window_view(x, reach, axis=axes)
    steps = tuple(slice(None, None, s) for s in stride)
    inner = tuple(slice(None, None, d) for d in dilation)
    windows = windows[(slice(None), slice(None), *steps, *inner)]  # [N, C, out..., kernel...]
    count, channels = windows.shape[:2]
    out = windows.shape[2 : 2 + spatial]
    per = channels // groups
    patches = windows.reshape(count, groups, per, *out, *kernel)
    order = (1, 0, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
    rows = patches.transpose(order).reshape(groups, count * int(np.prod(out)), per * int(np.prod(kernel)))
    columns = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(0, 2, 1)
    total = product(rows, columns).reshape(groups, count, *out, -1)
    return np.moveaxis(np.moveaxis(total, 0, -2).reshape(count, *out, -1), -1, 1)


def qlinear_conv(
    x: Quantized,
    w: Quantized,
    bias: np.ndarray | None,
    y: Grid,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> np.ndarray:
    """QLinearConv: clip(rint(f32(acc + bias) * m) + zero), m = f32(f32(x.scale * w.scale) / y.scale)."""
    total = convolution(x.centred(), w.centred(0), stride, padding, dilation, groups)
    along = (1, -1, *([1] * (x.data.ndim - 2)))
    if bias is not None:
        total = total + bias.astype(np.int64).reshape(along)
    m = _multiplier(x, w, y)
    return requantize(total, m.reshape(along) if m.ndim else m, y.zero)


def _multiplier(x: Quantized, w: Quantized, y: Grid) -> np.ndarray:
    return np.asarray(np.asarray(x.scale * w.scale, dtype=f32) / y.scale, dtype=f32)


def _accumulated(x: Quantized, w: Quantized, bias: np.ndarray | None) -> np.ndarray:
    """x [..., K] times w [K, N], plus an int32 bias [N]."""
    total = product(x.centred(), w.centred(w.data.ndim - 1))
    return total if bias is None else total + bias.astype(np.int64)


def qlinear_matmul(x: Quantized, w: Quantized, y: Grid, bias: np.ndarray | None = None) -> np.ndarray:
    """QLinearMatMul and QGemm with a quantized result, as in :func:`qlinear_conv`."""
    return requantize(_accumulated(x, w, bias), _multiplier(x, w, y), y.zero)


def qgemm_float(x: Quantized, w: Quantized, bias: np.ndarray | None = None) -> np.ndarray:
    """QGemm with a float result, and MatMulIntegerToFloat: f32(acc + bias) * f32(x.scale * w.scale)."""
    return np.asarray(_accumulated(x, w, bias).astype(f32) * np.asarray(x.scale * w.scale, dtype=f32))


def qlinear_add(a: Quantized, b: Quantized, y: Grid) -> np.ndarray:
    """QLinearAdd: rint(fma(ra, a, fma(rb, b, zy - fma(ra, za, rb * zb)))), ra = f32(a.scale / y.scale).

    Where the first operand alone is repeated along the innermost axis, the runtime swaps the two.
    """
    if _repeated_first(a.data.shape, b.data.shape):
        a, b = b, a
    ra, rb = (np.asarray(q.scale / y.scale, dtype=f32) for q in (a, b))
    za, zb = f32(int(a.zero)), f32(int(b.zero))
    fixed = np.asarray(f32(int(y.zero)) - fma(ra, za, rb * zb), dtype=f32)
    found = fma(ra, a.data.astype(f32), fma(rb, b.data.astype(f32), fixed))
    return saturate(np.rint(found), y.zero.dtype)


def _repeated_first(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether broadcasting repeats an element of ``a`` along the last axis that is longer than 1."""
    rank = max(len(a), len(b))
    sizes = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return next((one == 1 for one, other in reversed(list(sizes)) if max(one, other) > 1), False)


def qlinear_mul(a: Quantized, b: Quantized, y: Grid) -> np.ndarray:
    """QLinearMul: rint(f32(f32((a - za) * (b - zb)) * m) + zy), m = f32(f32(a.scale * b.scale) / y.scale)."""
    m = np.asarray(np.asarray(a.scale * b.scale, dtype=f32) / y.scale, dtype=f32)
    exact = (a.centred() * b.centred()).astype(f32)
    return saturate(np.rint(exact * m + f32(int(y.zero))), y.zero.dtype)


def qlinear_concat(parts: Sequence[Quantized], y: Grid, axis: int) -> np.ndarray:
    """QLinearConcat: parts on the result's grid are copied, others go through a table."""
    same = [q.scale == y.scale and int(q.zero) == int(y.zero) and q.data.dtype == y.zero.dtype for q in parts]
    return np.concatenate(
        [q.data if s else table(q, y, lambda x: x)[0] for q, s in zip(parts, same, strict=True)], axis=axis
    )


def table(x: Quantized, y: Grid, function: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A function of one number by a table of all 256: (result, table). QLinearSigmoid, QLinearLeakyRelu.

    Each entry is clip(rint(function(dequantized) / y.scale) + zero) in float32.
    """
    info = np.iinfo(x.data.dtype)
    keys = np.arange(info.min, info.max + 1, dtype=x.data.dtype)
    values = function(dequantize(keys, x.scale, x.zero)).astype(f32)
    entries = saturate(np.rint(values / y.scale) + int(y.zero), y.zero.dtype)
    return entries[x.data.astype(np.int64) - info.min], entries


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) rounded once to float32; the runtime's approximation is within 2e-7 of it."""
    return np.asarray(1 / (1 + np.exp(-x.astype(np.float64)))).astype(f32)


def hard_sigmoid_terms(x: Quantized, alpha: float, beta: float) -> tuple[Quantized, Quantized]:
    """The two operands whose sum, saturated at 0 and 1, is clip(alpha * x + beta, 0, 1): x on a scale of its own, beta.

    A hard sigmoid has no integer kernel; an addition has one, whose result saturates where the result's grid ends.
    """
    most = int(np.iinfo(x.data.dtype).max)
    scaled = Quantized(x.data, np.asarray(f32(alpha * float(x.scale))), x.zero)
    kind = x.data.dtype
    return scaled, Quantized(np.array([most], kind), np.asarray(f32(beta / most)), np.zeros((), kind))


def ends_at_0_and_1(y: Grid) -> bool:
    """Whether a grid's smallest number is 0 and its largest at most 1 (to half a step)."""
    info = np.iinfo(y.zero.dtype)
    return int(y.zero) == info.min and (info.max - info.min - 0.5) * float(y.scale) <= 1


def leaky_relu(x: np.ndarray, slope: float) -> np.ndarray:
    """x, or slope * x where x is negative, in float32."""
    return np.where(x >= 0, x, f32(slope) * x)


def qlinear_global_average_pool(x: Quantized, y: Grid) -> np.ndarray:
    """clip(rint(f32(sum of (x - zero)) * f32(x.scale / f32(y.scale * count))) + zero) over the spatial axes."""
    axes = tuple(range(2, x.data.ndim))
    count = f32(int(np.prod([x.data.shape[i] for i in axes])))
    total = x.centred().sum(axes, keepdims=True, dtype=np.int64)
    return requantize(total, np.asarray(x.scale / f32(y.scale * count), dtype=f32), y.zero)


def qlinear_average_pool(
    x: Quantized,
    y: Grid,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    count_include_pad: bool,
) -> np.ndarray:
    """rint(f32(mean / y.scale) + zero); the mean is summed in float32, row by row of the window."""
    values = dequantize(x.data, x.scale, x.zero)
    pads = [(0, 0), (0, 0), *padding]
    axes = tuple(range(2, x.data.ndim))
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    windows = sliding_window_view(np.pad(values, pads), kernel, axis=axes)[steps]
    inside = sliding_window_view(np.pad(np.ones(values.shape[2:], f32), pads[2:]), kernel)[steps[2:]]
    total: Any = np.zeros(windows.shape[: x.data.ndim], f32)
    for place in np.ndindex(*kernel):
        total = total + windows[(..., *place)]
    count: Any = f32(int(np.prod(kernel)))
    if not count_include_pad:
        count = inside.sum(tuple(range(len(axes), 2 * len(axes)))).astype(f32)
    scaled = (total / count) / y.scale
    return saturate(np.rint(scaled + f32(int(y.zero))), y.zero.dtype)
