"""Which convolutions and matrix products ONNX Runtime's CPU provider computes in integers, and why the others not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..rules.onnx_file import OnnxFile, attribute, name_of
from ..rules.qdq import DQ, PRODUCTS, Pair, Q, dequantizer, is_op, quantizer, readers, same_scale, stored, weight_axis

CROSSED = ("Identity", "Dropout", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Expand")
"""Operators that ONNX Runtime 1.31 moves a DequantizeLinear or QuantizeLinear across."""
LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}


@dataclass(frozen=True)
class Fusion:
    """What becomes of one product. ``reason`` is "" where it computes in integers."""

    integer: bool
    reason: str = ""
    details: str = ""
    x: Pair | None = None
    w: Pair | None = None


def source(file: OnnxFile, value: ir.Value | None) -> Pair | None:
    """The DequantizeLinear behind an operand, past operators that it crosses."""
    for _ in range(32):
        if value is None:
            return None
        pair = dequantizer(file, value)
        if pair is not None:
            return pair
        node = value.producer()
        if node is None or not (is_op(node, *CROSSED) or (is_op(node, "Pad") and _zero_pad(file, node))):
            return None
        value = node.inputs[0]
    return None


def _zero_pad(file: OnnxFile, node: ir.Node) -> bool:
    """A padding with zeros that a convolution takes in."""
    users = readers(node.outputs[0])
    fill = file.const(node.inputs[2]) if len(node.inputs) > 2 else None
    plain = attribute(node, "mode", "constant") == "constant" and (fill is None or not np.any(fill))
    return plain and len(users) == 1 and is_op(users[0], "Conv")


@dataclass(frozen=True)
class Tail:
    """What reads a product's result: ``pair`` the QuantizeLinear, if one alone does; else why not."""

    pair: Pair | None
    reason: str = ""
    details: str = ""
    value: ir.Value | None = None


def tail(file: OnnxFile, node: ir.Node) -> Tail:
    """The QuantizeLinear on a result, past what is fused away or crossed."""
    value = node.outputs[0]
    for _ in range(32):
        users = readers(value)
        quantizers = [Pair(file, n) for n in users if is_op(n, Q) and n.inputs[0] is value]
        others = [n for n in users if not is_op(n, Q)]
        if quantizers:
            if value.is_graph_output() or others:
                who = "the graph's output" if not others else name_of(others[0])
                return Tail(None, "fan-out", f"{who} reads its result past the QuantizeLinear", value)
            if any(not same_scale(quantizers[0], p) for p in quantizers[1:]):
                return Tail(None, "fan-out", "two QuantizeLinear of different scales read its result", value)
            return Tail(quantizers[0], value=value)
        if value.is_graph_output() or len(users) != 1:
            return Tail(None, "output-q", "no QuantizeLinear reads its result", value)
        user = users[0]
        if is_op(user, "Relu", "Clip"):
            further = tail(file, user)
            if further.pair is None:
                return Tail(None, "output-q", further.details or "no QuantizeLinear reads its result", value)
            if not _absorbed(file, user, further.pair):
                zero = "" if further.pair.zeros is None else f" (zero point {np.asarray(further.pair.zeros).flat[0]})"
                return Tail(
                    None, "relu", f"{user.op_type} {name_of(user)} cuts otherwise than the integers{zero}", value
                )
            return further
        if not is_op(user, *CROSSED):
            return Tail(None, "output-q", f"{user.op_type} {name_of(user)} stands before the QuantizeLinear", value)
        value = user.outputs[0]
    return Tail(None, "output-q", "no QuantizeLinear reads its result", value)


