"""What a streamed statistic is, and those of extremes: bounded, and independent of the order of batches."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from ...graph.errors import ConstraintError


class Statistic(Protocol):
    """A bounded summary of a stream of tensors.

    ``update`` takes one tensor; ``merge`` takes another summary of the same kind, so that shards collected apart
    (one process per shard) give what one stream would have given.
    """

    count: int

    def update(self, x: np.ndarray) -> None: ...

    def merge(self, other: Any) -> None: ...


class MinMax:
    """Smallest and largest element seen, for the whole tensor or per index of one axis. Exact."""

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.count = 0
        self.low: np.ndarray = np.array(math.inf)
        self.high: np.ndarray = np.array(-math.inf)

    def update(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        flat = x.reshape(1, -1) if self.axis is None else np.moveaxis(x, self.axis, 0).reshape(x.shape[self.axis], -1)
        low, high = flat.min(1).astype(np.float64), flat.max(1).astype(np.float64)
        if self.axis is None:
            low, high = low[0], high[0]
        self.extend(low, high, x.size)

    def extend(self, low: Any, high: Any, count: int) -> None:
        """Take in ``count`` elements that lie between ``low`` and ``high``, both of which occur."""
        if not np.all(np.isfinite(low)) or not np.all(np.isfinite(high)):
            raise ConstraintError(
                "calibration met a value that is not finite",
                found=f"{np.min(low)} .. {np.max(high)}",
                hint="look for overflow or NaN in the float model on this batch",
            )
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        self.count += count

    def merge(self, other: MinMax) -> None:
        if other.count:
            self.extend(other.low, other.high, other.count)


class ExactSum:
    """A sum of float32 numbers without any rounding until it is read: the same bits in every order.

    The integer mantissas are added up per exponent (after Kulisch's long accumulator), so memory is fixed at 2.3 KB
    and up to 2**39 numbers fit.
    """

    LOWEST = -172
    """The smallest exponent of a float32 (2**-149) whose mantissa is scaled to a 24-bit integer."""

    def __init__(self) -> None:
        self.mantissas: np.ndarray = np.zeros(128 - 24 - self.LOWEST + 1, dtype=np.int64)

    def add(self, x: np.ndarray) -> None:
        """Add every element of x (rounded to float32)."""
        fraction, exponent = np.frexp(np.asarray(x, dtype=np.float32).ravel())
        np.add.at(self.mantissas, exponent - 24 - self.LOWEST, np.ldexp(fraction, 24).astype(np.int64))

    def merge(self, other: ExactSum) -> None:
        self.mantissas = self.mantissas + other.mantissas

    def total(self) -> float:
        """The sum, rounded once."""
        used = np.nonzero(self.mantissas)[0]
        return math.fsum(math.ldexp(int(self.mantissas[i]), int(i) + self.LOWEST) for i in used)


class MeanMinMax:
    """Mean over the samples of each sample's smallest and largest element: less swayed by one outlier than MinMax.

    A sample is one index of axis 0 (a whole tensor where it has none). This is what a moving average of the extremes
    tends to, without its dependence on order: it is the same in every order of samples and for every way to cut them
    into batches, to the last bit.
    """

    def __init__(self) -> None:
        self.count = 0
        self.samples = 0
        self.sums = (ExactSum(), ExactSum())
        self.extremes = MinMax()

    def update(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        rows = x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)
        low, high = rows.min(1), rows.max(1)
        self.extremes.extend(low.min(), high.max(), x.size)
        self.sums[0].add(low)
        self.sums[1].add(high)
        self.samples += len(rows)
        self.count += x.size

    def merge(self, other: MeanMinMax) -> None:
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine.merge(theirs)
        self.extremes.merge(other.extremes)
        self.samples += other.samples
        self.count += other.count

    @property
    def low(self) -> float:
        return self.sums[0].total() / self.samples

    @property
    def high(self) -> float:
        return self.sums[1].total() / self.samples
