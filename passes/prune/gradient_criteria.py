"""Criteria from gradients of the loss: first order (Taylor) and second order (Fisher, Kronecker factors, Hessian).

All estimate the change of the mean loss when an index is removed, in the unit of the loss. Those that see a slab as a
whole judge by the slabs that read the index (zeroing them is what pruning does), all of them at once; where no weight
reads it, by each member that makes it. Those that add up over single elements judge by every member that counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...graph.groups import AxisGroup, Member
from ..base import Needs
from .criterion import Parts, criterion
from .evidence import Evidence
from .slabs import members_that_count, removals, slab_sums


def _whole(g: AxisGroup, score: Callable[[Member, np.ndarray], np.ndarray]) -> Parts:
    """One sum over the slabs of each set of members that removes an index."""
    return [np.sum([slab_sums(g, m, score(m, _data(m))) for m in part], axis=0) for part in removals(g)]


def _each(g: AxisGroup, score: Callable[[Member, np.ndarray], np.ndarray]) -> Parts:
    """One sum over the slab for each member that counts."""
    used = [m for m in members_that_count(g) if m.weight.value is not None and m.weight.value.uses]
    return [slab_sums(g, m, score(m, _data(m))) for m in used]


def _data(m: Member) -> np.ndarray:
    return m.weight.numpy().astype(np.float64)


@criterion("taylor", Needs.GRADIENTS, relative=False)
def taylor(g: AxisGroup, evidence: Evidence) -> Parts:
    """``|sum of g * w|`` over the slabs, g the gradient of the mean loss: the first-order change of the loss
    ("Importance Estimation for Neural Network Pruning"). Says little of a model at a minimum of its loss."""
    return [np.abs(s) for s in _whole(g, lambda m, w: evidence.gradients[m.weight.name] * w)]


@criterion("taylor_elements", Needs.GRADIENTS, relative=False)
def taylor_elements(g: AxisGroup, evidence: Evidence) -> Parts:
    """``sum of |g * w|`` over the slabs: no cancellation inside them ("LLM-Pruner: On the Structural Pruning of Large
    Language Models", its element-wise form)."""
    return _each(g, lambda m, w: np.abs(evidence.gradients[m.weight.name] * w))


@criterion("fisher", Needs.GRADIENTS, relative=False)
def fisher(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 E[(sum of g_n * w)^2]`` over the slabs, g_n the gradient of sample n: Fisher information of a gate on the
    index, so that its elements' correlations count ("Group Fisher Pruning for Practical Network Compression")."""
    return [s / 2 for s in evidence.squared_slopes(g)]


@criterion("obd", Needs.GRADIENTS, relative=False)
def obd(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 sum of E[g_n^2] * w^2``: second-order change of the loss with the diagonal Fisher information in place of
    the Hessian ("Optimal Brain Damage")."""
    return _each(g, lambda m, w: evidence.squared_gradients[m.weight.name] * w**2 / 2)


@criterion("hessian", Needs.GRADIENTS, relative=False)
def hessian(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 sum of H_ii * w^2`` with the true Hessian's diagonal by Hutchinson's estimate over all batches ("Optimal
    Brain Damage"; "AdaHessian: An Adaptive Second Order Optimizer"). Indices of negative curvature score 0."""
    return [np.maximum(s, 0) for s in _each(g, lambda m, w: evidence.hessian_diagonal[m.weight.name] * w**2 / 2)]


@criterion("obd_kfac", Needs.GRADIENTS, relative=False)
def obd_kfac(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 w_S^T (A (x) G) w_S`` over a slab S, with the Gram matrices A of a layer's inputs and G of its output
    gradients: ``1/2 A_ii * w_i^T G w_i`` for a column i, ``1/2 G_oo * w_o^T A w_o`` for a row o ("EigenDamage:
    Structured Pruning in the Kronecker-Factored Eigenbasis"). Linear nodes and convolutions, grouped ones too; the
    factors are independent between layers and between the groups of a convolution: sums over them."""
    scores: dict[tuple[AxisGroup, str, int], np.ndarray] = evidence.once("kfac", lambda: _kfac_scores(evidence))
    parts = []
    for part in removals(g):
        known = [scores[key] for m in part if (key := (g, m.weight.name, m.axis)) in scores]
        if known:
            parts.append(np.sum(known, axis=0))
    return parts


def _kfac_scores(evidence: Evidence) -> dict[tuple[AxisGroup, str, int], np.ndarray]:
    import torch

    from ..sites import pair_sums

    members: dict[str, list[tuple[AxisGroup, Member]]] = {}
    for g in evidence.chosen():
        for m in (m for part in removals(g) for m in part):
            members.setdefault(m.weight.name, []).append((g, m))
    scores: dict[tuple[AxisGroup, str, int], np.ndarray] = {}
    for factor in evidence.kronecker():
        weight = factor.site.weight
        blocks, rows, columns = factor.site.shape
        w = torch.from_numpy(weight.numpy().astype(np.float64).reshape(blocks, rows, columns))
        for g, m in members[weight.name]:
            if m.axis > 1:
                continue
            at = torch.from_numpy(m.positions(g.atom))
            total = scores.setdefault((g, weight.name, m.axis), np.zeros(g.size))
            for b in range(blocks):
                if m.axis == 0:
                    mine = at[b * rows : (b + 1) * rows]
                    total += pair_sums(factor.left[b], w[b] @ factor.right[b], w[b], mine, g.size).numpy() / 2
                else:
                    mine = at.repeat_interleave(columns // len(at))
                    total += pair_sums(factor.right[b], (factor.left[b] @ w[b]).T, w[b].T, mine, g.size).numpy() / 2
    return scores
