"""Where TensorRT finds the integers of a product's operands: it moves DequantizeLinear down through some operators."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..rules.onnx_file import OnnxFile, attribute
from ..rules.qdq import DQ, Pair, dequantizer, is_op, readers, same_scale, weight_axis

CROSSED = frozenset(
    "Identity Dropout Reshape Flatten Squeeze Unsqueeze Transpose Slice Split Gather Expand Tile MaxPool GlobalMaxPool "
    "ReduceMax DepthToSpace SpaceToDepth Neg".split()
)
"""Operators that a DequantizeLinear crosses, by what the builder of TensorRT-RTX 1.7 does."""
BLOCKS = frozenset(
    "Relu Clip LeakyRelu PRelu Elu Selu HardSwish HardSigmoid Sigmoid Tanh Gelu Softplus AveragePool GlobalAveragePool "
    "ReduceMean Resize Upsample Where Add Sub Mul Div Pow Min Max LayerNormalization BatchNormalization Softmax "
    "Pad Cast Sum Erf Exp Sqrt InstanceNormalization GroupNormalization LpNormalization LRN".split()
)


FOUR_BITS = ("int4", "uint4", "float4_e2m1fn")


@dataclass(frozen=True)
class Arrival:
    """How an operand reaches a product.

    Attributes:
        kind: ``quantized``; ``float``; ``blocked`` (quantized, but an operator stands between that the dequantization
            does not cross); ``unequal`` (a concatenation of what has different scales, or not all of it quantized).
        pairs: the DequantizeLinear nodes behind it.
        at: the operator that blocks, or the concatenation.
        channel: for one pair with a scale per channel: the axis of the operand that it varies along; -1 if unknown.
    """

    kind: str
    pairs: tuple[Pair, ...] = ()
    at: ir.Node | None = None
    channel: int | None = None

    @property
    def dtype(self) -> str:
        return self.pairs[0].dtype if self.pairs else ""


FLOAT = Arrival("float")


def arrival(file: OnnxFile, value: ir.Value | None) -> Arrival:
    """Trace an operand back to its integers."""
    if value is None:
        return FLOAT
    node = value.producer()
    if node is None:
        return FLOAT
    if is_op(node, DQ):
        pair = Pair(file, node)
        one_axis = not pair.block and file.rank(pair.scale) == 1 and not pair.per_tensor
        return Arrival("quantized", (pair,), channel=pair.positive_axis if one_axis else None)
    if is_op(node, "Concat"):
        return _concat(file, node)
    if crosses(file, node):
        found = arrival(file, _data(file, node))
        if found.channel is None or found.kind != "quantized":
            return found
        return Arrival("quantized", found.pairs, channel=_moved(file, node, found.channel))
    if is_op(node, *BLOCKS):
        behind = [arrival(file, v) for v in node.inputs if v is not None and not _plain_constant(file, v)]
        quantized = [b for b in behind if b.kind == "quantized"]
        if quantized and len(quantized) == len(behind):
            return Arrival("blocked", quantized[0].pairs, node)
    return FLOAT


def _data(file: OnnxFile, node: ir.Node) -> ir.Value | None:
    """The operand that an operator moves: the first, or that which is no scalar constant."""
    if node.op_type in ("Mul", "Div") and file.is_static(node.inputs[0]):
        return node.inputs[1]
    return node.inputs[0]


def _plain_constant(file: OnnxFile, value: ir.Value) -> bool:
    return file.is_static(value) and dequantizer(file, value) is None


def crosses(file: OnnxFile, node: ir.Node) -> bool:
    """Whether a DequantizeLinear in front of this operator may as well stand behind it."""
    if is_op(node, *CROSSED):
        return True
    if is_op(node, "Cast"):
        wanted = attribute(node, "to")
        return wanted is not None and file.dtype(node.inputs[0]) == ir.DataType(wanted)
    if is_op(node, "Pad"):
        if attribute(node, "mode", "constant") != "constant":
            return True
        fill = file.const(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        return fill is None or not np.any(fill)
    if is_op(node, "Mul", "Div"):
        # Scaling by one constant goes into the scale.
        factor = file.const(node.inputs[1 if node.op_type == "Div" or not file.is_static(node.inputs[0]) else 0])
        return factor is not None and factor.size == 1
    return False


def _moved(file: OnnxFile, node: ir.Node, axis: int) -> int:
    """Where an axis of the operand lies in the result; -1 where that is not followed."""
    if node.op_type in ("Identity", "Dropout", "Cast", "Mul", "Div", "Neg"):
        return axis
    if node.op_type == "Transpose":
        rank = file.rank(node.inputs[0])
        order = attribute(node, "perm") or (list(range(rank))[::-1] if rank else [])
        return list(order).index(axis) if axis in order else -1
    if node.op_type == "Gather":
        across = int(attribute(node, "axis", 0))
        rank, index = file.rank(node.inputs[0]), file.rank(node.inputs[1])
        if rank is None or index is None:
            return -1
        across = across + rank if across < 0 else across
        return axis if axis < across else axis + index - 1 if axis > across else -1
    before, after = file.sizes(node.inputs[0]), file.sizes(node.outputs[0])
    if before is None or after is None:
        return -1
    # A reshape keeps an axis whole where the products of the sizes before it agree.
    lead = int(np.prod(before[:axis], dtype=np.int64))
    for i, size in enumerate(after):
        if size == before[axis] and int(np.prod(after[:i], dtype=np.int64)) == lead:
            return i
    return -1


def _concat(file: OnnxFile, node: ir.Node) -> Arrival:
    parts = [arrival(file, v) for v in node.inputs if v is not None]
    quantized = [p for p in parts if p.kind == "quantized"]
    if not quantized:
        return FLOAT
    pairs = tuple(pair for p in quantized for pair in p.pairs)
    if len(quantized) == len(parts) and all(same_scale(pairs[0], p) and pairs[0].dtype == p.dtype for p in pairs[1:]):
        return Arrival("quantized", pairs, channel=quantized[0].channel)
    return Arrival("unequal", pairs, node)


@dataclass(frozen=True)
class ProductState:
    """What TensorRT makes of one convolution or matrix product, and why.

    Attributes:
        precision: narrow type it multiplies in, or ``float``.
        reason: why it is float although something about it is quantized: ``operand``, ``blocked``, ``unequal``,
            ``weight-axis``, ``activation-axis``, ``scale-vector``, ``blocks``, ``transposed``, ``types``,
            ``packed``; "" if there
            is nothing to say.
        at: node to name with the reason.
    """

    precision: str
    reason: str = ""
    at: ir.Node | None = None
    x: Arrival = FLOAT
    w: Arrival = FLOAT


def state(file: OnnxFile, node: ir.Node) -> ProductState:
    """Predict the precision of a product; a test holds it against the builder, node by node."""
    x, w = arrival(file, node.inputs[0]), arrival(file, node.inputs[1])
    if x.kind == "float" and w.kind == "float":
        return ProductState("float", x=x, w=w)
    if x.kind == "quantized" and w.kind == "quantized" and node.op_type == "ConvTranspose":
        return ProductState("float", "transposed", node, x, w)
    for found in (x, w):
        if found.kind == "unequal":
            return ProductState("float", "unequal", found.at, x, w)
    for mine, other in ((x, w), (w, x)):
        if mine.kind == "blocked" and other.kind != "float":
            return ProductState("float", "blocked", mine.at, x, w)
    if any(p.block for p in (*x.pairs, *w.pairs)):
        return ProductState("float", "blocks", node, x, w)
    if w.kind == "quantized" and w.dtype in FOUR_BITS:
        return ProductState("float", "blocks", node, x, w)
    if x.kind != "quantized" or w.kind != "quantized":
        return ProductState("float", "operand", node, x, w)
    if _computed(x.dtype) != _computed(w.dtype):
        return ProductState("float", "types", node, x, w)
    if x.channel is not None:
        return ProductState("float", "activation-axis", node, x, w)
    if node.op_type == "Conv" and any(file.shape(p.scale) == (1,) for p in x.pairs):
        return ProductState("float", "scale-vector", node, x, w)
    if w.channel is not None and w.channel != -1 and w.channel != _wanted(file, node):
        return ProductState("float", "weight-axis", node, x, w)
    if node.op_type != "Conv" and w.channel is not None and packed(file, node):
        return ProductState("float", "packed", node, x, w)
    return ProductState(_computed(x.dtype), x=x, w=w)


def packed(file: OnnxFile, node: ir.Node) -> bool:
    """Whether a product's result is cut into query, key and value, and a part goes into the scores as it is."""
    stack: list[tuple[ir.Value, bool]] = [(node.outputs[0], False)]
    seen: set[ir.Value] = set()
    while stack:
        value, cut = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        for user in readers(value):
            if is_op(user, "MatMul") and cut and not any(file.is_static(v) for v in user.inputs):
                if _before_softmax(user):
                    return True
            elif is_op(user, "Slice", "Split", "Gather"):
                stack += [(v, True) for v in user.outputs]
            elif is_op(user, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten") or (
                is_op(user, "Add") and any(file.is_static(v) for v in user.inputs)
            ):
                stack.append((user.outputs[0], cut))
    return False


def _before_softmax(node: ir.Node) -> bool:
    value = node.outputs[0]
    for _ in range(6):
        users = readers(value)
        if any(is_op(n, "Softmax") for n in users):
            return True
        step = next((n for n in users if is_op(n, "Mul", "Div", "Add", "Where", "Cast", "Reshape")), None)
        if step is None:
            return False
        value = step.outputs[0]
    return False


def _computed(dtype: str) -> str:
    """What the engine multiplies in for an operand of this type: it reads uint8 and quantizes int4 as int8."""
    return "int8" if dtype in ("int8", "uint8", "int4") else "fp8" if dtype == "float8_e4m3fn" else dtype


def _wanted(file: OnnxFile, node: ir.Node) -> int:
    """The output-channel axis of operand 1."""
    if node.op_type == "MatMul":
        rank = file.rank(node.inputs[1])
        return 1 if rank is None else rank - 1
    return weight_axis(node)
