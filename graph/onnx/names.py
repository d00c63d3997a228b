"""Names in an ONNX model, which values share their data, and all its values in one order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import ConstraintError
from . import native as onnx_native


def storage_key(native: ir.Value) -> Any:
    """Equal for values that surely share their data: one tensor object, or one region of an external file."""
    tensor = native.const_value if native.producer() is None else None
    if tensor is None:
        return native  # a Constant node
    if isinstance(tensor, ir.ExternalTensor):
        return (tensor.path, tensor.offset, tensor.length)
    return id(tensor)


def native_values(model: ir.Model) -> list[ir.Value]:
    """All values of the main graph in a fixed order."""
    graph = model.graph
    return [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]


def names_in(model: ir.Model) -> set[str]:
    """Every value and node name used anywhere in the model, subgraphs included."""
    found: set[str] = set()
    for graph in model.graphs():
        found.update(v.name for v in graph.inputs if v.name)
        found.update(graph.initializers)
        for node in graph:
            found.update(o.name for o in node.outputs if o.name)
            if node.name:
                found.add(node.name)
    return found


def load_weight(native: ir.Value) -> np.ndarray:
    tensor = onnx_native.constant_tensor(native)
    if tensor is None:
        raise ConstraintError("the weight has been removed from the graph", value=native.name)
    return tensor.numpy()
