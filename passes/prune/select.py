"""Which indices each group keeps: uniform, global and isomorphic ratios, fixed ratios, equal widths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import numpy as np

from ...graph.actions import Plan, select
from ...graph.groups import AxisGroup, AxisGroups, axis_groups
from ...graph.ir import Graph
from .importance import Scores
from .widths import Widths

Kept: TypeAlias = dict[AxisGroup, np.ndarray]
Normalizer: TypeAlias = Literal["mean", "max", "sum", "gaussian", "lamp", "none"]


def keep_best(scores: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n highest scores, ascending; ties go to the lower index."""
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[:n])


def uniform(scores: Scores, ratio: float, widths: Widths) -> Kept:
    """The same share ``ratio`` of every group goes."""
    return {g: keep_best(s, widths.count(g, g.size * (1 - ratio))) for g, s in scores.items()}


def fixed(scores: Scores, ratios: Mapping[AxisGroup, float], widths: Widths) -> Kept:
    """Each listed group loses the share that was asked of it; 0 keeps it whole."""
    return {g: keep_best(scores[g], widths.count(g, g.size * (1 - r))) for g, r in ratios.items() if g in scores}


def equalized(kept: Kept, classes: Iterable[list[AxisGroup]], scores: Scores, widths: Widths) -> Kept:
    """Groups of one class keep the same number of indices, their mean, each its own best."""
    out = dict(kept)
    for members in classes:
        here = [g for g in members if g in kept]
        if len(here) > 1:
            n = widths.together(here, sum(len(kept[g]) for g in here) / len(here))
            out.update({g: keep_best(scores[g], n) for g in here})
    return out


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
    sizes = np.abs(scores)  # a callable may score below zero
    scale = {"mean": sizes.mean(), "max": sizes.max(), "sum": sizes.sum()}[normalizer]
    return np.asarray(scores / max(float(scale), 1e-30))


def ranked(scores: Scores, ratio: float, widths: Widths, normalizer: Normalizer = "mean") -> Kept:
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
        kept[g] = keep_best(s, widths.count(g, n))
        at += g.size
    return kept


def isomorphic(scores: Scores, ratio: float, widths: Widths, normalizer: Normalizer = "mean") -> Kept:
    """As :func:`ranked`, but only groups of one structure compete ("Isomorphic Pruning for Vision Models")."""
    classes: dict[tuple[tuple[str, int, int, str], ...], Scores] = {}
    for g, s in scores.items():
        classes.setdefault(structure(g), {})[g] = s
    kept: Kept = {}
    for alike in classes.values():
        kept.update(ranked(alike, ratio, widths, normalizer))
    return {g: kept[g] for g in scores}


def structure(g: AxisGroup) -> tuple[tuple[str, int, int, str], ...]:
    """The kinds of places a group occurs in: (op, operand, axis, role), each once, sorted."""
    places = {
        (n.op, i, m.axis, m.role) for m in g.members if m.weight.value is not None for n, i in m.weight.value.uses
    }
    return tuple(sorted(places))


def cut_clone(groups: AxisGroups, kept: Kept) -> Graph:
    """A clone of the graph with the selection applied."""
    return cut_with_plan(groups, kept)[0]


def cut_with_plan(groups: AxisGroups, kept: Kept) -> tuple[Graph, Plan]:
    """A clone of the graph with the selection applied, and what was done."""
    clone = groups.graph.clone()
    twins = axis_groups(clone)
    where = {g: i for i, g in enumerate(groups)}
    plan = select(twins, {twins.groups[where[g]]: k for g, k in kept.items() if len(k) < g.size})
    return clone, plan
