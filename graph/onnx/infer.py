"""Shapes of last resort: onnx inference over the whole model, and one run in ONNX Runtime on made-up inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from . import native

if TYPE_CHECKING:
    from .shapes import ShapeTable, Sizes

Found = dict[str, "tuple[Sizes | None, Sizes | None, str]"]
BIG = 1 << 12
RUN_LIMIT = 1 << 30


def from_whole_model(table: ShapeTable) -> Found:
    """Shape inference (with data propagation) on a copy whose large weights are only declared, once per world."""
    from .node_infer import read_type

    worlds = []
    for world in (0, 1):
        proto = native.serialize(native.inline(_skeleton(table, world)))
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return {}
        infos = list(inferred.graph.value_info) + list(inferred.graph.output)
        worlds.append({v.name: read_type(v.type) for v in infos})
    first, second = worlds
    return {
        name: (shape, second.get(name, (None, ""))[0], dtype)
        for name, (shape, dtype) in first.items()
        if shape is not None
    }


def _skeleton(table: ShapeTable, world: int) -> ir.Model:
    model = table.model.clone()
    graph = model.graph
    for old, new in zip(table.model.graph.inputs, graph.inputs, strict=True):
        info = table.info.get(old)
        sizes = None if info is None else (info.b if world else info.a)
        if sizes is not None:
            new.shape = ir.Shape(sizes)
    for node_old, node_new in zip(table.model.graph, graph, strict=True):
        for old, new in zip(node_old.outputs, node_new.outputs, strict=True):
            info = table.info.get(old)
            sizes = None if info is None else (info.b if world else info.a)
            known = info is not None and sizes is not None and bool(info.dtype)
            new.shape = ir.Shape(sizes) if known and sizes is not None else None
            if known and info is not None:
                new.type = ir.TensorType(native.dtype_of(info.dtype))
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > BIG:
            graph.initializers.pop(value.name or "")
            if not value.is_graph_input():
                value.shape, value.dtype = ir.Shape(native.tensor_shape(tensor)), tensor.dtype
                graph.inputs.append(value)
    return model


def from_run(table: ShapeTable) -> Found:
    """Concrete shapes from one run on zeros and random numbers; {} where the model is large or does not run."""
    from .run import OrtError, Session, made_up_inputs

    graph = table.model.graph
    total = sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None)
    inputs = made_up_inputs(table)
    wanted = [
        o.name
        for n in graph
        if not native.is_constant_node(n)
        for o in n.outputs
        if o.name and table.info[o].a is None and isinstance(o.type, (ir.TensorType, type(None)))
    ]
    if total > RUN_LIMIT or inputs is None or not wanted:
        return {}
    try:
        _, taps = Session(table.model, wanted).run(inputs)
    except OrtError as error:
        table.notes.append(
            f"shapes of {len(wanted)} values unknown: the model does not run on made-up inputs ({error})"
        )
        return {}
    return {name: (tuple(np.shape(x)), None, str(np.asarray(x).dtype)) for name, x in taps.items() if x is not None}
