"""Boundaries: a value between what makes it and the linear operators that read it, where a map and its inverse cancel.

A map on the channels of a value stands at a boundary when everybody who reads the value undoes it: the readers' weights
take the inverse, what makes the value takes the map. Both are walks of the affine algebra (``passes/fold``); nothing
here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ...graph.groups import AxisGroups
from ...graph.ir import Graph, Node, Value
from ...graph.ops.carry import Stuck, backward
from ...graph.positions import coordinates
from ..base import Context
from ..fold import sinks
from ..fold.affine import Affine
from ..fold.edits import Finished
from ..fold.operands import FLOATS, channel_axis, groups, inputs_first
from ..fold.walk import Walk
from ..rewrite import Env, Refusal, Why

NEUTRAL = ("identity", "reshape", "squeeze", "unsqueeze", "transpose")
"""Operators that stand between a value and its reader without choosing among the elements."""


@dataclass(eq=False)
class Boundary:
    """A value and the linear operators that read it along one of its axes.

    Attributes:
        value: of whose channels the map is.
        axis: its channel axis, counted from 0.
        size: number of channels.
        readers: (linear operator, its operand 0), in graph order; their weights have ``size`` input channels in the
            order of ``value``'s.
    """

    value: Value
    axis: int
    size: int
    readers: list[tuple[Node, Value]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.value.name

    def along(self, scale: np.ndarray, shift: np.ndarray | None = None) -> Affine:
        """The map of one scale (and shift) per channel, on ``value``."""
        assert self.value.rank is not None
        return Affine.along(self.axis, scale, np.zeros(self.size) if shift is None else shift, self.value.rank)


def weight_matrix(node: Node) -> np.ndarray | None:
    """The weight of a linear operator without groups as [out, in] (a kernel as [out * taps, in]); None if none."""
    data = None if node.input(1) is None else node.inputs[1].const()  # type: ignore[union-attr]
    if data is None or data.ndim < 2 or groups(node) != 1 or str(data.dtype) not in FLOATS:
        return None
    if node.op == "matmul":
        return data.T if data.ndim == 2 else None
    return np.moveaxis(data, 0 if inputs_first(node) else 1, -1).reshape(-1, data.shape[0 if inputs_first(node) else 1])


def input_axis(node: Node) -> int | None:
    """The axis of operand 0 that a linear operator with a stored weight contracts; None for other operators."""
    if node.op not in ("linear", "conv", "matmul") or len(node.inputs) < 2:
        return None
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or x.is_const or x.rank is None or weight is None or not weight.is_const:
        return None
    if node.op == "matmul":
        return x.rank - 1 if weight.rank == 2 and x.rank >= 2 else None
    axis = channel_axis(node, x)
    return None if isinstance(axis, Refusal) else axis


def source(value: Value, axis: int) -> tuple[Value, int]:
    """The value that ``value`` is a rearrangement of, as far back as its channel axis stays one axis in its order."""
    size = None if value.hint is None else value.hint[axis]
    while size is not None and value.rank is not None and value.producer is not None and value.producer.op in NEUTRAL:
        node = value.producer
        probe = np.arange(1.0, size + 1).reshape([-1 if a == axis else 1 for a in range(value.rank)])
        try:
            moved = backward(node, 0, value.index, probe, 0.0, False)
        except Stuck:
            break
        wide = [a for a, n in enumerate(moved.shape) if n != 1]
        if len(wide) != 1 or moved.size != size or not np.array_equal(moved.reshape(-1), probe.reshape(-1)):
            break
        first = node.inputs[0]
        assert first is not None
        value, axis = first, wide[0]
    return value, axis


def find_boundaries(graph: Graph, ops: Iterable[str] = ("linear", "matmul")) -> list[Boundary]:
    """The boundaries before all linear operators of these ops with a stored weight, in graph order."""
    wanted = set(ops)
    found: dict[tuple[int, int], Boundary] = {}
    for node in graph.nodes:
        axis = input_axis(node) if node.op in wanted else None
        x = node.inputs[0] if axis is not None else None
        if x is None or axis is None or x.hint is None or x.hint[axis] < 2 or x.dtype not in FLOATS:
            continue
        value, at = source(x, axis)
        there = found.setdefault((id(value), at), Boundary(value, at, x.hint[axis]))
        there.readers.append((node, x))
    return list(found.values())


class BoundaryWalk(Walk):
    """A walk that may change one value whatever else reads it, since its readers were made to undo the change."""

    def __init__(self, env: Env, value: Value) -> None:
        super().__init__(env)
        self.value = value

    def _private(self, value: Value, reader: Node, position: int, affine: Affine) -> Refusal | None:
        if value is self.value and not value.is_output and id(value) not in self.env.captured:
            return None
        return super()._private(value, reader, position, affine)


def rescale(env: Env, boundary: Boundary, factors: np.ndarray) -> Finished | Refusal:
    """The edits that divide the channels of a boundary by ``factors`` (positive) and multiply them in its readers.

    Exact up to the rounding of the stored dtype. Nothing is changed yet: ``Finished.write`` does.
    """
    walk = BoundaryWalk(env, boundary.value)
    if (blocked := below(walk, boundary, factors)) is not None:
        return blocked
    if (blocked := above(walk, boundary, 1.0 / factors)) is not None:
        return blocked
    done = walk.edits.finish()
    return _unbroken(done) if isinstance(done, Finished) else done


def _unbroken(done: Finished) -> Finished | Refusal:
    """Refuse where a scalar would become a vector: it is part of an activation spelled out, which backends fuse."""
    for node, position, data in done.operands:
        stored = None if position < 0 else node.input(position)
        if node.op in sinks.ARITHMETIC and stored is not None and stored.hint is not None:
            if data.size > 1 and np.prod(stored.hint, dtype=np.int64) == 1:
                reason = f"the scalar of {node.name} would become a vector, which breaks the activation it is part of"
                return Refusal(reason, node.name, Why.SIZE)
    return done


def below(walk: Walk, boundary: Boundary, factors: np.ndarray) -> Refusal | None:
    """Let all readers multiply by ``factors``."""
    return walk.down(boundary.value, boundary.along(factors))


def above(walk: Walk, boundary: Boundary, factors: np.ndarray) -> Refusal | None:
    """Let what makes the value multiply it by ``factors``."""
    reader, position = next((n, k) for n, k in boundary.value.uses if n.op != "shape_of")
    return walk.up(reader, position, boundary.along(factors))


def environment(graph: Graph, ctx: Context) -> Env:
    """What the walks may ask about the graph."""
    return Env(graph, ctx)


def shared_channels(groups: AxisGroups, boundary: Boundary) -> list[np.ndarray]:
    """Ways in which channels may have to share a factor because one channel above feeds several, the finest first.

    Each is a class per channel, int64 [size]. Under grouped queries each value head is copied for several query heads:
    channels that differ only in what the weight above does not know are one class.
    """
    node = boundary.readers[0][0]
    weight = node.inputs[1]
    if weight is None or weight.weight is None or weight not in groups.analysis.spaces or node.op == "conv":
        return []
    axis = 0 if node.op == "matmul" or inputs_first(node) else 1
    space = groups.analysis.of(weight)[axis]
    here = groups.of(weight.weight, axis)
    found: dict[tuple[int, ...], np.ndarray] = {}
    for other in dict.fromkeys(m.weight for g in here for m in g.members if m.role in ("produces", "both")):
        known = [g for g in here if any(m.weight is other and m.role in ("produces", "both") for m in g.members)]
        if other is weight.weight or len(known) == len(here):
            continue
        places = np.stack([coordinates(space, g.atom) for g in known], 1)
        found.setdefault(
            tuple(here.index(g) for g in known), np.unique(places, axis=0, return_inverse=True)[1].reshape(-1)
        )
    return sorted(found.values(), key=lambda classes: -int(classes.max()))
