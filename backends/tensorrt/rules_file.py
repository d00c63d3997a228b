"""Rules for TensorRT on what its parser and builder refuse, crash on, or read as something else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..rules.onnx_file import MICROSOFT, OnnxFile, name_of
from ..rules.qdq import Pair, dequantizer, is_op, pairs, quantizer
from ..rules.rule import Hit, Rule, Where
from .flow import state
from .operators import CONTRIB, DYNAMIC, NO_PLUGIN, QOPERATORS, UNSUPPORTED

LEGAL = {"int8", "int4", "float8_e4m3fn", "float4_e2m1fn"}
CAPABILITY = {"float8_e4m3fn": 89, "float4_e2m1fn": 100, "int4": 80}
"""Least compute capability per type; below it the builder refuses."""
FLOATS = {"float32", "float16", "bfloat16"}
SAME_TYPE = frozenset(
    "Add Sub Mul Div Pow Min Max Sum Mean MatMul Gemm Conv ConvTranspose Concat Where PRelu Equal Greater Less "
    "GreaterOrEqual LessOrEqual LayerNormalization BatchNormalization InstanceNormalization".split()
)


def _zero_nonzero(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        zeros = pair.zeros
        if zeros is not None and np.any(zeros.astype(np.float64)):
            yield pair.name, f"{pair.node.op_type} has zero point {_few(zeros)}"


def _uint8(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        zeros = pair.zeros
        if pair.dtype != "uint8" or (zeros is not None and np.any(zeros)):
            continue
        if pair.quantizes and pair.zero is not None:
            yield pair.name, "uint8 with zero point 0 is computed as int8, which cuts values at 127 steps"


def _uint8_default(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.quantizes and pair.zero is None and pair.dtype == "uint8":
            yield pair.name, "without zero point or output_dtype it means uint8 in ONNX and int8 here"


def _uint8_stored(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if (
            not pair.quantizes
            and where.file.static_dtype(pair.data) == "uint8"
            and quantizer(where.file, pair.data) is None
        ):
            if not _made_here(where.file, pair.data):
                yield pair.name, "it reads uint8 that is no QuantizeLinear's"


def _made_here(file: OnnxFile, value: ir.Value | None) -> bool:
    """Whether integers come from a quantization in the file, through operators that move elements."""
    while value is not None and (node := value.producer()) is not None:
        if quantizer(file, value) is not None or node.op_type in DYNAMIC:
            return True
        value = node.inputs[0] if node.inputs else None
    return False


def _scale_constant(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.scale is not None and not where.file.is_static(pair.scale):
            yield pair.name, f"its scale {pair.scale.name!r} is computed at run time; the parser crashes"


def _scale_positive(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        scales = pair.scales
        if scales is not None and not np.all(scales.astype(np.float64) > 0):
            yield pair.name, f"a scale is {scales.astype(np.float64).reshape(-1)[np.argmin(scales > 0)]:g}"


def _scale_finite(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        scales = pair.scales
        if scales is None:
            continue
        data = scales.astype(np.float64)
        tiny = 6.2e-5 if scales.dtype == np.float16 else 1.2e-38
        if np.any(np.isinf(data)) or np.any((data > 0) & (data < tiny)):
            yield pair.name, "a scale is infinite or subnormal"


def _scale_rank(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        rank = where.file.rank(pair.scale)
        if rank is not None and rank > 1 and not pair.block and rank != where.file.rank(pair.data):
            yield pair.name, f"its scale has {rank} axes"


def _scale_length(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        scale, data = where.file.shape(pair.scale), where.file.shape(pair.data)
        if pair.block or scale is None or data is None or len(scale) != 1 or scale == (1,):
            continue
        axis = pair.positive_axis
        if axis is not None and axis < len(data) and None not in (data[axis], scale[0]) and data[axis] != scale[0]:
            yield pair.name, f"{scale[0]} scales for axis {axis} of size {data[axis]}"


def _zero_shape(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        scale, zero = where.file.shape(pair.scale), where.file.shape(pair.zero)
        if scale is None or zero is None or None in scale or None in zero:
            continue
        sizes = [int(np.prod([d or 0 for d in s], dtype=np.int64)) for s in (scale, zero)]
        if sizes[0] != sizes[1]:
            yield pair.name, f"{sizes[0]} scales and {sizes[1]} zero points"


def _bias(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if not pair.quantizes and where.file.static_dtype(pair.data) == "int32":
            yield pair.name, "it dequantizes int32"


def _types(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        dtype = pair.dtype
        if dtype and dtype not in LEGAL | {"uint8", "int32"}:
            yield pair.name, f"{pair.node.op_type} to or from {dtype}"


def _int4_activation(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.quantizes and pair.dtype == "int4" and not where.file.is_static(pair.data):
            yield pair.name, "the engine quantizes this activation to int8"


def _capability(where: Where) -> Iterator[Hit]:
    here = int(where.options.get("capability", 89))
    for pair in pairs(where.file):
        least = CAPABILITY.get(pair.dtype, 0)
        if here < least:
            yield pair.name, f"{pair.dtype} needs compute capability {least / 10}, this is {here / 10}"


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


def _stored_moved(where: Where) -> Iterator[Hit]:
    file = where.file
    for pair in pairs(file):
        node = None if pair.data is None else pair.data.producer()
        if pair.quantizes or node is None or node.op_type in ("Constant", "QuantizeLinear") or pair.dtype not in LEGAL:
            continue
        source = _source(file, node)
        if source is not None and file.static_dtype(source) in LEGAL:
            yield pair.name, f"{node.op_type} stands between the stored integers and it"


def _source(file: OnnxFile, node: ir.Node) -> ir.Value | None:
    """The stored tensor that a chain of moving operators begins with, or None."""
    value: ir.Value | None = node.inputs[0] if node.inputs else None
    while value is not None and value.producer() is not None and not is_op(value.producer(), "Constant"):
        producer = value.producer()
        if is_op(producer, "QuantizeLinear") or producer is None:
            return None
        value = producer.inputs[0] if producer.inputs else None
    return value if value is not None and file.is_static(value) else None


def _mixed(where: Where) -> Iterator[Hit]:
    for node in where.file.of(*SAME_TYPE):
        operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
        operands = operands[:3] if "Normalization" not in node.op_type else operands[:1]
        found = {where.file.static_dtype(v) for v in operands if v is not None} & FLOATS
        if len(found) > 1:
            yield name_of(node), " and ".join(sorted(found))


def _input_type(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.quantizes and where.file.static_dtype(pair.data) not in FLOATS | {"", "float64"}:
            yield pair.name, f"it quantizes {where.file.static_dtype(pair.data)}"


def _nbits(where: Where) -> Iterator[Hit]:
    for node in where.file.of("MatMulNBits"):
        dtype = where.file.static_dtype(node.inputs[0])
        if node.domain == MICROSOFT and dtype not in ("float16", ""):
            yield name_of(node), f"its activation is {dtype}"


def _block_division(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        data, axis = where.file.shape(pair.data), pair.positive_axis
        if pair.block and data is not None and axis is not None and data[axis] is not None and data[axis] % pair.block:
            yield pair.name, f"{data[axis]} elements in blocks of {pair.block}"


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


def _precision_lost(where: Where) -> Iterator[Hit]:
    wide = [v for v in (*where.file.graph.inputs, *where.file.graph.outputs) if where.file.static_dtype(v) == "float64"]
    for value in dict.fromkeys(wide):
        yield "", f"{value.name} is float64"


def _few(values: np.ndarray) -> str:
    flat = np.unique(values.astype(np.float64).reshape(-1))
    return ", ".join(f"{v:g}" for v in flat[:3]) + ("..." if flat.size > 3 else "")


RULES: tuple[Rule, ...] = (
    Rule(
        "zero-point", "error", "a zero point other than 0 is refused", "quantize symmetrically", _zero_nonzero, "int8"
    ),
    Rule(
        "uint8-activation",
        "silently wrong",
        "uint8 activations are read as int8",
        "quantize to int8, symmetrically",
        _uint8,
        "int8",
    ),
    Rule(
        "uint8-default",
        "silently wrong",
        "a QuantizeLinear that names no type",
        "write the zero point, as int8",
        _uint8_default,
        "int8",
    ),
    Rule("uint8-stored", "error", "stored or incoming uint8 is refused", "store int8", _uint8_stored, "int8"),
    Rule("scale-constant", "error", "a scale must be constant", "calibrate, and store the scale", _scale_constant),
    Rule("scale-positive", "error", "a scale must be positive", "quantize again: the range was empty", _scale_positive),
    Rule(
        "scale-finite",
        "inaccurate",
        "a scale out of its type's normal range",
        "quantize again, with float32 scales",
        _scale_finite,
    ),
    Rule("scale-rank", "error", "a scale of rank 2 or more needs blocks", "store one axis of scales", _scale_rank),
    Rule("scale-length", "error", "scales must be as many as the axis is long", "quantize again", _scale_length),
    Rule(
        "zero-point-shape",
        "error",
        "zero points must be as many as scales",
        "give each scale a zero point",
        _zero_shape,
        "zero_points",
    ),
    Rule("bias-int32", "error", "no DequantizeLinear of int32", "keep the bias in float", _bias, "float_bias"),
    Rule("type", "error", "integers of this type are refused", "use int8, fp8 e4m3 or int4 blocks", _types),
    Rule("int4-activation", "silently wrong", "int4 is for weights", "quantize activations to int8", _int4_activation),
    Rule("capability", "error", "the GPU lacks this type", "build for a newer one, or use int8", _capability),
    Rule("operand-types", "error", "both operands of a product share one type", "quantize both alike", _operand_types),
    Rule("qoperator", "error", "no QLinear operators", "write QuantizeLinear and DequantizeLinear", _qoperators, "qdq"),
    Rule("dynamic-quantization", "error", "no quantization at run time", "quantize statically", _dynamic),
    Rule("operator", "error", "an operator that is not imported", "replace it, or load a plugin", _operators),
    Rule(
        "stored-moved",
        "error",
        "stored integers go into a DequantizeLinear and nowhere else",
        "dequantize first",
        _stored_moved,
        "dequantize_first",
    ),
    Rule(
        "mixed-types",
        "error",
        "operands must have one type (strongly typed networks)",
        "cast one of them, or give scales the activation's type",
        _mixed,
    ),
    Rule("input-type", "error", "only floats are quantized", "cast to float first", _input_type),
    Rule("nbits-float16", "error", "MatMulNBits takes float16 only", "convert to float16, or to QDQ", _nbits),
    Rule("block-division", "error", "an axis is whole blocks", "choose a block size that divides it", _block_division),
    Rule(
        "block-axis", "error", "blocks lie along one of the last two axes", "quantize along another axis", _block_axis
    ),
    Rule("attention-op", "error", "no kernel for attention", "use float16, or write it out", _attention_op),
    Rule("shape-tensor", "error", "sizes cannot be dequantized", "leave shape tensors alone", _shape_tensor, "shapes"),
    Rule(
        "float64",
        "inaccurate",
        "float64 is computed in float32",
        "convert to float32",
        _precision_lost,
        severity="info",
    ),
)
