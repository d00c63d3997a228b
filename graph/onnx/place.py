"""How native nodes and stored tensors enter and leave an ONNXGraph, and the shapes the file keeps of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..ir import Node
from . import native as onnx_native
from .reading import new_node

if TYPE_CHECKING:
    from .graph import ONNXGraph


def fresh(g: ONNXGraph, name: str) -> str:
    unique, i = name, g.numbers.get(name, 1)
    while unique in g.taken or unique in g.values:
        unique, i = f"{name}_{i}", i + 1
    g.numbers[name] = i
    g.taken.add(unique)
    return unique


def new_constant(g: ONNXGraph, name: str, data: np.ndarray) -> ir.Value:
    """A new initializer under a name nobody uses yet."""
    name = fresh(g, name)
    tensor = ir.Tensor(np.ascontiguousarray(data).reshape(data.shape), name=name)
    native = ir.Value(name=name, shape=ir.Shape(data.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    g.model.graph.initializers.add(native)
    g.table.constant(native)
    g.touch()
    return native


def put_constant(native: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Change the tensor of an initializer or of a Constant node in place, name and all."""
    producer = native.producer()
    if producer is not None:
        for name in [n for n in producer.attributes if n.startswith("value") or n == "sparse_value"]:
            producer.attributes.pop(name)
        producer.attributes.add(ir.AttrTensor("value", tensor))
    else:
        native.const_value = tensor if tensor.name == native.name else _named(tensor, native.name)
    native.shape, native.type = ir.Shape(onnx_native.tensor_shape(tensor)), ir.TensorType(tensor.dtype)


def _named(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    if tensor.name is None:
        tensor.name = name
    return tensor


def adopt(g: ONNXGraph, made: Sequence[ir.Node], scope: str = "") -> Node:
    """Give native nodes that have their place in the native graph their view, with shapes; returns the last one's."""
    node: Node | None = None
    used: set[str] = set()
    for native in made:
        for output in native.outputs:
            g.taken.add(output.name or "")
        g.table.visit(native, stored=False)
        for output in native.outputs:
            _write_shape(g, output, fill=True)
        node = g.by_native[native] = new_node(native, used)
        node.scope = scope or node.scope
        g.reread(node)
        g.dirty.add(native)
    assert node is not None
    g.reorder()
    g.touch()
    return node


def drop_unused(g: ONNXGraph, candidates: Iterable[ir.Value]) -> None:
    """Forget stored values that nothing reads any more."""
    graph = g.model.graph
    for native in dict.fromkeys(candidates):
        if onnx_native.is_used(native) or onnx_native.constant_tensor(native) is None:
            continue
        producer = native.producer()
        if producer is not None:
            graph.remove(producer, safe=True)
        else:
            graph.initializers.pop(native.name or "")
        view = g.view.pop(native, None)
        g.values.pop(native.name or "", None)
        g.table.info.pop(native, None)
        g.table.elements.pop(native, None)
        g.moved.discard(native)
        weight = None if view is None else view.weight
        if weight is not None and weight in g.carriers:
            g.carriers[weight] = [v for v in g.carriers[weight] if v is not native]
            if not g.carriers[weight]:
                del g.carriers[weight]
                g.weights.pop(weight.name, None)


def drop_idle(g: ONNXGraph) -> None:
    """Forget stored operands that were replaced since the last refresh and that nothing has taken up again."""
    idle, g.idle = g.idle, []
    drop_unused(g, [v for v in idle if v in g.view])


def write_shapes(g: ONNXGraph) -> None:
    """Bring the shapes stored in the file in line with the table, changing only those that disagree."""
    for node in g.model.graph:
        if not onnx_native.is_constant_node(node):
            for value in node.outputs:
                _write_shape(g, value, fill=False)


def _write_shape(g: ONNXGraph, value: ir.Value, *, fill: bool) -> None:
    info = g.table.info.get(value)
    if info is None or info.shape is None or info.a is None:
        return
    if info.dtype and (value.type is None or (isinstance(value.type, ir.TensorType) and value.dtype is not None
                                              and onnx_native.dtype_name(value.dtype) != info.dtype)):  # fmt: skip
        value.type = ir.TensorType(onnx_native.dtype_of(info.dtype))
    if value.shape is None and not fill and not value.is_graph_output():
        return
    old = list(value.shape) if value.shape is not None else []
    fits = len(old) == len(info.shape) and all(
        (o == n) if isinstance(o, int) else isinstance(n, str) or o.value is None or value.is_graph_output()
        for o, n in zip(old, info.shape, strict=True)
    )
    if fits:
        return
    keep = len(old) == len(info.shape)
    dims: list[Any] = []
    for i, dim in enumerate(info.shape):
        if isinstance(dim, int):
            dims.append(dim)
        elif keep and not isinstance(old[i], int):
            dims.append(old[i])
        else:
            dims.append(dim if dim in g.table.declared else None)
    value.shape = ir.Shape(dims)
