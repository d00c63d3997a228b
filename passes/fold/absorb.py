"""How a linear operator (convolution, transposed convolution, linear) takes an affine map into its weight and bias.

After the operator, ``A(W x + b) = (scale W) x + (scale b + shift)``, always exact. Before it,
``W A(x) + b = (W scale) x + (b + W shift)``, exact where every output sums the same taps: with zero padding the border
sums fewer, so a map with a shift is refused there and a pure scale is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graph.ir import Graph, Node, Weight
from .affine import Affine, Refusal

LINEAR_OPS = ("conv", "linear")


@dataclass(eq=False)
class Absorbed:
    """New weight and bias of a linear operator, computed but not yet written.

    Attributes:
        stored: the weight it replaces.
        weight: float64, in the layout of ``stored``.
        bias: float64 [out], or None where the bias (or its absence) stays.
    """

    node: Node
    stored: Weight
    weight: np.ndarray
    bias: np.ndarray | None

    def cast(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Weight and bias in the dtypes they are stored in; a new bias takes the weight's."""
        dtype = self.stored.numpy().dtype
        old = self.node.input(2)
        old_data = None if old is None else old.const()
        with np.errstate(over="ignore"):
            weight = self.weight.astype(dtype)
            bias = None if self.bias is None else self.bias.astype(dtype if old_data is None else old_data.dtype)
        return weight, bias

    def fits(self) -> bool:
        """Whether every number stays finite in the stored dtype."""
        return all(np.isfinite(data.astype(np.float64)).all() for data in self.cast() if data is not None)


def out_axis(node: Node) -> int | Refusal:
    """The axis of the output on which the operator writes its channels."""
    rank = node.output.rank
    if rank is None:
        return Refusal("the rank of its output is unknown", node.name)
    return rank - 1 if node.op == "linear" else rank - 1 - _spatial(node)


def in_axis(node: Node) -> int | Refusal:
    """The axis of operand 0 that the operator contracts."""
    data = node.inputs[0]
    if data is None or data.rank is None:
        return Refusal("the rank of its input is unknown", node.name)
    return data.rank - 1 if node.op == "linear" else data.rank - 1 - _spatial(node)


def absorb_after(node: Node, affine: Affine) -> Absorbed | Refusal:
    """``affine`` acts on the output of ``node``: scale the rows of the weight, scale and shift the bias."""
    axis = out_axis(node)
    if isinstance(axis, Refusal):
        return axis
    if axis != affine.axis:
        return Refusal(f"it acts on axis {affine.axis}, {node.name} writes its channels on axis {axis}", node.name)
    operands = _operands(node)
    if isinstance(operands, Refusal):
        return operands
    stored, bias, (_, beta) = operands
    weight = stored.numpy().astype(np.float64)
    out = _out_channels(node, weight)
    if affine.size != out:
        return Refusal(f"it has {affine.size} channels, {node.name} makes {out}", node.name)
    scaled = _scale_out(node, weight, affine.scale)
    if bias is None and not affine.has_shift:
        return Absorbed(node, stored, scaled, None)
    old = np.zeros(out) if bias is None else np.broadcast_to(bias, (out,))
    return Absorbed(node, stored, scaled, affine.scale * old + affine.shift / beta)


def absorb_before(node: Node, affine: Affine) -> Absorbed | Refusal:
    """``affine`` acts on operand 0 of ``node``: scale the columns of the weight, add the weight times the shift."""
    axis = in_axis(node)
    if isinstance(axis, Refusal):
        return axis
    if axis != affine.axis:
        return Refusal(f"it acts on axis {affine.axis}, {node.name} contracts axis {axis}", node.name)
    if affine.has_shift and (border := _border(node)):
        return Refusal(border, node.name)
    operands = _operands(node)
    if isinstance(operands, Refusal):
        return operands
    stored, bias, (alpha, beta) = operands
    weight = stored.numpy().astype(np.float64)
    if affine.size != (channels := _in_channels(node, weight)):
        return Refusal(f"it has {affine.size} channels, {node.name} reads {channels}", node.name)
    scaled = _scale_in(node, weight, affine.scale)
    if not affine.has_shift:
        return Absorbed(node, stored, scaled, None)
    constant = _sum_taps(node, _scale_in(node, weight, affine.shift))
    old = np.zeros(len(constant)) if bias is None else np.broadcast_to(bias, constant.shape)
    return Absorbed(node, stored, scaled, old + constant * (alpha / beta))


