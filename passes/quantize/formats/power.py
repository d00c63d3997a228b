"""Power exponents: numbers on the grid sign(c) |c|**(1/a), whose products are again powers of integer products.

"NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search". The exponent is searched per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....graph.errors import ConfigError
from .layout import Layout
from .lookup import LookupEncoded, join
from .protocol import blocks_of, checked_importance
from .scales import store

EXPONENTS = np.round(np.arange(0.30, 1.31, 0.05), 2)
"""What a search tries first; it then looks between the neighbours of the best."""


@dataclass(frozen=True)
class PowerExponent:
    """Integer codes c in -(2**(bits-1) - 1) .. 2**(bits-1) - 1; c stands for ``sign(c) |c|**(1/a) * scale``.

    The scale puts the largest magnitude of a block (or row) on the largest code; a number gets the code whose value is
    nearest, which is what rounding in the power domain approximates. With ``a = 1`` this is uniform symmetric
    quantization, bit for bit.

    Attributes:
        bits: 2 to 8.
        block: columns that share a scale; 0: a row.
        exponent: a; None searches the one with the least (weighted) squared error for each tensor.
    """

    bits: int = 4
    block: int = 0
    exponent: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError("power codes have 2 to 8 bits", node="bits", found=self.bits)
        if self.exponent is not None and not 0.05 <= self.exponent <= 4:
            raise ConfigError("the exponent lies within 0.05 .. 4", node="exponent", found=self.exponent)

    @property
    def name(self) -> str:
        return f"power{self.bits}"

    def fit(self, weight: np.ndarray, axis: int = 0, importance: np.ndarray | None = None) -> LookupEncoded:
        layout = Layout(weight.shape, axis)
        matrix = layout.matrix(weight)
        return self.prepared(matrix, importance).fit_matrix(matrix, layout, importance)

    def prepared(self, matrix: np.ndarray, importance: np.ndarray | None = None) -> PowerExponent:
        """With the exponent found."""
        if self.exponent is not None:
            return self
        layout = Layout(matrix.shape)
        cost = checked_importance(importance, matrix.shape[1])

        def error(a: float) -> float:
            encoded = replace(self, exponent=a).fit_matrix(matrix, layout, importance)
            off = encoded.values(encoded.codes, 0) - matrix
            return float((np.square(off, dtype=np.float64) * cost).sum())

        tried = {float(a): error(float(a)) for a in EXPONENTS}
        for width in (0.025, 0.0125):
            best = min(tried, key=lambda a: tried[a])
            for a in (best - width, best + width):
                tried[a] = error(a)
        return replace(self, exponent=min(tried, key=lambda a: tried[a]))

    def fit_matrix(self, matrix: np.ndarray, layout: Layout, importance: np.ndarray | None = None) -> LookupEncoded:
        assert self.exponent is not None
        table = power_table(self.bits, self.exponent)
        peak = np.abs(blocks_of(matrix, self.block)).max(2).astype(np.float64)
        scales = store(peak / float(table[-1]), "float32")
        codes = np.zeros((layout.rows, 0), np.uint8)
        found = LookupEncoded(layout, codes, self.bits, table, scales, None, self.block, first=1)
        return found.with_codes(found.nearest(matrix, 0))

    def join(self, parts: Sequence[LookupEncoded], layout: Layout) -> LookupEncoded:
        return join(parts, layout, self.block)


def power_table(bits: int, exponent: float) -> np.ndarray:
    """float32 [2**bits]: what code k stands for, c = k - 2**(bits-1); k = 0 repeats k = 1 and is not used."""
    c = np.arange(2**bits) - 2.0 ** (bits - 1)
    c[0] = c[1]
    return (np.sign(c) * np.abs(c) ** (1 / exponent)).astype(np.float32)


def product_table(bits: int, exponent: float) -> np.ndarray:
    """float32 [2**bits, 2**bits]: the products of all pairs of codes.

    ``|c1|**p |c2|**p = |c1 c2|**p``: the entry depends on the integer product alone, so that a multiplication of two
    quantized numbers is a lookup by two codes, or by the product of two integers.
    """
    table = power_table(bits, exponent).astype(np.float64)
    found: np.ndarray = np.outer(table, table).astype(np.float32)
    return found
