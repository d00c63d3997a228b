"""Repairs of places: pairs taken out, put in, moved across an operator, or given the scale of another."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .editor import Editor, dequantizers, named, nodes_named, real
from .onnx_file import attribute, name_of
from .qdq import DQ, Pair, Q, dequantizer, is_op, pairs, quantizer, readers, stored


def strip(editor: Editor, names: set[str]) -> None:
    """Pairs, or all pairs on the operands of a node, are taken out; stored integers become floats."""
    for dq in named(editor, names):
        if not dq.quantizes and editor.remove_pair(dq):
            editor.say("pair taken out", dq.node)
    for node in nodes_named(editor, names, "ConvTranspose", "Conv", "Gemm", "MatMul"):
        for i, value in enumerate(node.inputs):
            pair = dequantizer(editor.file, value)
            if pair is None:
                continue
            source = quantizer(editor.file, pair.data)
            if stored(editor.file, pair):
                data = real(editor, pair)
                if data is not None:
                    node.replace_input_with(i, editor.store(f"{pair.name}_float", data))
                    editor.say("weight stored in float", node)
            elif source is not None and source.data is not None:
                node.replace_input_with(i, source.data)
                editor.say("reads the float value again", node)


def strip_twice(editor: Editor, names: set[str]) -> None:
    """Of two pairs behind each other the first is taken out, for this reader."""
    for q in named(editor, names):
        if not q.quantizes or q.data is None:
            continue
        reader, position, value = q.node, 0, q.data
        between = value.producer()
        if between is not None and is_op(between, "Relu", "Clip"):
            reader, value = between, between.inputs[0]  # type: ignore[assignment]
        first = dequantizer(editor.file, value)
        source = None if first is None else quantizer(editor.file, first.data)
        if source is not None and source.data is not None:
            reader.replace_input_with(position, source.data)
            editor.say("reads the value before the first pair", reader)


def requantize(editor: Editor, names: set[str]) -> None:
    """Behind an operator whose result stays within its operand's range, a pair of the same numbers is put in.

    Relu and Clip commute with symmetric quantization, so that their own pair in front goes, where they alone read it.
    """
    from ..tensorrt.flow import arrival

    for node in nodes_named(editor, names):
        found = arrival(editor.file, node.inputs[0])
        at = found.at
        keeps = ("Relu", "Clip", "LeakyRelu", "AveragePool", "GlobalAveragePool", "Resize")
        if found.kind != "blocked" or at is None or not is_op(at, *keeps):
            continue
        if at.op_type == "Resize" and attribute(at, "mode", "nearest") == "cubic":
            continue
        result, like = at.outputs[0], found.pairs[0]
        if like.zeros is not None and like.zeros.any() and at.op_type in ("Relu", "Clip"):
            continue
        users = readers(result)
        made = editor.insert_pair(result, like, at)
        editor.rewire(result, made, lambda n, users=users: n in users)  # type: ignore[misc]
        editor.say(f"pair behind {at.op_type}", at)
        source = quantizer(editor.file, like.data)
        alone = len(list(like.node.outputs[0].uses())) == 1 and at.inputs[0] is like.node.outputs[0]
        if at.op_type in ("Relu", "Clip") and alone and source is not None and source.data is not None:
            at.replace_input_with(0, source.data)
            editor.say("pair in front taken out", at)


def share_scales(editor: Editor, names: set[str]) -> None:
    """Operands of a concatenation, and pairs on one value, get the largest of their scales, which covers all."""
    from ..tensorrt.flow import arrival

    groups: list[list[Pair]] = []
    for node in nodes_named(editor, names):
        if is_op(node, Q):
            value = node.inputs[0]
            groups.append([p for p in pairs(editor.file) if p.quantizes and p.data is value])
            continue
        found = arrival(editor.file, node.inputs[0])
        if found.kind != "unequal" or found.at is None:
            continue
        operands = [arrival(editor.file, v) for v in found.at.inputs]
        if all(o.kind == "quantized" for o in operands):
            quantizers = [quantizer(editor.file, p.data) for o in operands for p in o.pairs]
            groups.append([q for q in quantizers if q is not None])
        elif all(
            o.kind == "quantized" or editor.file.is_static(v) for o, v in zip(operands, found.at.inputs, strict=True)
        ):
            _constants(editor, found.at, found.pairs[0])
    for group in groups:
        scales = [q.scales for q in group]
        if len(group) < 2 or any(s is None or s.size != 1 for s in scales):
            continue
        if any(q.zeros is not None and q.zeros.any() for q in group):
            continue
        largest = max((s for s in scales if s is not None), key=lambda s: float(s.reshape(-1)[0]))
        for q in group:
            for pair in (q, *dequantizers(editor, q)):
                editor.set_numbers(pair, np.asarray(largest), np.zeros(largest.shape, q.dtype))
        editor.say(f"{len(group)} pairs share one scale", group[0].node)


def _constants(editor: Editor, concat: ir.Node, like: Pair) -> None:
    """Constant operands of a concatenation get a pair, where the scale covers them."""
    scales = like.scales
    for i, value in enumerate(concat.inputs):
        data = editor.file.const(value)
        if value is None or data is None or dequantizer(editor.file, value) is not None or scales is None:
            continue
        if np.abs(data).max(initial=0) > float(scales.max()) * 127.5:
            continue
        operands = [like.scale, *([like.zero] if like.zero is not None else [])]
        q = editor.add(Q, [value, *operands], f"{value.name}_quantize", before=concat)
        dq = editor.add(DQ, [q.outputs[0], *operands], f"{value.name}_dequantize", before=concat)
        concat.replace_input_with(i, dq.outputs[0])
        editor.say("constant operand quantized", concat)


def residual(editor: Editor, names: set[str]) -> None:
    """A residual sum reads its skip dequantized, where it is quantized anyway, and its branch as it is."""
    from ..tensorrt.rules_speed import product_behind

    for node in nodes_named(editor, names, "Add"):
        for i, value in enumerate(node.inputs[:2]):
            if value is None or editor.file.is_static(value):
                continue
            pair = dequantizer(editor.file, value)
            branch = product_behind(editor.file, value) is not None
            if branch and pair is not None:
                source = quantizer(editor.file, pair.data)
                if source is not None and source.data is not None:
                    node.replace_input_with(i, source.data)
                    editor.say("reads the branch before its pair", node)
                    break
            elif not branch and pair is None:
                q = next((n for n in readers(value) if is_op(n, Q)), None)
                ends = [] if q is None else dequantizers(editor, Pair(editor.file, q))
                direct = [d for d in ends if d.data is not None and d.data.producer() is q]
                if direct:
                    node.replace_input_with(i, direct[0].node.outputs[0])
                    _order(editor, direct[0].node, node)
                    editor.say("reads the skip dequantized", node)


def _order(editor: Editor, first: ir.Node, then: ir.Node) -> None:
    """Keep the node list topological where an earlier node now reads a later one."""
    if first.graph is not None:
        first.graph.sort()


def single_reader(editor: Editor, names: set[str]) -> None:
    """What reads a value past its QuantizeLinear reads the dequantized value instead, the graph's output too."""
    for node in nodes_named(editor, names):
        value = node.outputs[0]
        while len(readers(value)) == 1 and is_op(readers(value)[0], "Relu", "Clip", "Reshape", "Transpose"):
            value = readers(value)[0].outputs[0]
        q = next((n for n in readers(value) if is_op(n, Q)), None)
        if q is None:
            continue
        others = [n for n in readers(value) if not is_op(n, Q)]
        ends = [d for d in dequantizers(editor, Pair(editor.file, q)) if d.data is q.outputs[0]]
        if not others and not value.is_graph_output():
            continue
        result = (
            ends[0].node.outputs[0]
            if ends
            else editor.add(DQ, [q.outputs[0], *q.inputs[1:]], f"{value.name}_dequantize", after=q).outputs[0]
        )
        editor.rewire(value, result, lambda n: not is_op(n, Q))
        if value.is_graph_output():
            if result.is_graph_output():
                result = editor.add("Identity", [result], f"{value.name}_copy", after=result.producer()).outputs[0]
            editor.take_over_output(value, result)
        if q.graph is not None:
            q.graph.sort()
        editor.say("every reader takes the dequantized value", node)


