"""Repair: operators that carry scales as operands become float operators between Q and DQ nodes."""

from __future__ import annotations

import onnx_ir as ir

from .editor import Editor, nodes_named
from .onnx_file import MICROSOFT, name_of
from .qdq import DQ, Q

PLAIN = {
    "QLinearConv": "Conv",
    "QLinearMatMul": "MatMul",
    "QGemm": "Gemm",
    "MatMulIntegerToFloat": "MatMul",
    "QLinearAdd": "Add",
    "QLinearMul": "Mul",
    "QLinearSub": "Sub",
    "QLinearConcat": "Concat",
    "QLinearAveragePool": "AveragePool",
    "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearLeakyRelu": "LeakyRelu",
    "QLinearSigmoid": "Sigmoid",
    "QLinearSoftmax": "Softmax",
}
Triple = tuple[int, int, int]
LAYOUT: dict[str, tuple[tuple[Triple, ...], tuple[int, int] | None]] = {
    "QLinearConv": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearMatMul": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QGemm": (((0, 1, 2), (3, 4, 5)), (7, 8)),
    "MatMulIntegerToFloat": (((0, 2, 4), (1, 3, 5)), None),
    "QLinearAdd": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearMul": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearSub": (((0, 1, 2), (3, 4, 5)), (6, 7)),
    "QLinearAveragePool": (((0, 1, 2),), (3, 4)),
    "QLinearGlobalAveragePool": (((0, 1, 2),), (3, 4)),
    "QLinearLeakyRelu": (((0, 1, 2),), (3, 4)),
    "QLinearSigmoid": (((0, 1, 2),), (3, 4)),
    "QLinearSoftmax": (((0, 1, 2),), (3, 4)),
}
"""Operator -> positions of (integers, scale, zero point) of each operand, and of (scale, zero point) of the result."""


def qdq(editor: Editor, names: set[str]) -> None:
    """Write each as DequantizeLinear, the float operator, QuantizeLinear; rounding differs where the kernel's did."""
    for node in nodes_named(editor, names, *PLAIN):
        if node.attributes.get("channels_last") is not None and node.attributes["channels_last"].value:
            continue
        operands, result = _layout(node)
        base = name_of(node)
        floats: list[ir.Value | None] = []
        for i, triple in enumerate(operands):
            integers, scale, zero = (_input(node, p) for p in triple)
            axis = _axis(editor, node, i, scale)
            dq = editor.add(
                DQ, [integers, scale, *([zero] if zero is not None else [])], f"{base}_dequantize_{i}", before=node
            )
            if axis is not None:
                dq.attributes["axis"] = ir.AttrInt64("axis", axis)
            floats.append(dq.outputs[0])
        bias = _bias(editor, node, operands)
        attributes = {k: a for k, a in node.attributes.items() if k not in ("channels_last", "opset")}
        plain = editor.add(
            PLAIN[node.op_type], [*floats, *([bias] if bias is not None else [])], f"{base}_float", before=node
        )
        for key, attr in attributes.items():
            plain.attributes[key] = attr
        value = plain.outputs[0]
        scale = None if result is None else _input(node, result[0])
        if result is not None and scale is not None:
            zero = _input(node, result[1])
            q = editor.add(Q, [value, scale, *([zero] if zero is not None else [])], f"{base}_quantize", before=node)
            value = q.outputs[0]
        old = node.outputs[0]
        editor.rewire(old, value)
        if old.is_graph_output():
            editor.take_over_output(old, value)
        editor.say(f"{node.op_type} written with Q/DQ", node)
    if MICROSOFT in editor.model.opset_imports and not any(n.domain == MICROSOFT for n in editor.file.nodes):
        editor.model.opset_imports.pop(MICROSOFT)


def _layout(node: ir.Node) -> tuple[tuple[Triple, ...], tuple[int, int] | None]:
    if node.op_type == "QLinearConcat":
        return tuple((i, i + 1, i + 2) for i in range(2, len(node.inputs), 3)), (0, 1)
    return LAYOUT[node.op_type]


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _axis(editor: Editor, node: ir.Node, i: int, scale: ir.Value | None) -> int | None:
    """The axis of a weight's scales, where it has many."""
    shape = editor.file.shape(scale)
    if i != 1 or not shape or shape == (1,):
        return None
    if node.op_type == "QLinearConv":
        return 0
    if node.op_type == "QGemm":
        return 0 if node.attributes.get("transB") is not None and node.attributes["transB"].value else 1
    rank = editor.file.rank(node.inputs[3 if node.op_type == "QLinearMatMul" else 1])
    return 1 if rank is None else rank - 1


def _bias(editor: Editor, node: ir.Node, operands: tuple[Triple, ...]) -> ir.Value | None:
    """The bias in float: int32 on the accumulator's scale in QLinearConv and QGemm, float already elsewhere."""
    position = {"QLinearConv": 8, "QGemm": 6, "MatMulIntegerToFloat": 6}.get(node.op_type)
    bias = None if position is None else _input(node, position)
    if bias is None or node.op_type == "MatMulIntegerToFloat":
        return None if bias is None else bias
    scales = [editor.file.const(_input(node, t[1])) for t in operands]
    data = editor.file.const(bias)
    if data is None or scales[0] is None or scales[1] is None:
        return None
    real = data.astype("float32") * (scales[0].reshape(()) * scales[1].reshape(-1)).astype("float32")
    return editor.store(f"{bias.name}_float", real)
