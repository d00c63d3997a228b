"""From a torch graph to ONNX: torch.onnx with translations of foldline's own operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from ...graph.errors import BackendError
from ...graph.ir import Graph
from ...passes.quantize.opset import TYPES
from .turn import narrow, store_zeros, turn_weights

OPSET = 20
"""The exporter's own default, and read by every ONNX Runtime that foldline supports."""


def _translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """foldline's custom torch operators -> functions that build the ONNX nodes."""
    import numpy as np
    import onnxscript

    from ...graph.fx.custom import dequantize_linear, quantize_linear, storage_dtype
    from ...graph.fx.tensors import HELD

    op = getattr(onnxscript, f"opset{max(opset, 20)}", onnxscript.opset21)

    def stored(x: Any, dtype: str) -> Any:
        """An operand in the type it stands for, where torch holds it in a wider one (see ``turn.narrow``)."""
        return op.Cast(x, to=int(ir.DataType[dtype.upper()])) if dtype in HELD else x

    def zeros(scale: Any, dtype: str) -> Any:
        """ONNX knows the integer type by its zero point only."""
        name = str(storage_dtype(dtype)).removeprefix("torch.")
        return op.ConstantOfShape(op.Shape(scale), value=ir.serde.serialize_tensor(ir.tensor(np.zeros(1, name))))

    def attributes(axis: int | None, block: int) -> dict[str, int]:
        return {"axis": 1 if axis is None else axis, **({"block_size": block} if block else {})}

    def quantize(
        x: Any,
        scale: Any,
        zero_point: Any = None,
        axis: int | None = None,
        dtype: str = "int8",
        block: int = 0,
        rounding: str = "divide",  # ONNX divides
    ) -> Any:
        zero = stored(zeros(scale, dtype) if zero_point is None else zero_point, dtype)
        return op.QuantizeLinear(x, scale, zero, **attributes(axis, block))

    def dequantize(
        x: Any, scale: Any, zero_point: Any = None, axis: int | None = None, dtype: str = "int8", block: int = 0
    ) -> Any:
        x = stored(x, dtype)
        operands = (x, scale) if zero_point is None else (x, scale, stored(zero_point, dtype))
        return op.DequantizeLinear(*operands, **attributes(axis, block))

    return {quantize_linear: quantize, dequantize_linear: dequantize}


def export(graph: Graph, opset: int = OPSET) -> tuple[ir.Model, list[str]]:
    """The ONNX model of an FX graph (same input and output names), and what the user should know about it.

    Symbolic dimensions stay symbolic. Where tracing cannot keep one (an operator whose translation needs its size),
    it becomes the example's size and a note says so.

    Raises:
        BackendError: torch.onnx cannot translate an operator; says which.
    """
    from torch.export import Dim

    pairs = [node.attrs for node in graph.nodes if node.op in ("quantize", "dequantize")]
    if any(attrs.get("block") for attrs in pairs):
        opset = max(opset, 21)  # the first that knows blocks
    opset = max([opset, *(TYPES.get(attrs.get("dtype", ""), 10) for attrs in pairs)])
    arguments = _example(graph)
    notes: list[str] = []
    try:
        model = _export(graph, arguments, _dynamic(graph, Dim.DYNAMIC), opset)
    except BackendError as exc:
        if "static shape" not in str(exc.found):
            raise
        model = _export(graph, arguments, _dynamic(graph, Dim.AUTO), opset)
        for value, mine in zip(model.graph.inputs, graph.inputs, strict=True):
            for i, d in enumerate(mine.shape or ()):
                if isinstance(d, str) and value.shape is not None and isinstance(value.shape[i], int):
                    notes.append(f"axis {i} of input {mine.name} is fixed at {value.shape[i]}: {exc.found}")
    _rename(model, [v.name for v in graph.inputs], [v.name for v in graph.outputs])
    narrow(model)
    store_zeros(model)
    turn_weights(model)
    strip(model)
    return model, notes


def _dynamic(graph: Graph, dim: Any) -> tuple[dict[int, Any], ...]:
    return tuple({i: dim for i, d in enumerate(v.shape or ()) if isinstance(d, str)} for v in graph.inputs)


def _export(graph: Graph, arguments: tuple[Any, ...], shapes: tuple[dict[int, Any], ...], opset: int) -> ir.Model:
    import torch

    module = graph.to_graph_module()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                dynamic_shapes=shapes if any(shapes) else None,
                custom_translation_table=_translations(opset),
                opset_version=opset,
                verbose=False,
            )
        except Exception as exc:  # the exporter wraps every failure in classes of its own
            raise BackendError("torch.onnx could not export the graph", node=graph.name, found=_cause(exc)) from exc
    if program is None:
        raise BackendError("torch.onnx gave no model", node=graph.name)
    model: ir.Model = program.model
    return model


def _rename(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    """Give inputs and outputs their names; an inner value that has one of them gives way.

    (The exporter's own ``input_names`` and ``output_names`` can leave two values of one name.)
    """
    wanted = dict(zip(model.graph.inputs, inputs, strict=True))
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        wanted.setdefault(value, name)
    taken = set(wanted.values())
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [v for node in model.graph.all_nodes() for v in node.outputs]
    used = {v.name for v in values} | taken
    for value in values:
        if value in wanted or value.name not in taken:
            continue
        i = 1
        while f"{value.name}_{i}" in used:
            i += 1
        _set_name(model, value, f"{value.name}_{i}")
        used.add(value.name)
    for value, name in wanted.items():
        _set_name(model, value, name)


def _set_name(model: ir.Model, value: ir.Value, name: str) -> None:
    stored = model.graph.initializers
    old = value.name or ""
    if stored.get(old) is value:
        del stored[old]
        value.name = name
        stored[name] = value
    else:
        value.name = name


def _cause(exc: BaseException) -> str:
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return f"{type(exc).__name__}: {str(exc).strip()[:400]}"


def _example(graph: Graph) -> tuple[Any, ...]:
    """Tensors of the hint shapes; a dynamic dimension needs a size of at least 2 not to be specialised."""
    import torch

    from ...graph.fx.ops import TORCH_DTYPES

    arguments = []
    for v in graph.inputs:
        if v.hint is None or v.shape is None:
            raise BackendError("an input's shape is unknown", value=v.name)
        arguments.append(torch.zeros(v.hint, dtype=TORCH_DTYPES[v.dtype]))
    return tuple(arguments)


def strip(model: ir.Model) -> None:
    """Drop the exporter's notes: stack traces hold absolute paths and make the same model give different bytes."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for function in model.functions.values():
        for node in function.all_nodes():
            node.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
        for node in graph:
            for value in node.outputs:
                value.metadata_props.clear()
    model.metadata_props.clear()
