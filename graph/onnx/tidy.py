"""Tidying of whole ONNX graphs: functions inlined, settled sizes written as numbers, equal stored tensors merged."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from . import native as onnx_native
from .place import drop_unused, new_constant
from .shapes import ShapeTable
from .sizes import drop_dead_sizes

if TYPE_CHECKING:
    from .graph import ONNXGraph

SAMPLE = 64
"""Bytes at either end of a tensor that are compared before all of it is read."""


def inline_functions(g: ONNXGraph) -> list[str]:
    """Replace calls of the model's own functions by their bodies, in place; names of the functions."""
    from onnx_ir.passes.common import InlinePass

    names = [str(key[1]) for key in g.model.functions]
    if not names:
        return []
    g.model = InlinePass()(g.model).model
    g.table = ShapeTable(g.model, {v.name: v.hint for v in g.inputs if v.hint is not None})
    g.table.load()
    g.view, g.canon, g.by_native, g.settled, g.carriers, g._tied = {}, {}, {}, {}, {}, {}
    g.values, g.weights = {}, {}
    g.dirty, g.moved, g.idle = set(), set(), []
    g.resync()
    g.touch()
    return names


def write_settled_sizes(g: ONNXGraph) -> list[str]:
    """Let what reads a size that is the same in every run read it as a stored number; names of the sizes."""
    written = []
    graph = g.model.graph
    for native in list(g.settled):
        for output in native.outputs:
            uses = [u for u in output.uses() if u.node not in g.settled]
            if not uses or output.is_graph_output():
                continue
            if any(u.node.graph is not graph for u in uses):
                continue
            constant = new_constant(g, f"{output.name}_static", g.table.elements[output].a)
            for use in uses:
                use.node.replace_input_with(use.idx, constant)
            written.append(output.name or "")
    if g.settled:
        drop_dead_sizes(g, settled_only=True)
        g.resync()
        g.touch()
    return written


def store_constants(g: ONNXGraph) -> list[str]:
    """Turn Constant nodes into initializers of the same name; the names.

    A file before IR version 4 lists its initializers as inputs, and an output needs a node: there they stay.
    """
    graph = g.model.graph
    if (g.model.ir_version or 0) < 4:
        return []
    stored = []
    for node in [n for n in graph if onnx_native.is_constant_node(n)]:
        old, tensor = node.outputs[0], onnx_native.constant_attribute(node)
        if tensor is None or old.is_graph_output() or not old.name:
            continue
        held = ir.Value(
            name=old.name, shape=ir.Shape(onnx_native.tensor_shape(tensor)), type=ir.TensorType(tensor.dtype)
        )
        held.const_value = _renamed(tensor, old.name)
        held.doc_string = old.doc_string
        held.metadata_props.update(old.metadata_props)
        for use in list(old.uses()):
            use.node.replace_input_with(use.idx, held)
        graph.remove(node, safe=True)
        graph.initializers.add(held)
        g.table.constant(held)
        stored.append(old.name)
    if stored:
        g.resync()
        g.touch()
    return stored


def _renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """A tensor of that name over the same data; the attribute that it comes from may be the caller's."""
    if tensor.name == name:
        return tensor
    if tensor.dtype == ir.DataType.STRING:
        data = [s if isinstance(s, bytes) else str(s).encode() for s in tensor.numpy().reshape(-1)]
        return ir.StringTensor(data, shape=ir.Shape(onnx_native.tensor_shape(tensor)), name=name)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(onnx_native.tensor_shape(tensor)), name=name)


def merge_duplicates(g: ONNXGraph, *, smallest: int) -> dict[str, str]:
    """Let readers of a stored tensor read an equal one that comes before it; {name that went: name that stays}.

    Equal means dtype, shape and every bit. Graph inputs (defaults that a caller can override), graph outputs and
    tensors that subgraphs read stay. Large tensors are compared by their ends first, so that few are read whole.

    Args:
        smallest: floating tensors of fewer bytes stay apart (equal biases of two layers have nothing in common).
    """
    graph = g.model.graph
    inner = {v.native for n in g.nodes for v in n.captured}
    groups: dict[Hashable, list[ir.Value]] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output() or value in inner:
            continue
        if tensor.dtype == ir.DataType.STRING or not value.uses():
            continue
        if tensor.dtype.is_floating_point() and len(tensor.shape) and tensor.nbytes < smallest:
            continue
        groups.setdefault((tensor.dtype, onnx_native.tensor_shape(tensor)), []).append(value)
    merged: dict[str, str] = {}
    for group in groups.values():
        for equal in _equal(group) if len(group) > 1 else ():
            first, *others = equal
            for other in others:
                for use in list(other.uses()):
                    use.node.replace_input_with(use.idx, first)
                merged[other.name or ""] = first.name or ""
            drop_unused(g, others)
    if merged:
        g.resync()
        g.touch()
    return merged


def drop_unused_tensors(g: ONNXGraph) -> list[str]:
    """Forget initializers that nothing reads and that are neither inputs nor outputs; their names."""
    graph = g.model.graph
    inner = {v.native for n in g.nodes for v in n.captured}
    unused = [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_input() and v not in inner]
    unused = [v for v in unused if not v.is_graph_output()]
    names = [v.name or "" for v in unused]
    drop_unused(g, unused)
    return names


def _equal(group: Iterable[ir.Value]) -> list[list[ir.Value]]:
    """Groups of two and more whose bits are equal."""
    for look in (_ends, _whole):
        parts: dict[Hashable, list[ir.Value]] = {}
        for value in group:
            parts.setdefault(look(value), []).append(value)
        group = [v for part in parts.values() if len(part) > 1 for v in part]
    return [part for part in parts.values() if len(part) > 1]


def _raw(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    data = value.const_value.numpy()
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _ends(value: ir.Value) -> Hashable:
    raw = _raw(value)
    return raw.size, raw[:SAMPLE].tobytes(), raw[-SAMPLE:].tobytes()


def _whole(value: ir.Value) -> Hashable:
    return hashlib.sha256(_raw(value).data).digest()
