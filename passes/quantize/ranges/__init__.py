"""Range estimators: from a streamed statistic to the interval that the integers cover. One small class each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....graph.errors import ConfigError
from .collect import collect_ranges
from .entropy import EntropyRange
from .estimator import RangeEstimator
from .extremes import MeanRange, MinMaxRange
from .percentile import PercentileRange
from .search import L2Range, MseRange, SparseRange
from .weights import WEIGHT_RANGES, weight_bounds

RANGES: dict[str, Callable[..., RangeEstimator]] = {
    "minmax": MinMaxRange,
    "mean": MeanRange,
    "percentile": PercentileRange,
    "mse": MseRange,
    "entropy": EntropyRange,
    "l2": L2Range,
    "sparse": SparseRange,
}
"""Name -> class. Add an estimator here and it is an option of the pass."""


def estimator(name: str, **options: Any) -> RangeEstimator:
    """The estimator of that name with its options (the fields of its class).

    Raises:
        ConfigError: naming those that exist, or the options that the estimator has.
    """
    if name not in RANGES:
        raise ConfigError("unknown range estimator", node="ranges", expected=", ".join(RANGES), found=name)
    made = RANGES[name]
    known = list(getattr(made, "__dataclass_fields__", {}))
    wrong = sorted(set(options) - set(known))
    if wrong:
        raise ConfigError(
            f"the range estimator {name!r} has no option {wrong[0]!r}",
            node="ranges",
            expected=", ".join(known) or "no options",
            found=wrong[0],
        )
    return made(**options)


__all__ = [
    "RANGES",
    "WEIGHT_RANGES",
    "EntropyRange",
    "L2Range",
    "MeanRange",
    "MinMaxRange",
    "MseRange",
    "PercentileRange",
    "RangeEstimator",
    "SparseRange",
    "collect_ranges",
    "estimator",
    "weight_bounds",
]
