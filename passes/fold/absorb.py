"""New weights and biases of linear operators: the algebra per group and tap, and how a pair of them is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node, Weight
from .operands import BiasSlot, channel_axis, groups, inputs_first


@dataclass(eq=False)
class Absorbed:
    """New weight and bias of a linear operator, computed but not yet written.

    Attributes:
        stored: the weight it replaces.
        slot: where the bias is or goes.
        weight: float64, in the layout of ``stored``.
        bias: float64 [out], or None where the bias (or its absence) stays.
    """

    node: Node
    stored: Weight
    slot: BiasSlot
    weight: np.ndarray
    bias: np.ndarray | None

    def cast(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Weight and bias in the dtypes they are stored in; a new bias takes the weight's."""
        dtype = self.stored.numpy().dtype
        old = None if self.slot.value is None or self.slot.value.weight is None else self.slot.value.const()
        with np.errstate(over="ignore"):
            weight = self.weight.astype(dtype)
            bias = None if self.bias is None else self.bias.astype(dtype if old is None else old.dtype)
        return weight, bias

    def fits(self) -> bool:
        """Whether every number stays finite in the stored dtype."""
        return all(np.isfinite(data.astype(np.float64)).all() for data in self.cast() if data is not None)


def write(graph: Graph, new: Absorbed) -> str:
    """Cast once and store; says what became of the bias (``"kept"``, ``"updated"``, ``"created"``, ``"untied"``)."""
    weight, bias = new.cast()
    outcome = "kept" if bias is None else _write_bias(graph, new, bias)
    graph.set_weight(new.stored, weight)
    return outcome


def _write_bias(graph: Graph, new: Absorbed, bias: np.ndarray) -> str:
    node, slot, stored = new.node, new.slot, new.stored
    axis, rank = channel_axis(node, node.output), node.output.rank
    assert isinstance(axis, int) and rank is not None
    shaped = slot.shaped(bias, axis, rank)
    old = None if slot.value is None else slot.value.weight
    if slot.value is not None and old is not None and len(slot.value.uses) == 1 and len(old.aliases) <= 1:
        graph.set_weight(old, shaped)
        return "updated"
    name = stored.name.removesuffix("weight") + "bias" if stored.name.endswith("weight") else stored.name + "_bias"
    value = graph.add_weight(name, shaped, trainable=stored.trainable)
    try:
        graph.set_input(slot.holder, slot.position, value)
    except ConstraintError:  # a plain matrix product has no bias operand
        added = graph.insert("add", [node.output, value], name=f"{node.name}_bias", after=node, scope=node.scope)
        graph.replace_uses(node.output, added.output, except_nodes=[added])
    return "created" if slot.value is None else "untied"


# ---- the algebra, per group and tap ----------------------------------------------------------------------------
def _by_group(node: Node, weight: np.ndarray) -> np.ndarray:
    """A weight as [groups, first / groups, second, taps]; a linear has one group and one tap."""
    g = groups(node)
    return weight.reshape(g, weight.shape[0] // g, weight.shape[1], -1)


def times_out(node: Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    split = _by_group(node, weight)
    factor = scale.reshape(split.shape[0], -1)
    return (split * (factor[:, None, :, None] if inputs_first(node) else factor[:, :, None, None])).reshape(
        weight.shape
    )


def times_in(node: Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    split = _by_group(node, weight)
    factor = scale.reshape(split.shape[0], -1)
    return (split * (factor[:, :, None, None] if inputs_first(node) else factor[:, None, :, None])).reshape(
        weight.shape
    )


def sum_taps(node: Node, weight: np.ndarray) -> np.ndarray:
    """[out]: the sum of a weight over input channels and taps."""
    return _by_group(node, weight).sum(axis=(1, 3) if inputs_first(node) else (2, 3)).reshape(-1)


def border(node: Node) -> str:
    """Why a shift before this operator is no constant after it; empty where it is."""
    if node.op == "linear":
        return ""
    attrs = node.attrs
    if any(lo or hi for lo, hi in attrs["padding"]):
        return f"{node.name} pads with zeros: the padded border would not be shifted"
    if attrs.get("transposed"):
        weight = node.input(1)
        taps = () if weight is None or weight.shape is None else weight.shape[2:]
        if any(t != 1 for t in taps) or any(s != 1 for s in attrs["stride"]) or any(attrs.get("output_padding") or ()):
            return f"{node.name} is transposed: its outputs sum different taps, a shift becomes no constant"
    return ""
