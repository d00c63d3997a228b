"""Criteria from gradients of the loss: first order (Taylor) and second order (Fisher, Kronecker factors, Hessian).

All estimate the change of the mean loss when a slab is set to zero, in the unit of the loss, member by member: rows
that make an index and columns that read it are two estimates of the same removal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...graph.groups import AxisGroup, Member
from ..base import Needs
from .criterion import Parts, criterion
from .evidence import Evidence
from .slabs import members_that_count, slab_sums


def _each(g: AxisGroup, score: Callable[[Member, np.ndarray], np.ndarray]) -> Parts:
    used = [m for m in members_that_count(g) if m.weight.value is not None and m.weight.value.uses]
    return [score(m, m.weight.numpy().astype(np.float64)) for m in used]


@criterion("taylor", Needs.GRADIENTS, relative=False)
def taylor(g: AxisGroup, evidence: Evidence) -> Parts:
    """``|sum of g * w|`` over the slab, g the gradient of the mean loss: the first-order change of the loss
    ("Importance Estimation for Neural Network Pruning")."""
    return _each(g, lambda m, w: np.abs(slab_sums(g, m, evidence.gradients[m.weight.name] * w)))


@criterion("taylor_elements", Needs.GRADIENTS, relative=False)
def taylor_elements(g: AxisGroup, evidence: Evidence) -> Parts:
    """``sum of |g * w|`` over the slab: no cancellation inside it ("LLM-Pruner: On the Structural Pruning of Large
    Language Models", its element-wise form)."""
    return _each(g, lambda m, w: slab_sums(g, m, np.abs(evidence.gradients[m.weight.name] * w)))


@criterion("fisher", Needs.GRADIENTS, relative=False)
def fisher(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 E[(sum of g_n * w)^2]`` over the slab, g_n the gradient of sample n: Fisher information of a gate on the
    slab, so that its elements' correlations count ("Group Fisher Pruning for Practical Network Compression")."""
    return _each(g, lambda m, _: evidence.squared_slopes(g, m) / 2)


@criterion("obd", Needs.GRADIENTS, relative=False)
def obd(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 sum of E[g_n^2] * w^2``: second-order change of the loss with the diagonal Fisher information in place of
    the Hessian ("Optimal Brain Damage")."""
    return _each(g, lambda m, w: slab_sums(g, m, evidence.squared_gradients[m.weight.name] * w**2) / 2)


@criterion("hessian", Needs.GRADIENTS, relative=False)
def hessian(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 sum of H_ii * w^2`` with the true Hessian's diagonal by Hutchinson's estimate over all batches ("Optimal
    Brain Damage"; "AdaHessian: An Adaptive Second Order Optimizer"). Slabs of negative curvature score 0."""
    return _each(g, lambda m, w: np.maximum(slab_sums(g, m, evidence.hessian_diagonal[m.weight.name] * w**2) / 2, 0))


@criterion("obd_kfac", Needs.GRADIENTS, relative=False)
def obd_kfac(g: AxisGroup, evidence: Evidence) -> Parts:
    """``1/2 w_S^T (A (x) G) w_S`` over the slab S, with the Gram matrices A of a layer's inputs and G of its output
    gradients: ``1/2 G_oo * w_o^T A w_o`` for a row o, ``1/2 A_ii * w_i^T G w_i`` for a column i ("EigenDamage:
    Structured Pruning in the Kronecker-Factored Eigenbasis"). Linear nodes and convolutions, grouped ones too; the
    factors are independent between the groups of a convolution. A weight used at several places sums over them."""
    scores: dict[tuple[AxisGroup, str, int], np.ndarray] = evidence.once("kfac", lambda: _kfac_scores(evidence))
    keys = [(g, m.weight.name, m.axis) for m in members_that_count(g)]
    return [scores[k] for k in keys if k in scores]


def _kfac_scores(evidence: Evidence) -> dict[tuple[AxisGroup, str, int], np.ndarray]:
    import torch

    from ..sites import pair_sums

    members: dict[str, list[tuple[AxisGroup, Member]]] = {}
    for g, m in evidence.members():
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
