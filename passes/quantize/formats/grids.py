"""Formats with a fixed table: integers in blocks, NF4, MXFP4 and NVFP4."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ....graph.errors import ConfigError
from .cost import Cost
from .layout import Layout
from .lookup import LookupEncoded, join
from .protocol import blocks_of
from .scales import ScaleKind, store

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""NormalFloat 4: quantiles of the normal distribution with an exact zero, scaled to [-1, 1] ("QLoRA: Efficient
Finetuning of Quantized LLMs")."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""float4 e2m1: sign bit, two exponent bits, one mantissa bit (code 8, minus zero, is not used: it reads as 0)."""

CLIPS = np.linspace(1.0, 0.5, 21)
"""Shares of a block's range that a search of the scale tries."""


@dataclass(frozen=True)
class TableFormat(abc.ABC):
    """Base of formats whose scale per block follows from the block's extremes.

    Attributes:
        block: columns that share a scale; 0: a row.
        scale: stored type of the scales.
        search: try smaller ranges too and keep, per block, the one with the least (weighted) squared error.
        tensor_scale: factor of all scales, for scales in e4m3; None: from the weight.
        gain: after the codes are chosen, scale every block so that its error has nothing in common with the block
            itself (the estimate keeps its gain). A range that clips, least squares above all, makes weights and outputs
            smaller (at 2 bits by an eighth), and that error, alike in all layers, costs more than rounding noise.
    """

    takes_gram: ClassVar[bool] = True
    """Whether ``importance`` may be the Gram matrix of the inputs, which weighs errors by the block's outputs."""

    block: int = 32
    scale: ScaleKind = "float32"
    search: bool = False
    tensor_scale: float | None = None
    gain: bool = False

    def fit(self, weight: np.ndarray, axis: int = 0, importance: np.ndarray | None = None) -> LookupEncoded:
        layout = Layout(weight.shape, axis)
        matrix = layout.matrix(weight)
        encoded: LookupEncoded = self.prepared(matrix, importance).fit_matrix(matrix, layout, importance)
        return encoded

    def prepared(self, matrix: np.ndarray, importance: np.ndarray | None = None) -> TableFormat:
        return self

    def join(self, parts: Sequence[LookupEncoded], layout: Layout) -> LookupEncoded:
        return join(parts, layout, self.block)

    def fit_matrix(self, matrix: np.ndarray, layout: Layout, importance: np.ndarray | None = None) -> LookupEncoded:
        """Scales, then codes."""
        low, high = self._extremes(matrix)
        if not self.search and not self.gain:
            return self._candidate(matrix, layout, low, high)
        cost = Cost.of(importance, matrix.shape[1], self.block)
        best = self._candidate(matrix, layout, low, high, cost)
        if not self.search:
            return best
        share, least = np.ones_like(low), self._errors(best, matrix, cost)
        for clip in CLIPS[1:]:
            tried = self._candidate(matrix, layout, low * np.float32(clip), high * np.float32(clip), cost)
            error = self._errors(tried, matrix, cost)
            share, least = np.where(error < least, np.float32(clip), share), np.minimum(error, least)
        return self._candidate(matrix, layout, low * share, high * share, cost)

    def _candidate(
        self, matrix: np.ndarray, layout: Layout, low: np.ndarray, high: np.ndarray, cost: Cost | None = None
    ) -> LookupEncoded:
        found = self._with_range(matrix, layout, low, high)
        found = found.with_codes(found.nearest(matrix, 0))
        if not self.gain or cost is None or found.scales is None:
            return found
        factors = cost.gain(found.values(found.codes, 0), matrix)
        scales = store(found.scales.numbers() * factors, found.scales.kind)
        return replace(found, scales=scales)

    def _extremes(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = blocks_of(matrix, self.block)
        return np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)

    def _errors(self, encoded: LookupEncoded, matrix: np.ndarray, cost: Cost) -> np.ndarray:
        off = encoded.values(encoded.codes, 0) - matrix
        return cost.inner(off, off)

    @abc.abstractmethod
    def _with_range(self, matrix: np.ndarray, layout: Layout, low: np.ndarray, high: np.ndarray) -> LookupEncoded:
        """Scales for blocks with values in [low, high]; the codes are yet to be found."""

    def _tensor(self) -> np.float32 | None:
        return None if self.tensor_scale is None else np.float32(self.tensor_scale)


