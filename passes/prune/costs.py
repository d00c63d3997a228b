"""What any selection would cost, fast: each node and weight is counted once per combination of its own sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ...graph.analysis import Resize
from ...graph.cost import cost, is_parameter, is_size, weight_bytes
from ...graph.groups import AxisGroup, AxisGroups
from ...graph.ir import Node, Value, Weight
from ...graph.ops.macs import macs
from ...graph.space import Atom, atoms
from ..targets import Target


class Estimate(Protocol):
    """Predicts a quantity of the pruned model from how many indices each group keeps (absent groups stay whole)."""

    def __call__(self, counts: Mapping[AxisGroup, int]) -> float: ...


class Part:
    """One term of a sum: a number that depends on the sizes of a few groups."""

    def __init__(self, groups: list[AxisGroup], count: Callable[[dict[AxisGroup, int]], float]) -> None:
        self.groups = groups
        self._count = count
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, counts: Mapping[AxisGroup, int]) -> float:
        key = tuple(counts.get(g, g.size) for g in self.groups)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._count(dict(zip(self.groups, key, strict=True)))
        return found


class Shapes:
    """Nodes and weights of a graph at the sizes they would have, one at a time."""

    def __init__(self, groups: AxisGroups, chosen: Iterable[AxisGroup]) -> None:
        self.analysis = groups.analysis
        self.chosen = {g.atom: g for g in chosen}

    def groups_of(self, values: Iterable[Value | None]) -> list[AxisGroup]:
        """The chosen groups that any of the values' axes mention."""
        found: dict[Atom, None] = {}
        for v in values:
            for e in self.analysis.spaces.get(v, ()) if v is not None else ():
                found.update({a: None for a in atoms(e) if a in self.chosen})
        return [self.chosen[a] for a in found]

    def value(self, v: Value, counts: Mapping[AxisGroup, int]) -> Value:
        """The value with the hint it would have."""
        spaces = self.analysis.spaces.get(v)
        if spaces is None or len(spaces) != len(v.hint or ()):
            return v
        # Sizes need only the length of a selection.
        selection: Any = {g.atom: range(n) for g, n in counts.items()}
        hint = tuple(Resize(self.analysis, selection).shape(v))
        new = replace(v, hint=hint)
        if v.weight is not None:
            new.weight = replace(v.weight, shape=hint)
        return new

    def node(self, n: Node, counts: Mapping[AxisGroup, int]) -> Node:
        """The node over such values."""
        inputs = [None if v is None else self.value(v, counts) for v in n.inputs]
        return replace(n, inputs=inputs, outputs=[self.value(v, counts) for v in n.outputs])


class CostTable:
    """MACs, parameters or bytes of a graph under a selection: what ``preview_cost`` counts, in a fraction of the time.

    Args:
        groups: of the graph.
        chosen: the groups whose sizes vary.
        target: whose quantity to count.
    """

    def __init__(self, groups: AxisGroups, chosen: Iterable[AxisGroup], target: Target) -> None:
        shapes = Shapes(groups, chosen)
        self.fixed = 0.0
        self.parts: list[Part] = []
        whole = cost(groups.graph)
        self.original = target.of(whole)
        if target.metric == "macs":
            for node, item in zip(groups.graph.nodes, whole.nodes, strict=True):
                self._add(shapes.groups_of([*node.inputs, *node.outputs]), _macs_of(shapes, node, item.macs), item.macs)
        else:
            for w in groups.graph.weights.values():
                if not is_size(w):
                    values = [] if w.value is None else [w.value]
                    self._add(shapes.groups_of(values), _size_of(shapes, w, target), _stored(w, target))

    def _add(self, groups: list[AxisGroup], count: Callable[[dict[AxisGroup, int]], float], now: float) -> None:
        if groups and now:
            self.parts.append(Part(groups, count))
        else:
            self.fixed += now

    def __call__(self, counts: Mapping[AxisGroup, int]) -> float:
        return self.fixed + sum(part(counts) for part in self.parts)


def _macs_of(shapes: Shapes, node: Node, counted: int) -> Callable[[dict[AxisGroup, int]], float]:
    """MACs of a node per sample: its work is divided as the whole graph's count divided it."""
    work = macs(node) or 0
    divisor = round(work / counted) if counted else 1
    return lambda counts: (macs(shapes.node(node, counts)) or 0) // divisor


def _size_of(shapes: Shapes, w: Weight, target: Target) -> Callable[[dict[AxisGroup, int]], float]:
    def count(counts: dict[AxisGroup, int]) -> float:
        assert w.value is not None
        resized = shapes.value(w.value, counts).weight
        assert resized is not None
        return _stored(resized, target)

    return count


def _stored(w: Weight, target: Target) -> float:
    if target.metric == "bytes":
        return weight_bytes(w)
    return w.size if is_parameter(w) else 0


def counts_of(kept: Mapping[AxisGroup, np.ndarray]) -> dict[AxisGroup, int]:
    """How many indices each group keeps."""
    return {g: len(k) for g, k in kept.items()}
