"""Importance of every index of an axis group: small functions of one member's slabs, reduced over the members."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import numpy as np

from ...graph.errors import ConfigError
from ...graph.groups import AxisGroup, AxisGroups, Member
from .evidence import Evidence

Scores: TypeAlias = dict[AxisGroup, np.ndarray]
"""One float64 score per index of each group; higher is more important."""
Criterion: TypeAlias = Callable[[AxisGroup, AxisGroups], np.ndarray]
"""A user's own criterion: (group, all groups) -> one score per index."""
Reduction: TypeAlias = Literal["mean", "sum", "max", "first", "product"]

NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm")


def l1(slabs: np.ndarray) -> np.ndarray:
    """Sum of absolute values ("Pruning Filters for Efficient ConvNets")."""
    return np.abs(slabs).sum(axis=1, dtype=np.float64)


def l2(slabs: np.ndarray) -> np.ndarray:
    """Euclidean norm; over all members of a group the criterion of "DepGraph: Towards Any Structural Pruning"."""
    return np.sqrt(np.einsum("ij,ij->i", slabs, slabs, dtype=np.float64))


def linf(slabs: np.ndarray) -> np.ndarray:
    """Largest absolute value."""
    return np.asarray(np.abs(slabs).max(axis=1), dtype=np.float64)


def fpgm(slabs: np.ndarray) -> np.ndarray:
    """Sum of distances to all other slabs: what lies near the geometric median is replaceable ("Filter Pruning via
    Geometric Median")."""
    x = slabs.astype(np.float64)
    square = np.einsum("ij,ij->i", x, x)
    distance = np.sqrt(np.maximum(square[:, None] + square[None, :] - 2 * (x @ x.T), 0))
    return np.asarray(distance.sum(axis=1))


def cosine(slabs: np.ndarray) -> np.ndarray:
    """One minus the largest absolute cosine with another slab: a near copy of another index can go."""
    x = slabs.astype(np.float64)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    similar = np.abs(x @ x.T)
    np.fill_diagonal(similar, 0)
    return np.asarray(1 - similar.max(axis=1))


CRITERIA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l1": l1,
    "l2": l2,
    "linf": linf,
    "fpgm": fpgm,
    "cosine": cosine,
    "norm_scale": l1,
}
"""Each maps one member's slabs, float (indices, elements per index), to a score per index. ``norm_scale`` reads the
gains of normalizations only ("Learning Efficient Convolutional Networks through Network Slimming")."""
NAMES = (*CRITERIA, "random")


def importance(
    groups: AxisGroups,
    chosen: Iterable[AxisGroup],
    criterion: str | Criterion,
    seed: int,
    reduction: Reduction = "mean",
    evidence: Evidence | None = None,
) -> Scores:
    """Scores of every index of the chosen groups (groups that a criterion cannot judge are left out).

    Each member's scores are divided by their mean, so that wide and narrow members count alike, and then reduced over
    the members. ``"random"`` is the baseline: same seed, same scores.

    Raises:
        ConfigError: unknown criterion, or a user's criterion that does not return one finite score per index.
    """
    chosen = list(chosen)
    if callable(criterion):
        return {g: _checked(g, criterion(g, groups)) for g in chosen}
    if criterion == "random":
        rng = np.random.default_rng(seed)
        return {g: rng.random(g.size) for g in chosen}
    if criterion not in CRITERIA:
        raise ConfigError("unknown criterion", value=criterion, expected=", ".join(NAMES) + " or a callable")
    judged = _gains if criterion == "norm_scale" else members_that_count
    scores: Scores = {}
    for g in chosen:
        parts = [_relative(CRITERIA[criterion](slabs_of(g, m))) for m in judged(g)]
        if parts:
            scores[g] = _reduce(parts, reduction)
    return scores


def _checked(g: AxisGroup, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (g.size,) or not np.isfinite(scores).all():
        raise ConfigError(
            "the criterion must return one finite score per index", node=g.name, expected=(g.size,), found=scores.shape
        )
    return scores


def _relative(scores: np.ndarray) -> np.ndarray:
    mean = float(scores.mean())
    return scores / mean if mean > 0 else scores


def _reduce(parts: list[np.ndarray], reduction: Reduction) -> np.ndarray:
    stacked = np.stack(parts)
    if reduction == "first":
        return parts[0]
    if reduction == "product":
        return np.asarray(stacked.prod(axis=0))
    if reduction == "max":
        return np.asarray(stacked.max(axis=0))
    return np.asarray(stacked.sum(axis=0) if reduction == "sum" else stacked.mean(axis=0))


def slabs_of(g: AxisGroup, member: Member) -> np.ndarray:
    """The member's data as one row per group index, (size, elements per index), float32 or float64."""
    data = member.weight.numpy()
    if data.dtype not in (np.float32, np.float64):
        data = data.astype(np.float32)
    at = member.positions(g.atom)
    order = np.argsort(at, kind="stable")[int((at < 0).sum()) :]
    return np.ascontiguousarray(np.moveaxis(data, member.axis, 0)[order]).reshape(g.size, -1)


def members_that_count(g: AxisGroup) -> list[Member]:
    """The floating members whose slabs make or read the index; gains and tables only if there is nothing else."""
    floating = [m for m in g.members if m.weight.dtype.startswith(("float", "bfloat")) and not m.stat]
    main = [m for m in floating if m.role != "carries" and len(m.weight.shape) > 1]
    return main or floating


def _gains(g: AxisGroup) -> list[Member]:
    """Members that are the gain of a normalization."""
    return [
        m
        for m in g.members
        if m.weight.value is not None and any(n.op in NORMS and i == 1 for n, i in m.weight.value.uses)
    ]