@dataclass(frozen=True)
class Integers(TableFormat):
    """Integers of 2 to 8 bits per block, as DequantizeLinear and MatMulNBits read them.

    Symmetric: codes -2**(bits-1) .. 2**(bits-1) - 1 and a scale that puts the largest magnitude on the largest code.
    Otherwise: codes 0 .. 2**bits - 1 and a zero point that represents zero exactly.
    """

    bits: int = 4
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError("integer blocks have 2 to 8 bits", node="bits", found=self.bits)

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def _with_range(self, matrix: np.ndarray, layout: Layout, low: np.ndarray, high: np.ndarray) -> LookupEncoded:
        count, half = 2**self.bits, 2 ** (self.bits - 1)
        codes = np.zeros((layout.rows, 0), np.uint8)
        if self.symmetric:
            table = np.arange(count, dtype=np.float32) - half
            scales = store(np.maximum(-low, high).astype(np.float64) / (half - 1), self.scale, self._tensor())
            return LookupEncoded(layout, codes, self.bits, table, scales, None, self.block, f"int{self.bits}")
        table = np.arange(count, dtype=np.float32)
        scales = store((high.astype(np.float64) - low) / (count - 1), self.scale, self._tensor())
        zeros = np.clip(np.rint(-low / scales.numbers().astype(np.float64)), 0, count - 1).astype(np.uint8)
        return LookupEncoded(layout, codes, self.bits, table, scales, zeros, self.block, f"uint{self.bits}")


@dataclass(frozen=True)
class NormalFloat(TableFormat):
    """NF4 in blocks, scaled by the largest magnitude ("QLoRA: Efficient Finetuning of Quantized LLMs")."""

    block: int = 64
    bits: ClassVar[int] = 4

    @property
    def name(self) -> str:
        return "nf4"

    def _with_range(self, matrix: np.ndarray, layout: Layout, low: np.ndarray, high: np.ndarray) -> LookupEncoded:
        codes = np.zeros((layout.rows, 0), np.uint8)
        scales = store(np.maximum(-low, high), self.scale, self._tensor())
        return LookupEncoded(layout, codes, 4, NF4, scales, None, self.block, "nf4")


@dataclass(frozen=True)
class Float4(TableFormat):
    """float4 e2m1 in blocks: MXFP4 (block 32, scales powers of two) or NVFP4 (block 16, scales e4m3, tensor scale).

    MXFP4 takes the scale 2**(floor(log2 peak) - 2) of the OCP Microscaling Formats specification, under which values
    above 6 steps saturate; ``search`` also tries the power above.
    """

    kind: str = "mxfp4"
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        wanted = {"mxfp4": ("e8m0", 32), "nvfp4": ("e4m3", 16)}.get(self.kind)
        if wanted is None:
            raise ConfigError("unknown float4 format", node="kind", expected="mxfp4 or nvfp4", found=self.kind)
        if self.gain:
            raise ConfigError("scales of float4 are too coarse to keep a gain", node="gain", expected="int or nf4")
        object.__setattr__(self, "scale", wanted[0])
        object.__setattr__(self, "block", wanted[1])

    @property
    def name(self) -> str:
        return self.kind

    def prepared(self, matrix: np.ndarray, importance: np.ndarray | None = None) -> Float4:
        if self.kind == "mxfp4" or self.tensor_scale is not None:
            return self
        peak = float(np.abs(matrix).max(initial=0))
        factor = float(np.float32(peak / (6 * 448.0))) if peak > 0 else 1.0
        return Float4(search=self.search, kind=self.kind, tensor_scale=factor or 1.0)

    def fit_matrix(self, matrix: np.ndarray, layout: Layout, importance: np.ndarray | None = None) -> LookupEncoded:
        found = super().fit_matrix(matrix, layout, importance)
        if self.kind == "nvfp4" or not self.search or found.scales is None:
            return found
        cost = Cost.of(importance, matrix.shape[1], self.block)
        low, high = self._extremes(matrix)
        above = self._with_range(matrix, layout, low * 2, high * 2)
        above = above.with_codes(above.nearest(matrix, 0))
        assert above.scales is not None
        worse = self._errors(found, matrix, cost) <= self._errors(above, matrix, cost)
        stored = np.where(worse, found.scales.stored, above.scales.stored)
        found = LookupEncoded(
            layout, found.codes, 4, E2M1, type(found.scales)("e8m0", stored), None, self.block, "e2m1"
        )
        return found.with_codes(found.nearest(matrix, 0))

    def _with_range(self, matrix: np.ndarray, layout: Layout, low: np.ndarray, high: np.ndarray) -> LookupEncoded:
        peak = np.maximum(-low, high)
        codes = np.zeros((layout.rows, 0), np.uint8)
        if self.kind == "mxfp4":
            exponent = np.frexp(peak)[1] - 1
            scales = store(np.where(peak > 0, np.exp2(exponent - 2.0), 0), "e8m0")
        else:
            scales = store(peak / np.float32(6), "e4m3", self._tensor())
        return LookupEncoded(layout, codes, 4, E2M1, scales, None, self.block, "e2m1")