def write(graph: Graph, new: Absorbed) -> str:
    """Cast once and store; says what became of the bias (``"kept"``, ``"updated"``, ``"created"``, ``"untied"``)."""
    weight, bias = new.cast()
    stored, old = new.stored, new.node.input(2)
    outcome = "kept"
    if bias is not None and old is not None and old.weight is not None and len(old.uses) == 1:
        graph.set_weight(old.weight, bias)
        outcome = "updated"
    elif bias is not None:
        name = stored.name.removesuffix("weight") + "bias" if stored.name.endswith("weight") else stored.name + "_bias"
        graph.set_input(new.node, 2, graph.add_weight(name, bias, trainable=stored.trainable))
        outcome = "created" if old is None else "untied"
    graph.set_weight(stored, weight)
    return outcome


# ---- operands ------------------------------------------------------------------------------------------------
def _stored(node: Node) -> Weight | Refusal:
    """The weight of a linear operator, if this operator alone uses it."""
    value = node.input(1)
    if value is None or value.weight is None:
        return Refusal(f"the weight of {node.name} is computed at run time", node.name)
    if value.is_output or any(user is not node or position != 1 for user, position in value.uses):
        return Refusal(f"the weight {value.weight.name} is tied: another operator reads it too", node.name)
    if len({alias for alias in value.weight.aliases if alias}) > 1:
        return Refusal(f"the weight is tied under the names {', '.join(value.weight.aliases)}", node.name)
    if value.dtype not in ("float16", "bfloat16", "float32", "float64"):
        return Refusal(f"the weight of {node.name} is stored as {value.dtype}", node.name)
    return value.weight


def _operands(node: Node) -> tuple[Weight, np.ndarray | None, tuple[float, float]] | Refusal:
    """The weight, the bias in float64 (flat, [out] or [1]), and the factors (alpha, beta) of a Gemm."""
    stored = _stored(node)
    if isinstance(stored, Refusal):
        return stored
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    bias = None
    if (value := node.input(2)) is not None:
        data = value.const()
        if data is None:
            return Refusal(f"the bias of {node.name} is computed at run time", node.name)
        if any(length != 1 for length in data.shape[:-1]):
            return Refusal(f"the bias of {node.name} differs between rows", node.name)
        bias = data.astype(np.float64).reshape(-1)
    if beta == 0.0:
        return Refusal(f"{node.name} multiplies its bias by zero", node.name)
    return stored, bias, (alpha, beta)


def _spatial(node: Node) -> int:
    """Number of spatial axes of a convolution."""
    return len(node.attrs["stride"])


def _groups(node: Node) -> int:
    return int(node.attrs.get("groups", 1))


def _transposed(node: Node) -> bool:
    """Whether the weight holds its input channels first."""
    return bool(node.attrs.get("transposed_weight" if node.op == "linear" else "transposed"))


def _out_channels(node: Node, weight: np.ndarray) -> int:
    if _transposed(node):
        return weight.shape[1] * _groups(node) if node.op == "conv" else weight.shape[1]
    return weight.shape[0]


def _in_channels(node: Node, weight: np.ndarray) -> int:
    if _transposed(node):
        return weight.shape[0]
    return weight.shape[1] * _groups(node) if node.op == "conv" else weight.shape[1]


def _by_group(node: Node, weight: np.ndarray) -> np.ndarray:
    """A weight as [groups, first / groups, second, taps]; a linear has one group and one tap."""
    groups = _groups(node) if node.op == "conv" else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _scale_out(node: Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    split = _by_group(node, weight)
    per_group = scale.reshape(split.shape[0], -1)
    factor = per_group[:, None, :, None] if _transposed(node) else per_group[:, :, None, None]
    return (split * factor).reshape(weight.shape)


def _scale_in(node: Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    split = _by_group(node, weight)
    per_group = scale.reshape(split.shape[0], -1)
    factor = per_group[:, :, None, None] if _transposed(node) else per_group[:, None, :, None]
    return (split * factor).reshape(weight.shape)


def _sum_taps(node: Node, weight: np.ndarray) -> np.ndarray:
    """[out]: the sum of a weight over input channels and taps."""
    return _by_group(node, weight).sum(axis=(1, 3) if _transposed(node) else (2, 3)).reshape(-1)


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
