"""A weight as the matrix [output channels, everything an output reads], along whose rows blocks of a format lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....graph.errors import ConstraintError


@dataclass(frozen=True)
class Layout:
    """Where rows and columns come from: ``axis`` of ``shape`` makes the rows, the other axes in order the columns.

    Raises:
        ConstraintError: the weight has no such axis, or is a scalar.
    """

    shape: tuple[int, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        if not self.shape or not -len(self.shape) <= self.axis < len(self.shape):
            raise ConstraintError(
                "a weight has no such axis", value=self.shape, expected="an axis of it", found=self.axis
            )
        object.__setattr__(self, "axis", self.axis % len(self.shape))

    @property
    def rows(self) -> int:
        return self.shape[self.axis]

    @property
    def columns(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) // max(self.rows, 1)

    @property
    def moved(self) -> tuple[int, ...]:
        """The shape with the row axis first."""
        return (self.rows, *(n for i, n in enumerate(self.shape) if i != self.axis))

    @property
    def permutation(self) -> tuple[int, ...]:
        """Axes of :attr:`moved` in the order that gives ``shape`` back."""
        rest = iter(range(1, len(self.shape)))
        return tuple(0 if i == self.axis else next(rest) for i in range(len(self.shape)))

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The weight as float32 [rows, columns]; a view where its order allows one."""
        moved = np.moveaxis(weight, self.axis, 0)
        return np.ascontiguousarray(moved, dtype=np.float32).reshape(self.rows, self.columns)

    def tensor(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`matrix`."""
        return np.ascontiguousarray(np.moveaxis(matrix.reshape(self.moved), 0, self.axis))
