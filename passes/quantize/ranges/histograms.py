"""What the ranges read from histograms share: their statistic, and the error of a grid on a histogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...calibrate import Histogram
from ..numerics import QuantParams, grid
from ..spec.formats import TensorFormat
from .estimator import RangeEstimator

BLOCK = 1 << 16
"""Bins times candidates worked on at a time, so that the intermediate arrays stay small."""


@dataclass(frozen=True)
class HistogramRange(RangeEstimator):
    """A range read from a histogram of ``bins`` bins."""

    bins: int = 2048

    def statistic(self) -> Histogram:
        return Histogram(self.bins)


def ends(statistic: Histogram) -> tuple[float, float]:
    """The extremes seen, zero included."""
    return min(float(statistic.extremes.low), 0.0), max(float(statistic.extremes.high), 0.0)


def one_sided(statistic: Histogram) -> bool:
    """Whether all elements have one sign (zeros apart)."""
    return float(statistic.extremes.low) >= 0 or float(statistic.extremes.high) <= 0


def squared_errors(statistic: Histogram, low: np.ndarray, high: np.ndarray, form: TensorFormat) -> np.ndarray:
    """Mean squared error of quantizing what the histogram holds, for each candidate range.

    Args:
        low, high: 1-d arrays of one length, the candidates.
        form: the grid.

    Returns:
        float64, one per candidate, averaged over all elements seen (zeros too: they cost nothing). Exact up to the
        spread of the elements inside a bin, which is taken as even.
    """
    edges, counts = statistic.filled()
    if counts.size == 0:
        return np.zeros(len(low))
    used = np.nonzero(counts)[0]
    weights = counts[used].astype(np.float64)
    # The first and last bin reach no further than the data does.
    first = np.maximum(edges[used], float(statistic.extremes.low))
    last = np.minimum(edges[used + 1], float(statistic.extremes.high))
    centres, widths = (first + last) / 2, last - first
    found = np.empty(len(low))
    lot = max(BLOCK // used.size, 1)
    for i in range(0, len(low), lot):
        part = slice(i, i + lot)
        params = grid(low[part], high[part], form, axis=0)
        values = np.broadcast_to(centres.astype(np.float32), (len(low[part]), used.size))
        miss = params.apply(values).astype(np.float64) - centres
        step = np.minimum(_steps(params, centres, form), widths)
        found[part] = (np.square(miss) + np.square(step) / 12) @ weights
    return found / statistic.count


def _steps(params: QuantParams, centres: np.ndarray, form: TensorFormat) -> np.ndarray:
    """Distance of neighbouring grid points around each centre: [candidates, centres]."""
    scale = params.scale.astype(np.float64).reshape(-1, 1)
    if not form.is_float:
        return np.broadcast_to(scale, (len(scale), centres.size))
    import ml_dtypes

    info = ml_dtypes.finfo(params.zero_point.dtype)
    exponent = np.frexp(np.abs(centres) / scale)[1] - 1
    return scale * np.exp2(np.maximum(exponent, np.log2(float(info.smallest_normal))) - info.nmant)
