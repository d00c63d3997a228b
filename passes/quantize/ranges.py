"""Range estimators: from a streamed statistic to the interval that the integers cover. One small class each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...graph.errors import ConfigError
from ..calibrate import Histogram, MeanMinMax, MinMax, Statistic


class RangeEstimator(ABC):
    """Chooses the interval of one tensor. ``statistic`` makes the summary to stream into; ``bounds`` reads it."""

    @abstractmethod
    def statistic(self) -> Statistic:
        """A fresh, empty statistic."""

    @abstractmethod
    def bounds(self, statistic: Any) -> tuple[float, float]:
        """(low, high) of a filled statistic."""


@dataclass(frozen=True)
class MinMaxRange(RangeEstimator):
    """Everything seen: nothing is clipped on the calibration data."""

    def statistic(self) -> Statistic:
        return MinMax()

    def bounds(self, statistic: MinMax) -> tuple[float, float]:
        return float(statistic.low), float(statistic.high)


@dataclass(frozen=True)
class MeanRange(RangeEstimator):
    """Mean of the batches' extremes."""

    def statistic(self) -> Statistic:
        return MeanMinMax()

    def bounds(self, statistic: MeanMinMax) -> tuple[float, float]:
        return statistic.low, statistic.high


@dataclass(frozen=True)
class PercentileRange(RangeEstimator):
    """All but (100 - percentile) % of the elements, half of that at either end; an end at zero is not clipped.

    Zeros after a relu hold much of the mass: an end that no element lies beyond zero of stays at zero.
    """

    percentile: float = 99.99
    bins: int = 2048

    def statistic(self) -> Statistic:
        return Histogram(self.bins)

    def bounds(self, statistic: Histogram) -> tuple[float, float]:
        tail = (1 - self.percentile / 100) / 2
        one_sided = float(statistic.extremes.low) >= 0 or float(statistic.extremes.high) <= 0
        tail = 2 * tail if one_sided else tail
        return min(statistic.quantile(tail), 0.0), max(statistic.quantile(1 - tail), 0.0)


RANGES: dict[str, Callable[..., RangeEstimator]] = {
    "minmax": MinMaxRange,
    "mean": MeanRange,
    "percentile": PercentileRange,
}
"""Name -> class. Add an estimator here and it is an option of the pass."""


def estimator(name: str, **options: Any) -> RangeEstimator:
    """The estimator of that name. Raises ConfigError naming those that exist."""
    if name not in RANGES:
        raise ConfigError("unknown range estimator", node="ranges", expected=", ".join(RANGES), found=name)
    return RANGES[name](**options)
