"""Activations that are a value times its gate, written as both, so that each half can be an integer kernel."""

from __future__ import annotations

from ...graph.ir import Graph, Node
from ..base import Decision
from .spec import BackendSpec

GATES = {"silu": "sigmoid", "hardswish": "hardsigmoid"}
"""Activation -> its gate: x * sigmoid(x), x * clip(x / 6 + 1/2, 0, 1)."""


def split_gates(graph: Graph, spec: BackendSpec) -> list[Decision]:
    """Write silu and hardswish as a gate and a product where the target has integer kernels for both.

    torch knows them as one operator, its ONNX exporter writes two: the same network gets the same kernels this way.
    The function stays the same. Only behind nodes whose result the target wants quantized: elsewhere they run in float.
    """
    found = []
    for node in list(graph.nodes):
        gate = GATES.get(node.op)
        if gate is None or not (_joins(spec, gate) and _joins(spec, "mul")) or _joins(spec, node.op):
            continue
        x = node.inputs[0]
        if x is None or x.producer is None or not _integers_come_out(spec, x.producer):
            continue
        # ONNX's hard sigmoid has a slope of its own unless told; torch's is the one that hard swish means.
        attrs = {"alpha": 1 / 6, "beta": 0.5} if gate == "hardsigmoid" and graph.kind == "onnx" else {}
        first = graph.insert(gate, [x], attrs, name=f"{node.name}_gate", after=node, scope=node.scope)
        product = graph.insert("mul", [x, first.output], name=f"{node.name}_product", after=first, scope=node.scope)
        graph.replace_uses(node.output, product.output)
        graph.erase(node)
        found.append(Decision(product.name, "split", f"{node.op} as {gate} and a product, each an integer kernel"))
    if found:
        graph.refresh()
    return found


def _integers_come_out(spec: BackendSpec, node: Node) -> bool:
    rule, _ = spec.placement(node)
    return rule is not None and rule.role in ("anchor", "join") and rule.output == "required"


def _joins(spec: BackendSpec, op: str) -> bool:
    return any(rule.role == "join" for rule in spec.alternatives(op))
