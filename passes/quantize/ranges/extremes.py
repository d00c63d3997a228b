"""Ranges from extremes: all that was seen, or the mean over the samples of each one's extremes."""

from __future__ import annotations

from dataclasses import dataclass

from ...calibrate import MeanMinMax, MinMax
from ..spec.formats import TensorFormat
from .estimator import RangeEstimator


@dataclass(frozen=True)
class MinMaxRange(RangeEstimator):
    """Everything seen: nothing is clipped on the calibration data."""

    def statistic(self) -> MinMax:
        return MinMax()

    def bounds(self, statistic: MinMax, form: TensorFormat) -> tuple[float, float]:
        return min(float(statistic.low), 0.0), max(float(statistic.high), 0.0)


@dataclass(frozen=True)
class MeanRange(RangeEstimator):
    """Mean over the samples (axis 0) of their extremes: what a moving average tends to, whatever the order."""

    def statistic(self) -> MeanMinMax:
        return MeanMinMax()

    def bounds(self, statistic: MeanMinMax, form: TensorFormat) -> tuple[float, float]:
        return min(statistic.low, 0.0), max(statistic.high, 0.0)
