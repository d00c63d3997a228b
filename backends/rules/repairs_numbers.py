"""Repairs of numbers: types, scales, zero points, axes and biases, with every range still covered."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .editor import LIMITS, Editor, dequantizers, named, nodes_named, real, symmetric
from .onnx_file import attribute, name_of
from .qdq import DQ, Pair, dequantizer, is_op, pairs, quantizer, readers, stored, weight_axis


def int8(editor: Editor, names: set[str]) -> None:
    """Every 8-bit pair becomes symmetric int8: the scale is that of the larger side of the range it had.

    Stored weights whose integers fit once their zero point is taken away keep their scale, and are exact; others are
    quantized again, per output channel. Integers that are inputs or outputs of the graph keep their type.
    """
    found = [(p, p.dtype, p.scales, p.zeros) for p in pairs(editor.file)]  # as they are before any of them changes
    for pair, dtype, scales, points in found:
        if scales is None or dtype not in ("int8", "uint8") or _interface(pair) or _bound(editor, pair):
            continue
        zeros = np.zeros(scales.shape) if points is None else points.astype(np.float64)
        if dtype == "int8" and not zeros.any() and (pair.zero is not None or not pair.quantizes):
            continue
        if stored(editor.file, pair):
            if quantizer(editor.file, pair.data) is None:
                _shift_weight(editor, pair, zeros)
                continue
        low, high = scales * (LIMITS[dtype][0] - zeros), scales * (LIMITS[dtype][1] - zeros)
        scale = (np.maximum(-low, high) / 127).astype(scales.dtype)
        if pair.quantizes and not low.any() and not _nonnegative(editor, pair.data):
            relu = editor.add("Relu", [pair.data], f"{pair.name}_cut", before=pair.node)
            pair.node.replace_input_with(0, relu.outputs[0])
            editor.say("a Relu cuts what uint8 cut", pair.node)
        editor.set_numbers(pair, scale, np.zeros(scale.shape, np.int8))
        editor.say("to symmetric int8", pair.node)


def _nonnegative(editor: Editor, value: ir.Value | None) -> bool:
    """Whether a value is surely not below 0."""
    for _ in range(8):
        node = None if value is None else value.producer()
        if node is None:
            return False
        if is_op(node, "Relu", "Sigmoid", "Softmax", "HardSigmoid", "Abs"):
            return True
        if is_op(node, "Clip"):
            low = attribute(node, "min") if len(node.inputs) < 2 else editor.file.const(node.inputs[1])
            return low is not None and float(low) >= 0
        if not is_op(
            node, "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Flatten", "Identity"
        ):
            return False
        value = node.inputs[0]
    return False


def int8_weights(editor: Editor, names: set[str]) -> None:
    """Stored weights of uint8 become int8; those with zero point 128 exactly."""
    for node in nodes_named(editor, names):
        dq = dequantizer(editor.file, node.inputs[1])
        if dq is not None and dq.dtype == "uint8" and dq.scales is not None:
            _shift_weight(editor, dq, np.zeros(dq.scales.shape) if dq.zeros is None else dq.zeros.astype(np.float64))


def _interface(pair: Pair) -> bool:
    integers = pair.node.outputs[0] if pair.quantizes else pair.data
    return integers is not None and (integers.is_graph_input() or integers.is_graph_output())


MOVES = ("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "MaxPool")
"""Operators that may stand between Q and DQ and leave integers what they are."""


def _bound(editor: Editor, pair: Pair) -> bool:
    """Whether the integers' type is not ours to change: another operator computes with them, or they are moved
    from a stored tensor, which that operator reads as well."""
    if pair.quantizes:
        stack = [pair.node.outputs[0]]
        while stack:
            for node in readers(stack.pop()):
                if is_op(node, *MOVES):
                    stack += node.outputs
                elif not is_op(node, DQ):
                    return True
        return False
    if stored(editor.file, pair) and quantizer(editor.file, pair.data) is None:
        return False
    value = pair.data
    while value is not None and (maker := value.producer()) is not None and is_op(maker, *MOVES):
        value = maker.inputs[0]
    first = quantizer(editor.file, value)
    return first is None or _bound(editor, first)


def _shift_weight(editor: Editor, dq: Pair, zeros: np.ndarray) -> None:
    data, scales, axis = editor.file.const(dq.data), dq.scales, None if dq.per_tensor else dq.positive_axis
    if data is None or scales is None or dq.block:
        return
    shape = [1] * data.ndim
    if axis is not None:
        shape[axis] = -1
    shifted = data.astype(np.int32) - (zeros.astype(np.int32).reshape(shape) if zeros.size > 1 else int(zeros.flat[0]))
    if shifted.min(initial=0) >= -128 and shifted.max(initial=0) <= 127:
        editor.weight_dq(dq, shifted.astype(np.int8), np.asarray(scales), axis)
        editor.say("stored integers shifted to zero point 0, exactly", dq.node)
        return
    value = real(editor, dq)
    if value is not None:
        integers, scale = symmetric(value, axis)
        editor.weight_dq(dq, integers, scale, axis)
        editor.say("weight quantized again, symmetrically", dq.node)


def uint8(editor: Editor, names: set[str]) -> None:
    """int8 activations become uint8 by adding 128, exactly; behind Relu and Clip the range begins at 0 instead."""
    for q in list(pairs(editor.file)):
        if not q.quantizes or q.dtype not in ("int8", "uint8") or _interface(q) or _bound(editor, q):
            continue
        scales, zeros = q.scales, q.zeros
        ends = dequantizers(editor, q)
        if scales is None or scales.size != 1 or any(_interface(p) or not _same(p, q) for p in ends):
            continue
        zero = 0 if zeros is None else int(zeros.reshape(-1)[0])
        low, high = (float(scales.reshape(-1)[0]) * (bound - zero) for bound in LIMITS[q.dtype])
        bounds = _cut(editor, q)
        if bounds is None and q.dtype == "uint8":
            continue
        if bounds is None:
            scale, point = scales, zero + 128
        else:
            low, high = max(low, bounds[0]), min(high, bounds[1])
            if low >= 0 and q.dtype == "uint8" and zero == 0 and float(scales.reshape(-1)[0]) * 255 <= bounds[1]:
                continue
            if low > 0 or high <= low:
                continue
            step = np.float32((high - low) / 255)
            step = np.nextafter(step, np.float32(0)) if float(step) * 255 > high - low else step
            scale, point = np.asarray(step, scales.dtype), int(np.clip(np.rint(-low / float(step)), 0, 255))
        for pair in (q, *ends):
            editor.set_numbers(pair, np.asarray(scale), np.asarray(point, np.uint8).reshape(np.shape(scale)))
        editor.say("to uint8" if bounds is None else f"to uint8 over {low:.4g}..{high:.4g}", q.node)


def _same(a: Pair, b: Pair) -> bool:
    return a.scales is not None and b.scales is not None and np.array_equal(a.scales, b.scales)


def _cut(editor: Editor, q: Pair) -> tuple[float, float] | None:
    """The bounds of a Relu or Clip right in front of a QuantizeLinear."""
    node = None if q.data is None else q.data.producer()
    if node is None or not is_op(node, "Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, float("inf")
    low, high = (editor.file.const(v) if v is not None else None for v in (*node.inputs[1:3], None, None)[:2])
    least, most = attribute(node, "min", -np.inf), attribute(node, "max", np.inf)
    return float(least if low is None else low), float(most if high is None else high)


def zero_points(editor: Editor, names: set[str]) -> None:
    """Missing zero points are written; a single one becomes as many as there are scales."""
    for pair in named(editor, names):
        scale = editor.file.sizes(pair.scale)
        if scale is None or not pair.dtype:
            continue
        zeros = pair.zeros
        kind = np.dtype(pair.dtype) if zeros is None else zeros.dtype
        data = np.zeros(scale, kind) if zeros is None else np.broadcast_to(zeros.reshape(-1)[:1], scale)
        editor.set_operand(pair.node, 2, editor.store(f"{pair.name}_zero_point", np.array(data)))
        editor.say("zero points written", pair.node)


def scalars(editor: Editor, names: set[str]) -> None:
    """Scales of shape [1] on activations become scalars."""
    for pair in list(pairs(editor.file)):
        scales = pair.scales
        if scales is None or scales.shape != (1,) or stored(editor.file, pair) or pair.block:
            continue
        kind = np.dtype(pair.dtype) if pair.zeros is None else pair.zeros.dtype
        zero = np.zeros((), kind) if pair.zeros is None else pair.zeros.reshape(())
        editor.set_numbers(pair, scales.reshape(()), zero)
        editor.say("scale to a scalar", pair.node)


def per_tensor(editor: Editor, names: set[str]) -> None:
    """Activations with many scales get one that covers all their ranges."""
    for q in list(pairs(editor.file)):
        scales, limits = q.scales, LIMITS.get(q.dtype)
        if not q.quantizes or stored(editor.file, q) or scales is None or scales.size < 2 or limits is None or q.block:
            continue
        zeros = np.zeros(scales.shape) if q.zeros is None else q.zeros.astype(np.float64)
        low, high = float((scales * (limits[0] - zeros)).min()), float((scales * (limits[1] - zeros)).max())
        if not zeros.any():
            scale, zero = np.asarray(scales.max()), 0
        else:
            scale = np.asarray((high - low) / (limits[1] - limits[0]), scales.dtype)
            zero = int(np.clip(np.rint(limits[0] - low / float(scale)), *limits))
        for pair in (q, *dequantizers(editor, q)):
            editor.set_numbers(pair, scale, np.asarray(zero, q.dtype))
        editor.say("one scale for all channels", q.node)


def weight_axis_repair(editor: Editor, names: set[str]) -> None:
    """Weights whose scales lie off the output channels are quantized again, per output channel."""
    for node in nodes_named(editor, names):
        value, flips = node.inputs[1], 0
        while value is not None and is_op(value.producer(), "Transpose", "Identity"):
            flips += is_op(value.producer(), "Transpose")
            value = value.producer().inputs[0]  # type: ignore[union-attr]
        dq = dequantizer(editor.file, value)
        data = None if dq is None else real(editor, dq)
        if dq is None or data is None or (flips and data.ndim != 2):
            continue
        axis = data.ndim - 1 if node.op_type == "MatMul" else weight_axis(node)
        axis = 1 - axis if flips % 2 else axis
        integers, scale = symmetric(data, axis)
        editor.weight_dq(dq, integers, scale, axis)
        editor.say(f"weight quantized again along axis {axis}", dq.node)


def quantize_weights(editor: Editor, names: set[str]) -> None:
    """Float weights under quantized activations become int8 per output channel."""
    for node in nodes_named(editor, names):
        data = editor.file.const(node.inputs[1])
        if data is None or data.dtype.kind != "f":
            continue
        axis = data.ndim - 1 if node.op_type == "MatMul" else weight_axis(node)
        integers, scale = symmetric(data, axis)
        base = node.inputs[1].name if node.inputs[1] is not None else name_of(node)
        operands = [
            editor.store(f"{base}_quantized", integers),
            editor.store(f"{base}_scale", scale),
            editor.store(f"{base}_zero_point", np.zeros(scale.shape, np.int8)),
        ]
        dq = editor.add(DQ, operands, f"{base}_dequantize", before=node, axis=axis)
        node.replace_input_with(1, dq.outputs[0])
        editor.say("weight quantized per output channel", node)


def float_bias(editor: Editor, names: set[str]) -> None:
    """Biases of int32, and constants without axes, are stored in float."""
    for dq in named(editor, names):
        data = real(editor, dq)
        if data is None:
            continue
        result, kept = dq.node.outputs[0], editor.store(f"{dq.name}_float", data)
        editor.rewire(result, kept)
        if result.is_graph_output():
            editor.take_over_output(result, editor.add("Identity", [kept], f"{dq.name}_copy", after=dq.node).outputs[0])
        editor.say("bias stored in float" if data.ndim else "constant stored in float", dq.node)


def int32_bias(editor: Editor, names: set[str]) -> None:
    """Biases are stored as int32 with activation scale times weight scale, as the kernels assume."""
    from ..onnxruntime.flow import source

    for node in nodes_named(editor, names):
        holder, position = node, 2
        if node.op_type == "MatMul":
            users = readers(node.outputs[0])
            if len(users) != 1 or not is_op(users[0], "Add"):
                continue
            holder, position = users[0], 1 if users[0].inputs[0] is node.outputs[0] else 0
        x, w = source(editor.file, node.inputs[0]), source(editor.file, node.inputs[1])
        bias = holder.inputs[position] if position < len(holder.inputs) else None
        data = editor.file.const(bias)
        if x is None or w is None or bias is None or data is None or x.scales is None or w.scales is None:
            continue
        scale = (x.scales.astype(np.float32).reshape(()) * w.scales.astype(np.float32)).astype(np.float32)
        if data.ndim != 1 or scale.size not in (1, data.size):
            continue
        scale = scale.reshape(-1) if scale.size == data.size else np.broadcast_to(scale.reshape(()), data.shape).copy()
        steps = np.clip(np.rint(data.astype(np.float64) / scale), -(2**31), 2**31 - 1).astype(np.int32)
        operands: list[ir.Value | None] = [
            editor.store(f"{bias.name}_quantized", steps),
            editor.store(f"{bias.name}_scale", scale),
            editor.store(f"{bias.name}_zero_point", np.zeros(scale.shape, np.int32)),
        ]
        dq = editor.add(DQ, operands, f"{bias.name}_dequantize", before=holder, axis=0)
        holder.replace_input_with(position, dq.outputs[0])
        editor.say("bias stored as int32 on the accumulator's scale", holder)
