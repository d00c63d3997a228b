"""Plans of several passes joined into one, and their sizes for the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..graph.groups import axis_groups
from ..graph.ir import Graph
from ..graph.plans import Plan
from ..graph.plans import complete as complete_in
from .base import Context, Reference


def as_data(plan: Any) -> dict[str, dict[int, np.ndarray]]:
    """A plan, or its data ``{weight: {axis: kept indices}}``, with integer axes and int64 index arrays."""
    data = plan.weights if isinstance(plan, Plan) else plan
    return {
        str(weight): {int(axis): np.asarray(kept, dtype=np.int64) for axis, kept in axes.items()}
        for weight, axes in data.items()
    }


def compose(plans: Iterable[Any], graph: Graph) -> Plan:
    """One plan that does what the given ones do in turn, in terms of ``graph``, the model that came in.

    Weights that came into being in between (a folded bias) are in no plan of the model that came in: they are left
    out.
    """
    plans = list(plans)
    if len(plans) == 1 and isinstance(plans[0], Plan) and _is_of(plans[0], graph):
        return plans[0]
    joined: dict[str, dict[int, np.ndarray]] = {}
    for plan in plans:
        for weight, axes in as_data(plan).items():
            so_far = joined.setdefault(weight, {})
            for axis, kept in axes.items():
                so_far[axis] = so_far[axis][kept] if axis in so_far else kept
    known = _names(graph)
    if not known.issuperset(joined):  # selecting passes give vectors that layers share by accident copies of their own
        graph = graph.clone()
        graph.separate_shared()
        known = _names(graph)
    return Plan.of(graph, {n: {a: k.tolist() for a, k in axes.items()} for n, axes in joined.items() if n in known})


def _is_of(plan: Plan, graph: Graph) -> bool:
    """Is this plan in terms of ``graph`` already?"""
    found = [(graph.weights.get(name), shape, plan.names(name)) for name, shape in plan.shapes.items()]
    return all(
        w is not None and list(w.shape) == shape and set(names) == {w.name, *w.aliases} for w, shape, names in found
    )


def _names(graph: Graph) -> set[str]:
    return {name for w in graph.weights.values() for name in (w.name, *w.aliases)}


def remember(ctx: Context, before: Graph | None, plan: Plan) -> None:
    """Leave a selection in ``ctx.reference`` for later passes: ``before`` is the graph it was made in, as it was."""
    if ctx.last:
        return
    assert before is not None
    if ctx.reference is None:
        ctx.reference = Reference(before, plan)
    else:
        ctx.reference = Reference(ctx.reference.graph, compose([ctx.reference.plan, plan], ctx.reference.graph))


def complete(plan: Plan, graph: Graph) -> Plan:
    """A plan made after other passes, extended to what they removed from ``graph`` (a folded norm's weights).

    The axis groups of ``graph`` say where else the indices occur.

    Raises:
        ConstraintError: the axes of ``graph`` do not correspond (an earlier pass merged or reordered them).
    """
    return complete_in(axis_groups(graph), plan)


def sizes(plan: Any, graph: Graph) -> dict[str, dict[int, tuple[int, int]]]:
    """Per weight and axis: how many indices are kept, and of how many (in ``graph``, before the plan)."""
    if plan is None:
        return {}
    if isinstance(plan, Plan):
        known = _names(graph)
        return {
            weight: {axis: (len(kept), plan.shapes[weight][axis]) for axis, kept in axes.items()}
            for weight, axes in plan.weights.items()
            if weight in known
        }
    shapes = {name: w.shape for w in graph.weights.values() for name in (w.name, *w.aliases)}
    return {
        weight: {axis: (len(kept), shapes[weight][axis]) for axis, kept in axes.items()}
        for weight, axes in as_data(plan).items()
        if weight in shapes
    }
