"""Rules for TensorRT on operators and places that its parser and builder refuse."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ..rules.onnx_file import MICROSOFT, OnnxFile, name_of
from ..rules.qdq import Pair, dequantizer, pairs
from ..rules.rule import Hit, Rule, Where
from .flow import state
from .operators import CONTRIB, DYNAMIC, NO_PLUGIN, QOPERATORS, UNSUPPORTED
from .rules_numbers import FLOATS, LEGAL

SAME_TYPE = frozenset(
    "Add Sub Mul Div Pow Min Max Sum Mean MatMul Gemm Conv ConvTranspose Concat Where PRelu Equal Greater Less "
    "GreaterOrEqual LessOrEqual LayerNormalization BatchNormalization InstanceNormalization".split()
)


def _operand_types(where: Where) -> Iterator[Hit]:
    for node in where.file.of("Conv", "ConvTranspose", "Gemm", "MatMul"):
        found = state(where.file, node)
        if found.reason == "types" and {found.x.dtype, found.w.dtype} <= LEGAL:
            yield name_of(node), f"{found.x.dtype} times {found.w.dtype}"


def _qoperators(where: Where) -> Iterator[Hit]:
    for node in where.file.nodes:
        if node.op_type in QOPERATORS and node.domain in ("", "ai.onnx", MICROSOFT):
            yield name_of(node), f"{node.op_type}"


def _dynamic(where: Where) -> Iterator[Hit]:
    for node in where.file.nodes:
        if node.op_type in DYNAMIC and node.domain in ("", "ai.onnx", MICROSOFT):
            yield name_of(node), f"{node.op_type}"


def _operators(where: Where) -> Iterator[Hit]:
    local = {(f.domain, f.name) for f in where.file.model.functions.values()}
    for node in where.file.nodes:
        if node.op_type in QOPERATORS | DYNAMIC or (node.domain, node.op_type) in local:
            continue
        if node.domain in ("", "ai.onnx"):
            if node.op_type in UNSUPPORTED | NO_PLUGIN:
                yield name_of(node), node.op_type
        elif node.domain == MICROSOFT:
            if node.op_type not in CONTRIB:
                yield name_of(node), f"{MICROSOFT}.{node.op_type}"
        elif node.domain != "trt":
            yield name_of(node), f"{node.domain}.{node.op_type} (unless a plugin of that name is loaded)"


def _mixed(where: Where) -> Iterator[Hit]:
    for node in where.file.of(*SAME_TYPE):
        operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
        operands = operands[:3] if "Normalization" not in node.op_type else operands[:1]
        found = {where.file.static_dtype(v) for v in operands if v is not None} & FLOATS
        if len(found) > 1:
            yield name_of(node), " and ".join(sorted(found))


def _nbits(where: Where) -> Iterator[Hit]:
    for node in where.file.of("MatMulNBits"):
        dtype = where.file.static_dtype(node.inputs[0])
        if node.domain == MICROSOFT and dtype not in ("float16", ""):
            yield name_of(node), f"its activation is {dtype}"


def _block_division(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        data, axis = where.file.shape(pair.data), pair.positive_axis
        if not pair.block or data is None or axis is None:
            continue
        length = data[axis]
        if length is not None and length % pair.block:
            yield pair.name, f"{length} elements in blocks of {pair.block}"


def _block_axis(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        rank, axis = where.file.rank(pair.data), pair.positive_axis
        if pair.block and rank is not None and axis is not None and axis < rank - 2:
            yield pair.name, f"blocks along axis {axis} of {rank}"


def _attention_op(where: Where) -> Iterator[Hit]:
    for node in where.file.of("Attention"):
        dtype = where.file.static_dtype(node.inputs[0])
        if node.domain in ("", "ai.onnx") and dtype == "float32":
            yield name_of(node), "Attention of float32"


_SHAPES: dict[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Resize": (2, 3),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Pad": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "TopK": (1,),
}


def _shape_tensor(where: Where) -> Iterator[Hit]:
    """Stored integers, dequantized, that end as a size: the parser cannot evaluate them."""
    file = where.file
    for node in file.of(*_SHAPES):
        for position in _SHAPES[node.op_type]:
            value = node.inputs[position] if position < len(node.inputs) else None
            found = _dequantized_behind(file, value)
            if found is not None:
                yield name_of(node), f"its sizes come from {found.name}"


def _dequantized_behind(file: OnnxFile, value: ir.Value | None) -> Pair | None:
    for _ in range(16):
        if value is None:
            return None
        pair = dequantizer(file, value)
        if pair is not None:
            return pair
        node = value.producer()
        if node is None or node.op_type in ("Shape", "Size"):
            return None
        value = node.inputs[0] if node.inputs else None
    return None


RULES: tuple[Rule, ...] = (
    Rule(
        "operand-types", "error", "the operands of a product must share one type", "quantize both alike", _operand_types
    ),
    Rule(
        "qoperator",
        "error",
        "operators that carry scales as operands (QLinearConv, QGemm...) are not imported",
        "write QuantizeLinear and DequantizeLinear",
        _qoperators,
        "qdq",
    ),
    Rule(
        "dynamic-quantization",
        "error",
        "operators that quantize at run time are not imported",
        "quantize statically",
        _dynamic,
    ),
    Rule(
        "operator",
        "error",
        "the parser does not import this operator, or finds no kernel for it",
        "replace it, or load a plugin",
        _operators,
    ),
    Rule(
        "mixed-types",
        "error",
        "operands must have one type (strongly typed networks)",
        "cast one of them, or give scales the activation's type",
        _mixed,
    ),
    Rule("nbits-float16", "error", "MatMulNBits takes float16 only", "convert to float16, or to QDQ", _nbits),
    Rule(
        "block-division",
        "error",
        "the axis must be a whole number of blocks",
        "choose a block size that divides it",
        _block_division,
    ),
    Rule(
        "block-axis", "error", "blocks lie along one of the last two axes", "quantize along another axis", _block_axis
    ),
    Rule(
        "attention-op",
        "error",
        "the operator Attention has no kernel in float32",
        "use float16, or write it out",
        _attention_op,
    ),
    Rule(
        "shape-tensor",
        "error",
        "sizes that come out of a DequantizeLinear cannot be evaluated",
        "leave shape tensors alone",
        _shape_tensor,
        "shapes",
    ),
)
