"""How a linear operator (convolution, transposed convolution, linear) takes an affine map into its weight and bias.

After the operator, ``A(W x + b) = (scale W) x + (scale b + shift)``, always exact. Before it,
``W A(x) + b = (W scale) x + (b + W shift)``, exact where every output sums the same taps: with zero padding the border
sums fewer, so a map with a shift is refused there and a pure scale is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...graph.ir import Node
from .absorb import border, sum_taps, times_in, times_out
from .affine import Affine, Refusal, Why, constant
from .edits import BEHIND, Edits, changeable
from .operands import FLOATS, channel_axis, channels, groups, inputs_first

if TYPE_CHECKING:
    from .walk import Walk


def linear_up(walk: Walk, node: Node, affine: Affine) -> Refusal | None:
    """The map acts on the output: scale the rows of the weight, scale and shift the bias."""
    axis, sizes = _sides(node, output=True)
    if isinstance(axis, Refusal):
        return axis
    vector = affine.vector(axis, sizes[1])
    if vector is None:
        return _elsewhere(node, affine, axis, "writes its channels on")
    scale, shift = vector
    alpha_beta = _factors(node)
    if alpha_beta[1] == 0.0 and (affine.has_shift or node.input(2) is not None):
        return Refusal(f"{node.name} multiplies its bias by zero", node.name)
    if (blocked := _bias_refusal(node, sizes[1])) is not None:
        return blocked
    if affine.has_scale:
        if (blocked := _scale_weight(walk, node, scale, out=True)) is not None:
            return blocked
    _change_bias(walk.edits, node, axis, scale, shift / (alpha_beta[1] or 1.0))
    return None


def linear_down(walk: Walk, node: Node, position: int, affine: Affine) -> Affine | Refusal | None:
    """The map acts on operand 0: scale the columns of the weight, add the weight times the shift to the bias."""
    if position != 0:
        return Refusal(f"{node.name} reads it as operand {position}", node.name, Why.NOT_CONSTANT)
    axis, sizes = _sides(node, output=False)
    if isinstance(axis, Refusal):
        return axis
    vector = affine.vector(axis, sizes[0])
    if vector is None:
        return _elsewhere(node, affine, axis, "contracts")
    scale, shift = vector
    out_axis = channel_axis(node, node.output)
    if isinstance(out_axis, Refusal):
        return out_axis
    extra: np.ndarray | None = None
    alpha, beta = _factors(node)
    if affine.has_shift:
        if reason := border(node):
            return Refusal(reason, node.name, Why.BORDER)
        if beta == 0.0:
            return Refusal(f"{node.name} multiplies its bias by zero", node.name)
        if (blocked := _bias_refusal(node, sizes[1])) is not None:
            return blocked
        weight = walk.edits.current(node, 1)
        if weight is None:
            return Refusal(f"the weight of {node.name} is computed at run time", node.name, Why.NOT_CONSTANT)
        extra = sum_taps(node, times_in(node, weight, shift)) * alpha
    if affine.has_scale and (blocked := _scale_weight(walk, node, scale, out=False)) is not None:
        return blocked
    if extra is None or not extra.any():
        return None
    if node.input(2) is None and added_behind(node) is not None:
        shape = [-1 if a == out_axis else 1 for a in range(node.output.rank or 0)]
        return shift_behind(walk, node, extra.reshape(shape))
    _change_bias(walk.edits, node, out_axis, np.ones(sizes[1]), extra / beta)
    return None


def _sides(node: Node, *, output: bool) -> tuple[int | Refusal, tuple[int, int]]:
    axis = channel_axis(node, node.output if output else node.inputs[0])
    weight = node.input(1)
    if weight is None or weight.shape is None or not all(isinstance(n, int) for n in weight.shape):
        return Refusal(f"the size of the weight of {node.name} is unknown", node.name, Why.SHAPE), (0, 0)
    return axis, channels(node, tuple(n for n in weight.shape if isinstance(n, int)))


def _elsewhere(node: Node, affine: Affine, axis: int, verb: str) -> Refusal:
    wrong = [a for a in affine.axes if a != axis]
    where = f"axis {wrong[0]}" if len(wrong) == 1 else f"axes {wrong}"
    return Refusal(f"it acts on {where}, {node.name} {verb} axis {axis}", node.name, Why.COMMUTE)


def _factors(node: Node) -> tuple[float, float]:
    return float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))


def _scale_weight(walk: Walk, node: Node, scale: np.ndarray, *, out: bool) -> Refusal | None:
    value = node.inputs[1]
    assert value is not None
    if not value.is_const:
        return _scale_computed(walk, node, scale, out=out)
    if value.dtype not in FLOATS:
        return Refusal(f"the weight of {node.name} is stored as {value.dtype}", node.name, Why.DTYPE)
    if (blocked := changeable(node, 1)) is not None:
        return blocked
    times = times_out if out else times_in
    walk.edits.add(node, 1, lambda a: times(node, a, scale))
    return None


def _scale_computed(walk: Walk, node: Node, scale: np.ndarray, *, out: bool) -> Refusal | None:
    """A dequantized weight: its scales take the map where it acts on an axis of the weight."""
    value = node.inputs[1]
    assert value is not None and value.rank is not None
    axis = 0 if out != inputs_first(node) else 1
    if value.producer is None or value.producer.op != "dequantize" or (groups(node) != 1 and axis == 1):
        return Refusal(f"the weight of {node.name} is computed at run time", node.name, Why.NOT_CONSTANT)
    if groups(node) != 1 and not out:
        return Refusal(f"the weight of {node.name} is computed at run time", node.name, Why.NOT_CONSTANT)
    return walk.up(node, 1, Affine.along(axis, scale, np.zeros(len(scale)), value.rank))


def _bias_refusal(node: Node, out: int) -> Refusal | None:
    value = node.input(2)
    if value is None:
        return None
    data = constant(node, 2)
    if data is None:
        return Refusal(f"the bias of {node.name} is computed at run time", node.name, Why.NOT_CONSTANT)
    if data.size not in (1, out) or data.shape[-1:] not in ((), (data.size,)):
        return Refusal(f"the bias of {node.name} differs between rows", node.name, Why.SHAPE)
    return changeable(node, 2)


def _change_bias(edits: Edits, node: Node, axis: int, scale: np.ndarray, shift: np.ndarray) -> None:
    """``scale * bias + shift`` where the operator has a bias, or must get one for the shift."""
    own = node.input(2) is not None or takes_bias(node)
    position = 2 if own else BEHIND
    known = node.input(2) is not None or (node, position) in edits.slots()
    if not known and not shift.any():
        return
    rank = node.output.rank
    assert rank is not None
    tail = [1] * (rank - 1 - axis) if position == BEHIND else []
    out = len(scale)

    def change(a: np.ndarray) -> np.ndarray:
        new = np.broadcast_to(a.reshape(-1), (out,)) * scale + shift
        return new.reshape(a.shape) if a.size == out else new

    edits.add(node, position, change, np.zeros((out, *tail)))


def takes_bias(node: Node) -> bool:
    """Whether the native operator has an operand for a bias that it was not given; a matrix product has none."""
    return node.op == "conv" or node.origin == "Gemm" or node.origin.startswith("aten.linear")


def added_behind(node: Node) -> tuple[Node, int] | None:
    """The addition of a constant that is all that reads the output, and the constant's position there.

    That is how a matrix product has a bias.
    """
    readers = [(user, k) for user, k in node.output.uses if user.op != "shape_of"]
    if node.output.is_output or len(readers) != 1:
        return None
    user, k = readers[0]
    other = user.input(1 - k) if user.op == "add" and len(user.inputs) == 2 else None
    fits = other is not None and other.is_const and float(user.attrs.get("alpha", 1.0)) == 1.0
    return (user, 1 - k) if fits else None


def shift_behind(walk: Walk, node: Node, shift: np.ndarray) -> Refusal | None:
    """A shift behind a product: into the constant that is added there, or on its way further down."""
    from .sinks import into_constant

    bias = added_behind(node)
    if bias is None:
        return walk.down(node.output, Affine.of(1.0, shift, shift.ndim))
    walk.window[bias[0]] = None
    return into_constant(walk.edits, *bias, Affine(np.ones((1,) * shift.ndim), shift))
