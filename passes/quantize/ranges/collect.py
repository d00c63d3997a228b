"""Collects the statistics of ranges: graph values to merged statistics, without what attention masks put in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ....graph.errors import ConstraintError
from ....graph.execute import MOVES
from ....graph.ir import Graph, Node, Value
from ...base import Progress, no_progress
from ...calibrate import Statistic, collect
from .estimator import RangeEstimator

MASKING = 1e3
"""Constants of at least this magnitude that are filled in or added stand for "not here", not for numbers."""
DEPTH = 12
"""Nodes followed from an addition back to the constant that its mask is made of."""


class Unmasked:
    """A statistic that does not see elements at or below ``floor`` (what a mask pushed out of the way), nor -inf."""

    def __init__(self, inner: Statistic, floor: float) -> None:
        self.inner = inner
        self.floor = floor
        self.count = 0

    def update(self, x: np.ndarray) -> None:
        masked = x <= self.floor
        # Zeros are exact on every grid, so they stand in where the shape must stay (samples along axis 0).
        self.inner.update(np.where(masked, np.zeros((), x.dtype), x) if masked.any() else x)
        self.count = self.inner.count

    def merge(self, other: Any) -> None:
        self.inner.merge(other.inner if isinstance(other, Unmasked) else other)
        self.count = self.inner.count


def collect_ranges(
    graph: Graph,
    batches: Iterable[Any],
    sources: Mapping[str, Sequence[str]],
    ranges: RangeEstimator | Mapping[str, RangeEstimator],
    *,
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[dict[str, Statistic], int]:
    """One statistic per root, over all the values that share its scale, from one reading of the batches.

    Args:
        graph: the float graph, unedited.
        batches: as :func:`...calibrate.collect` takes them.
        sources: root -> names of the values whose elements make its range.
        ranges: the estimator, or one per root.
        progress, options: of :func:`...calibrate.collect`.

    Returns:
        The statistics, and the number of batches seen.

    Raises:
        ConstraintError: a value is constant or holds no floating numbers (a shape, an index, a boolean mask): it has
            no range; or calibration met a value that is not finite.
    """
    wanted: dict[str, Statistic] = {}
    for root, names in sources.items():
        choice = ranges if isinstance(ranges, RangeEstimator) else ranges[root]
        for name in names:
            value = graph.values[name]
            if value.is_const or not value.dtype.startswith(("float", "bfloat")):
                raise ConstraintError(
                    "a value that is no activation has no range",
                    value=name,
                    expected="a floating value that the network computes",
                    found="a constant" if value.is_const else value.dtype,
                )
            fill = mask_fill(value)
            statistic = choice.statistic()
            wanted[name] = statistic if fill is None else Unmasked(statistic, fill / 2)
    seen = collect(graph, batches, wanted, progress=progress, **options)
    found = {}
    for root, names in sources.items():
        statistics = [_inner(wanted[name]) for name in names]
        total = statistics[0]
        for other in statistics[1:]:
            total.merge(other)
        found[root] = total
    return found, seen


def _inner(statistic: Statistic) -> Statistic:
    return statistic.inner if isinstance(statistic, Unmasked) else statistic


def mask_fill(value: Value) -> float | None:
    """The negative constant that masking may have put into a value's elements, or None: found from the graph alone."""
    node: Node | None = value.producer
    for _ in range(DEPTH):
        if node is None or not node.inputs:
            return None
        if node.op in ("masked_fill", "where"):
            found = [_filler(v) for v in node.inputs if v is not None and v.dtype != "bool"]
        elif node.op in ("add", "sub"):
            found = [_additive(v, DEPTH) for v in node.inputs if v is not None]
        else:
            found = []
        fills = [fill for fill in found if fill is not None]
        attribute = node.attrs.get("value")
        if node.op == "masked_fill" and isinstance(attribute, (int, float)) and attribute <= -MASKING:
            fills.append(float(attribute))
        if fills:
            return max(fills)  # the one nearest to zero bounds them all
        first = node.input(0)
        if node.op not in MOVES or first is None:
            return None
        node = first.producer
    return None


def _filler(value: Value) -> float | None:
    """The masking number that a constant of one element is, or that a constant's least element is."""
    while not value.is_const and value.producer is not None and value.producer.op in MOVES and value.producer.inputs:
        source = value.producer.inputs[0]
        if source is None:
            return None
        value = source
    data = value.const()
    if data is None or data.size == 0 or data.dtype.kind not in "fiu":
        return None
    least = float(np.max(data[data <= -MASKING], initial=-np.inf))
    if np.isfinite(least):
        return least
    return float(np.finfo(np.float32).min) if np.isneginf(data.astype(np.float64)).any() else None


def _additive(value: Value, depth: int) -> float | None:
    """The masking constant that an operand of an addition is made of, following moves, products and choices."""
    if value.is_const:
        return _filler(value)
    node = value.producer
    if node is None or depth == 0 or node.op not in (*MOVES, "mul", "sub", "add", "where", "masked_fill", "cast"):
        return None
    for v in node.inputs:
        if v is None:
            continue
        if v.is_const and node.op == "mul":
            data = v.const()
            if data is not None and data.size == 1 and abs(float(data.reshape(-1)[0])) >= MASKING:
                return -abs(float(data.reshape(-1)[0]))
        elif node.op in ("where", "masked_fill") and v.dtype != "bool":
            fill = _filler(v)
            if fill is not None:
                return fill
    followed = (v for v in node.inputs if v is not None and not v.is_const)
    return next((fill for v in followed for fill in [_additive(v, depth - 1)] if fill is not None), None)
