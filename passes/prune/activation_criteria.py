"""Criteria from activations: input norms times weights, mean squares, and the share of zeros."""

from __future__ import annotations

import numpy as np

from ...graph.groups import AxisGroup, Member
from ...graph.ir import Value
from ...graph.positions import coordinates
from ..base import Needs
from ..calibrate import Moments, Statistic, ZeroCount
from ..sites import Site, uses_as_matrix
from .criterion import Parts, criterion
from .evidence import Evidence
from .slabs import by_index, members_that_count, slab_sums


@criterion("wanda", Needs.CALIBRATION)
def wanda(g: AxisGroup, evidence: Evidence) -> Parts:
    """``sum of |W_oi| * rms(x_i)`` over the slab, x the layer's input: over a column its weights times the size of the
    index itself, over a row all that the index is made of ("A Simple and Effective Pruning Approach for Large Language
    Models", over slabs as in "Fluctuation-based Adaptive Structured Pruning for Large Language Models")."""
    norms: dict[str, Statistic] = evidence.once("input norms", lambda: _input_norms(evidence))
    parts = []
    for m in members_that_count(g):
        scores = [_weighted(g, m, s, norms[s.x.name]) for s in uses_as_matrix(m.weight)]
        if scores:
            parts.append(np.sum(scores, axis=0))
    return parts


def _weighted(g: AxisGroup, m: Member, site: Site, moments: Statistic) -> np.ndarray:
    assert isinstance(moments, Moments)
    rms = moments.norm() / np.sqrt(moments.per_channel)
    w = np.abs(m.weight.numpy().astype(np.float64))
    blocks = w.reshape(*site.shape[:2], w.shape[1], -1)
    if site.in_axis == 0:
        scaled = blocks * rms.reshape(site.blocks, -1, 1, 1)
    else:
        scaled = blocks * rms.reshape(site.blocks, 1, -1, 1)
    return slab_sums(g, m, scaled.reshape(w.shape))


def _input_norms(evidence: Evidence) -> dict[str, Statistic]:
    sites = [s for w in evidence.weights for s in uses_as_matrix(w)]
    return evidence.statistics({s.x.name: Moments(s.x_axis) for s in sites})


@criterion("activation", Needs.CALIBRATION)
def activation(g: AxisGroup, evidence: Evidence) -> Parts:
    """Mean square of the activations where layers read the index; of the layer's output where none does ("Pruning
    Convolutional Neural Networks for Resource Efficient Inference", its baseline of activation size)."""
    moments: dict[str, Statistic] = evidence.once("moments", lambda: _at_readers(evidence, Moments))
    parts = []
    for value, axis, at in _readers(g, evidence):
        m = moments[f"{value.name}"]
        assert isinstance(m, Moments) and m.squares is not None and m.axis == axis
        parts.append(_mean(g, m.squares / m.per_channel, at))
    return parts


@criterion("apoz", Needs.CALIBRATION, relative=False)
def apoz(g: AxisGroup, evidence: Evidence) -> Parts:
    """Share of activations that are not zero, one minus the average percentage of zeros, where layers read the index
    ("Network Trimming: A Data-Driven Neuron Pruning Approach"). Groups without any zero (no ReLU) are not judged."""
    counts: dict[str, Statistic] = evidence.once("zeros", lambda: _at_readers(evidence, ZeroCount))
    parts = []
    for value, _, at in _readers(g, evidence):
        zeros = counts[value.name]
        assert isinstance(zeros, ZeroCount)
        share = _mean(g, zeros.share(), at)
        if share.any():
            parts.append(1 - share)
    return parts


def _readers(g: AxisGroup, evidence: Evidence) -> list[tuple[Value, int, np.ndarray]]:
    """(value, axis, index at each position of the axis) of the inputs of the layers that read the group, each value
    once; of the outputs of the layers that make it, if none does."""
    spaces = evidence.groups.analysis.spaces
    sites = [s for m in members_that_count(g) for s in uses_as_matrix(m.weight)]
    for ends in ([(s.x, s.x_axis) for s in sites], [(s.y, s.y_axis) for s in sites]):
        found = {}
        for value, axis in ends:
            if value in spaces:
                at = coordinates(spaces[value][axis], g.atom)
                if (at >= 0).any():
                    found[value.name] = value, axis, at
        if found:
            return list(found.values())
    return []


def _at_readers(evidence: Evidence, kind: type[Moments] | type[ZeroCount]) -> dict[str, Statistic]:
    judged = evidence.groups if evidence.judged is None else evidence.judged
    return evidence.statistics({v.name: kind(axis) for g in judged for v, axis, _ in _readers(g, evidence)})


def _mean(g: AxisGroup, along: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Mean over the positions that stand for each index."""
    return by_index(along, at, g.size) / by_index(np.ones_like(along), at, g.size)
