"""The one streaming statistics collector: what it keeps is bounded, and does not depend on the order of batches."""

from .channels import Gram, Moments, ZeroCount
from .collect import S, collect
from .histogram import Histogram
from .statistics import ExactSum, MeanMinMax, MinMax, Statistic

__all__ = ["ExactSum", "Gram", "Histogram", "MeanMinMax", "MinMax", "Moments", "S", "Statistic", "ZeroCount", "collect"]
