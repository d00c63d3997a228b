"""The branch that a constant condition takes, moved out of its If into the main graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from ..ir import Node
from . import native as onnx_native
from .place import fresh

if TYPE_CHECKING:
    from .graph import ONNXGraph


def inline_branch(g: ONNXGraph, node: Node, taken: bool) -> list[Node]:
    """Put the nodes of one branch of an If in its place; returns their views. The If itself is removed.

    Values of the branch get names that nothing else in the model has. Graph outputs keep their names.
    """
    native: ir.Node = node.native
    branch = native.attributes["then_branch" if taken else "else_branch"].as_graph()
    stored = [_copied(g, value, branch) for value in list(branch.initializers.values())]
    results = list(branch.outputs)
    for node_inside in branch:
        for value in node_inside.outputs:
            if value.name:
                value.name = fresh(g, value.name)
    branch.outputs.clear()
    branch.initializers.clear()
    for value in stored:
        g.model.graph.initializers.add(value)
    inner = list(branch)
    branch.remove(inner)
    for n in inner:
        if n.name:
            n.name = fresh(g, n.name)
    g.model.graph.insert_before(native, inner)
    g.dirty.update(inner)
    for value in stored:
        g.table.constant(value)
    for n in inner:
        if onnx_native.is_constant_node(n):
            g.table.constant(n.outputs[0])
        else:
            g.table.visit(n, stored=False)
    g.resync()
    for old, new in zip(native.outputs, results, strict=True):
        if old.uses() or old.is_graph_output():
            g.replace_uses(g.value_of(old), g.operand_of(new))
    g.erase(node)
    g.resync()
    g.touch()
    return [g.by_native[n] for n in inner if n in g.by_native]


def _copied(g: ONNXGraph, value: ir.Value, branch: ir.Graph) -> ir.Value:
    """A twin of an initializer under a name of its own (the tensor of the file carries a name, so it is not shared)."""
    tensor = value.const_value
    assert tensor is not None
    name = fresh(g, value.name or "branch")
    twin = ir.Value(
        name=name, shape=ir.Shape(onnx_native.tensor_shape(tensor)), type=ir.TensorType(tensor.dtype),
        const_value=ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name),
    )  # fmt: skip
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, twin)
    for i, result in enumerate(branch.outputs):
        if result is value:
            branch.outputs[i] = twin
    return twin


def readable(node: Node, taken: bool) -> bool:
    """Whether the branch can be moved: it has no inputs, and its results are what the readers take."""
    native: ir.Node = node.native
    attribute = native.attributes.get("then_branch" if taken else "else_branch")
    if attribute is None or attribute.is_ref():
        return False
    branch = attribute.as_graph()
    if branch.inputs or len(branch.outputs) != len(native.outputs):
        return False
    for old, new in zip(native.outputs, branch.outputs, strict=True):
        ranged = any(use.node.op_type == "Range" for use in old.uses())
        if ranged and (new.shape is None or len(new.shape)):
            return False  # Range takes scalars; that it was given a list only shows once the shape is known
    return not any(onnx_native.is_constant_node(n) and n.outputs[0].is_graph_output() for n in branch)
