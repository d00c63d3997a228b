"""Importance of every index of an axis group: small functions of (group, weights), all groups at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from ...graph.errors import ConfigError
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Weight

Scores: TypeAlias = dict[AxisGroup, np.ndarray]
"""One float64 score per index of each group; higher is more important."""
Criterion: TypeAlias = Callable[[AxisGroup, AxisGroups], np.ndarray]
"""A user's own criterion: (group, all groups) -> one score per index."""

POWERS = {"l1": 1, "l2": 2}
CRITERIA = (*POWERS, "random")


def importance(groups: AxisGroups, chosen: Iterable[AxisGroup], criterion: str | Criterion, seed: int) -> Scores:
    """Scores of every index of the chosen groups.

    ``"l1"``/``"l2"``: norm of the group's slabs over all member weights that produce or consume the index (Li et al.,
    "Pruning Filters for Efficient ConvNets"; DepGraph's group form), each member divided by its own mean so that wide
    and narrow members count alike. ``"random"``: the baseline; same seed, same scores.
    """
    chosen = list(chosen)
    if callable(criterion):
        return {g: _checked(g, criterion(g, groups)) for g in chosen}
    if criterion == "random":
        rng = np.random.default_rng(seed)
        return {g: rng.random(g.size) for g in chosen}
    if criterion not in POWERS:
        raise ConfigError("unknown criterion", value=criterion, expected=", ".join(CRITERIA) + " or a callable")
    return _magnitude(chosen, POWERS[criterion])


def _checked(g: AxisGroup, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (g.size,) or not np.isfinite(scores).all():
        raise ConfigError(
            "the criterion must return one finite score per index", node=g.name, expected=(g.size,), found=scores.shape
        )
    return scores


def _magnitude(chosen: list[AxisGroup], power: int) -> Scores:
    # |W|^p is reduced once per (weight, axis), weight by weight, so that no weight is held longer than needed.
    wanted: dict[Weight, set[int]] = {}
    for g in chosen:
        for m in members_that_count(g):
            wanted.setdefault(m.weight, set()).add(m.axis)
    sums: dict[tuple[Weight, int], np.ndarray] = {}
    for w, axes in wanted.items():
        data = w.numpy()
        data = data if data.dtype in (np.float32, np.float64) else data.astype(np.float32)
        for axis in axes:
            sums[w, axis] = _reduce(data, axis, power)
    scores: Scores = {}
    for g in chosen:
        total = np.zeros(g.size)
        for m in members_that_count(g):
            at = m.positions(g.atom)
            inside = at >= 0
            part = np.bincount(at[inside], weights=sums[m.weight, m.axis][inside], minlength=g.size)
            mean = part.mean()
            total += part / mean if mean > 0 else part
        scores[g] = total ** (1 / power)
    return scores


def members_that_count(g: AxisGroup) -> list:  # type: ignore[type-arg]
    """The floating members whose slabs make or read the index; gains and tables only if there is nothing else."""
    floating = [m for m in g.members if m.weight.dtype.startswith(("float", "bfloat")) and not m.stat]
    main = [m for m in floating if m.role != "carries" and len(m.weight.shape) > 1]
    return main or floating


def _reduce(data: np.ndarray, axis: int, power: int) -> np.ndarray:
    """Sum of |data|^power over every axis but one, float64."""
    moved = np.moveaxis(data, axis, 0).reshape(data.shape[axis], -1)
    if power == 1:
        return np.abs(moved).sum(axis=1, dtype=np.float64)
    return np.einsum("ij,ij->i", moved, moved, dtype=np.float64)
