"""What a graph would cost under a selection, without applying it: the same nodes over values with new sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from .analysis import Resize
from .cost import Cost, cost
from .groups import AxisGroup, AxisGroups
from .ir import Graph, Node, Value, Weight


class _Shadow:
    """The part of Graph that counting reads."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.weights: dict[str, Weight] = {}


def preview_cost(groups: AxisGroups, kept: Mapping[AxisGroup, np.ndarray]) -> Cost:
    """Parameters, bytes and MACs of the graph once each group keeps the given indices. Nothing is changed or loaded."""
    return cost(shadow(groups, kept))


def shadow(groups: AxisGroups, kept: Mapping[AxisGroup, np.ndarray]) -> Graph:
    """A read-only stand-in for the graph with the hints and weight shapes it would have under the selection."""
    graph, an = groups.graph, groups.analysis
    selection = {g.atom: np.asarray(k) for g, k in kept.items()}
    re = Resize(an, selection)
    out = _Shadow()
    values: dict[Value, Value] = {}

    def copy(v: Value) -> Value:
        new = values.get(v)
        if new is None:
            hint = tuple(re.shape(v)) if v in an.spaces and len(an.spaces[v]) == len(v.hint or ()) else v.hint
            new = values[v] = replace(v, hint=hint)
            if v.weight is not None and hint is not None:
                new.weight = weights.get(v.weight) or replace(v.weight, shape=hint)
                weights[v.weight] = new.weight
        return new

    weights: dict[Weight, Weight] = {}
    for n in graph.nodes:
        inputs = [None if v is None else copy(v) for v in n.inputs]
        out.nodes.append(replace(n, inputs=inputs, outputs=[copy(v) for v in n.outputs]))
    out.inputs = [copy(v) for v in graph.inputs]
    out.outputs = [copy(v) for v in graph.outputs]
    out.weights = {name: weights.get(w, w) for name, w in graph.weights.items()}
    return cast(Graph, out)
