"""Scales of blocks and how they are stored: float32, float16, powers of two, float8 e4m3 under a tensor scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np

ScaleKind: TypeAlias = Literal["float32", "float16", "e8m0", "e4m3"]

BYTES: dict[str, int] = {"float32": 4, "float16": 2, "e8m0": 1, "e4m3": 1}
E4M3_MAX = 448.0


@cache
def power_table() -> np.ndarray:
    """float32 [256]: 2**(code - 127), what an e8m0 byte stands for (255, NaN there, is not used: it holds 0 here)."""
    found = np.exp2(np.arange(256, dtype=np.float64) - 127)
    found[255] = 0
    return found.astype(np.float32)


@cache
def e4m3_table() -> np.ndarray:
    """float32 [256]: what each float8 e4m3fn byte stands for (the two NaN hold 0)."""
    found = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.nan_to_num(found, nan=0.0)


@dataclass(frozen=True)
class Scales:
    """Positive scales [rows, blocks].

    Attributes:
        kind: stored type.
        stored: float32 or float16 numbers, or the bytes of e8m0 and e4m3.
        tensor: factor of all of them (e4m3), else 1.
    """

    kind: ScaleKind
    stored: np.ndarray
    tensor: np.float32 = np.float32(1)

    def numbers(self) -> np.ndarray:
        """float32 [rows, blocks], as a graph computes them from what is stored."""
        if self.kind == "e8m0":
            return power_table()[self.stored]
        if self.kind == "e4m3":
            return e4m3_table()[self.stored] * self.tensor
        return self.stored.astype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.stored.size * BYTES[self.kind] + (4 if self.kind == "e4m3" else 0)

    def columns(self, start: int, stop: int) -> Scales:
        return Scales(self.kind, self.stored[:, start:stop], self.tensor)


def store(scale: np.ndarray, kind: ScaleKind, tensor: np.float32 | None = None) -> Scales:
    """Scales rounded to their stored type; zeros (blocks of zeros) become the smallest power or 1.

    e8m0 rounds up to a power of two, so that nothing clips; float16 and e4m3 round to the nearest, and what underflows
    becomes the smallest positive number.

    Args:
        tensor: for e4m3: the factor of all scales; by default what puts the largest at the largest e4m3 number.
    """
    scale = np.asarray(scale, np.float32)
    if kind == "float32":
        return Scales(kind, np.where(scale > 0, scale, np.float32(1)).astype(np.float32))
    if kind == "float16":
        half = np.clip(scale, 0, 65504).astype(np.float16)
        return Scales(kind, np.where(scale > 0, np.maximum(half, np.float16(6e-8)), np.float16(1)))
    if kind == "e8m0":
        mantissa, exponent = np.frexp(scale)
        exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
        return Scales(kind, np.where(scale > 0, np.clip(exponent + 127, 0, 254), 127).astype(np.uint8))
    if tensor is None:
        peak = float(scale.max(initial=0))
        tensor = np.float32(peak / E4M3_MAX) if peak > 0 else np.float32(1)
    wanted = np.clip(scale / tensor, 2.0**-9, E4M3_MAX)
    return Scales(kind, wanted.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), np.float32(tensor))
