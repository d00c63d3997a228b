"""How many and which indices each group keeps: uniform, global and isomorphic ratios, blocks, and cost targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Literal, TypeAlias

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.preview import preview_cost
from ..targets import Target
from .importance import Scores

Kept: TypeAlias = dict[AxisGroup, np.ndarray]
Normalizer: TypeAlias = Literal["mean", "max", "sum", "gaussian", "lamp", "none"]


def block(g: AxisGroup, round_to: int) -> int:
    """Smallest step in group indices that keeps every member axis a multiple of ``round_to`` (if it was one)."""
    slab = 0
    for m in g.members:
        at = m.positions(g.atom)
        slab = gcd(slab, int(np.bincount(at[at >= 0], minlength=g.size).min()))
    return round_to // gcd(round_to, max(slab, 1))


def counts_to_keep(g: AxisGroup, wanted: float, round_to: int, min_keep: int) -> int:
    """``wanted`` indices, rounded to blocks; never below one block or ``min_keep``, never more than there are."""
    step = block(g, round_to)
    if step >= g.size:
        return g.size
    n = max(int(round(wanted / step)), 1) * step
    while n < min_keep:
        n += step
    return min(n, g.size)


def keep_best(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n highest scores, ascending; ties go to the lower index."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:n])


def uniform(scores: Scores, ratio: float, round_to: int, min_keep: int) -> Kept:
    """The same share ``ratio`` of every group goes."""
    return {g: keep_best(s, counts_to_keep(g, g.size * (1 - ratio), round_to, min_keep)) for g, s in scores.items()}


def normalized(scores: np.ndarray, normalizer: Normalizer) -> np.ndarray:
    """Scores of one group on a scale that can be compared between groups.

    ``lamp``: each score over the sum of all scores of the group that are not smaller ("Layer-adaptive Sparsity for
    the Magnitude-based Pruning"); ``gaussian``: zero mean, unit variance.
    """
    if normalizer == "none":
        return scores
    if normalizer == "gaussian":
        return np.asarray((scores - scores.mean()) / max(float(scores.std()), 1e-30))
    if normalizer == "lamp":
        order = np.argsort(scores, kind="stable")
        ascending = scores[order]
        out = np.empty_like(scores)
        out[order] = ascending / np.maximum(np.cumsum(ascending[::-1])[::-1], 1e-30)
        return out
    scale = {"mean": scores.mean(), "max": scores.max(), "sum": scores.sum()}[normalizer]
    return np.asarray(scores / max(float(scale), 1e-30))


def ranked(scores: Scores, ratio: float, round_to: int, min_keep: int, normalizer: Normalizer = "mean") -> Kept:
    """The lowest ``ratio`` of all indices goes, ranked together on the normalizer's scale."""
    if not scores:
        return {}
    normal = {g: normalized(s, normalizer) for g, s in scores.items()}
    everything = np.concatenate(list(normal.values()))
    order = np.argsort(everything, kind="stable")
    gone = np.zeros(len(everything), dtype=bool)
    gone[order[: round(ratio * len(everything))]] = True
    kept: Kept = {}
    at = 0
    for g, s in normal.items():
        n = int((~gone[at : at + g.size]).sum())
        kept[g] = keep_best(s, counts_to_keep(g, n, round_to, min_keep))
        at += g.size
    return kept


def isomorphic(scores: Scores, ratio: float, round_to: int, min_keep: int, normalizer: Normalizer = "mean") -> Kept:
    """As :func:`ranked`, but only groups of one structure compete ("Isomorphic Pruning for Vision Models")."""
    classes: dict[tuple[tuple[str, int, int, str], ...], Scores] = {}
    for g, s in scores.items():
        classes.setdefault(structure(g), {})[g] = s
    kept: Kept = {}
    for alike in classes.values():
        kept.update(ranked(alike, ratio, round_to, min_keep, normalizer))
    return {g: kept[g] for g in scores}


def structure(g: AxisGroup) -> tuple[tuple[str, int, int, str], ...]:
    """The kinds of places a group occurs in: (op, operand, axis, role), each once, sorted."""
    places = {
        (n.op, i, m.axis, m.role) for m in g.members if m.weight.value is not None for n, i in m.weight.value.uses
    }
    return tuple(sorted(places))


def reach(
    groups: AxisGroups, scores: Scores, choose: Callable[[float], Kept], target: Target, tolerance: float = 0.02
) -> tuple[Kept, float, float]:
    """The selection whose cost comes closest to a target: bisection over the ratio, then group by group.

    At one ratio all groups of equal width step to their next block together; the second search lets only the first of
    them (those that lose the least important indices) take that step.

    Returns the selection, the ratio and the cost reached as a share of the original.

    Raises:
        ConstraintError: even the largest ratio leaves more than the target.
    """
    original = target.of(preview_cost(groups, {}))
    wanted = target.amount(original)

    def measure(kept: Mapping[AxisGroup, np.ndarray]) -> float:
        return target.of(preview_cost(groups, kept))

    low, high = 0.0, 1.0
    above, below = choose(low), choose(high)
    least = measure(below)
    if least > wanted * (1 + tolerance):
        raise ConstraintError(
            "the target cannot be reached by pruning these groups",
            node=str(target),
            expected=f"at most {wanted:,.0f} {target.metric}",
            found=f"{least:,.0f} left with every group at its minimum",
            hint="raise the target, shorten `ignore`, lower `round_to` or allow nested groups with atoms='all'",
        )
    best, reached = below, least
    for _ in range(16):
        middle = (low + high) / 2
        kept = choose(middle)
        now = measure(kept)
        if abs(now - wanted) < abs(reached - wanted):
            best, reached = kept, now
        if now > wanted:
            low, above = middle, kept
        else:
            high, below = middle, kept
    steps = sorted(
        (g for g in above if len(above[g]) > len(below[g])), key=lambda g: _loss(scores[g], above[g], below[g])
    )
    first, last = 0, len(steps)
    while first < last:
        count = (first + last) // 2
        mixed = {**above, **{g: below[g] for g in steps[:count]}}
        now = measure(mixed)
        if abs(now - wanted) < abs(reached - wanted):
            best, reached = mixed, now
        if now > wanted:
            first = count + 1
        else:
            last = count
    return best, (low + high) / 2, reached / original


def _loss(scores: np.ndarray, more: np.ndarray, fewer: np.ndarray) -> float:
    """Mean normalised importance of the indices that the smaller selection drops."""
    gone = np.setdiff1d(more, fewer)
    return float(scores[gone].mean() / max(float(scores.mean()), 1e-30)) if len(gone) else 0.0
