"""Ranges of least squared error: shrunk from the extremes (mse), or with equal tails outside (l2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...calibrate import Histogram
from ..spec.formats import TensorFormat
from .histograms import HistogramRange, ends, squared_errors
from .percentile import tails


@dataclass(frozen=True)
class MseRange(HistogramRange):
    """Least mean squared error over ranges inside the extremes.

    Both ends shrink together on a grid of ``steps`` ratios, then each on its own, each time finer around the best.
    Never worse than the extremes themselves, on the histogram. A symmetric format or one-sided data leaves one end.
    """

    bins: int = 4096
    steps: int = 64
    least: float = 0.02
    """The smallest ratio tried: ranges keep at least that share of the extremes."""

    def bounds(self, statistic: Histogram, form: TensorFormat) -> tuple[float, float]:
        low, high = ends(statistic)
        if low == high:
            return low, high
        best = (1.0, 1.0)
        for left, right in ((True, True), (False, True), (True, False), (False, True), (True, False)):
            if (left, right) != (True, True) and (form.symmetric or form.is_float or low == 0 or high == 0):
                break
            best = self._along(statistic, form, best, left, right)
        return best[0] * low, best[1] * high

    def _along(
        self, statistic: Histogram, form: TensorFormat, best: tuple[float, float], left: bool, right: bool
    ) -> tuple[float, float]:
        """The best ratios with the chosen ends free (together, where both are)."""
        low, high = ends(statistic)
        centre, spread = 1.0, 1.0 - self.least
        for level in range(3):
            start, stop = max(centre - spread, self.least), min(centre + spread, 1.0)
            ratios = np.append(np.linspace(start, stop, self.steps if level == 0 else 16), centre)
            lows = low * (ratios if left else np.full(ratios.size, best[0]))
            highs = high * (ratios if right else np.full(ratios.size, best[1]))
            errors = squared_errors(statistic, lows, highs, form)
            # Of equal errors the widest range: it clips least of what calibration did not see.
            centre = float(ratios[np.flatnonzero(errors == errors.min())].max())
            spread = 2 * (stop - start) / (ratios.size - 1)
        found = (centre if left else best[0]), (centre if right else best[1])
        both = np.array([best, found]) * (low, high)
        old, new = squared_errors(statistic, both[:, 0], both[:, 1], form)
        return found if new < old else best


@dataclass(frozen=True)
class L2Range(HistogramRange):
    """Least squared error (L2 norm) over the ranges that leave equal shares outside at both ends.

    The search that torch's histogram observer makes step by step: here the whole path of shares, from none to a
    tenth, is weighed at once, and the best of it taken.
    """

    steps: int = 128

    def bounds(self, statistic: Histogram, form: TensorFormat) -> tuple[float, float]:
        if statistic.exponent is None:
            return ends(statistic)
        shares = np.logspace(-7, -1, self.steps)
        found = np.array([ends(statistic), *(tails(statistic, float(share)) for share in shares)])
        errors = squared_errors(statistic, found[:, 0], found[:, 1], form)
        low, high = found[int(np.argmin(errors))]
        return float(low), float(high)


@dataclass(frozen=True)
class SparseRange(HistogramRange):
    """For inputs that are mostly exact zeros: from the extremes, a grid of scales, least error on what is not zero.

    The range part of "LiDAR-PTQ: Post-Training Quantization for Point Cloud 3D Object Detection": the scale starts at
    the extremes' and ``steps`` smaller ones are tried, the least of them ``least`` times the first. Zeros are exact
    under every one of them, so they have no say, neither here nor in any share of elements.
    """

    bins: int = 8192
    steps: int = 200
    least: float = 0.05

    def bounds(self, statistic: Histogram, form: TensorFormat) -> tuple[float, float]:
        low, high = ends(statistic)
        ratios = np.linspace(1.0, self.least, self.steps)
        errors = squared_errors(statistic, low * ratios, high * ratios, form)
        best = float(ratios[int(np.argmin(errors))])
        return best * low, best * high
