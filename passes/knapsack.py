"""The multiple-choice knapsack with one budget, exactly: undominated partial choices, cut by the relaxed bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_STATES = 100_000
"""Partial choices held at a time; beyond that the search gives up."""
ROUNDING = 1e-12
"""Relative room for the rounding of sums of costs and of bounds."""


def solve(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], limit: float) -> list[int] | None:
    """Position of the level of every item with the least total loss at a total cost of at most ``limit``.

    Items are taken in turn. Of the partial choices those are kept that no cheaper one equals, and whose gain and the
    most that the remaining items could add (the linear relaxation: the levels on their convex hulls by falling gain per
    cost, the last one in part) exceeds the best choice known. Costs and losses may be any numbers; nothing is scaled or
    rounded, so the result is the optimum to the last few bits. Equal losses go to the cheaper choice.

    Args:
        costs, losses: per item, float64 [levels].

    Returns:
        None where the cheapest levels exceed the limit, or more than ``MOST_STATES`` partial choices would be held
        (many items whose gain is in proportion to their cost).
    """
    items = [_levels(c, x) for c, x in zip(costs, losses, strict=True)]
    base = [float(item[1][0]) for item in items]
    room = limit - sum(base) + ROUNDING * max(abs(limit), sum(float(np.abs(c).max()) for c in costs))
    if room < 0:
        return None
    order = sorted(range(len(items)), key=lambda i: -float(items[i][2][-1]))
    bounds = _bounds([items[i] for i in order])
    best = _greedy([items[i] for i in order], room)
    cost, gain = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for k, i in enumerate(order):
        _, c, g = items[i]
        count = len(c)
        total = (cost[:, None] + (c - c[0])).ravel()
        made = (gain[:, None] + g).ravel()
        above = made + np.interp(room - total, *bounds[k + 1])
        alive = np.flatnonzero((total <= room) & (above >= best - ROUNDING * abs(best)))
        alive = alive[np.lexsort((-made[alive], total[alive]))]
        most = np.maximum.accumulate(made[alive])
        alive = alive[np.r_[True, made[alive][1:] > most[:-1]]] if len(alive) else alive
        if len(alive) > MOST_STATES:
            return None
        steps.append((alive // count, alive % count))
        cost, gain = total[alive], made[alive]
        best = max(best, float(gain.max(initial=best)))
    at, picked = int(np.argmax(gain)), [0] * len(items)
    for i, (parents, levels) in zip(reversed(order), reversed(steps), strict=True):
        picked[i] = int(items[i][0][levels[at]])
        at = int(parents[at])
    return picked


Item = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Levels worth taking, by rising cost: their positions, costs, and gains over the first."""


def _levels(cost: np.ndarray, loss: np.ndarray) -> Item:
    order = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[order])
    kept = order[np.r_[True, loss[order][1:] < least[:-1]]]
    return kept, cost[kept], loss[kept[0]] - loss[kept]


def _hull(item: Item) -> list[tuple[float, float]]:
    """(cost, gain) of the steps along the upper convex hull, by falling gain per cost."""
    corners: list[tuple[float, float]] = [(0.0, 0.0)]
    for c, g in zip(item[1] - item[1][0], item[2], strict=True):
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) <= _slope(corners[-1], (c, g)):
            corners.pop()
        if c > corners[-1][0]:
            corners.append((float(c), float(g)))
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(corners, corners[1:], strict=False)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else -np.inf


def _bounds(items: Sequence[Item]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per position the most that the items from there on can gain, as corners (cost, gain) of a concave function."""
    hulls = [(c, g, k) for k, item in enumerate(items) for c, g in _hull(item)]
    hulls.sort(key=lambda step: -step[1] / step[0])
    cost, gain, owner = (np.array(x, dtype=np.float64) for x in (zip(*hulls, strict=True) if hulls else ([], [], [])))
    found = []
    for k in range(len(items) + 1):
        mine = owner >= k
        found.append((np.r_[0.0, np.cumsum(cost[mine])], np.r_[0.0, np.cumsum(gain[mine])]))
    return found


def _greedy(items: Sequence[Item], room: float) -> float:
    """The gain of taking whole steps of the hulls by falling gain per cost wherever they fit."""
    steps = [(k, j, c, g) for k, item in enumerate(items) for j, (c, g) in enumerate(_hull(item))]
    taken, left, total = [0] * len(items), room, 0.0
    for k, j, c, g in sorted(steps, key=lambda step: -step[3] / step[2]):
        if taken[k] == j and c <= left:
            taken[k], left, total = j + 1, left - c, total + g
    return total
