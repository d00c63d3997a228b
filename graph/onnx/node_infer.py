"""Shape inference of one ONNX node by its schema, remembered by what it depends on: a large graph repeats itself."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from . import native

if TYPE_CHECKING:
    from .shapes import ShapeTable

Sizes: TypeAlias = "tuple[int, ...]"
Found: TypeAlias = "dict[int, tuple[Sizes | None, str]]"
Memo: TypeAlias = "dict[Hashable, Any]"

BY_SHAPE = frozenset(
    "Add Sub Mul Div Pow Mod Min Max Sum Mean And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual Where Clip "
    "PRelu Conv ConvTranspose MatMul Gemm BatchNormalization InstanceNormalization GroupNormalization Gather Concat "
    "LayerNormalization GatherElements GatherND QuantizeLinear DequantizeLinear LSTM GRU RNN Einsum Identity".split()
)
"""Operators whose result shapes follow from operand shapes and attributes alone, whatever numbers the operands hold."""

PLAIN = frozenset(
    (
        ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS,
        ir.AttributeType.STRING, ir.AttributeType.STRINGS,
    )
)  # fmt: skip


def infer_node(table: ShapeTable, node: ir.Node, world: int) -> Found:
    """{output position: (shape if every dimension is a number, dtype name)} in one world; {} where nothing follows."""
    key = _key(table, node, world)
    if key is None:
        return _infer(table, node, world)
    found: Found | None = table.memo.get(key)
    if found is None:
        found = table.memo[key] = _infer(table, node, world)
    return found


def _key(table: ShapeTable, node: ir.Node, world: int) -> Hashable | None:
    """Everything that the inference of a node reads; None where that is no small piece of plain data."""
    attributes = []
    for attr in node.attributes.values() if node.attributes else ():
        if attr.type not in PLAIN or attr.is_ref():
            return None
        value = attr.value
        attributes.append((attr.name, tuple(value) if isinstance(value, list) else value))
    operands: list[Hashable] = []
    blind = node.op_type in BY_SHAPE
    for value in node.inputs:
        if value is None:
            operands.append(None)
            continue
        info = table.info.get(value)
        if info is None or (value.type is not None and type(value.type) is not ir.TensorType):
            return None
        if info.a is None and value.shape is not None:
            return None
        e = None if blind else table.elements.get(value)
        data = None if e is None else _bytes(e.b if world else e.a)
        operands.append((info.dtype, info.b if world else info.a, data))
    named = [bool(o.name) for o in node.outputs]
    return node.domain, node.op_type, node.overload, tuple(attributes), tuple(named), *operands


def _bytes(data: np.ndarray) -> Hashable:
    return data.shape, data.dtype.name, data.tobytes()


def _infer(table: ShapeTable, node: ir.Node, world: int) -> Found:
    model = table.model
    domain = "" if node.domain in native.STANDARD_DOMAINS else node.domain
    opset = model.graph.opset_imports.get(domain, 0)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, domain)
    except onnx.defs.SchemaError:
        from .contrib import infer

        return infer(table, node, world)
    if node.op_identifier() in model.functions or any(True for _ in native.subgraphs(node)):
        return {}  # whole-model inference knows functions and scopes
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None or not value.name:
            continue
        proto = _type_proto(table, value, world)
        if proto is None:
            return {}
        types[value.name] = proto
        e = table.elements.get(value)
        if e is not None:
            data[value.name] = ir.serde.serialize_tensor(ir.tensor(np.ascontiguousarray(e.b if world else e.a)))
    try:
        found = infer_node_outputs(
            schema, ir.serde.serialize_node(node), types, data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in model.graph.opset_imports.items()],
            ir_version=model.ir_version,
        )  # fmt: skip
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    positions = {o.name: i for i, o in enumerate(node.outputs) if o.name}
    return {positions[name]: read_type(t) for name, t in found.items() if name in positions}


def _type_proto(table: ShapeTable, value: ir.Value, world: int) -> onnx.TypeProto | None:
    info = table.info.get(value)
    if info is None or not info.dtype or (value.type is not None and not isinstance(value.type, ir.TensorType)):
        return None if value.type is None else ir.serde.serialize_type(value.type)
    shape = info.b if world else info.a
    return onnx.helper.make_tensor_type_proto(native.dtype_of(info.dtype).value, shape)


def read_type(proto: onnx.TypeProto) -> tuple[Sizes | None, str]:
    """(shape if every dimension is a number, dtype name) of a tensor type."""
    if not proto.HasField("tensor_type"):
        return None, ""
    tensor = proto.tensor_type
    dtype = native.dtype_name(ir.DataType(tensor.elem_type))
    if not tensor.HasField("shape") or not all(d.HasField("dim_value") for d in tensor.shape.dim):
        return None, dtype
    return tuple(d.dim_value for d in tensor.shape.dim), dtype
