"""Reaching a target: the selection whose cost comes closest to what was asked, by bisection over the ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup
from ..targets import Target
from .costs import Estimate, counts_of
from .importance import Scores
from .select import Kept

TOLERANCE = 0.02
"""Relative distance from a target within which it counts as met."""


@dataclass
class Reached:
    """A selection and where it stands.

    Attributes:
        kept: the selection.
        ratio: the ratio it was chosen at.
        cost: what it costs, in the target's unit.
    """

    kept: Kept
    ratio: float
    cost: float


def reach(
    choose: Callable[[float], Kept],
    measure: Estimate,
    wanted: float,
    target: Target,
    scores: Scores,
    classes: Iterable[list[AxisGroup]] = (),
) -> Reached:
    """The selection whose cost comes closest to ``wanted``: bisection over the ratio, then group by group.

    At one ratio all groups of equal width step to their next block together; the second search lets only the first of
    them (those that lose the least important indices) take that step. Groups of one class step together.

    Raises:
        ConstraintError: even the largest ratio leaves more than the target.
    """

    def cost_of(kept: Kept) -> float:
        return measure(counts_of(kept))

    low, high = 0.0, 1.0
    above, below = choose(low), choose(high)
    least = cost_of(below)
    if least > wanted * (1 + TOLERANCE):
        raise unreachable(target, wanted, least)
    best = Reached(below, 1.0, least)

    def consider(kept: Kept, ratio: float) -> float:
        now = cost_of(kept)
        if abs(now - wanted) < abs(best.cost - wanted):
            best.kept, best.ratio, best.cost = kept, ratio, now
        return now

    for _ in range(16):
        middle = (low + high) / 2
        kept = choose(middle)
        if consider(kept, middle) > wanted:
            low, above = middle, kept
        else:
            high, below = middle, kept
    steps = _steps(above, below, scores, classes)
    first, last = 0, len(steps)
    while first < last:
        count = (first + last) // 2
        taken = [g for step in steps[:count] for g in step]
        if consider({**above, **{g: below[g] for g in taken}}, (low + high) / 2) > wanted:
            first = count + 1
        else:
            last = count
    return best


def unreachable(target: Target, wanted: float, least: float) -> ConstraintError:
    """The error for a target that lies below what these groups can give."""
    unit = "ms" if target.metric == "latency" else target.metric
    shown = (f"{wanted:,.3f}", f"{least:,.3f}") if target.metric == "latency" else (f"{wanted:,.0f}", f"{least:,.0f}")
    return ConstraintError(
        "the target cannot be reached by pruning these groups",
        node=str(target),
        expected=f"at most {shown[0]} {unit}",
        found=f"{shown[1]} left with every group at its minimum",
        hint="raise the target, shorten `ignore`, lower `round_to` or allow nested groups with atoms='all'",
    )


def _steps(above: Kept, below: Kept, scores: Scores, classes: Iterable[list[AxisGroup]]) -> list[list[AxisGroup]]:
    """Groups whose width differs, those of a class together, the least loss first."""
    differ = [g for g in above if len(above[g]) > len(below[g])]
    bundles = [[g for g in members if g in differ] for members in classes]
    bundled = {g for members in bundles for g in members}
    units = [b for b in bundles if b] + [[g] for g in differ if g not in bundled]
    return sorted(units, key=lambda unit: sum(_loss(scores[g], above[g], below[g]) for g in unit) / len(unit))


def _loss(scores: np.ndarray, more: np.ndarray, fewer: np.ndarray) -> float:
    """Mean normalised importance of the indices that the smaller selection drops."""
    gone = np.setdiff1d(more, fewer)
    return float(scores[gone].mean() / max(float(scores.mean()), 1e-30)) if len(gone) else 0.0
