"""How a linear operator (convolution, transposed convolution, linear) takes an affine map into its weight and bias.

After the operator, ``A(W x + b) = (scale W) x + (scale b + shift)``, always exact. Before it,
``W A(x) + b = (W scale) x + (b + W shift)``, exact where every output sums the same taps: with zero padding the border
sums fewer, so a map with a shift is refused there and a pure scale is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graph.errors import ConstraintError
from ...graph.ir import Graph, Node, Value, Weight
from .affine import Affine, Refusal
from .operands import BiasSlot, bias_slot, channel_axis, channels, groups, inputs_first, stored_weight


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


def absorb_after(node: Node, affine: Affine) -> Absorbed | Refusal:
    """``affine`` acts on the output of ``node``: scale the rows of the weight, scale and shift the bias."""
    found = _matching(node, node.output, affine, side=1, verb="writes its channels on")
    if isinstance(found, Refusal):
        return found
    stored, slot, _, beta = found
    weight = stored.numpy().astype(np.float64)
    scaled = _times_out(node, weight, affine.scale)
    if slot.value is None and not affine.has_shift:
        return Absorbed(node, stored, slot, scaled, None)
    bias = affine.scale * slot.data(affine.size) + affine.shift / beta
    return Absorbed(node, stored, slot, scaled, bias)


def absorb_before(node: Node, affine: Affine) -> Absorbed | Refusal:
    """``affine`` acts on operand 0 of ``node``: scale the columns of the weight, add the weight times the shift."""
    found = _matching(node, node.inputs[0], affine, side=0, verb="contracts")
    if isinstance(found, Refusal):
        return found
    if affine.has_shift and (border := _border(node)):
        return Refusal(border, node.name)
    stored, slot, alpha, beta = found
    weight = stored.numpy().astype(np.float64)
    scaled = _times_in(node, weight, affine.scale)
    if not affine.has_shift:
        return Absorbed(node, stored, slot, scaled, None)
    constant = _sum_taps(node, _times_in(node, weight, affine.shift))
    return Absorbed(node, stored, slot, scaled, slot.data(len(constant)) + constant * (alpha / beta))


def expected_bias(new: Absorbed) -> str:
    """What :func:`write` will make of the bias: ``"kept"``, ``"updated"``, ``"created"`` or ``"untied"``."""
    if new.bias is None:
        return "kept"
    old = None if new.slot.value is None else new.slot.value.weight
    if new.slot.value is not None and old is not None and len(new.slot.value.uses) == 1 and len(old.aliases) <= 1:
        return "updated"
    return "created" if new.slot.value is None else "untied"


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


def _matching(
    node: Node, value: Value | None, affine: Affine, side: int, verb: str
) -> tuple[Weight, BiasSlot, float, float] | Refusal:
    """Weight, bias and Gemm's factors (alpha, beta), if the map acts on the channels of that side (0 in, 1 out)."""
    axis = channel_axis(node, value)
    if isinstance(axis, Refusal):
        return axis
    if axis != affine.axis:
        return Refusal(f"it acts on axis {affine.axis}, {node.name} {verb} axis {axis}", node.name)
    stored = stored_weight(node)
    if isinstance(stored, Refusal):
        return stored
    sizes = channels(node, stored.shape)
    if affine.size != sizes[side]:
        return Refusal(f"it has {affine.size} channels, {node.name} has {sizes[side]}", node.name)
    slot = bias_slot(node, sizes[1])
    if isinstance(slot, Refusal):
        return slot
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    if slot.holder is not node:
        beta = 1.0
    if beta == 0.0:
        return Refusal(f"{node.name} multiplies its bias by zero", node.name)
    return stored, slot, alpha, beta


# ---- the algebra, per group and tap ----------------------------------------------------------------------------
def _by_group(node: Node, weight: np.ndarray) -> np.ndarray:
    """A weight as [groups, first / groups, second, taps]; a linear has one group and one tap."""
    g = groups(node)
    return weight.reshape(g, weight.shape[0] // g, weight.shape[1], -1)


def _times_out(node: Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    split = _by_group(node, weight)
    factor = scale.reshape(split.shape[0], -1)
    return (split * (factor[:, None, :, None] if inputs_first(node) else factor[:, :, None, None])).reshape(
        weight.shape
    )


def _times_in(node: Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    split = _by_group(node, weight)
    factor = scale.reshape(split.shape[0], -1)
    return (split * (factor[:, :, None, None] if inputs_first(node) else factor[:, None, :, None])).reshape(
        weight.shape
    )


def _sum_taps(node: Node, weight: np.ndarray) -> np.ndarray:
    """[out]: the sum of a weight over input channels and taps."""
    return _by_group(node, weight).sum(axis=(1, 3) if inputs_first(node) else (2, 3)).reshape(-1)


def _border(node: Node) -> str:
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
