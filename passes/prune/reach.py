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
HELD = 4
"""Steps that cross the target by more than that and are left out of the search in turn."""


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
    unjudged: int = 0,
) -> Reached:
    """The selection whose cost comes closest to ``wanted``: bisection over the ratio, then group by group.

    At one ratio all groups of equal width step to their next block together; the second search lets only the first of
    them (those that lose the least important indices) take that step. Groups of one class step together. Where one
    group's step (a head of three) alone crosses the target by more than the tolerance, that group stays on one side of
    it, whichever the others can make up for better, and the ratio of the others is searched anew.

    Args:
        unjudged: how many groups could be cut but have no scores; only the error says so.

    Raises:
        ConstraintError: even the largest ratio leaves more than the target.
    """
    classes = list(classes)
    whole, floor = choose(0.0), choose(1.0)
    least = measure(counts_of(floor))
    if least > wanted * (1 + TOLERANCE):
        raise unreachable(target, wanted, least, unjudged)
    best = Reached(floor, 1.0, least)

    def consider(kept: Kept, ratio: float) -> float:
        now = measure(counts_of(kept))
        if abs(now - wanted) < abs(best.cost - wanted):
            best.kept, best.ratio, best.cost = kept, ratio, now
        return now

    def search(held: Kept) -> _Crossing:
        """Both searches with some groups held as they are."""
        low, high = 0.0, 1.0
        above, below = {**whole, **held}, {**floor, **held}
        nearest = float("inf")
        for _ in range(16):
            middle = (low + high) / 2
            kept = {**choose(middle), **held}
            now = consider(kept, middle)
            nearest = min(nearest, abs(now - wanted))
            if now > wanted:
                low, above = middle, kept
            else:
                high, below = middle, kept
        steps = _steps(above, below, scores, classes)
        first, last = 0, len(steps)
        while first < last:
            count = (first + last) // 2
            taken = [g for step in steps[:count] for g in step]
            now = consider({**above, **{g: below[g] for g in taken}}, (low + high) / 2)
            nearest = min(nearest, abs(now - wanted))
            if now > wanted:
                first = count + 1
            else:
                last = count
        crossing = steps[first - 1] if 0 < first <= len(steps) else []
        sides = (above, below) if crossing else ()
        return _Crossing(nearest, [{**held, **{g: side[g] for g in crossing}} for side in sides])

    found = search({})
    for _ in range(HELD):
        if abs(best.cost - wanted) <= TOLERANCE * wanted or not found.sides:
            break
        found = min((search(side) for side in found.sides), key=lambda crossing: crossing.nearest)
    return best


@dataclass
class _Crossing:
    """Where a search ended: its distance from the target, and the groups to hold from here on, those whose step crossed
    the target before that step in one dict and after it in the other; none if there are no such groups."""

    nearest: float
    sides: list[Kept]


def unreachable(target: Target, wanted: float, least: float, unjudged: int = 0) -> ConstraintError:
    """The error for a target that lies below what these groups can give; ``unjudged`` more have no scores."""
    unit = "ms" if target.metric == "latency" else target.metric
    shown = (f"{wanted:,.3f}", f"{least:,.3f}") if target.metric == "latency" else (f"{wanted:,.0f}", f"{least:,.0f}")
    hint = "raise the target, shorten `ignore`, lower `round_to` or allow nested groups with atoms='all'"
    if unjudged:
        hint = f"take another criterion, this one has nothing to judge {unjudged} of the groups by; or {hint}"
    return ConstraintError(
        "the target cannot be reached by pruning these groups",
        node=str(target),
        expected=f"at most {shown[0]} {unit}",
        found=f"{shown[1]} left with every group at its minimum",
        hint=hint,
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
