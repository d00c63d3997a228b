"""The branch that a constant condition takes, moved out of its If into the main graph."""

from __future__ import annotations

from collections.abc import Iterator
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
    results = list(branch.outputs)
    for value in _own_values(branch):
        value.name = fresh(g, value.name or "branch")
    branch.outputs.clear()
    stored = list(branch.initializers.values())
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


def _own_values(branch: ir.Graph) -> Iterator[ir.Value]:
    yield from list(branch.initializers.values())
    for node in branch:
        yield from (v for v in node.outputs if v.name)


def readable(node: Node, taken: bool) -> bool:
    """Whether the branch can be moved: it has no inputs, and none of its results is read in a subgraph."""
    native: ir.Node = node.native
    attribute = native.attributes.get("then_branch" if taken else "else_branch")
    if attribute is None or attribute.is_ref():
        return False
    branch = attribute.as_graph()
    return not branch.inputs and len(branch.outputs) == len(native.outputs) and not any(
        onnx_native.is_constant_node(n) and n.outputs[0].is_graph_output() for n in branch
    )  # fmt: skip
