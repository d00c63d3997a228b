"""Criteria that look at the weights alone: magnitudes, gains of norms, and how replaceable a slab is by others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...graph.groups import AxisGroup
from .criterion import Parts, PartsFunction, criterion
from .evidence import Evidence
from .slabs import gains, members_that_count, slab_norms, slabs_of


def of_slabs(function: Callable[[np.ndarray], np.ndarray]) -> PartsFunction:
    """A criterion from a function of one member's slabs, float (indices, elements per index)."""

    def parts(g: AxisGroup, _: Evidence) -> Parts:
        return [function(slabs_of(g, m)) for m in members_that_count(g)]

    parts.__doc__ = function.__doc__
    return parts


def l1(g: AxisGroup, evidence: Evidence) -> Parts:
    """Sum of absolute values ("Pruning Filters for Efficient ConvNets")."""
    return [slab_norms(g, m, 1, evidence) for m in members_that_count(g)]


def l2(g: AxisGroup, evidence: Evidence) -> Parts:
    """Euclidean norm; over all members of a group the criterion of "DepGraph: Towards Any Structural Pruning"."""
    return [slab_norms(g, m, 2, evidence) for m in members_that_count(g)]


def linf(g: AxisGroup, evidence: Evidence) -> Parts:
    """Largest absolute value."""
    return [slab_norms(g, m, np.inf, evidence) for m in members_that_count(g)]


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


def lamp(slabs: np.ndarray) -> np.ndarray:
    """Squared norm over the sum of all squared norms that are not smaller: comparable between layers without another
    normalizer ("Layer-adaptive Sparsity for the Magnitude-based Pruning")."""
    squares = np.einsum("ij,ij->i", slabs, slabs, dtype=np.float64)
    order = np.argsort(squares, kind="stable")
    ascending = squares[order]
    scores = np.empty_like(squares)
    scores[order] = ascending / np.maximum(np.cumsum(ascending[::-1])[::-1], 1e-300)
    return scores


for _parts in (l1, l2, linf):
    criterion(_parts.__name__)(_parts)
for _function in (fpgm, cosine):
    criterion(_function.__name__)(of_slabs(_function))
criterion("lamp", relative=False)(of_slabs(lamp))


@criterion("norm_scale")
def norm_scale(g: AxisGroup, evidence: Evidence) -> Parts:
    """Absolute gains of the normalizations on the indices ("Learning Efficient Convolutional Networks through Network
    Slimming"); groups without one are not judged."""
    return [slab_norms(g, m, 1, evidence) for m in gains(g)]
