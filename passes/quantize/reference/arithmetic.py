"""float32 arithmetic as the kernels do it: one rounding per operation, fused multiply-add, ties to even."""

from __future__ import annotations

from typing import Any

import numpy as np

f32 = np.float32


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """a * b + c of float32 operands, rounded once to float32 (overflow to infinity apart).

    The product is exact in float64; the sum is rounded to odd there (its last bit tells that something was cut off),
    from which the rounding to float32 is the right one (Boldo and Melquiond, "Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd").
    """
    x, y, z = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (a, b, c)))
    product = x * y
    total = np.atleast_1d(product + z)
    back = total - product
    rest = (product - (total - back)) + (z - back)
    bits = total.view(np.int64)
    even = (rest != 0) & (bits & 1 == 0)
    bits += np.where(even, np.where((rest > 0) == (total > 0), 1, -1), 0)
    return total.astype(f32).reshape(product.shape)


def saturate(value: np.ndarray, dtype: np.dtype[Any] | str) -> np.ndarray:
    """Whole numbers into the range of an integer type."""
    info = np.iinfo(dtype)
    return np.clip(value, info.min, info.max).astype(dtype)


def requantize(total: np.ndarray, multiplier: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """clip(rint(f32(total) * multiplier) + zero): from an integer accumulator to the type of ``zero``.

    Args:
        total: exact integers, any dtype that holds them.
        multiplier: float32, broadcasts against ``total``.
        zero: zero point of the result; its dtype is the result's.
    """
    scaled = total.astype(f32) * multiplier.astype(f32)
    return saturate(np.rint(scaled) + int(zero), zero.dtype)


def dequantize(q: np.ndarray, scale: Any, zero: Any) -> np.ndarray:
    """(q - zero) * scale in float32."""
    return (q.astype(np.int32) - np.asarray(zero).astype(np.int32)).astype(f32) * np.asarray(scale, dtype=f32)


def quantize(x: np.ndarray, scale: Any, zero: np.ndarray) -> np.ndarray:
    """clip(rint(x / scale) + zero), the division in float32."""
    return saturate(np.rint(x.astype(f32) / np.asarray(scale, dtype=f32)) + int(zero), zero.dtype)
