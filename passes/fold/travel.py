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
    for axis in range(rank):
        if _axis_forward(node, axis) == affine.axis and node.op != "reshape":
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
    before, after = node.inputs[0], node.output
    if before is None or before.shape is None or after.shape is None:
        return Refusal("the shapes round the reshape are unknown", node.name)
    lead = _extent(before.shape[: affine.axis])
    inner = 1
    for stop in range(affine.axis + 1, len(before.shape) + 1):
        merged = affine.size * inner
        for axis, length in enumerate(after.shape):
            if length == merged and _extent(after.shape[:axis]) == lead:
                return affine.repeat(inner, axis)
        if stop < len(before.shape):
            length_behind = before.shape[stop]
            if not isinstance(length_behind, int):
                break
            inner *= length_behind
    return Refusal("the reshape cuts the channel axis", node.name)


def _extent(dims: Sequence[Dim]) -> tuple[int, list[str]]:
    """The product of some dimensions, in a form that compares equal only where it is equal for every symbol."""
    return math.prod(d for d in dims if isinstance(d, int)), sorted(d for d in dims if isinstance(d, str))
