"""Operands computed from constants alone become stored weights, so that folds see them.

Exporters write a missing bias as zeros expanded to the weight's shape, a missing gain as ones, and parametrizations as
arithmetic on parameters. Such an operand has the same value in every run: it is read off one execution of the graph.
"""

from __future__ import annotations

from ...graph.execute import run_graph, synthesize_inputs
from ...graph.ir import Graph, Node, Value
from ..base import Context, Decision

OPERATORS = ("conv", "linear", "batch_norm")
"""The operators whose operands 1, 2, ... are wanted as stored weights."""

RUNTIME = frozenset(("random", "opaque", "if", "loop", "scan", "quantize", "dequantize", "fake_quantize"))
"""Ops that are no function of their operands, hold graphs of their own, or carry a quantization worth keeping."""


def materialize(graph: Graph, ctx: Context) -> list[Decision]:
    """Store every operand of :data:`OPERATORS` that is computed from constants alone; drop what computed it."""
    constant = _constant_values(graph)
    wanted: dict[str, list[tuple[Node, int]]] = {}
    for node in graph.nodes:
        if node.op in OPERATORS:
            for position, value in enumerate(node.inputs):
                if position and value is not None and not value.is_const and id(value) in constant:
                    wanted.setdefault(value.name, []).append((node, position))
    if not wanted:
        return []
    inputs = synthesize_inputs(graph, ctx.seed) if ctx.example_inputs is None else graph.bind(ctx.example_inputs)
    _, found = run_graph(graph, inputs, list(wanted))
    decisions = []
    for name, uses in wanted.items():
        producer = graph.values[name].producer
        trainable = any(_trainable(node) for node, _ in uses)
        stored = graph.add_weight(name, found[name].copy(), trainable=trainable)
        for node, position in uses:
            graph.set_input(node, position, stored)
            reason = f"its operand {position} is computed from constants alone"
            decisions.append(Decision(node.name, "stored", reason, {"weight": stored.name}))
        if producer is not None:
            _erase_dead(graph, producer)
    return decisions


def _trainable(node: Node) -> bool:
    """Whether any weight of a node is."""
    return any(v is not None and v.weight is not None and v.weight.trainable for v in node.inputs[1:])


def _constant_values(graph: Graph) -> set[int]:
    """Ids of the computed values that are the same in every run."""
    constant: set[int] = set()

    def known(value: Value | None) -> bool:
        return value is None or value.is_const or id(value) in constant

    for node in graph.nodes:
        if node.op in RUNTIME or node.captured:
            continue
        if node.op == "shape_of":
            same = _static(node)
        else:
            sizes = [] if node.op == "cast" else node.dynamic  # CastLike reads a dtype, which is no number
            same = all(map(known, node.inputs)) and all(map(known, sizes))
        if same:
            constant.update(id(value) for value in node.outputs)
    return constant


def _static(node: Node) -> bool:
    """Whether the sizes that a shape_of reads are numbers."""
    data = node.inputs[0] if node.inputs else None
    if data is None or data.shape is None:
        return False
    return all(isinstance(data.shape[axis], int) for axis in node.attrs["axes"])


def _erase_dead(graph: Graph, node: Node) -> None:
    """Erase a node nobody reads, and what then is read by nobody."""
    stack = [node]
    while stack:
        node = stack.pop()
        sizes = {id(v) for user in graph.nodes for v in [*user.dynamic, *user.captured]}
        if node not in graph.nodes or any(v.uses or v.is_output or id(v) in sizes for v in node.outputs):
            continue
        sources = [v.producer for v in [*node.inputs, *node.dynamic] if v is not None and v.producer is not None]
        graph.erase(node)
        stack += sources
