"""What a linear operator stores: its weight and channel axes, and its bias, which may sit in an addition behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...graph.ir import Node, Value, Weight
from .affine import Refusal

LINEAR_OPS = ("conv", "linear")
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(eq=False)
class BiasSlot:
    """Where the bias of a linear operator is, or would be.

    Attributes:
        holder: the operator itself, or the addition of a constant right behind it (ONNX MatMul has no bias).
        position: operand position in ``holder``.
        value: what stands there, None if nothing does.
    """

    holder: Node
    position: int
    value: Value | None

    def data(self, out: int) -> np.ndarray:
        """float64 [out]; zeros if there is no bias."""
        found = None if self.value is None else self.value.const()
        if found is None:
            return np.zeros(out)
        return np.broadcast_to(found.astype(np.float64).reshape(-1), (out,))

    def shaped(self, bias: np.ndarray, axis: int, rank: int) -> np.ndarray:
        """[out] in the shape in which ``holder`` reads it: an addition broadcasts from the last axis."""
        old = None if self.value is None else self.value.const()
        if old is not None and old.size == bias.size:
            return bias.reshape(old.shape)
        return bias.reshape(-1, *[1] * (rank - 1 - axis)) if self.holder.op == "add" else bias


def spatial(node: Node) -> int:
    """Number of spatial axes of a convolution."""
    return len(node.attrs["stride"])


def channel_axis(node: Node, value: Value | None) -> int | Refusal:
    """The axis of operand 0 that the operator contracts, or of the output on which it writes its channels."""
    if value is None or value.rank is None:
        return Refusal(f"a rank at {node.name} is unknown", node.name)
    return value.rank - 1 if node.op == "linear" else value.rank - 1 - spatial(node)


def groups(node: Node) -> int:
    """Groups of a convolution; 1 for a linear."""
    return int(node.attrs.get("groups", 1)) if node.op == "conv" else 1


def inputs_first(node: Node) -> bool:
    """Whether the weight holds its input channels on axis 0: [in, out / groups, taps...]."""
    return bool(node.attrs.get("transposed_weight" if node.op == "linear" else "transposed"))


def channels(node: Node, shape: tuple[int, ...]) -> tuple[int, int]:
    """(in, out) of a weight of this shape."""
    first, second = shape[0], shape[1] * groups(node)
    return (first, second) if inputs_first(node) else (second, first)


def stored_weight(node: Node) -> Weight | Refusal:
    """The weight of a linear operator, if it is a stored float tensor and this operator alone uses it."""
    value = node.input(1)
    if value is None or value.weight is None:
        return Refusal(f"the weight of {node.name} is computed at run time", node.name)
    readers = [(user, position) for user, position in value.uses if user.op != "shape_of"]
    if value.is_output or readers != [(node, 1)]:
        return Refusal(f"the weight {value.weight.name} is tied: another operator reads it too", node.name)
    if len(value.weight.aliases) > 1:
        return Refusal(f"the weight is tied under the names {', '.join(value.weight.aliases)}", node.name)
    if value.dtype not in FLOATS:
        return Refusal(f"the weight of {node.name} is stored as {value.dtype}", node.name)
    return value.weight


def bias_slot(node: Node, out: int) -> BiasSlot | Refusal:
    """Where the bias is: an operand of the operator, a constant added right behind it, or nowhere yet."""
    own = node.input(2)
    if own is not None:
        data = own.const()
        if data is None:
            return Refusal(f"the bias of {node.name} is computed at run time", node.name)
        if data.size not in (1, out) or data.shape[-1:] not in ((), (data.size,)):
            return Refusal(f"the bias of {node.name} differs between rows", node.name)
        return BiasSlot(node, 2, own)
    readers = [(user, position) for user, position in node.output.uses if user.op != "shape_of"]
    if not node.output.is_output and len(readers) == 1:
        user, position = readers[0]
        if user.op == "add" and len(user.inputs) == 2 and user.attrs.get("alpha", 1) == 1:
            other = user.input(1 - position)
            if other is not None and _per_channel(other, node, out):
                return BiasSlot(user, 1 - position, other)
    return BiasSlot(node, 2, None)


def _per_channel(value: Value, node: Node, out: int) -> bool:
    """Whether a constant adds one number per output channel (or one to all)."""
    axis, rank = channel_axis(node, node.output), node.output.rank
    if not value.is_const or value.shape is None or rank is None or isinstance(axis, Refusal):
        return False
    if len(value.shape) > rank or math.prod(d for d in value.shape if isinstance(d, int)) not in (1, out):
        return False
    aligned = (1,) * (rank - len(value.shape)) + tuple(value.shape)
    return all(length == 1 for i, length in enumerate(aligned) if i != axis) and aligned[axis] in (1, out)
