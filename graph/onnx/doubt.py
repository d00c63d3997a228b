"""Sizes that agree in both worlds by chance: where they depend on the input all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from . import native

if TYPE_CHECKING:
    from .eval import Elements
    from .shapes import ShapeTable, Sizes

TARGETS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
"""Ops whose output has the sizes that an operand lists -> position of that operand."""


def doubted(table: ShapeTable, node: ir.Node, a: Sizes | None, b: Sizes | None) -> Sizes | None:
    """The sizes in world ``b``, changed by one where equality with world ``a`` proves nothing.

    ``x[:3]`` has 3 rows in both worlds, for both batches are larger, and 2 for a batch of two; ``n // 4`` is the same
    number for many n. A size that differs between the worlds is symbolic, which is all that is said here.
    """
    if a is None or b is None or len(a) != len(b) or node.domain not in native.STANDARD_DOMAINS:
        return b
    made = list(b)
    if node.op_type == "Slice" and node.inputs:
        source = table.info.get(node.inputs[0]) if node.inputs[0] is not None else None
        if source is None or source.shape is None or len(source.shape) != len(a):
            return b
        first = _edges(table, node)
        for i, dim in enumerate(source.shape):
            if isinstance(dim, int) or a[i] != b[i] or (a[i] == 1 and i in first):
                continue
            made[i] = a[i] - 1 if a[i] > 1 else a[i] + 1  # what a shorter axis may leave
    position = TARGETS.get(node.op_type)
    target = node.inputs[position] if position is not None and position < len(node.inputs) else None
    listed = None if target is None else table.elements.get(target)
    if listed is not None and listed.a.ndim == 1 and len(listed.known) == len(a):
        for i, known in enumerate(listed.known.tolist()):
            if not known and a[i] == b[i] and listed.a[i] == listed.b[i] == a[i]:
                made[i] = a[i] + 1
    return tuple(made)


def _edges(table: ShapeTable, node: ir.Node) -> set[int]:
    """Axes of which a slice takes the first element or the last one: one of them is there in every run."""
    operands = [None if v is None else table.elements.get(v) for v in node.inputs[1:4]]
    starts = native.attribute(node, "starts") or _listed(operands, 0)
    axes = native.attribute(node, "axes") or _listed(operands, 2) or list(range(len(starts)))
    rank = len(table.info[node.inputs[0]].shape or ()) if node.inputs[0] is not None else 0
    return {axis % rank for axis, start in zip(axes, starts, strict=False) if start in (0, -1)} if rank else set()


def _listed(operands: list[Elements | None], i: int) -> list[int]:
    found = operands[i] if i < len(operands) else None
    return [int(n) for n in found.a.ravel()] if found is not None and found.all_known else []
