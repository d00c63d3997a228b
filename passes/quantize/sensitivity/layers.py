"""What can be given bits of its own: the stored weights of a graph's layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ....graph.ir import Graph, Node, Value, Weight
from ..bits.costs import stored_bytes
from ..numerics import QuantParams, weight_params
from ..spec import TensorFormat

OPS = ("conv", "linear", "matmul")


@dataclass
class Layer:
    """A stored weight and the layers that read it (several where it is tied: they share its bits).

    Attributes:
        name: of the first layer's node.
        axis, in_axis: output- and input-channel axes of the weight.
    """

    name: str
    weight: Weight
    value: Value
    nodes: list[Node] = field(default_factory=list)
    axis: int = 0
    in_axis: int = 1

    @property
    def scope(self) -> str:
        return self.nodes[0].scope or self.name

    def params(self, form: TensorFormat) -> QuantParams:
        """The grid that covers the whole weight."""
        return weight_params(self.data(), self.axis, form, in_axis=self.in_axis)

    def data(self) -> np.ndarray:
        return np.asarray(self.weight.numpy(), dtype=np.float32)

    def rounded(self, form: TensorFormat) -> np.ndarray:
        """The weight rounded to the nearest points of its grid, float32."""
        return np.asarray(self.params(form).apply(self.data()), dtype=np.float32)

    def bytes(self, form: TensorFormat, packed: bool = True) -> float:
        """Bytes as stored, scales included."""
        return stored_bytes(self.weight.shape, self.axis, self.in_axis, form, packed)


def layers(graph: Graph, only: set[str] | None = None) -> list[Layer]:
    """The layers with stored float weights, in graph order; ``only`` names of nodes."""
    found: dict[int, Layer] = {}
    for node in graph.nodes:
        if node.op not in OPS or (only is not None and node.name not in only):
            continue
        for value in node.inputs[:2]:
            weight = None if value is None else value.weight
            if value is None or weight is None or not weight.dtype.startswith(("float", "bfloat")):
                continue
            if len(weight.shape) < 2:
                continue
            out, into = _axes(node, weight)
            layer = found.setdefault(id(weight), Layer(node.name, weight, value, [], out, into))
            layer.nodes.append(node)
            break
    return list(found.values())


def _axes(node: Node, weight: Weight) -> tuple[int, int]:
    if node.op == "conv":
        return (1, 0) if node.attrs.get("transposed") else (0, 1)
    last = len(weight.shape) - 1
    if node.op == "matmul":
        return last, last - 1
    return (1, 0) if node.attrs.get("transposed_weight") else (0, 1)
