"""Edits of the nodes of an ONNXGraph: attributes, wiring, insertion, removal, each on the native graph first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..errors import ConstraintError
from ..ir import Node, Value
from . import attrs as onnx_attrs
from . import insert as onnx_insert
from . import native as onnx_native
from .place import adopt, drop_unused, fresh
from .sizes import bake_sizes, drop_dead_sizes

if TYPE_CHECKING:
    from .graph import ONNXGraph


# ---- attributes --------------------------------------------------------------------------------------------
def set_attr(g: ONNXGraph, node: Node, attrs: dict[str, Any]) -> None:
    changed = {k: v for k, v in attrs.items() if k not in node.attrs or node.attrs[k] != v}
    if not changed:
        return
    if any(k in onnx_attrs.SIZES for k in changed):
        bake_sizes(g)
    for key, value in changed.items():
        onnx_attrs.write(g, node, key, value)
    g.dirty.add(node.native)
    g.reread(node)
    g.touch()


# ---- wiring ------------------------------------------------------------------------------------------------
def set_input(g: ONNXGraph, node: Node, position: int, value: Value | None) -> None:
    native: ir.Node = node.native
    operands = g.canon[node].operands
    slot = operands[position] if position < len(operands) else None
    if slot is None:
        slot = onnx_attrs.slot_of(node, position)
    old = native.inputs[slot] if slot < len(native.inputs) else None
    if value is not None and value.native is old:
        return
    if slot >= len(native.inputs):
        native.resize_inputs(slot + 1)
    native.replace_input_with(slot, None if value is None else value.native)
    while native.inputs and native.inputs[-1] is None:
        native.resize_inputs(len(native.inputs) - 1)
    g.dirty.add(native)
    if value is not None and old is not None and old.dtype != value.native.dtype:
        g.table.visit(native, stored=False)  # the results may change their type, which nodes inserted behind ask for
    g.reread(node)
    if old is not None:
        g.idle.append(old)
    g.touch()


def replace_uses(g: ONNXGraph, old: Value, new: Value, except_nodes: Iterable[Node] = ()) -> None:
    if old is new:
        return
    spared = {n.native for n in except_nodes}
    source, target = old.native, new.native
    owners: dict[ir.Node, None] = {}
    for use in list(source.uses()):
        owner = _top(use.node, g)
        if owner in spared:
            continue
        use.node.replace_input_with(use.idx, target)
        owners[owner] = None
    if source.is_graph_output():
        _move_output(g, old, new)
    alike = g.view.get(target) is new and _alike(g, source, target)
    for owner in owners:
        g.dirty.add(owner)
        node = g.by_native.get(owner)
        if node is None:
            continue
        if alike and owner.op_type not in ASKS_FURTHER and owner.domain in onnx_native.STANDARD_DOMAINS:
            _swap(node, old, new)
        else:
            g.reread(node)
    g.moved.add(target)
    g.idle.append(source)
    g.touch()


ASKS_FURTHER = onnx_native.WITH_GRAPHS | {"MatMul"}
"""Operators whose reading looks at more than their own attributes and at what is known of their operands."""


def _alike(g: ONNXGraph, source: ir.Value, target: ir.Value) -> bool:
    """Whether all that is known of two computed values is the same: no reading of a node tells one from the other."""
    table = g.table
    known = table.info.get(source)
    if known is None or known.a is None or known != table.info.get(target):
        return False
    if source in table.elements or target in table.elements:
        return False
    return all(onnx_native.constant_tensor(v) is None for v in (source, target))


def _swap(node: Node, old: Value, new: Value) -> None:
    """Let a node read ``new`` wherever it reads ``old``, its reading as it is."""
    for i, value in enumerate(node.inputs):
        if value is old:
            old.uses.discard((node, i))
            node.inputs[i] = new
            new.uses.append((node, i))
    node.dynamic = [new if v is old else v for v in node.dynamic]


def _top(node: ir.Node, g: ONNXGraph) -> ir.Node:
    """The node of the main graph whose subgraphs hold ``node``."""
    while node.graph is not g.model.graph:
        node = next(n for n in g.model.graph if _holds(n, node))
    return node


def _holds(outer: ir.Node, inner: ir.Node) -> bool:
    return any(n is inner or _holds(n, inner) for graph in onnx_native.subgraphs(outer) for n in graph)


def _move_output(g: ONNXGraph, old: Value, new: Value) -> None:
    """Let the graph output of ``old`` be ``new`` under the same name."""
    graph = g.model.graph
    name, source, target = old.native.name, old.native, new.native
    slots = [i for i, v in enumerate(graph.outputs) if v is source]
    free = (
        target.producer() is not None
        and not target.is_graph_output()
        and not onnx_native.is_constant_node(target.producer())
    )
    if not free:
        bridge = ir.Node("", "Identity", [target], name=fresh(g, f"{name}_output"))
        bridge.outputs[0].shape, bridge.outputs[0].type = target.shape, target.type
        graph.append(bridge)
        g.table.visit(bridge, stored=False)
        target = bridge.outputs[0]
    for i in slots:
        graph.outputs[i] = target
    parked = fresh(g, f"{name}_before")
    source.name = old.name = parked  # before the view is read again: no two values of one name
    target.name = name
    target.shape = source.shape if source.shape is not None else target.shape  # what the file declares of its output
    target.type = source.type if source.type is not None else target.type
    target.doc_string = source.doc_string
    if not free:
        g.resync()
    for value in (old, new):
        g.values.pop(value.name, None)
    for value in (old, new):
        value.name = value.native.name
        g.values[value.name] = value
        if value.weight is not None and value.weight.value is value:
            value.weight.name = value.name
    old.is_output = False
    out = g.value_of(target)
    out.is_output = True
    for i in slots:
        g.outputs[i] = out


def _let_go(native: ir.Node) -> None:
    """Let the subgraphs of a node read nothing any more, the nested ones too."""
    for graph in onnx_native.subgraphs(native):
        for inner in list(graph):
            _let_go(inner)
            for i in range(len(inner.inputs)):
                inner.replace_input_with(i, None)
        graph.outputs.clear()


# ---- nodes -------------------------------------------------------------------------------------------------
def insert(
    g: ONNXGraph,
    op: str,
    inputs: Sequence[Value | None],
    attrs: dict[str, Any],
    *,
    name: str,
    after: Node | None,
    scope: str,
) -> Node:
    made = onnx_insert.spell(g, op, inputs, attrs, fresh(g, name))
    graph = g.model.graph
    if after is not None:
        graph.insert_after(after.native, made)
    elif len(graph):
        graph.insert_before(graph[0], made)
    else:
        graph.extend(made)
    return adopt(g, made, scope)


def erase(g: ONNXGraph, node: Node) -> None:
    native: ir.Node = node.native
    if any(use.node in g.settled for value in native.outputs for use in value.uses()):
        drop_dead_sizes(g, settled_only=True)
    for value in native.outputs:
        if onnx_native.is_used(value):
            users = [u.node.name or u.node.op_type for u in value.uses()]
            raise ConstraintError(
                "the node is still in use", node=node.name, value=value.name,
                found="a graph output" if value.is_graph_output() else f"read by {users[:4]}",
                hint="replace_uses first",
            )  # fmt: skip
    operands = [v for v in native.inputs if v is not None]
    operands += onnx_native.captures(native, g.model.graph)
    _let_go(native)
    g.model.graph.remove(native, safe=True)
    g.reorder()
    for i, held in enumerate(node.inputs):
        if held is not None:
            held.uses.discard((node, i))
    for value in native.outputs:
        g.values.pop(value.name or "", None)
        g.view.pop(value, None)
        g.table.info.pop(value, None)
    g.by_native.pop(native, None)
    g.canon.pop(node, None)
    g.dirty.discard(native)
    drop_unused(g, operands)
    g.touch()
