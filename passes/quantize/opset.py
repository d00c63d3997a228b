"""The ONNX opset that a placement needs, and a model raised to it."""

from __future__ import annotations

from typing import Any

from ...graph.errors import BackendError
from ...graph.ir import Graph
from .placement import Placement
from .spec import BackendSpec, TensorFormat

TYPES = {
    "int8": 10, "uint8": 10, "int32": 10, "float8_e4m3fn": 19, "float8_e5m2": 19, "int16": 21, "uint16": 21, "int4": 21,
    "uint4": 21, "float4_e2m1fn": 23, "int2": 25, "uint2": 25,
}  # fmt: skip
"""Type -> the first opset whose QuantizeLinear and DequantizeLinear know it."""


def needed(spec: BackendSpec, placement: Placement) -> int:
    """The least opset in which the placement can be written."""
    sites = [*placement.weights, *placement.tables]
    forms: list[TensorFormat] = [site.form for site in sites] + [p.form for p in placement.points.values()]
    types = max((TYPES[f.dtype] for f in forms), default=10)
    axes = max((21 if f.block else 13 for f in forms if f.granularity != "tensor"), default=10)
    return max(types, axes, spec.export.opset or 10)


def at_opset(graph: Graph, spec: BackendSpec, placement: Placement) -> Graph | None:
    """The graph of the same model at the opset that the placement needs, or None where it is there already.

    Raises:
        BackendError: the model cannot be converted; says why.
    """
    if graph.kind != "onnx":
        return None
    from ...graph.onnx.attrs import opset_of

    have, want = opset_of(graph), needed(spec, placement)  # type: ignore[arg-type]
    return None if have >= want else _converted(graph, have, want)


def _converted(graph: Graph, have: int, want: int) -> Graph:
    import onnx_ir as ir

    from ...graph.onnx import load_onnx

    try:
        from onnxscript import version_converter
    except ImportError as exc:
        raise BackendError(
            f"the types chosen need opset {want}", node=graph.name, expected=f"opset {want}", found=f"opset {have}",
            hint=f"install onnxscript, which converts models, or export the model with opset {want}",
        ) from exc  # fmt: skip
    source: Any = graph.to_model()
    model = source.clone() if isinstance(source, ir.Model) else ir.serde.deserialize_model(source)
    problem = ""
    try:
        version_converter.convert_version(model, target_version=want)
    except Exception as exc:  # the converter raises whatever its adapters do
        problem = str(exc)[:300]
    if problem or model.opset_imports.get("", 0) < want:
        raise BackendError(
            f"the types chosen need opset {want}, and the model cannot be converted", node=graph.name,
            expected=f"opset {want}", found=problem or f"opset {have}", hint=f"export the model with opset {want}",
        )  # fmt: skip
    _axes_as_operands(model)
    return load_onnx(model)


def _axes_as_operands(model: Any) -> None:
    """Reductions name their axes in an operand since opset 18; the converter leaves the attribute on some of them."""
    import numpy as np
    import onnx_ir as ir

    if model.opset_imports.get("", 0) < 18:
        return
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "" and node.op_type.startswith("Reduce") and "axes" in node.attributes:
            axes = np.array(node.attributes.pop("axes").as_ints(), np.int64)
            value = ir.Value(
                name=f"{node.outputs[0].name}_axes", const_value=ir.tensor(axes),
                shape=ir.Shape(axes.shape), type=ir.TensorType(ir.DataType.INT64),
            )  # fmt: skip
            model.graph.register_initializer(value)
            node.resize_inputs(2)
            node.replace_input_with(1, value)