def dequantize_first(editor: Editor, names: set[str]) -> None:
    """Stored integers that an operator moves before they are dequantized are dequantized first, or moved beforehand."""
    for dq in named(editor, names):
        data = editor.file.const(dq.data)
        if data is not None:
            dq.node.replace_input_with(0, editor.store(f"{dq.name}_quantized", data))
            editor.say("integers stored as they are read", dq.node)
            continue
        mover = None if dq.data is None else dq.data.producer()
        if mover is None or not is_op(mover, "Gather", "Slice", "Reshape", "Transpose", "Identity"):
            continue
        axis = None if dq.per_tensor else _axis_before(editor, mover, dq)
        if axis == -1:
            continue
        first = editor.add(DQ, [mover.inputs[0], *dq.node.inputs[1:]], f"{dq.name}_first", before=mover)
        if axis is not None:
            first.attributes["axis"] = ir.AttrInt64("axis", axis)
        moved = editor.add(mover.op_type, [first.outputs[0], *mover.inputs[1:]], f"{name_of(mover)}_float", after=mover)
        for key, attr in mover.attributes.items():
            moved.attributes[key] = attr
        result = dq.node.outputs[0]
        editor.rewire(result, moved.outputs[0])
        if result.is_graph_output():
            editor.take_over_output(result, moved.outputs[0])
        editor.say(f"dequantized before {mover.op_type}", dq.node)


def _axis_before(editor: Editor, mover: ir.Node, dq: Pair) -> int:
    """Where the axis of the scales lies in front of a look-up; -1 where that is not followed."""
    axis, at, index = dq.positive_axis, int(attribute(mover, "axis", 0)), editor.file.rank(mover.inputs[1])
    if not is_op(mover, "Gather") or axis is None or index is None or at < 0 or dq.block:
        return axis if is_op(mover, "Identity") and axis is not None else -1
    return axis if axis < at else axis - index + 1 if axis >= at + index else -1


def shapes(editor: Editor, names: set[str]) -> None:
    """Sizes that were dequantized are stored as the integers they are."""
    for node in nodes_named(editor, names):
        for i, value in enumerate(node.inputs[1:], 1):
            data = editor.file.const(value)
            if value is not None and data is not None and value.producer() is not None:
                node.replace_input_with(i, editor.store(f"{value.name}_stored", data))
                editor.say("sizes stored", node)
