"""The percentile range: a fixed share of the elements is clipped."""

from __future__ import annotations

from dataclasses import dataclass

from ....graph.errors import ConfigError
from ...calibrate import Histogram
from ..spec.formats import TensorFormat
from .histograms import HistogramRange, one_sided


@dataclass(frozen=True)
class PercentileRange(HistogramRange):
    """All but (100 - percentile) % of the elements, half of that at either end; an end at zero is not clipped.

    Zeros after a relu hold much of the mass: an end that no element lies beyond zero of stays at zero.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ConfigError("no such percentile", node="percentile", expected="50 < p <= 100", found=self.percentile)

    def bounds(self, statistic: Histogram, form: TensorFormat) -> tuple[float, float]:
        return tails(statistic, 1 - self.percentile / 100)


def tails(statistic: Histogram, share: float) -> tuple[float, float]:
    """The range that leaves ``share`` of the elements outside, half at either end or all at the one end there is."""
    tail = share if one_sided(statistic) else share / 2
    return min(statistic.quantile(tail), 0.0), max(statistic.quantile(1 - tail), 0.0)
