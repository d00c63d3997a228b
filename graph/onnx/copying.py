"""Copying an ONNXGraph: a new native model that shares its tensors, and what is known of its shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .names import native_values

if TYPE_CHECKING:
    from .graph import ONNXGraph


def clone(g: ONNXGraph) -> ONNXGraph:
    """See ``Graph.clone``."""
    from .graph import ONNXGraph

    model = g.model.clone()
    pairs = dict(zip(native_values(g.model), native_values(model), strict=True))
    other = ONNXGraph(model, form=g.form, table=g.table.moved_to(model, pairs))
    nodes = dict(zip(g.model.graph, model.graph, strict=True))
    other.dirty = {nodes[n] for n in g.dirty if n in nodes}
    other.moved = {pairs[v] for v in g.moved if v in pairs}
    other.idle = [pairs[v] for v in g.idle if v in pairs]
    other.source, other.baked, other.notes = g.source, g.baked, list(g.notes)
    return other
