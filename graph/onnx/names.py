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
    for graph in onnx_native.graphs(model):
        found.update(v.name for v in graph.inputs if v.name)
        found.update(graph.initializers)
        for node in graph:
            for output in node.outputs:
                found.add(output.name or "")
            found.add(node.name or "")
    found.discard("")
    return found


KEPT = 4096
"""Elements of the largest tensor whose array is kept once it was read."""


class Loader:
    """Reads the data of one stored value. Small tensors are asked for many times: their array is kept while the tensor
    object stays the same (an edit gives the value another one)."""

    __slots__ = ("_data", "_native", "_tensor")

    def __init__(self, native: ir.Value) -> None:
        self._native = native
        self._tensor: ir.TensorProtocol | None = None
        self._data: np.ndarray | None = None

    def __call__(self) -> np.ndarray:
        tensor = onnx_native.constant_tensor(self._native)
        if tensor is None:
            raise ConstraintError("the weight has been removed from the graph", value=self._native.name)
        if tensor is self._tensor and self._data is not None:
            return self._data
        data = tensor.numpy()
        if data.size <= KEPT and not isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):  # no file is held open
            self._tensor, self._data = tensor, data
        return data
