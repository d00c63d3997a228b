"""Sizes that agree in both worlds by chance: where they depend on the input all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from . import native

if TYPE_CHECKING:
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
    if node.op_type == "Slice":
        source = table.info.get(node.inputs[0]) if node.inputs[0] is not None else None
        if source is None or source.shape is None or len(source.shape) != len(a):
            return b
        for i, dim in enumerate(source.shape):
            if not isinstance(dim, int) and a[i] == b[i] and a[i] > 1:
                made[i] = a[i] - 1  # what a shorter axis leaves
    position = TARGETS.get(node.op_type)
    target = node.inputs[position] if position is not None and position < len(node.inputs) else None
    listed = None if target is None else table.elements.get(target)
    if listed is not None and listed.a.ndim == 1 and len(listed.known) == len(a):
        for i, known in enumerate(listed.known.tolist()):
            if not known and a[i] == b[i] and listed.a[i] == listed.b[i] == a[i]:
                made[i] = a[i] + 1
    return tuple(made)
