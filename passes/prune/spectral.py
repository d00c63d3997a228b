"""Spectral criterion: how concentrated the weights of an index are in Fourier space."""

from __future__ import annotations

import numpy as np

from ...graph.groups import AxisGroup, Member
from ...graph.space import Sum, norm
from .criterion import Parts, criterion
from .evidence import Evidence
from .slabs import members_that_count


@criterion("spectral", relative=False)
def spectral(g: AxisGroup, evidence: Evidence) -> Parts:
    """Inverse participation ratio of the Fourier weights, the mean over the axes that the slab runs along: near 1 for
    a periodic slab (one frequency), near 0 for one that spreads over all frequencies, which memorises and goes first
    ("To grok or not to grok: Disentangling generalization and memorization on corrupted algorithmic datasets").

    The transform runs along the matrix's other axis; where the graph concatenates that axis from parts, along each
    part. Says something of networks on modular or periodic data; elsewhere it is a number like any other."""
    found = []
    for m in members_that_count(g):
        data = m.weight.numpy()
        if data.ndim > 1:
            found.append(_member(g, m, evidence))
    return found


def _member(g: AxisGroup, member: Member, evidence: Evidence) -> np.ndarray:
    """Mean ratio over every row of every slab, float64 [size]."""
    data = member.weight.numpy().astype(np.float64)
    other = 1 if member.axis == 0 else 0
    lengths = _parts(member, other, evidence)
    rows = np.moveaxis(data, (member.axis, other), (0, -1)).reshape(data.shape[member.axis], -1, data.shape[other])
    ratio = np.zeros(rows.shape[:2])
    start = 0
    for length in lengths:
        ratio += participation(rows[..., start : start + length]) / len(lengths)
        start += length
    at = member.positions(g.atom)
    valid = at >= 0
    count = np.bincount(at[valid], minlength=g.size)
    return np.bincount(at[valid], weights=ratio.mean(1)[valid], minlength=g.size) / count


def _parts(member: Member, axis: int, evidence: Evidence) -> list[int]:
    """Lengths of the parts that the axis is concatenated from."""
    value = member.weight.value
    spaces = evidence.groups.analysis.spaces
    e = norm(spaces[value][axis]) if value is not None and value in spaces else None
    return [t.size for t in e.terms] if isinstance(e, Sum) else [member.weight.shape[axis]]


def participation(x: np.ndarray) -> np.ndarray:
    """Inverse participation ratio along the last axis: sum of |F|^4 over the square of the sum of |F|^2, F the real
    Fourier transform of x without its mean; in (0, 1], 0 for a constant."""
    power = np.abs(np.fft.rfft(x - x.mean(-1, keepdims=True), axis=-1)) ** 2
    total = power.sum(-1, keepdims=True)
    share = np.divide(power, total, out=np.zeros_like(power), where=total > 0)
    return np.asarray((share**2).sum(-1))
