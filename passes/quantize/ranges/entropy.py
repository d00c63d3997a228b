"""The entropy range: the clipping whose quantized histogram is nearest to the true one in relative entropy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...calibrate import Histogram
from ..numerics import range_params
from ..spec.formats import LIMITS, TensorFormat
from .histograms import HistogramRange, ends


@dataclass(frozen=True)
class EntropyRange(HistogramRange):
    """Least Kullback-Leibler divergence, as in Migacz, "8-bit inference with TensorRT" (2017).

    For each threshold T: P is the histogram of the elements within [-T, T] with all others added to its outermost bins;
    Q is the same histogram without them, summed over the bins that one level of the format stands for, and spread
    evenly over those of them that are filled. The T of least KL(P || Q) wins. Thresholds run from the one with a bin
    per level to the largest magnitude. Zeros, exact under every threshold, have no say.

    A format with as many levels as the histogram has bins (16 bits) gets the extremes.
    """

    steps: int = 64

    def bounds(self, statistic: Histogram, form: TensorFormat) -> tuple[float, float]:
        low, high = ends(statistic)
        edges, counts = statistic.filled()
        reach = max(-low, high)
        first = _levels(form) * statistic.width / (1 if low == 0 or high == 0 else 2)
        if counts.size == 0 or first >= reach:
            return low, high
        thresholds = np.linspace(first, reach, self.steps)
        best = thresholds[int(np.argmin([_divergence(statistic, edges, counts, t, form) for t in thresholds]))]
        near = (reach - first) / (self.steps - 1)
        finer = np.clip(np.linspace(best - near, best + near, 17), first, reach)
        best = finer[int(np.argmin([_divergence(statistic, edges, counts, t, form) for t in finer]))]
        return max(low, -float(best)), min(high, float(best))


def _levels(form: TensorFormat) -> int:
    if form.dtype in LIMITS:
        least, most = form.limits
        return int(most - least) + 1
    import ml_dtypes

    return int(2 ** ml_dtypes.finfo(form.dtype).bits)


def _divergence(
    statistic: Histogram, edges: np.ndarray, counts: np.ndarray, threshold: float, form: TensorFormat
) -> float:
    """KL(P || Q) in nats for one threshold; inf where Q lacks something that P has."""
    centres = (edges[:-1] + edges[1:]) / 2
    inside = np.flatnonzero(np.abs(centres) <= threshold)
    if inside.size == 0:
        return float("inf")
    a, b = int(inside[0]), int(inside[-1]) + 1
    kept = counts[a:b].astype(np.float64)
    p = kept.copy()
    p[0] += counts[:a].sum()
    p[-1] += counts[b:].sum()
    low, high = ends(statistic)
    params = range_params(max(low, -threshold), min(high, threshold), form)
    stored = params.quantize(centres[a:b].astype(np.float32))
    if form.is_float:
        group = np.unique(stored.astype(np.float32), return_inverse=True)[1]
    else:
        group = stored.astype(np.int64) - int(form.limits[0])
    filled = kept > 0
    total = np.bincount(group, kept)
    members = np.bincount(group, filled)
    q = np.where(filled, total[group] / np.maximum(members[group], 1), 0.0)
    if q.sum() == 0 or np.any((p > 0) & (q == 0)):
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