def _absorbed(file: OnnxFile, node: ir.Node, pair: Pair) -> bool:
    """Whether the integers' own limits do what a Relu or Clip does."""
    limits, scales, zeros = LIMITS.get(pair.dtype), pair.scales, pair.zeros
    if limits is None or scales is None or scales.size != 1:
        return False
    zero = 0 if zeros is None else int(zeros.reshape(-1)[0])
    scale = float(scales.reshape(-1)[0])
    low, high = scale * (limits[0] - zero), scale * (limits[1] - zero)
    if node.op_type == "Relu":
        return limits[0] >= zero
    bounds = [file.const(v) if v is not None else None for v in (*node.inputs[1:3], None, None)[:2]]
    least = attribute(node, "min") if bounds[0] is None else float(bounds[0])
    most = attribute(node, "max") if bounds[1] is None else float(bounds[1])
    return (least is None or low >= least - 1e-6) and (most is None or high <= most + 1e-6)


def converted(file: OnnxFile, pair: Pair, arm: bool) -> str:
    """The type that a pair has in the end: on x86 int8 becomes uint8 where a single node reads it."""
    if pair.dtype != "int8" or arm:
        return pair.dtype
    first = pair if pair.quantizes else quantizer(file, pair.data)
    if first is None:
        return "int8"
    result = first.node.outputs[0]
    users = list(result.uses())
    if result.is_graph_output() or len(users) != 1 or not is_op(users[0].node, DQ):
        return "int8"
    out = users[0].node.outputs[0]
    return "uint8" if len(list(out.uses())) + out.is_graph_output() <= 1 else "int8"


def fusion(file: OnnxFile, node: ir.Node, arm: bool = False) -> Fusion | None:
    """Predict one product; None where nothing about it is quantized. A test holds it against the optimized graph."""
    if not is_op(node, *PRODUCTS):
        return None
    x, w = source(file, node.inputs[0]), _weight(file, node)
    if x is None and w is None:
        return None
    found = _operands(file, node, x, w) or _result(file, node, x, w, arm) or _bias(file, node, x, w)
    return found or Fusion(True, x=x, w=w)


def _weight(file: OnnxFile, node: ir.Node) -> Pair | None:
    return source(file, node.inputs[1])


def _operands(file: OnnxFile, node: ir.Node, x: Pair | None, w: Pair | None) -> Fusion | None:
    if node.op_type == "ConvTranspose":
        # With a float weight it is where it should be, unless ONNX Runtime quantizes that on its own.
        alone = w is None and (not file.is_static(node.inputs[1]) or tail(file, node).pair is None)
        which = "ONNX Runtime quantizes its weight itself, per tensor, and" if w is None else "ConvTranspose"
        return Fusion(False, "" if alone else "transposed", f"{which} has no integer kernel for it", x, w)
    if x is None:
        own = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
        if own and w is not None and stored(file, w) and w.dtype in ("int8", "uint8", "int4", "uint4"):
            axis = w.positive_axis
            if w.per_tensor or (w.block == 0) == (axis == 1):
                return Fusion(True, x=x, w=w)  # MatMulNBits, which quantizes the activation itself
        return Fusion(False, "input", "its weight is quantized, its activation is not", x, w)
    if x.scales is None and len(node.inputs) > 2:
        return Fusion(False, "dynamic", "its activation's scale is computed at run time, its bias has another", x, w)
    if not x.per_tensor:
        return Fusion(False, "activation-axis", "its activation has a scale per channel", x, w)
    if w is None:
        static = file.is_static(node.inputs[1])
        ours = node.op_type in ("Conv", "Gemm") and tail(file, node).pair is not None
        if static and ours:
            return Fusion(True, "weight-float", "ONNX Runtime quantizes its weight itself, per tensor", x, w)
        return Fusion(False, "input", "its activation is quantized, its weight is not", x, w)
    if x.dtype.startswith("float8"):
        return Fusion(False, "float8", f"{x.dtype} gets an integer kernel that does not take it", x, w)
    if x.dtype not in ("uint8", "int8"):
        return Fusion(False, "type", f"its activation is {x.dtype}", x, w)
    if w.dtype not in ("uint8", "int8"):
        return Fusion(False, "type", f"its weight is {w.dtype}", x, w)
    if w.block:
        return Fusion(False, "type", "its weight has blocks", x, w)
    if file.static_dtype(x.scale) == "float16":
        return Fusion(False, "type", "it is float16", x, w)
    if any(abs(float(attribute(node, key, 1.0)) - 1) > 0 for key in ("alpha", "beta")):
        return Fusion(False, "alpha", "integer kernels take alpha = beta = 1", x, w)
    return None


