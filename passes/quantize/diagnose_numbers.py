"""Numbers that say how a tensor sits on its grid: signal to noise, what is clipped, what is used, a histogram."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...graph.ir import Node
from .numerics import QuantParams

BINS = 64


@dataclass
class ErrorSums:
    """Signal and noise energy over any number of tensors, in float64."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, wanted: np.ndarray, now: np.ndarray) -> None:
        a, b = wanted.astype(np.float64), now.astype(np.float64)
        self.signal += float(np.vdot(a, a))
        self.noise += float(np.square(a - b).sum())

    @classmethod
    def of(cls, wanted: Iterable[Any], now: Iterable[Any]) -> ErrorSums:
        """Over pairs of torch tensors of equal shapes."""
        found = cls()
        for a, b in zip(wanted, now, strict=True):
            found.add(a.float().numpy(), b.float().numpy())
        return found

    @property
    def decibel(self) -> float | None:
        """SQNR; None where both are equal."""
        if self.noise == 0:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def stored_grid(node: Node, integers: np.ndarray | None = None) -> QuantParams | None:
    """The grid of a quantize or dequantize node with constant parameters; None otherwise.

    Its range is that of the stored type, or narrower where a clip stands before a quantize node, or where stored
    ``integers`` all fit into fewer bits.
    """
    scale = node.inputs[1].const() if node.inputs[1] is not None else None
    point = node.input(2)
    zero = None if point is None else point.const()
    if scale is None or (point is not None and zero is None):
        return None
    stored = node.output.dtype if node.op == "quantize" else node.inputs[0].dtype  # type: ignore[union-attr]
    if zero is None:
        from .spec.formats import numpy_dtype

        zero = np.zeros(scale.shape, dtype=numpy_dtype(stored))
    axis, block = node.attrs.get("axis"), int(node.attrs.get("block") or 0)
    one = scale.size == 1 and not block
    scale, zero = (a.reshape(()) if one else a for a in (scale, np.asarray(zero)))
    found = QuantParams(np.asarray(scale), zero, None if one else axis, block)
    low, high = _range(node, found, integers)
    return replace(found, low=low, high=high)


def _range(node: Node, grid: QuantParams, integers: np.ndarray | None) -> tuple[float, float]:
    low, high = grid.limits
    if integers is not None and integers.size and low < 0 <= high and grid.dtype.startswith("int"):
        least, most = int(integers.min()), int(integers.max())
        bits = next(b for b in range(2, 33) if -(2 ** (b - 1)) <= least and most < 2 ** (b - 1))
        return max(low, -(2 ** (bits - 1))), min(high, 2 ** (bits - 1) - 1)
    clip = node.inputs[0].producer if node.op == "quantize" and node.inputs[0] is not None else None
    ends = [] if clip is None or clip.op != "clip" else [clip.attrs.get(k) for k in ("min", "max")]
    if not ends or None in ends or grid.scale.ndim:
        return low, high
    first, last = (float(np.rint(float(end or 0) / float(grid.scale)) + float(grid.zero_point)) for end in ends)
    # a clip of the model's own (relu6) leaves most of the type's levels in use
    return (max(low, first), min(high, last)) if 2 * (last - first) <= high - low else (low, high)


@dataclass
class Spread:
    """How elements lie on a grid: extremes, the share that is clipped, the share of the grid in use, a histogram.

    Per-channel grids are looked at in units of their steps, so that one picture shows all channels.
    """

    grid: QuantParams | None
    histogram: bool = True
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    outside: int = 0
    least: float = math.inf
    most: float = -math.inf
    _parts: list[np.ndarray] = field(default_factory=list, repr=False)

    def add(self, x: np.ndarray) -> None:
        if not x.size:
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.count += x.size
        if self.grid is None:
            return
        steps = self.grid.steps(x) + self.grid.spread(self.grid.zero_point, x.shape).astype(np.float32)
        first, last = self.grid.limits
        self.outside += int(((steps < first - 0.5) | (steps > last + 0.5)).sum())
        clipped = np.clip(steps, first, last)
        self.least, self.most = min(self.least, float(clipped.min())), max(self.most, float(clipped.max()))
        if self.histogram:
            self._parts.append(steps.ravel().astype(np.float32))

    def facts(self) -> dict[str, Any]:
        """Plain data. The histogram is in steps of the grid (0 is its zero point), over what was seen."""
        if self.grid is None or not self.count:
            return {
                "low": self.low,
                "high": self.high,
                "clipped": 0.0,
                "used": 1.0,
                "dtype": "float",
                "histogram": None,
            }
        first, last = self.grid.limits
        found: dict[str, Any] = {
            "low": self.low,
            "high": self.high,
            "clipped": self.outside / self.count,
            "used": (self.most - self.least) / (last - first),
            "dtype": self.grid.dtype,
            "bits": int(last - first).bit_length(),
            "histogram": None,
        }
        if self._parts:
            every = np.concatenate(self._parts)
            zero = float(np.mean(self.grid.zero_point.astype(np.float64)))
            start, stop = float(every.min()), float(every.max())
            counts, edges = np.histogram(every, bins=BINS, range=(start, stop if stop > start else start + 1))
            found["histogram"] = {
                "counts": counts.tolist(),
                "start": float(edges[0]) - zero,
                "stop": float(edges[-1]) - zero,
                "first": first - zero,
                "last": last - zero,
            }
        return found
