"""Rules for TensorRT on the numbers of a pair: zero points, scales, types, and what the GPU knows of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..rules.onnx_file import OnnxFile
from ..rules.qdq import pairs, quantizer
from ..rules.rule import Hit, Rule, Where
from ..rules.validity import zero_shape
from .operators import DYNAMIC

LEGAL = {"int8", "int4", "float8_e4m3fn", "float4_e2m1fn"}
CAPABILITY = {"float8_e4m3fn": 89, "float4_e2m1fn": 100, "int4": 80}
"""Least compute capability per type; below it the builder refuses."""
FLOATS = {"float32", "float16", "bfloat16"}


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
            yield pair.name, "it has neither zero point nor output_dtype"


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
            yield pair.name, f"its scale {pair.scale.name!r} is computed at run time"


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
            yield pair.name, "an activation in int4"


def _capability(where: Where) -> Iterator[Hit]:
    here = int(where.options.get("capability", 89))
    for pair in pairs(where.file):
        least = CAPABILITY.get(pair.dtype, 0)
        if here < least:
            yield pair.name, f"{pair.dtype} needs compute capability {least / 10}, this is {here / 10}"


def _input_type(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.quantizes and where.file.static_dtype(pair.data) not in FLOATS | {"", "float64"}:
            yield pair.name, f"it quantizes {where.file.static_dtype(pair.data)}"


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
        "a QuantizeLinear that names no type means uint8 in ONNX and is taken as int8",
        "write the zero point, as int8",
        _uint8_default,
        "int8",
    ),
    Rule("uint8-stored", "error", "stored or incoming uint8 is refused", "store int8", _uint8_stored, "int8"),
    Rule(
        "scale-constant",
        "error",
        "a scale must be constant; otherwise the parser crashes",
        "calibrate, and store the scale",
        _scale_constant,
    ),
    Rule(
        "scale-positive", "error", "every scale must be above 0", "quantize again: the range was empty", _scale_positive
    ),
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
        zero_shape,
        "zero_points",
    ),
    Rule(
        "bias-int32",
        "error",
        "a DequantizeLinear of int32 is refused, as biases have it for other targets",
        "keep the bias in float",
        _bias,
        "float_bias",
    ),
    Rule(
        "type",
        "error",
        "only int8, int4, float8 e4m3 and float4 are known",
        "use int8, fp8 e4m3 or int4 blocks",
        _types,
    ),
    Rule(
        "int4-activation",
        "silently wrong",
        "int4 is for weights; an activation is quantized to int8 instead",
        "quantize activations to int8",
        _int4_activation,
    ),
    Rule(
        "capability",
        "error",
        "the GPU that is built for lacks this type",
        "build for a newer one, or use int8",
        _capability,
    ),
    Rule("input-type", "error", "QuantizeLinear takes floats only here", "cast to float first", _input_type),
    Rule(
        "float64",
        "inaccurate",
        "float64 is computed in float32",
        "convert to float32",
        _precision_lost,
        severity="info",
    ),
)
