"""Purity and equality of native ONNX nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..ir import Graph, Node
from . import native as onnx_native

if TYPE_CHECKING:
    from .graph import ONNXGraph

DOMAINS = (*onnx_native.STANDARD_DOMAINS, "ai.onnx.ml")
RANDOM = frozenset("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial".split())
LARGE = 1 << 16
"""Attributes with more elements than this are not compared."""


def is_pure(node: Node, graph: Graph) -> bool:
    """See :func:`foldline.graph.purity.is_pure`."""
    if TYPE_CHECKING:
        assert isinstance(graph, ONNXGraph)
    native: ir.Node = node.native
    op = native.op_type
    if op == "Dropout" and node.op != "identity":
        return False
    if op == "BatchNormalization" and onnx_native.attribute(native, "training_mode", 0):
        return False
    return _pure(native, graph.model)


def _pure(native: ir.Node, model: ir.Model) -> bool:
    op, domain = native.op_type, native.domain
    if domain not in DOMAINS or op in RANDOM or (model.functions and native.op_identifier() in model.functions):
        return False
    if domain in onnx_native.STANDARD_DOMAINS and op not in onnx_native.WITH_GRAPHS:
        return True
    return all(_inner(n, model) for graph in onnx_native.subgraphs(native) for n in graph)


def _inner(native: ir.Node, model: ir.Model) -> bool:
    trains = native.op_type == "Dropout" or onnx_native.attribute(native, "training_mode", 0)
    return not trains and _pure(native, model)


def signature(node: Node) -> Hashable | None:
    """See :func:`foldline.graph.purity.signature`."""
    native: ir.Node = node.native
    attributes = []
    for name, attr in native.attributes.items():
        key = None if attr.is_ref() else _key(attr.type, attr.value)
        if key is None:
            return None
        attributes.append((name, attr.type.name, key))
    attributes.sort()
    domain = native.domain
    made = [bool(o.name) for o in native.outputs]
    operands = [None if v is None else id(v) for v in native.inputs]
    standard = "" if domain in onnx_native.STANDARD_DOMAINS else domain
    return (standard, native.op_type, native.overload, native.version, *attributes, *made, None, *operands)


def _key(kind: ir.AttributeType, value: Any) -> Hashable | None:
    """An attribute's value so that equal keys mean equal bits; None where it is not comparable."""
    if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.SPARSE_TENSOR):
        return None
    if kind == ir.AttributeType.TENSOR:
        if value.size > LARGE:
            return None
        data = value.numpy()
        raw = repr(data.tolist()).encode() if data.dtype.kind == "O" else np.ascontiguousarray(data).tobytes()
        return (str(value.dtype), tuple(value.shape.numpy()), hashlib.sha256(raw).hexdigest())
    return repr(value)  # tells -0.0 from 0.0