def _result(file: OnnxFile, node: ir.Node, x: Pair | None, w: Pair | None, arm: bool) -> Fusion | None:
    if x is None or w is None:
        return None
    end = tail(file, node)
    free = node.op_type in ("MatMul", "Gemm")
    if end.pair is None and (not free or end.reason in ("fan-out", "relu")):
        return Fusion(False, end.reason, end.details, x, w)
    kind = converted(file, x, arm)
    if end.pair is not None and not end.pair.per_tensor:
        return Fusion(False, "activation-axis", "its result has a scale per channel", x, w)
    if kind == "int8" and not arm and not (node.op_type == "Gemm" and end.pair is None):
        return Fusion(False, "int8", "its int8 activation has several readers", x, w)
    if end.pair is not None:
        out = converted(file, end.pair, arm)
        if out != kind:
            return Fusion(
                False, "int8" if "int8" == out else "type", f"its activation is {kind}, its result {out}", x, w
            )
    return None


def _bias(file: OnnxFile, node: ir.Node, x: Pair | None, w: Pair | None) -> Fusion | None:
    if x is None or w is None:
        return None
    if node.op_type == "MatMul":
        return _added_bias(file, node, x, w)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return None
    pair = dequantizer(file, value)
    requires = tail(file, node).pair is not None
    if pair is None:
        # Weight and bias of what has a Q behind it are quantized on the way.
        return None if requires and file.is_static(value) else Fusion(False, "bias", "its bias is float", x, w)
    if pair.dtype != "int32":
        return Fusion(False, "bias", f"its bias is {pair.dtype}", x, w)
    if node.op_type == "Conv" and not bias_scale_fits(pair, x, w):
        return Fusion(False, "bias-scale", "its bias scale is not activation scale times weight scale", x, w)
    return None


def _added_bias(file: OnnxFile, node: ir.Node, x: Pair, w: Pair) -> Fusion | None:
    """MatMul and an Add of a constant become a Gemm where shapes are static; a float bias then keeps it in float."""
    users = readers(node.outputs[0])
    if len(users) != 1 or not is_op(users[0], "Add") or node.outputs[0].is_graph_output():
        return None
    add, shape = users[0], file.shape(node.inputs[0])
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    columns = (file.shape(node.inputs[1]) or (None,))[-1]
    if shape is None or (len(shape) > 2 and None in shape) or file.shape(other) != (columns,):
        return None
    if not file.is_static(other) or dequantizer(file, other) is not None or not stored(file, w):
        return None
    if tail(file, add).pair is not None:
        return None
    details = f"with the float bias of {name_of(add)} it becomes a Gemm that stays in float"
    return Fusion(False, "bias", details, x, w)


def bias_scale_fits(bias: Pair, x: Pair, w: Pair) -> bool:
    """Whether the bias sits on the accumulator's scale; True where a scale is not known."""
    scales = [p.scales for p in (bias, x, w)]
    if any(s is None for s in scales):
        return True
    b, a, c = (np.asarray(s, np.float64).reshape(-1) for s in scales)
    product = a * c
    if b.size not in (1, product.size) and product.size != 1:
        return False
    return bool(np.allclose(b, product, rtol=1e-3, atol=0))


def wrong_axis(file: OnnxFile, node: ir.Node, w: Pair) -> int | None:
    """The axis of a stored weight's scales where it is not that of the output channels."""
    if w.node.outputs[0] is not node.inputs[1] or w.block or w.per_tensor or not stored(file, w):
        return None
    axis, rank = w.positive_axis, file.rank(w.data)
    wanted = rank - 1 if node.op_type == "MatMul" and rank is not None else weight_axis(node)
    return None if axis == wanted or node.op_type == "ConvTranspose" else axis
