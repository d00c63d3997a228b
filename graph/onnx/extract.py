"""Cutting a window out of an ONNXGraph: a small model of its own with the same names, shapes and stored tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from ..errors import ConstraintError
from ..ir import Node
from . import native as onnx_native
from .shapes import Info

if TYPE_CHECKING:
    from .graph import ONNXGraph

SIZE_OPS = ("scalar", "shape_of")


def extract(g: ONNXGraph, nodes: Sequence[Node], readers: bool) -> ONNXGraph:
    """See ``Graph.extract``."""
    from .graph import ONNXGraph

    chosen = _chosen(g, nodes)
    natives = [n.native for n in chosen]
    inside = set(_within(natives))
    stored, constants, boundary = _operands(g, chosen, inside)
    asked = set(nodes)
    shown = [n.native for n in chosen if n in asked or n.op == "shape_of"]  # what sizes rest on is no result
    results = [v for n in shown for v in n.outputs if v.name and _read_outside(g, v, inside)]
    view = ir.GraphView(
        boundary, results, nodes=[*constants, *natives], initializers=stored, name=g.name,
        opset_imports=dict(g.model.graph.opset_imports),
    )  # fmt: skip
    graph = view.clone()
    model = ir.Model(
        graph, ir_version=g.model.ir_version, functions=[f.clone() for f in g.model.functions.values()],
        producer_name=g.model.producer_name,
    )  # fmt: skip
    pairs = dict(zip(boundary, graph.inputs, strict=True))
    pairs |= dict(zip(stored, graph.initializers.values(), strict=True))
    twins = dict(zip([*constants, *natives], graph, strict=True))
    for old, new in twins.items():
        pairs |= dict(zip(old.outputs, new.outputs, strict=True))
    _declare(g, boundary, pairs, graph)
    table = g.table.moved_to(model, pairs)
    for out, old in _add_readers(results, graph) if readers else ():
        if old in g.table.info:
            table.info[out] = g.table.info[old]
    made = ONNXGraph(model, table=table)
    made.baked = g.baked
    for node in chosen:
        twin = made.by_native.get(twins[node.native])
        if twin is not None:
            twin.name, twin.scope = node.name, node.scope
    return made


def _chosen(g: ONNXGraph, nodes: Sequence[Node]) -> list[Node]:
    """The nodes, and those that compute sizes for them or from their results, in an order in which they can run."""
    wanted: dict[Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node in wanted:
            continue
        if not g.holds(node):
            raise ConstraintError("the node is not part of this graph", node=node.name)
        wanted[node] = None
        feeds = [*node.dynamic, *(v for v in node.inputs if v is not None)]
        stack += [v.producer for v in feeds if v.producer is not None and v.producer.op in SIZE_OPS]
        stack += [user for v in node.outputs for user, _ in v.uses if user.op == "shape_of"]
    order: dict[Node, None] = {}
    pending = [(n, False) for n in reversed(list(wanted))]
    while pending:
        node, ready = pending.pop()
        if node in order:
            continue
        if ready:
            order[node] = None
            continue
        pending.append((node, True))
        sources = [*node.inputs, *node.dynamic, *node.captured]
        pending += [(v.producer, False) for v in sources if v is not None and v.producer in wanted and v.producer]
    return list(order)


def _operands(
    g: ONNXGraph, chosen: Iterable[Node], inside: set[ir.Node]
) -> tuple[list[ir.Value], list[ir.Node], list[ir.Value]]:
    """(initializers, Constant nodes, values made outside) that the chosen nodes read."""
    stored: dict[ir.Value, None] = {}
    constants: dict[ir.Node, None] = {}
    boundary: dict[ir.Value, None] = {}
    for node in chosen:
        for value in [*node.native.inputs, *onnx_native.captures(node.native, g.model.graph)]:
            if value is None or value.producer() in inside:
                continue
            producer = value.producer()
            if onnx_native.constant_tensor(value) is None:
                boundary[value] = None
            elif producer is None:
                stored[value] = None
            else:
                constants[producer] = None
    return list(stored), list(constants), list(boundary)


def _read_outside(g: ONNXGraph, value: ir.Value, inside: set[ir.Node]) -> bool:
    """Whether anybody but the window reads the numbers of a value; ``inside`` holds the nodes of its subgraphs too."""
    return value.is_graph_output() or any(u.node not in inside and u.node not in g.settled for u in value.uses())


def _within(nodes: Iterable[ir.Node]) -> Iterable[ir.Node]:
    """The nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for graph in onnx_native.subgraphs(node):
            yield from _within(graph)


def _declare(g: ONNXGraph, boundary: Sequence[ir.Value], pairs: dict[ir.Value, ir.Value], graph: ir.Graph) -> None:
    """Types and shapes of the new inputs; sizes that are the same in every run become stored constants."""
    for old in boundary:
        new, info = pairs[old], g.table.info.get(old, Info(None, None, None, ""))
        if info.dtype and (new.type is None or isinstance(new.type, ir.TensorType)):
            new.type = ir.TensorType(onnx_native.dtype_of(info.dtype))
        if info.shape is not None:
            new.shape = ir.Shape(list(info.shape))
        if old.producer() in g.settled:
            data = g.table.elements[old].a
            graph.inputs.remove(new)
            new.const_value = ir.tensor(data.copy(), name=new.name)
            graph.initializers.add(new)


def _add_readers(results: Sequence[ir.Value], graph: ir.Graph) -> list[tuple[ir.Value, ir.Value]]:
    """Identities before the outputs that are none in the whole graph; (their results, the values they copy)."""
    taken = {v.name for n in graph for v in n.outputs} | {v.name for v in graph.inputs}
    made = []
    for i, (old, new) in enumerate(zip(results, list(graph.outputs), strict=True)):
        if old.is_graph_output():
            continue
        name = f"{new.name}_read"
        while name in taken:
            name += "_"
        taken.add(name)
        node = ir.Node("", "Identity", [new], name=name)
        out = node.outputs[0]
        out.name, out.type, out.shape = name, new.type, None if new.shape is None else new.shape.copy()
        graph.append(node)
        graph.outputs[i] = out
        made.append((out, old))
    return made
