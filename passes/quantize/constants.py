"""Weights that are computed from constants: evaluated once and stored, so that they can be quantized."""

from __future__ import annotations

from ...graph.errors import FoldlineError
from ...graph.evaluate import evaluate
from ...graph.ir import Graph, Node, Value
from ..base import Decision
from .spec import BackendSpec

RUNTIME = frozenset("random quantize dequantize fake_quantize if loop scan opaque".split())


def store_computed(graph: Graph, spec: BackendSpec) -> list[Decision]:
    """Store every weight and bias operand of a rule's that constants alone determine (transposed, cast, scaled...).

    The value is computed in the model's own dtypes, as the model would at run time. A weight that several nodes read is
    evaluated once. What cannot be evaluated is left, and a decision says why.
    """
    decisions = []
    known: dict[str, bool] = {}
    for node in list(graph.nodes):
        for position in sorted({p for r in spec.alternatives(node.op) for p in (r.weight, r.bias) if p is not None}):
            value = node.input(position)
            if value is None or value.is_const or value.producer is None or not constant(value, known):
                continue
            try:
                _store(graph, value)
            except FoldlineError as exc:
                decisions.append(Decision(node.name, "kept in float", f"its weight cannot be evaluated: {exc.message}"))
    return decisions


def constant(value: Value, known: dict[str, bool], ranges: bool = False) -> bool:
    """Whether nothing but constants determines a value; with ``ranges`` counting up between fixed ends is constant too.

    ``known``: what was found out before, by node name; updated.
    """
    stack: list[tuple[Node, bool]] = [(value.producer, False)] if value.producer is not None else []
    while stack:
        node, ready = stack.pop()
        if node.name in known:
            continue
        sources = [v for v in (*node.inputs, *node.dynamic) if v is not None and not v.is_const]
        if node.op in RUNTIME or node.captured or not (node.inputs or node.op == "full" or (ranges and _counts(node))):
            known[node.name] = False
        elif any(v.producer is None or known.get(v.producer.name) is False for v in sources):
            known[node.name] = False
        elif ready or all(known.get(v.producer.name) for v in sources if v.producer is not None):
            known[node.name] = all(known.get(v.producer.name, False) for v in sources if v.producer is not None)
        else:
            stack.append((node, True))
            stack += [(v.producer, False) for v in sources if v.producer is not None and v.producer.name not in known]
    return value.is_const or (value.producer is not None and known[value.producer.name])


def _counts(node: Node) -> bool:
    """Whether this is a range of integers whose ends the graph fixes."""
    return (
        node.op == "arange"
        and not node.dynamic
        and all(node.attrs.get(k) is not None for k in ("start", "end", "step"))
    )


def _store(graph: Graph, value: Value) -> Value:
    """Evaluate a value and what it is made of; every use reads the stored tensor."""
    node = value.producer
    assert node is not None
    for operand in list(node.inputs):
        if operand is not None and not operand.is_const:
            _store(graph, operand)
    results = evaluate(graph, node)
    stored: list[Value] = []
    for made, data in zip(node.outputs, results, strict=True):
        if data is None:
            continue
        new = graph.add_weight(f"{made.name}_value", data)
        graph.replace_uses(made, new)
        stored.append(new)
        if made is value:
            value = new
    graph.erase(node)
    return value
