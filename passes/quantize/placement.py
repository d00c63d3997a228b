"""Where Q/DQ pairs go, as data: points, weights, scales that are equal, and a reason for every node it mentions."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...graph.ir import Graph, Node, Value, Weight
from ..base import Decision
from .spec import BackendSpec, OpPlacement, TensorFormat, input_axis, output_axis


@dataclass
class Point:
    """A value that gets a Q/DQ pair.

    Attributes:
        value: the value.
        root: name of the value whose scale it takes (itself unless tied).
        all_uses: every consumer reads the dequantized value; else only ``readers`` do.
        readers: (node, input position) of those that asked for it.
        form: its format; the same for all points of one root.
    """

    value: Value
    root: str
    all_uses: bool = False
    readers: list[tuple[Node, int]] = field(default_factory=list)
    form: TensorFormat = field(default_factory=lambda: TensorFormat("uint8"))


@dataclass
class WeightSite:
    """A weight operand to store as integers.

    Attributes:
        node, position: who reads it, and as which operand.
        weight: the stored float tensor.
        axis: its output-channel axis (of an embedding table: the features).
        x: the activation that meets it. It is a point for products in integers, and none where the weight alone is
            quantized (``Placement.points`` tells). For a table: the indices.
        bias, bias_node, bias_position: the bias to store as int32 with it, or None; ``bias_node`` is the node itself
            or the addition behind it.
        in_axis: its input-channel axis, along which the product sums.
        form: format of the stored weight.
        rule: the spec's rule that asked for it.
    """

    node: Node
    position: int
    weight: Weight
    axis: int
    x: Value
    bias: Weight | None = None
    bias_node: Node | None = None
    bias_position: int = -1
    in_axis: int | None = None
    form: TensorFormat = field(default_factory=lambda: TensorFormat("int8", symmetric=True, granularity="out_channel"))
    rule: OpPlacement | None = None


@dataclass(frozen=True)
class Tie:
    """Two points that must have equal scales, the node that asks for it, and why."""

    first: str
    second: str
    node: str
    why: str


@dataclass
class Placement:
    """What a spec makes of a graph.

    Attributes:
        points: by value name, in topological order.
        weights: products' weights, in topological order.
        tables: embedding tables: looked up as integers, dequantized after the look-up.
        sources: name of a root -> the values whose statistics make its range.
        ties: why points share scales.
        quantized: node name -> its rule.
        decisions: what stays in float or is peculiar, and why.
    """

    points: dict[str, Point] = field(default_factory=dict)
    weights: list[WeightSite] = field(default_factory=list)
    tables: list[WeightSite] = field(default_factory=list)
    sources: dict[str, list[str]] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    quantized: dict[str, OpPlacement] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)


def place(
    graph: Graph, spec: BackendSpec, ignored: set[str], *, products: bool = False, tables: bool = True
) -> Placement:
    """Apply the spec. The graph is only read.

    Args:
        ignored: names of nodes that stay float.
        products: quantize products of two activations where the spec leaves that to the user.
        tables: quantize embedding tables where the spec has a rule for them.
    """
    from .solve import Solver

    return Solver(graph, spec, ignored, products=products, tables=tables).run()


def result(node: Node, rule: OpPlacement) -> Value:
    """The node's result after the activations that the backend fuses into it."""
    value = node.output
    while not value.is_output and len(value.uses) == 1:
        user, position = value.uses[0]
        if user.op not in rule.activations or position != 0 or len(user.outputs) != 1:
            break
        value = user.output
    return value


__all__ = ["Placement", "Point", "Tie", "WeightSite", "input_axis", "output_axis", "place", "result"]
