"""Plans as data, {weight: {axis: kept indices}}: joining those of several passes, and their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..graph.ir import Graph


def as_data(plan: Any) -> dict[str, dict[int, np.ndarray]]:
    """A plan (mapping, or an object with ``to_dict``) with integer axes and int64 index arrays."""
    data = plan.to_dict() if hasattr(plan, "to_dict") else plan
    return {
        str(weight): {int(axis): np.asarray(kept, dtype=np.int64) for axis, kept in axes.items()}
        for weight, axes in data.items()
    }


def compose(plans: Iterable[Any]) -> dict[str, dict[int, list[int]]]:
    """One plan that does what the given ones do in turn, as plain lists of indices into the first one's axes."""
    joined: dict[str, dict[int, np.ndarray]] = {}
    for plan in plans:
        for weight, axes in as_data(plan).items():
            known = joined.setdefault(weight, {})
            for axis, kept in axes.items():
                known[axis] = known[axis][kept] if axis in known else kept
    return {weight: {axis: kept.tolist() for axis, kept in axes.items()} for weight, axes in joined.items()}


def sizes(plan: Any, graph: Graph) -> dict[str, dict[int, tuple[int, int]]]:
    """Per weight and axis: how many indices are kept, and of how many (in ``graph``, before the plan)."""
    if plan is None:
        return {}
    found: dict[str, dict[int, tuple[int, int]]] = {}
    shapes: Mapping[str, tuple[int, ...]] = {
        name: w.shape for w in graph.weights.values() for name in (w.name, *w.aliases)
    }
    for weight, axes in as_data(plan).items():
        shape = shapes.get(weight)
        if shape is not None:
            found[weight] = {axis: (len(kept), shape[axis]) for axis, kept in axes.items()}
    return found
