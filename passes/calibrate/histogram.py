"""A histogram of fixed size whose bins double as the range grows; it depends on the data alone."""

from __future__ import annotations

import math

import numpy as np

from ...graph.errors import ConstraintError
from .statistics import MinMax

CHUNK = 1 << 16
"""Elements binned at a time: the intermediate arrays stay in the cache, and memory does not grow with the tensor."""


class Histogram:
    """Counts in at most ``bins`` bins whose width doubles as the range grows; exact zeros are counted apart.

    Bins lie at whole multiples of a power of two, [i w, (i + 1) w); zero is always an edge, and the width w is the
    smallest power of two with which the range seen fits. Doubling merges the bins 2i and 2i + 1 exactly, so counts and
    width depend only on the data, neither on order nor on batch boundaries. Memory: 8 * bins bytes.

    Attributes:
        bins: number of bins.
        count: elements seen.
        zeros: elements that are exactly zero; they are in no bin, since every grid represents them exactly.
        exponent: w = 2**exponent; None while only zeros were seen.
        start: the first bin is [start * w, (start + 1) * w).
        counts: int64 [bins].
        extremes: smallest and largest element, exact.
    """

    def __init__(self, bins: int = 2048) -> None:
        if bins < 4:
            raise ConstraintError("a histogram needs bins", expected="at least 4", found=bins)
        self.bins = bins
        self.count = 0
        self.zeros = 0
        self.exponent: int | None = None
        self.start = 0
        self.counts: np.ndarray = np.zeros(bins, dtype=np.int64)
        self.extremes = MinMax()

    def update(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        self.extremes.update(x)
        self.count += x.size
        self._widen()
        flat = x.reshape(-1)
        for i in range(0, flat.size, CHUNK):
            self._bin(flat[i : i + CHUNK])

    def _bin(self, part: np.ndarray) -> None:
        empty = part.size - int(np.count_nonzero(part))
        self.zeros += empty
        if self.exponent is None or empty == part.size:
            return
        # Scaling by a power of two is exact as long as nothing leaves the range of the type.
        narrow = part.dtype == np.float32 and -100 <= self.exponent <= 0
        scaled = part * np.float32(2.0**-self.exponent) if narrow else np.ldexp(part.astype(np.float64), -self.exponent)
        index = np.floor(scaled, out=scaled).astype(np.intp)
        if not narrow:
            index[(index == 0) & (part < 0)] = -1  # what the scaling took to -0.0
        index -= self.start
        self.counts += np.bincount(index, minlength=self.bins)
        if empty:
            self.counts[-self.start] -= empty

    def merge(self, other: Histogram) -> None:
        if other.bins != self.bins:
            raise ConstraintError("histograms of different sizes do not merge", expected=self.bins, found=other.bins)
        self.extremes.merge(other.extremes)
        self.count += other.count
        self.zeros += other.zeros
        self._widen()
        if other.exponent is not None and self.exponent is not None:
            used = np.nonzero(other.counts)[0]
            index = (used + other.start) >> (self.exponent - other.exponent)
            np.add.at(self.counts, index - self.start, other.counts[used])

    def _widen(self) -> None:
        low, high = min(0.0, float(self.extremes.low)), max(0.0, float(self.extremes.high))
        if low == high:
            return
        old = self.exponent
        # The widest side alone needs span / bins; start just below that and double until everything fits.
        exponent = math.frexp(max(high, -low) / self.bins)[1] - 1 if old is None else old
        while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= self.bins:
            exponent += 1
        start = math.floor(math.ldexp(low, -exponent))
        if old is not None and (exponent, start) != (old, self.start):
            used = np.nonzero(self.counts)[0]
            index = (used + self.start) >> (exponent - old)
            counts = np.zeros_like(self.counts)
            np.add.at(counts, index - start, self.counts[used])
            self.counts = counts
        self.exponent, self.start = exponent, start

    @property
    def width(self) -> float:
        """Width of a bin; 0 while only zeros were seen."""
        return 0.0 if self.exponent is None else math.ldexp(1.0, self.exponent)

    def edges(self) -> np.ndarray:
        """The bins + 1 edges, ascending."""
        return (np.arange(self.bins + 1) + self.start) * self.width

    def filled(self) -> tuple[np.ndarray, np.ndarray]:
        """Edges and counts of the span of bins that the data reaches, from its first to its last filled bin."""
        used = np.nonzero(self.counts)[0]
        if used.size == 0:
            return np.zeros(1), np.zeros(0, dtype=np.int64)
        first, last = int(used[0]), int(used[-1]) + 1
        return self.edges()[first : last + 1], self.counts[first:last]

    def quantile(self, share: float) -> float:
        """The value below which ``share`` (0..1) of the elements lie, linear inside a bin, within the extremes seen."""
        if self.count == 0:
            raise ConstraintError("no data in this histogram", expected="at least one element", found=0)
        low, high = float(self.extremes.low), float(self.extremes.high)
        if self.exponent is None:
            return 0.0
        rank = share * self.count
        negative = int(self.counts[: max(-self.start, 0)].sum())
        if self.zeros and negative <= rank <= negative + self.zeros:
            return min(max(0.0, low), high)
        rank -= self.zeros if rank > negative else 0
        below = np.cumsum(self.counts)
        i = min(int(np.searchsorted(below, rank, side="left")), self.bins - 1)
        inside = self.counts[i]
        before = below[i] - inside
        part = (rank - before) / inside if inside else 0.0
        return float(min(max((self.start + i + part) * self.width, low), high))
