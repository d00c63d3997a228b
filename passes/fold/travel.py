"""How an affine map passes an operator: ``op(A(x)) == A'(op(x))``, or the reason why no such A' exists."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...graph.ir import Dim, Node
from .affine import Affine, Refusal

WINDOWS = ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool")
REDUCTIONS = ("mean", "amax")


def forward(node: Node, affine: Affine) -> Affine | Refusal:
    """The map on the output of ``node`` that does what ``affine`` does on its operand 0."""
    allowed = _commutes(node, affine, affine.axis)
    if isinstance(allowed, Refusal):
        return allowed
    if node.op == "reshape":
        return _merge(node, affine)
    axis = _axis_forward(node, affine.axis)
    return axis if isinstance(axis, Refusal) else affine.on(axis)


def backward(node: Node, affine: Affine) -> Affine | Refusal:
    """The map on operand 0 of ``node`` that does what ``affine`` does on its output."""
    rank = node.inputs[0].rank if node.inputs and node.inputs[0] is not None else None
    if rank is None:
        return Refusal(f"the rank of what {node.op} reads is unknown", node.name)
    if node.op == "reshape":
        return _unmerge(node, affine)
    for axis in range(rank):
        if _axis_forward(node, axis) == affine.axis:
            moved = affine.on(axis)
            allowed = _commutes(node, moved, axis)
            return allowed if isinstance(allowed, Refusal) else moved
    return Refusal(f"the map does not commute with {node.op}", node.name)


def _commutes(node: Node, affine: Affine, axis: int) -> None | Refusal:
    """Whether the operator's arithmetic lets the map pass; where the axis lands is another question."""
    op, attrs = node.op, node.attrs
    if op in ("identity", "transpose", "squeeze", "unsqueeze", "reshape"):
        return None
    if op == "pad":
        lo, hi = attrs["pads"][axis]
        if lo or hi:
            return Refusal("the padding adds channels", node.name)
        if attrs["mode"] == "constant" and (affine.has_shift or attrs.get("value")):
            return Refusal("the padded border would be shifted too", node.name)
        return None
    if op in ("max_pool", "adaptive_max_pool", "amax") and not (affine.scale > 0).all():
        return Refusal(f"{op} commutes with positive scales only, and some are not", node.name)
    if op in REDUCTIONS:
        if axis in attrs["axes"]:
            return Refusal(f"{op} reduces the channels", node.name)
        return None
    if op in WINDOWS:
        padded = any(lo or hi for lo, hi in attrs.get("padding") or ())
        if op == "avg_pool" and affine.has_shift and (padded or attrs.get("ceil_mode") or attrs.get("ceil")):
            return Refusal("the padded border would be shifted too", node.name)
        rank = node.inputs[0].rank if node.inputs[0] is not None else None
        spatial = len(attrs.get("kernel") or attrs.get("output_size") or ())
        if rank is None or not spatial or axis >= rank - spatial:
            return Refusal(f"{op} slides over that axis", node.name)
        return None
    return Refusal(f"the map does not commute with {op}", node.name)


def _axis_forward(node: Node, axis: int) -> int | Refusal:
    """Where an axis of operand 0 is found in the output, for the operators that only move or drop axes."""
    op, attrs = node.op, node.attrs
    if op == "transpose":
        return list(attrs["perm"]).index(axis)
    if op == "squeeze" or (op in REDUCTIONS and not attrs["keepdims"]):
        if axis in attrs["axes"]:
            return Refusal(f"{op} drops the axis", node.name)
        return axis - sum(a < axis for a in attrs["axes"])
    if op == "unsqueeze":
        rank = node.output.rank
        if rank is None:
            return Refusal("the rank is unknown", node.name)
        return [a for a in range(rank) if a not in attrs["axes"]][axis]
    return axis


def _merge(node: Node, affine: Affine) -> Affine | Refusal:
    """Through a reshape that keeps the axis or merges it with axes behind it, whose lengths must be constant."""
    shapes = _shapes(node)
    if isinstance(shapes, Refusal):
        return shapes
    before, after = shapes
    inner = 1
    for stop in range(affine.axis + 1, len(before) + 1):
        for axis, length in enumerate(after):
            if length == affine.size * inner and _aligned(before, affine.axis, stop, after, axis, axis + 1):
                return affine.repeat(inner, axis)
        if stop < len(before):
            length_behind = before[stop]
            if not isinstance(length_behind, int):
                break
            inner *= length_behind
    return Refusal("the reshape cuts the channel axis", node.name)


def _unmerge(node: Node, affine: Affine) -> Affine | Refusal:
    """Back through a reshape that keeps the axis, whatever it does to the axes round it."""
    shapes = _shapes(node)
    if isinstance(shapes, Refusal):
        return shapes
    before, after = shapes
    for axis, length in enumerate(before):
        if length == affine.size and _aligned(before, axis, axis + 1, after, affine.axis, affine.axis + 1):
            return affine.on(axis)
    return Refusal("the reshape cuts or merges the channel axis", node.name)


def _shapes(node: Node) -> tuple[tuple[Dim, ...], tuple[Dim, ...]] | Refusal:
    before, after = node.inputs[0], node.output
    if before is None or before.shape is None or after.shape is None:
        return Refusal("the shapes round the reshape are unknown", node.name)
    return before.shape, after.shape


def _aligned(before: tuple[Dim, ...], lo: int, hi: int, after: tuple[Dim, ...], start: int, end: int) -> bool:
    """Whether axes lo..hi of ``before`` and start..end of ``after``, equally long, count the same elements.

    A reshape keeps the row-major order, so it is enough that as many elements stand before them, or behind them.
    """
    return _extent(before[:lo]) == _extent(after[:start]) or _extent(before[hi:]) == _extent(after[end:])


def _extent(dims: Sequence[Dim]) -> tuple[int, list[str]]:
    """The product of some dimensions, in a form that compares equal only where it is equal for every symbol."""
    return math.prod(d for d in dims if isinstance(d, int)), sorted(d for d in dims if isinstance(d, str))
