"""Where a graph normalizes: norm operators, and norms that a front end writes out as mean, root and product."""

from __future__ import annotations

from dataclasses import dataclass

from ....graph.ir import Graph, Node, Value

NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
THROUGH = ("identity", "cast")
STEPS = 8
"""How far back the statistic of a norm that is written out is looked for."""


@dataclass
class Norm:
    """One norm with its gain and bias.

    Attributes:
        node: whose output is the norm's result, bias included.
        gain, bias: operands; None where absent or computed.
        axis: of the result, along which gain and bias lie.
    """

    node: Node
    gain: Value | None
    bias: Value | None
    axis: int


def norms(graph: Graph) -> list[Norm]:
    """All norms with per-channel gains, in graph order. Batch norms are not among them."""
    found = []
    for node in graph.nodes:
        rank = node.output.rank if len(node.outputs) == 1 else None
        if not rank:
            continue
        if node.op in NORMS:
            axis = 1 if node.op in ("group_norm", "instance_norm") else rank - 1
            found.append(Norm(node, node.input(1), node.input(2), axis))
        elif node.op == "mul" and (gain := _written_out(node, rank)) is not None:
            found.append(_with_bias(node, gain, rank))
    return found


def _written_out(node: Node, rank: int) -> Value | None:
    """The gain of ``gain * (x * rsqrt(mean(...)))``, operands in any order; None if the node is something else."""
    for i, gain in enumerate(node.inputs):
        other = node.input(1 - i)
        if gain is None or other is None or gain.weight is None or node.output.hint is None:
            continue
        if gain.weight.size != node.output.hint[-1] or gain.weight.shape[-1:] != (gain.weight.size,):
            continue
        inner = _source(other)
        if inner is None or inner.op not in ("mul", "div"):
            continue
        if any(v is not None and _is_statistic(v, rank) for v in inner.inputs):
            return gain
    return None


def _source(value: Value) -> Node | None:
    node = value.producer
    while node is not None and node.op in THROUGH and node.inputs[0] is not None:
        node = node.inputs[0].producer
    return node


def _is_statistic(value: Value, rank: int) -> bool:
    """One number per row, made of a mean over the last axis."""
    if value.hint is None or len(value.hint) != rank or value.hint[-1] != 1:
        return False
    node: Node | None = _source(value)
    for _ in range(STEPS):
        if node is None:
            return False
        if node.op == "mean":
            return list(node.attrs.get("axes", ())) in ([rank - 1], [-1])
        operand = next((v for v in node.inputs if v is not None and not v.is_const), None)
        node = None if operand is None else _source(operand)
    return False


def _with_bias(node: Node, gain: Value, rank: int) -> Norm:
    if len(node.output.uses) == 1 and not node.output.is_output:
        reader, position = node.output.uses[0]
        other = reader.input(1 - position) if reader.op == "add" and len(reader.inputs) == 2 else None
        if other is not None and other.weight is not None and other.weight.size == gain.weight.size:  # type: ignore[union-attr]
            return Norm(reader, gain, other, rank - 1)
    return Norm(node, gain, None, rank - 1)
