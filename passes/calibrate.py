"""The one streaming statistics collector: what it keeps is bounded, and does not depend on the order of batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from ..graph.errors import ConstraintError
from ..graph.execute import batches_of, run_graph
from ..graph.ir import Graph
from .base import Progress, no_progress


class Statistic(Protocol):
    """A bounded summary of a stream of tensors.

    ``update`` takes one tensor; ``merge`` takes another summary of the same kind, so that shards collected apart
    (one process per shard) give what one stream would have given.
    """

    count: int

    def update(self, x: np.ndarray) -> None: ...

    def merge(self, other: Any) -> None: ...


S = TypeVar("S", bound=Statistic)


def _channels(x: np.ndarray, axis: int) -> np.ndarray:
    """x as [channels, everything else] in float64."""
    axis = axis % x.ndim
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64)


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
        self._extend(low, high, x.size)

    def _extend(self, low: Any, high: Any, count: int) -> None:
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
            self._extend(other.low, other.high, other.count)


class MeanMinMax:
    """Mean over the batches of each batch's smallest and largest element: less swayed by one outlier than MinMax.

    This is what a moving average of the extremes tends to, without its dependence on the order. The sums are kept
    exactly (as Shewchuk's partial sums), so any order gives the same bits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.batches = 0
        self._low: list[float] = []
        self._high: list[float] = []
        self.extremes = MinMax()

    def update(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        self.extremes.update(x)
        _exact_add(self._low, float(x.min()))
        _exact_add(self._high, float(x.max()))
        self.batches += 1
        self.count += x.size

    def merge(self, other: MeanMinMax) -> None:
        for mine, theirs in ((self._low, other._low), (self._high, other._high)):
            for part in theirs:
                _exact_add(mine, part)
        self.extremes.merge(other.extremes)
        self.batches += other.batches
        self.count += other.count

    @property
    def low(self) -> float:
        return math.fsum(self._low) / self.batches

    @property
    def high(self) -> float:
        return math.fsum(self._high) / self.batches


def _exact_add(partials: list[float], x: float) -> None:
    """Add x to a sum held as non-overlapping partials (Shewchuk 1997): nothing is rounded away."""
    i = 0
    for y in list(partials):
        if abs(x) < abs(y):
            x, y = y, x
        high = x + y
        low = y - (high - x)
        if low:
            partials[i] = low
            i += 1
        x = high
    partials[i:] = [x]


class Histogram:
    """Counts in at most ``bins`` bins whose width doubles as the range grows.

    Bins lie at whole multiples of a power of two, zero is always inside, and the width is the smallest power of two
    with which the range seen fits. Doubling merges the bins 2i and 2i + 1 exactly, so counts and width depend only on
    the data, neither on order nor on batch boundaries. Memory: 8 * bins bytes.
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
        if self.exponent is None:
            self.zeros += x.size
            return
        index = np.floor(np.ldexp(x.astype(np.float64).ravel(), -self.exponent)).astype(np.int64)
        self.counts += np.bincount(index - self.start, minlength=self.bins)

    def merge(self, other: Histogram) -> None:
        if other.bins != self.bins:
            raise ConstraintError("histograms of different sizes do not merge", expected=self.bins, found=other.bins)
        self.extremes.merge(other.extremes)
        self.count += other.count
        self._widen()
        self.zeros += other.zeros
        if other.exponent is None:
            self._absorb_zeros()
            return
        assert self.exponent is not None
        index = (np.arange(self.bins) + other.start) >> (self.exponent - other.exponent)
        np.add.at(self.counts, index[other.counts > 0] - self.start, other.counts[other.counts > 0])
        self._absorb_zeros()

    def _absorb_zeros(self) -> None:
        if self.exponent is not None and self.zeros:
            self.counts[-self.start] += self.zeros
            self.zeros = 0

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
        self._absorb_zeros()

    @property
    def width(self) -> float:
        """Width of a bin; 0 while only zeros were seen."""
        return 0.0 if self.exponent is None else math.ldexp(1.0, self.exponent)

    def edges(self) -> np.ndarray:
        """The bins + 1 edges, ascending."""
        return (np.arange(self.bins + 1) + self.start) * self.width

    def quantile(self, share: float) -> float:
        """The value below which ``share`` (0..1) of the elements lie, linear inside a bin, within the extremes seen."""
        if self.count == 0:
            raise ConstraintError("no data in this histogram", expected="at least one element", found=0)
        low, high = float(self.extremes.low), float(self.extremes.high)
        if self.exponent is None:
            return 0.0
        rank = share * self.count
        below = np.cumsum(self.counts)
        i = min(int(np.searchsorted(below, rank, side="left")), self.bins - 1)
        inside = self.counts[i]
        before = below[i] - inside
        part = (rank - before) / inside if inside else 0.0
        return float(min(max((self.start + i + part) * self.width, low), high))


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


def _lots(graph: Graph, names: Iterable[str], memory: int) -> list[list[str]]:
    lots: list[list[str]] = []
    room = 0
    for name in names:
        hint = graph.values[name].hint
        need = 8 * math.prod(hint) if hint is not None else memory
        if not lots or need > room:
            lots.append([])
            room = memory
        lots[-1].append(name)
        room -= need
    return lots


def collect(
    graph: Graph,
    batches: Iterable[Any],
    wanted: Mapping[str, S],
    *,
    memory: int = 1 << 30,
    progress: Progress = no_progress,
) -> int:
    """Run the graph over the batches once and feed the tensor of each wanted value to its statistic.

    Args:
        graph: what to run.
        batches: each in a form that ``Graph.bind`` takes; may be a generator, is read once, one batch at a time.
        wanted: value name -> statistic, updated in place. Graph inputs may be wanted too.
        memory: bound in bytes on the tensors tapped at a time (estimated from the hint shapes); when the wanted
            values need more, each batch is run several times.
        progress: wraps the loop over batches.

    Returns:
        The number of batches seen.

    Raises:
        ConstraintError: there was no batch, or a value that is not finite came up (it names the value).
    """
    fed = [name for name in wanted if graph.values[name].is_input]
    lots = _lots(graph, [name for name in wanted if not graph.values[name].is_input], memory)
    seen = 0
    for arrays in batches_of(graph, progress(batches, "calibrating")):
        seen += 1
        for name in fed:
            _update(wanted[name], name, np.asarray(arrays[name]))
        for lot in lots:
            _, tapped = run_graph(graph, arrays, lot)
            for name in lot:
                _update(wanted[name], name, tapped.pop(name))
    if seen == 0:
        raise ConstraintError(
            "the calibration data is empty", expected="at least one batch", found="none", hint="pass a list of batches"
        )
    return seen


def _update(statistic: Statistic, name: str, x: np.ndarray) -> None:
    try:
        statistic.update(x)
    except ConstraintError as exc:
        raise ConstraintError(exc.message, value=name, expected=exc.expected, found=exc.found, hint=exc.hint) from exc
