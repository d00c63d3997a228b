"""What an error of a block's weights costs: alike for all columns, by the power of the inputs, or by the outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....graph.errors import ConstraintError
from .protocol import blocks_of, checked_importance

GAIN = (0.5, 2.0)
"""Least and largest correction of a block's scale."""


@dataclass(frozen=True)
class Cost:
    """An inner product of rows, block by block.

    Attributes:
        block: columns of a block; 0: all of a row.
        diagonal: cost of a squared error per column, float64 [columns]; None: ``grams`` say it.
        grams: Gram matrices of the inputs of every block, float64 [blocks, block, block]: the error of the block's part
            of the output, ``|x (w - q)^T|^2``.
    """

    block: int
    diagonal: np.ndarray | None
    grams: np.ndarray | None = None

    @classmethod
    def of(cls, importance: np.ndarray | None, columns: int, block: int) -> Cost:
        """From one number per column, the Gram matrix of the inputs [columns, columns], or None (all alike)."""
        if importance is None or np.ndim(importance) == 1:
            return cls(block, checked_importance(importance, columns))
        gram = np.asarray(importance, np.float64)
        if gram.shape != (columns, columns):
            raise ConstraintError("the Gram matrix does not fit the weight", expected=columns, found=gram.shape)
        mean = float(np.einsum("ii->i", gram).mean())
        if not np.isfinite(mean) or mean <= 0:
            return cls(block, np.ones(columns))
        width = block or columns
        grams = np.zeros((-(-columns // width), width, width))
        for k, start in enumerate(range(0, columns, width)):
            part = gram[start : start + width, start : start + width] / mean
            grams[k, : len(part), : len(part)] = part + 1e-6 * np.eye(len(part))
        return cls(block, None, grams)

    def inner(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """``<a, b>`` of rows [rows, columns], block by block: float64 [rows, blocks]."""
        if self.diagonal is not None:
            return np.asarray(blocks_of(np.multiply(a, b, dtype=np.float64) * self.diagonal, self.block).sum(2))
        assert self.grams is not None
        first, second = (blocks_of(m.astype(np.float64), self.block).transpose(1, 0, 2) for m in (a, b))
        return np.asarray(((first @ self.grams) * second).sum(2).T)

    def gain(self, made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Factors [rows, blocks] after which what was made has no error along what was wanted.

        ``<made, wanted> = <wanted, wanted>``: rounding to a range that clips makes outputs smaller, coherently over all
        layers; what is left of the error then has nothing in common with the output. Within ``GAIN``.
        """
        whole, shared = self.inner(wanted, wanted), self.inner(made, wanted)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(shared > 0, whole / shared, 1.0)
        return np.clip(np.where(np.isfinite(found), found, 1.0), *GAIN)
