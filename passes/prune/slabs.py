"""The slabs of a group in one weight: as rows, and the sums over them of anything that has the weight's shape."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from ...graph.groups import AxisGroup, Member
from ...graph.quantized import is_numeric, real
from ...graph.space import Leaf, norm

if TYPE_CHECKING:
    from .evidence import Evidence

NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm", "instance_norm")


def slabs_of(g: AxisGroup, member: Member) -> np.ndarray:
    """The member's data as one row per group index, (size, elements per index), float32 or float64."""
    data = real(member.weight)
    if data.dtype not in (np.float32, np.float64):
        data = data.astype(np.float32)
    at = member.positions(g.atom)
    order = np.argsort(at, kind="stable")[int((at < 0).sum()) :]
    return np.ascontiguousarray(np.moveaxis(data, member.axis, 0)[order]).reshape(g.size, -1)


def slab_norms(g: AxisGroup, member: Member, order: float, evidence: Evidence) -> np.ndarray:
    """The 1-, 2- or infinity-norm of every index's slab, float64 [size], without gathering the slabs.

    One axis may hold many groups (a dense block's input): it is added up once for all of them.
    """
    key = f"norm {order} of {member.weight.name}[{member.axis}]"
    along = evidence.once(key, lambda: _norms_along(real(member.weight), member.axis, order))
    space = norm(member.space)
    if isinstance(space, Leaf) and space.atom is g.atom and space.perm is None:  # each position stands for itself
        return np.sqrt(along) if order == 2 else along.astype(np.float64)
    at = member.positions(g.atom)
    if order == np.inf:
        found = np.zeros(g.size)
        np.maximum.at(found, at[at >= 0], along[at >= 0])
        return found
    return by_index(along, at, g.size) if order == 1 else np.sqrt(by_index(along, at, g.size))


def _norms_along(data: np.ndarray, axis: int, order: float) -> np.ndarray:
    """Per position of an axis: sum of absolutes (1), of squares (2) or the largest absolute (inf), float64.

    Added up in the weight's own precision over blocks of some thousand elements, and in float64 over the blocks.
    """
    if data.dtype not in (np.float32, np.float64):
        data = data.astype(np.float32)
    size = data.shape[axis]
    x = data.reshape(prod(data.shape[:axis]), size, -1)
    if order == 2 and data.size <= 4096:  # one block
        return np.einsum("pnq,pnq->n", x, x).astype(np.float64)
    total = np.zeros(size)
    for rows in range(0, len(x), 256):
        for columns in range(0, x.shape[2], 4096):
            block = x[rows : rows + 256, :, columns : columns + 4096]
            if order == 2 and len(block) > 8 and block.shape[2] < 64:  # short rows: added up side by side
                rows_of = block.reshape(len(block), -1)
                squares = np.einsum("pm,pm->m", rows_of, rows_of).reshape(size, -1)
                total += squares[:, 0] if squares.shape[1] == 1 else squares.sum(axis=1, dtype=np.float64)
            elif order == 2:
                total += np.einsum("pnq,pnq->pn", block, block).sum(axis=0, dtype=np.float64)
            elif order == 1:
                total += np.einsum("pnq->pn", np.abs(block)).sum(axis=0, dtype=np.float64)
            else:
                np.maximum(total, np.abs(block).max(axis=(0, 2)), out=total)
    return total


def members_that_count(g: AxisGroup) -> list[Member]:
    """The floating members whose slabs make or read the index; gains and tables only if there is nothing else."""
    floating = [m for m in g.members if is_numeric(m.weight) and not m.stat]
    main = [m for m in floating if m.role != "carries" and len(m.weight.shape) > 1]
    return main or floating


def removals(g: AxisGroup) -> list[list[Member]]:
    """Sets of members each of which, set to zero, removes the index from the network.

    All that read it are one set: zeroing what is read is what pruning does, while a zeroed row still leaves its bias
    and the shift of a norm. Where no weight reads it (head dims of queries and keys), each of the others is one.
    """
    used = [m for m in members_that_count(g) if m.weight.value is not None and m.weight.value.uses]
    read = [m for m in used if m.role == "consumes"]
    return [read] if read else [[m] for m in used]


def gains(g: AxisGroup) -> list[Member]:
    """Members that are the gain of a normalization."""
    return [
        m
        for m in g.members
        if m.weight.value is not None and any(n.op in NORMS and i == 1 for n, i in m.weight.value.uses)
    ]


def slab_sums(g: AxisGroup, member: Member, elements: np.ndarray) -> np.ndarray:
    """Sum over the slab of every index, float64 [size]; ``elements`` has the shape of the weight."""
    rest = tuple(i for i in range(elements.ndim) if i != member.axis)
    return by_index(elements.sum(axis=rest, dtype=np.float64), member.positions(g.atom), g.size)


def by_index(along: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """Sums of the entries of the last axis per group index, [..., size]: ``at`` says which each stands for, -1 for
    none."""
    if len(at) == size and bool((at == np.arange(size)).all()):
        return along.astype(np.float64)
    order = np.argsort(at, kind="stable")[int((at < 0).sum()) :]
    counts = np.bincount(at[order], minlength=size)
    found = np.zeros((*along.shape[:-1], size))
    present = np.nonzero(counts)[0]
    if len(present):
        starts = (np.cumsum(counts) - counts)[present]
        found[..., present] = np.add.reduceat(along[..., order].astype(np.float64), starts, axis=-1)
    return found
