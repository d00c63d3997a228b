"""What a transform looks at: rows of activations drawn without regard to their order, and extremes per channel."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from ...graph.ir import Graph
from ..base import Progress, no_progress
from ..calibrate import collect


class Rows:
    """At most ``limit`` rows along one axis, and the extremes and mean magnitude per channel of all rows seen.

    Which rows are kept depends on their contents alone (a checksum orders them), so batches may come in any order;
    equal rows count once. Memory: 8 * limit * channels bytes.
    """

    def __init__(self, axis: int = -1, limit: int = 512) -> None:
        self.axis, self.limit = axis, limit
        self.count = 0
        self.seen = 0
        self.kept: dict[int, np.ndarray] = {}
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None
        self.magnitude: np.ndarray | None = None

    def update(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        rows = np.ascontiguousarray(np.moveaxis(x, self.axis, -1).reshape(-1, x.shape[self.axis]), np.float32)
        self._extend(rows.min(0), rows.max(0), np.abs(rows).sum(0, dtype=np.float64), len(rows), x.size)
        order = np.array([zlib.crc32(row.tobytes()) for row in rows])
        for i in np.argsort(order, kind="stable")[: self.limit]:
            self.kept.setdefault(int(order[i]), rows[i].copy())
        self._trim()

    def _extend(self, low: np.ndarray, high: np.ndarray, magnitude: np.ndarray, rows: int, count: int) -> None:
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.magnitude = magnitude if self.magnitude is None else self.magnitude + magnitude
        self.seen += rows
        self.count += count

    def _trim(self) -> None:
        if len(self.kept) > self.limit:
            self.kept = {key: self.kept[key] for key in sorted(self.kept)[: self.limit]}

    def merge(self, other: Rows) -> None:
        if other.low is not None and other.high is not None and other.magnitude is not None:
            self._extend(other.low, other.high, other.magnitude, other.seen, other.count)
            self.kept = other.kept | self.kept
            self._trim()

    @property
    def rows(self) -> np.ndarray:
        """float32 [kept rows, channels]."""
        return np.stack([self.kept[key] for key in sorted(self.kept)])

    @property
    def peak(self) -> np.ndarray:
        """Largest magnitude per channel, float32 [channels]."""
        assert self.low is not None and self.high is not None
        return np.maximum(np.abs(self.low), np.abs(self.high))

    @property
    def mean_magnitude(self) -> np.ndarray:
        """Mean magnitude per channel, float64 [channels]."""
        assert self.magnitude is not None
        return self.magnitude / max(self.seen, 1)


def _mark(x: np.ndarray) -> int:
    """A checksum that rounding in the last place does not change: which of 64 elements stand out."""
    picked = x.reshape(-1)[:: max(x.size // 64, 1)]
    return zlib.crc32((picked > 0.1 * float(np.abs(picked).max())).tobytes())


class Halves:
    """Rows of two halves of the samples (index of axis 0), so that what is fitted to one is judged on the other.

    Tokens of one image or sentence resemble each other: a range that covers some of them covers the rest, and tells
    nothing about the next image. A checksum of its contents puts a sample into its half, whatever the batches and
    whichever front end computed it.
    """

    def __init__(self, axis: int = -1, limit: int = 512) -> None:
        self.parts = (Rows(axis, (limit + 1) // 2), Rows(axis, (limit + 1) // 2))
        self.samples = [0, 0]
        self.count = 0

    def update(self, x: np.ndarray) -> None:
        if x.size == 0:
            return
        apart = x.ndim > 1 and self.parts[0].axis % x.ndim != 0
        groups = list(x) if apart else [x]
        side = np.array([_mark(g) & 1 for g in groups])
        for i, part in enumerate(self.parts):
            if (side == i).any():
                part.update(x[side == i] if apart else x)
                self.samples[i] += int((side == i).sum())
        self.count += x.size

    def merge(self, other: Halves) -> None:
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)
        self.samples = [a + b for a, b in zip(self.samples, other.samples, strict=True)]
        self.count += other.count

    @property
    def whole(self) -> Rows:
        """All that was seen, in one."""
        found = Rows(self.parts[0].axis, sum(p.limit for p in self.parts))
        for part in self.parts:
            found.merge(part)
        return found

    def folds(self) -> list[tuple[Rows, Rows]]:
        """Pairs (to fit, to judge): each half judges the other; all of it both where a half holds under two samples."""
        if min(self.samples) < 2:
            return [(self.whole, self.whole)]
        first, second = self.parts
        return [(first, second), (second, first)]


Collector = TypeVar("Collector", Rows, Halves)


def sample(
    graph: Graph,
    batches: Iterable[Any],
    places: Mapping[str, int],
    kind: Callable[[int, int], Collector],
    limit: int = 512,
    progress: Progress = no_progress,
) -> dict[str, Collector]:
    """Rows of the named values along the given axes, kept in one or in halves, from one run over the batches."""
    wanted = {name: kind(axis, limit) for name, axis in places.items()}
    if wanted:
        collect(graph, batches, wanted, progress=progress)
    return wanted
