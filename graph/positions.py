"""Reading index-space expressions under a selection: new sizes, kept positions, per-position factors, coordinates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TypeAlias

import numpy as np

from .space import Atom, Leaf, Space, Sum, norm

Selection: TypeAlias = Mapping[Atom, np.ndarray]


def size_after(e: Space, selection: Selection) -> int:
    """Size of an axis once each atom keeps the selected indices only."""
    if type(e) is not Leaf or e.atom.binding is not None:
        e = norm(e)
    if isinstance(e, Leaf):
        kept = selection.get(e.atom)
        return e.size if kept is None else len(kept)
    if isinstance(e, Sum):
        return sum(size_after(t, selection) for t in e.terms)
    return prod(size_after(f, selection) for f in e.factors)


def kept_positions(e: Space, selection: Selection) -> np.ndarray:
    """Old positions that an axis keeps, in their new order, once each atom is gathered by its selection.

    A selection is an index list per atom: a subset (select), or all indices in a new order (permute).
    """
    e = norm(e)
    if isinstance(e, Leaf):
        kept = selection.get(e.atom)
        if kept is None:
            return np.arange(e.size)
        if e.perm is None:
            return kept
        # Order inside a permuted occurrence: as before the action, so that every occurrence stays consistent.
        inverse = np.empty_like(e.perm)
        inverse[e.perm] = np.arange(e.size)
        return np.asarray(np.sort(inverse[kept]))
    if isinstance(e, Sum):
        out, offset = [], 0
        for t in e.terms:
            out.append(kept_positions(t, selection) + offset)
            offset += t.size
        return np.concatenate(out) if out else np.arange(0)
    result = np.zeros(1, dtype=np.int64)
    for f in e.factors:
        result = (result[:, None] * f.size + kept_positions(f, selection)[None, :]).reshape(-1)
    return result


def spread(
    e: Space, vectors: Mapping[Atom, np.ndarray], combine: Callable[..., np.ndarray] = np.multiply
) -> np.ndarray:
    """Per-position product over the axis of one factor per atom index (atoms without a vector count as 1)."""
    e = norm(e)
    if isinstance(e, Leaf):
        v = vectors.get(e.atom)
        if v is None:
            return np.ones(e.size)
        return v if e.perm is None else v[e.perm]
    if isinstance(e, Sum):
        return np.concatenate([spread(t, vectors, combine) for t in e.terms])
    result = np.ones(1)
    for f in e.factors:
        result = combine(result[:, None], spread(f, vectors, combine)[None, :]).reshape(-1)
    return result


def coordinates(e: Space, atom: Atom) -> np.ndarray:
    """For each position of the axis the index of ``atom`` it stands for, -1 where it stands for none."""
    e = norm(e)
    if isinstance(e, Leaf):
        if e.atom is not atom:
            return np.full(e.size, -1)
        return np.arange(e.size) if e.perm is None else e.perm
    if isinstance(e, Sum):
        return np.concatenate([coordinates(t, atom) for t in e.terms]) if e.terms else np.arange(0)
    result = np.full(1, -1)
    for f in e.factors:
        result = np.maximum(result[:, None], coordinates(f, atom)[None, :]).reshape(-1)
    return result
