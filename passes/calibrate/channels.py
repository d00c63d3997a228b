"""Statistics per index of one axis: moments, counts of zeros, Gram matrices. Memory does not grow with the data."""

from __future__ import annotations

import numpy as np


def _channels(x: np.ndarray, axis: int) -> np.ndarray:
    """x as [channels, everything else] in float64."""
    axis = axis % x.ndim
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64)


class Moments:
    """Per index of one axis: element count, sum and sum of squares, in float64 (rounding apart, any order is equal)."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.count = 0
        self.per_channel = 0
        self.total: np.ndarray | None = None
        self.squares: np.ndarray | None = None

    def update(self, x: np.ndarray) -> None:
        flat = _channels(x, self.axis)
        self._add(flat.sum(1), np.einsum("cn,cn->c", flat, flat), flat.shape[1], x.size)

    def _add(self, total: np.ndarray, squares: np.ndarray, per_channel: int, count: int) -> None:
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        self.per_channel += per_channel
        self.count += count

    def merge(self, other: Moments) -> None:
        if other.total is not None and other.squares is not None:
            self._add(other.total, other.squares, other.per_channel, other.count)

    def mean(self) -> np.ndarray:
        """Mean per channel."""
        assert self.total is not None
        return self.total / self.per_channel

    def norm(self) -> np.ndarray:
        """Euclidean norm of everything seen, per channel."""
        assert self.squares is not None
        return np.sqrt(self.squares)


class ZeroCount:
    """Per index of one axis: how many elements were exactly zero, and of how many. Exact."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.count = 0
        self.per_channel = 0
        self.zeros: np.ndarray | None = None

    def update(self, x: np.ndarray) -> None:
        axis = self.axis % x.ndim
        found = (x == 0).sum(axis=tuple(i for i in range(x.ndim) if i != axis), dtype=np.int64)
        self.zeros = found if self.zeros is None else self.zeros + found
        self.per_channel += x.size // x.shape[axis]
        self.count += x.size

    def merge(self, other: ZeroCount) -> None:
        if other.zeros is not None:
            self.zeros = other.zeros if self.zeros is None else self.zeros + other.zeros
            self.per_channel += other.per_channel
            self.count += other.count

    def share(self) -> np.ndarray:
        """Share of zeros per channel, 0..1."""
        assert self.zeros is not None
        return self.zeros / self.per_channel


class Gram:
    """X^T X over all rows seen, where a row is a vector along ``axis``: [n, n] in float64; memory 8 n^2 bytes."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.count = 0
        self.rows = 0
        self.matrix: np.ndarray | None = None

    def update(self, x: np.ndarray) -> None:
        flat = _channels(x, self.axis)
        gram = flat @ flat.T
        self.matrix = gram if self.matrix is None else self.matrix + gram
        self.rows += flat.shape[1]
        self.count += x.size

    def merge(self, other: Gram) -> None:
        if other.matrix is not None:
            self.matrix = other.matrix.copy() if self.matrix is None else self.matrix + other.matrix
            self.rows += other.rows
            self.count += other.count
