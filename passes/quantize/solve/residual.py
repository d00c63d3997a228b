"""Residual additions: which operand is fused with the layer before, and which one is the skip that gets the Q."""

from __future__ import annotations

from collections.abc import Mapping

from ....graph.ir import Graph, Node, Value
from ..spec import OpPlacement


def depths(graph: Graph, anchors: Mapping[str, OpPlacement]) -> dict[str, int]:
    """Value name -> the most anchors on a way from an input to it."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        deepest = max((found.get(v.name, 0) for v in node.inputs if v is not None), default=0)
        own = deepest + (node.name in anchors)
        for v in node.outputs:
            found[v.name] = own
    return found


def branch(value: Value | None, rule: OpPlacement, anchors: Mapping[str, OpPlacement]) -> Node | None:
    """The quantized layer whose result a value is, perhaps after its bias; None if something else reads it too."""
    while value is not None and not value.is_output and len(value.uses) == 1 and value.producer is not None:
        node = value.producer
        if node.name in anchors and node.op in rule.behind:
            return node
        constant = [v for v in node.inputs if v is not None and v.is_const]
        if node.op != "add" or len(node.inputs) != 2 or len(constant) != 1:
            return None
        value = next(v for v in node.inputs if v is not constant[0])
    return None


def skip(
    node: Node, rule: OpPlacement, anchors: Mapping[str, OpPlacement], depth: Mapping[str, int]
) -> tuple[int, Node] | str:
    """Position of the skip operand and the layer that the addition is fused into, or why it is no residual.

    Where both operands are results of layers, the one behind more layers is the branch: the shorter way is the skip.
    """
    if len(node.inputs) != 2 or any(v is None or v.is_const for v in node.inputs):
        return "it does not add two activations"
    if node.attrs.get("alpha", 1) != 1:
        return "it scales an operand while adding"
    ends = [branch(v, rule, anchors) for v in node.inputs]
    a, b = node.inputs
    assert a is not None and b is not None
    if a.shape != b.shape:
        return "its operands have different shapes"
    if ends[0] is None and ends[1] is None:
        return f"neither operand is the result of a quantized {' or '.join(rule.behind)} that nothing else reads"
    if ends[0] is not None and ends[1] is not None:
        longer = 1 if depth.get(b.name, 0) > depth.get(a.name, 0) else 0
        chosen = ends[longer]
        assert chosen is not None
        return 1 - longer, chosen
    kept = ends[0] if ends[0] is not None else ends[1]
    assert kept is not None
    return (1 if ends[0] is not None else 0), kept
