"""Small readings of onnx_ir objects: dtype names, constants, attributes as plain data, subgraph captures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

STANDARD_DOMAINS = ("", "ai.onnx")
WITH_GRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators of the standard domain that hold graphs of their own."""


@functools.cache
def dtype_name(dtype: ir.DataType | None) -> str:
    """numpy-style name: ``"float32"``, ``"bfloat16"``, ``"float8_e4m3fn"``, ``"string"``; ``""`` if unknown."""
    if dtype is None or dtype == ir.DataType.UNDEFINED:
        return ""
    if dtype == ir.DataType.STRING:
        return "string"
    return str(dtype.numpy().name)


@functools.cache
def dtype_of(name: str) -> ir.DataType:
    """The ONNX type of a numpy-style name. Raises KeyError for a name ONNX has no type for."""
    if name in ("string", "object", "str"):
        return ir.DataType.STRING
    for dtype in ir.DataType:
        if dtype not in (ir.DataType.UNDEFINED, ir.DataType.STRING) and dtype.numpy().name == name:
            return dtype
    raise KeyError(name)


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute as plain Python data (tuples become lists)."""
    attr = node.attributes.get(name)
    if attr is None or attr.is_ref():
        return default
    value = attr.value
    return list(value) if isinstance(value, tuple) else value


def constant_attribute(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, whatever attribute spells it; None for sparse ones."""
    for name, attr in node.attributes.items():
        if attr.is_ref():
            return None
        if name == "value":
            return attr.value  # not as_tensor(): its protocol check costs more than all else here
        if name in ("value_int", "value_ints"):
            return ir.Tensor(np.asarray(attr.value, np.int64))  # not ir.tensor(): it checks protocols
        if name in ("value_float", "value_floats"):
            return ir.Tensor(np.asarray(attr.value, np.float32))
        if name in ("value_string", "value_strings"):
            strings = [attr.value] if name == "value_string" else list(attr.value)
            data = [s.encode() if isinstance(s, str) else s for s in strings]
            shape = ir.Shape([]) if name == "value_string" else ir.Shape([len(data)])
            return ir.StringTensor(data, shape=shape)
    return None


_SPELLINGS = ("value", "value_int", "value_ints", "value_float", "value_floats", "value_string", "value_strings")


def is_constant_node(node: ir.Node) -> bool:
    """A Constant node whose tensor is in the file (not sparse, not an attribute of an enclosing function)."""
    if node.op_type != "Constant" or node.domain not in STANDARD_DOMAINS:
        return False
    return any(name in node.attributes and not node.attributes[name].is_ref() for name in _SPELLINGS)


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a value that is the same in every run: an initializer that no caller can override, or Constant."""
    producer = value.producer()
    if producer is not None:
        return constant_attribute(producer) if producer.op_type == "Constant" and is_constant_node(producer) else None
    if value.is_initializer() and not value.is_graph_input():
        return value.const_value
    return None


def is_used(value: ir.Value, besides: Container[ir.Node] = ()) -> bool:
    """Whether a node other than ``besides`` reads a value, or it is an output of its graph."""
    if value.is_graph_output():
        return True
    # uses() makes a tuple of them all, which is slow for a constant that thousands of nodes read
    uses = getattr(value, "_uses", None)
    return any(use.node not in besides for use in (value.uses() if uses is None else uses))


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor.shape.numpy())


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in the attributes of a node (not the nested ones below them)."""
    if node.op_type not in WITH_GRAPHS and node.domain in STANDARD_DOMAINS:
        return
    for attr in node.attributes.values():
        if attr.is_ref():
            continue
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph and all graphs in it; much faster than ``model.graphs()``, which looks at every attribute."""
    found = [model.graph]
    for graph in found:
        for node in graph:
            if node.op_type in WITH_GRAPHS or node.domain not in STANDARD_DOMAINS:
                found.extend(subgraphs(node))
    return found


def captures(node: ir.Node, outer: ir.Graph) -> list[ir.Value]:
    """Values of ``outer`` that the subgraphs of a node read, nested ones included, in order of first use."""
    if node.op_type not in WITH_GRAPHS and node.domain in STANDARD_DOMAINS:
        return []
    found: dict[ir.Value, None] = {}

    def visit(graph: ir.Graph) -> None:
        for inner in graph:
            for value in inner.inputs:
                if value is not None and value.graph is outer:
                    found[value] = None
            for deeper in subgraphs(inner):
                visit(deeper)
        for value in graph.outputs:
            if value.graph is outer:
                found[value] = None

    for graph in subgraphs(node):
        visit(graph)
    return list(found)


SOURCE = "foldline.source"
"""Key in a lazy tensor's ``meta``: the tensor it is computed from."""


def lazy(make: Callable[[], ir.TensorProtocol], source: ir.TensorProtocol, shape: tuple[int, ...]) -> ir.LazyTensor:
    """A tensor of the source's dtype that is computed from it each time it is read."""
    tensor = ir.LazyTensor(make, source.dtype, ir.Shape(shape))
    tensor.meta[SOURCE] = source
    return tensor


def stored_in(tensor: ir.TensorProtocol | None) -> ir.ExternalTensor | None:
    """The tensor in an external file that this one is, or is computed from."""
    while isinstance(tensor, ir.LazyTensor):
        tensor = tensor.meta.get(SOURCE)
    return tensor if isinstance(tensor, ir.ExternalTensor) else None


DECLARED = "foldline.declared_initializers"
"""Key in a graph's ``meta``: initializers whose type the file also declares, so that writing repeats exactly these."""


def inline(model: ir.Model, limit: int | None = None) -> ir.Model:
    """Hold stored tensors (up to ``limit`` bytes) in the model itself; the tensors of its clones are left alone."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (limit is None or tensor.nbytes <= limit):
                value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
    return model


def serialize(model: ir.Model) -> onnx.ModelProto:
    """The model as a proto; onnx_ir declares the type of every initializer, the file keeps those it had."""
    proto = ir.serde.serialize_model(model)
    declared = model.graph.meta.get(DECLARED)
    if declared is not None:
        nested = len(graphs(model)) > 1
        pending = [proto.graph]
        while pending:
            graph = pending.pop()
            stored = {t.name for t in graph.initializer} - declared
            kept = [v for v in graph.value_info if v.name not in stored]
            if len(kept) != len(graph.value_info):
                del graph.value_info[:]
                graph.value_info.extend(kept)
            pending += _nested(graph) if nested else []
    return proto


def deserialize(proto: onnx.ModelProto) -> ir.Model:
    """The inverse of :func:`serialize`."""
    model = ir.serde.deserialize_model(proto)
    declared: set[str] = set()
    nested = len(graphs(model)) > 1
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        declared |= {t.name for t in graph.initializer} & {v.name for v in graph.value_info}
        pending += _nested(graph) if nested else []
    model.graph.meta[DECLARED] = frozenset(declared)
    return model


def _nested(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [g for n in graph.node for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
