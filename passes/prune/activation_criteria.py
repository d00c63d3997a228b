"""Criteria from activations: input norms times weights, mean squares, and the share of zeros."""

from __future__ import annotations

from collections.abc import Mapping

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
    norms: Mapping[str, Moments] = evidence.once("input norms", lambda: _input_norms(evidence))
    parts = []
    for m in members_that_count(g):
        scores = [_weighted(g, m, s, norms[s.x.name]) for s in uses_as_matrix(m.weight)]
        if scores:
            parts.append(np.sum(scores, axis=0))
    return parts


def _weighted(g: AxisGroup, m: Member, site: Site, moments: Moments) -> np.ndarray:
    rms = moments.norm() / np.sqrt(moments.per_channel)
    w = np.abs(m.weight.numpy().astype(np.float64))
    blocks = w.reshape(*site.shape[:2], w.shape[1], -1)
    if site.in_axis == 0:
        scaled = blocks * rms.reshape(site.blocks, -1, 1, 1)
    else:
        scaled = blocks * rms.reshape(site.blocks, 1, -1, 1)
    return slab_sums(g, m, scaled.reshape(w.shape))


def _input_norms(evidence: Evidence) -> Mapping[str, Moments]:
    sites = [s for w in evidence.weights for s in uses_as_matrix(w)]
    return evidence.statistics({s.x.name: Moments(s.x_axis) for s in sites})


@criterion("activation", Needs.CALIBRATION)
def activation(g: AxisGroup, evidence: Evidence) -> Parts:
    """Mean square of the activations where layers read the index; of the layer's output where none does ("Pruning
    Convolutional Neural Networks for Resource Efficient Inference", its baseline of activation size)."""
    moments: dict[tuple[str, int], Statistic] = evidence.once("moments", lambda: _at_readers(evidence, Moments))
    parts = []
    for value, axis, at in _readers(g, evidence):
        m = moments[value.name, axis]
        assert isinstance(m, Moments) and m.squares is not None
        parts.append(_mean(g, m.squares / m.per_channel, at))
    return parts


@criterion("apoz", Needs.CALIBRATION, relative=False)
def apoz(g: AxisGroup, evidence: Evidence) -> Parts:
    """Share of activations that are not zero, one minus the average percentage of zeros, where layers read the index
    ("Network Trimming: A Data-Driven Neuron Pruning Approach"). Groups without any zero (no ReLU) are not judged."""
    counts: dict[tuple[str, int], Statistic] = evidence.once("zeros", lambda: _at_readers(evidence, ZeroCount))
    parts = []
    for value, axis, at in _readers(g, evidence):
        zeros = counts[value.name, axis]
        assert isinstance(zeros, ZeroCount)
        share = _mean(g, zeros.share(), at)
        if share.any():
            parts.append(1 - share)
    return parts


def _readers(g: AxisGroup, evidence: Evidence) -> list[tuple[Value, int, np.ndarray]]:
    """(value, axis, index at each position of the axis) of the activations that meet the group's weights where they
    are read, each value once; of what the layers that make the index give, if none reads it."""
    nodes = [n for m in members_that_count(g) if m.weight.value is not None for n, _ in m.weight.value.uses]
    for ends in ([v for n in nodes for v in n.inputs], [v for n in nodes for v in n.outputs]):
        found = {v.name: place for v in ends if v is not None and (place := _place(v, g, evidence)) is not None}
        if found:
            return list(found.values())
    return []


def _place(value: Value, g: AxisGroup, evidence: Evidence) -> tuple[Value, int, np.ndarray] | None:
    spaces = evidence.groups.analysis.spaces
    if value.is_const or value not in spaces or not value.dtype.startswith(("float", "bfloat")):
        return None
    for axis, e in enumerate(spaces[value]):
        at = coordinates(e, g.atom)
        if (at >= 0).any():
            return value, axis, at
    return None


def _at_readers(evidence: Evidence, kind: type[Moments] | type[ZeroCount]) -> dict[tuple[str, int], Statistic]:
    """One statistic per (value, axis): two groups may lie on different axes of one value."""
    places = [(v.name, axis) for g in evidence.chosen() for v, axis, _ in _readers(g, evidence)]
    wanted: dict[tuple[str, int], Statistic] = {place: kind(place[1]) for place in places}
    together: dict[str, Several] = {}
    for (name, _), statistic in wanted.items():
        together.setdefault(name, Several()).parts.append(statistic)
    evidence.statistics(dict(together))
    return wanted


class Several:
    """Several statistics of one value, fed together."""

    def __init__(self) -> None:
        self.parts: list[Statistic] = []
        self.count = 0

    def update(self, x: np.ndarray) -> None:
        self.count += x.size
        for part in self.parts:
            part.update(x)

    def merge(self, other: Several) -> None:
        self.count += other.count
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)


def _mean(g: AxisGroup, along: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Mean over the positions that stand for each index."""
    return by_index(along, at, g.size) / by_index(np.ones_like(along), at, g.size)
