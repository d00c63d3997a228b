"""Rules of plain ONNX, for any target, and what several targets refuse alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..base import Diagnostic
from .onnx_file import OnnxFile
from .qdq import pairs
from .rule import Hit, Rule, Where, run_rules

SINCE = {
    "int8": 10,
    "uint8": 10,
    "int32": 10,
    "float8_e4m3fn": 19,
    "float8_e5m2": 19,
    "float8_e4m3fnuz": 19,
    "float8_e5m2fnuz": 19,
    "int4": 21,
    "uint4": 21,
    "int16": 21,
    "uint16": 21,
    "float4_e2m1fn": 23,
    "int2": 25,
    "uint2": 25,
}
"""Opset from which QuantizeLinear and DequantizeLinear know a type."""


def _opset(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.node.domain:
            continue
        since = SINCE.get(pair.dtype, 0)
        if where.file.opset < since:
            yield pair.name, f"{pair.dtype} needs opset {since}, the file has {where.file.opset}"
        if pair.block and where.file.opset < 21:
            yield pair.name, f"blocks need opset 21, the file has {where.file.opset}"


def _zero_type(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.quantizes or pair.zero is None:
            continue
        data, zero = where.file.static_dtype(pair.data), where.file.static_dtype(pair.zero)
        if data and zero and data != zero:
            yield pair.name, f"it reads {data}, its zero point is {zero}"


def zero_shape(where: Where) -> Iterator[Hit]:
    """Zero points that are not as many as the scales; ONNX Runtime and TensorRT refuse them alike."""
    for pair in pairs(where.file):
        scale, zero = where.file.shape(pair.scale), where.file.shape(pair.zero)
        if scale is None or zero is None or None in scale or None in zero:
            continue
        sizes = [int(np.prod([d or 0 for d in s], dtype=np.int64)) for s in (scale, zero)]
        if sizes[0] != sizes[1]:
            yield pair.name, f"{sizes[0]} scales and {sizes[1]} zero points"


def _axis(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        rank, scale = where.file.rank(pair.data), where.file.rank(pair.scale)
        if rank is None or not scale or pair.per_tensor:
            continue
        if not -rank <= pair.axis < rank:
            yield pair.name, f"axis {pair.axis} of a tensor with {rank} axes"


RULES: tuple[Rule, ...] = (
    Rule("opset", "error", "a type or form that the file's opset does not know", "write a newer opset", _opset),
    Rule(
        "zero-point-type",
        "error",
        "a zero point must have the type of the integers that are read",
        "store both alike",
        _zero_type,
    ),
    Rule("axis", "error", "an axis that the tensor does not have", "write the right axis", _axis),
)


def checker(model: Any) -> list[Diagnostic]:
    """What ONNX's own checker says about a model or file, as the rule ``onnx``."""
    import onnx
    import onnx_ir as ir

    subject = ir.serde.serialize_model(model) if isinstance(model, ir.Model) else model
    try:
        onnx.checker.check_model(subject if isinstance(subject, onnx.ModelProto) else str(subject))
    except Exception as exc:  # ValidationError, DecodeError, OSError: whatever is wrong with the file
        text = " ".join(str(exc).split())
        fix = "the file is not valid ONNX: export it again"
        return [Diagnostic("onnx", "error", "", text[:400], fix, "error")]
    return []


def standard(file: OnnxFile) -> list[Diagnostic]:
    """The rules of this file."""
    return run_rules(RULES, Where(file))
