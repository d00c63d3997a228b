"""What every format of weights offers: fit, decode, nearest, bytes; and how it is written into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np

from .layout import Layout

if TYPE_CHECKING:
    from ....graph.ir import Value
    from .emit import Emitter


@runtime_checkable
class Encoded(Protocol):
    """A weight in a format: codes and what they stand for. Immutable.

    Attributes:
        layout: how the weight is seen as [rows, columns].
        codes: one code per column, or per group of ``step`` columns; unsigned [rows, columns / step].
        step: columns that one code stands for.
    """

    @property
    def layout(self) -> Layout: ...

    @property
    def codes(self) -> np.ndarray: ...

    @property
    def step(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes as written: packed codes, scales, zero points and tables of its own (shared tables are not counted)."""
        ...

    def decode(self) -> np.ndarray:
        """The numbers, float32, in the weight's shape; a graph that holds the format computes exactly these."""
        ...

    def nearest(self, values: np.ndarray, start: int) -> np.ndarray:
        """Codes [rows, n / step] of the representable numbers nearest to ``values`` [rows, n].

        Args:
            start: the first of these columns (their scales are those of the block it lies in).
        """
        ...

    def values(self, codes: np.ndarray, start: int) -> np.ndarray:
        """What codes at columns from ``start`` stand for, float32 [rows, n]."""
        ...

    def with_codes(self, codes: np.ndarray) -> Self:
        """The same scales and tables under other codes."""
        ...

    def write(self, emitter: Emitter, name: str) -> Value:
        """Put it into a graph and return the value (of the weight's shape, float32) that it is dequantized to."""
        ...


class Format(Protocol):
    """A way to store weights.

    Attributes:
        block: columns that share scales; 0: a whole row does.
    """

    block: int

    @property
    def name(self) -> str: ...

    def fit(self, weight: np.ndarray, axis: int = 0, importance: np.ndarray | None = None) -> Encoded:
        """Choose scales, tables and codes for a weight, each number to the nearest representable one.

        Args:
            weight: float array of any rank.
            axis: output-channel axis; blocks lie along the other axes, in order.
            importance: weight of the squared error per column, [columns]; None: all alike.
        """
        ...

    def prepared(self, matrix: np.ndarray, importance: np.ndarray | None = None) -> Any:
        """The format with what it learns from the whole tensor fixed, so that parts can be fitted one by one."""
        ...

    def join(self, parts: Sequence[Any], layout: Layout) -> Any:
        """Parts of consecutive columns, encoded by one prepared format, as one."""
        ...


def spread(blocks: np.ndarray, block: int, start: int, count: int) -> np.ndarray:
    """Per-block numbers [rows, blocks] at ``count`` columns from ``start``: [rows, count], or [rows, 1] for one."""
    if not block or blocks.shape[1] == 1:
        return blocks[:, :1]
    return blocks[:, np.arange(start, start + count) // block]


def blocks_of(matrix: np.ndarray, block: int, fill: float = 0.0) -> np.ndarray:
    """[rows, columns] as [rows, blocks, block]; the last block is filled up."""
    rows, columns = matrix.shape
    block = block or columns
    count = -(-columns // block)
    if count * block != columns:
        matrix = np.pad(matrix, ((0, 0), (0, count * block - columns)), constant_values=fill)
    return matrix.reshape(rows, count, block)


def checked_importance(importance: np.ndarray | None, columns: int) -> np.ndarray:
    """float64 [columns], positive; ones where none are given or all are zero."""
    if importance is None:
        return np.ones(columns)
    found = np.maximum(np.asarray(importance, np.float64).reshape(-1), 0)
    if found.shape != (columns,):
        from ....graph.errors import ConstraintError

        raise ConstraintError("one importance per column is needed", expected=columns, found=found.size)
    mean = found.mean()
    return np.ones(columns) if mean <= 0 else found / mean + 1e-6
