"""Reading a whole native graph into the view: canonical nodes, values and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..ir import Node, Weight
from . import native as onnx_native
from .names import names_in
from .ops import Canon, canonicalize
from .scope import location_of, scope_of

if TYPE_CHECKING:
    from .graph import ONNXGraph


def resync(g: ONNXGraph) -> None:
    """Read the whole native graph again; objects that stand for the same native thing are kept."""
    graph = g.model.graph
    g.taken, g.numbers = names_in(g.model), {}
    g.nodes, alive = [], set()
    constants: list[ir.Node] = []
    readings: list[tuple[ir.Node, Canon]] = []
    g.settled = {}
    operands: set[ir.Value | None] = set(graph.outputs)
    for native in graph:
        if native.op_type == "Constant" and onnx_native.is_constant_node(native):
            constants.append(native)
            continue
        canon = canonicalize(native, g.table)
        if canon.op in ("scalar", "shape_of") and _is_settled(g, native):
            g.settled[native] = None
            continue
        readings.append((native, canon))
        inputs = native.inputs
        operands.update([inputs[i] for i in canon.operands if i is not None])
        operands.update(onnx_native.captures(native, graph))
    for native in g.settled:
        for output in native.outputs:
            g.settled_value(output)
            alive.add(output)
    for value in graph.inputs:
        g.value_of(value).is_input = True
        alive.add(value)
    stored = [v for v in graph.initializers.values() if not v.is_graph_input()]
    stored += [n.outputs[0] for n in constants]
    for value in stored:
        alive.add(value)
        tensor = onnx_native.constant_tensor(value)
        assert tensor is not None
        g.constant_of(value, tensor, operand=value in operands or not value.uses())
    used_names: set[str] = set()
    for native, canon in readings:
        node = g.by_native.get(native)
        if node is None:
            node = g.by_native[native] = new_node(native, used_names)
        used_names.add(node.name)
        g.nodes.append(node)
        g.read(node, canon)
        alive.update(native.outputs)
    keep = set(g.nodes)
    g.by_native = {k: v for k, v in g.by_native.items() if v in keep}
    g.canon = {k: v for k, v in g.canon.items() if k in keep}
    g.view = {k: v for k, v in g.view.items() if k in alive}
    g.values = {v.name: v for k, v in g.view.items() if k.name}
    g.inputs = [g.value_of(v) for v in graph.inputs]
    for view in g.values.values():
        view.is_output = False
    g.outputs = [g.value_of(v) for v in graph.outputs]
    for view in g.outputs:
        view.is_output = True
    _sort_weights(g, stored)
    g._link()


def _is_settled(g: ONNXGraph, native: ir.Node) -> bool:
    """A size computation whose result is the same in every run: the view shows literals instead of nodes."""
    elements = [g.table.elements.get(o) for o in native.outputs]
    return all(e is not None and e.all_known for e in elements)


def new_node(native: ir.Node, used: set[str]) -> Node:
    """A node of the view for a native one, under a name that is not in ``used``; nothing is read yet."""
    base = native.name or f"{native.op_type}:{native.outputs[0].name if native.outputs else ''}"
    name, i = base, 1
    while name in used:
        name, i = f"{base}#{i}", i + 1
    origin = native.op_type if native.domain in onnx_native.STANDARD_DOMAINS else f"{native.domain}::{native.op_type}"
    return Node(
        name, "opaque", [], [], origin=origin, scope=scope_of(native), location=location_of(native), native=native
    )


def _sort_weights(g: ONNXGraph, stored: Sequence[ir.Value]) -> None:
    found: dict[str, Weight] = {}
    for native in stored:
        weight = g.view[native].weight
        if weight is not None:
            found.setdefault(weight.name, weight)
    g.weights = found
    alive = set(stored)
    for weight in list(g.carriers):
        g.carriers[weight] = [v for v in g.carriers[weight] if v in alive]
        if not g.carriers[weight]:
            del g.carriers[weight]
    g._tied = {k: w for k, w in g._tied.items() if w in g.carriers}
