"""An ONNX file as rules see it: nodes with names, constants evaluated, element types and shapes where they follow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...graph.errors import ModelFileError

SMALL = 1 << 22
"""Elements up to which a computed constant is evaluated; larger ones are only known to be constant."""
SKELETON = 1 << 10
"""Bytes above which an initializer is left out of shape inference but for its type."""
MICROSOFT = "com.microsoft"


class OnnxFile:
    """A read-only view of a model. Nothing is loaded that no rule asks for; weights stay memory-mapped.

    Args:
        model: anything ONNX: a path, a ``ModelProto`` or an ``onnx_ir.Model``, which is not changed.
    """

    def __init__(self, model: Any) -> None:
        self.model = read(model)
        self.graph = self.model.graph
        self.nodes: list[ir.Node] = list(self.graph.all_nodes())
        self._constants: dict[ir.Value, np.ndarray | None] = {}
        self._static: dict[ir.Value, bool] = {}

    @property
    def opset(self) -> int:
        """Version of the default domain."""
        return int(self.model.opset_imports.get("", self.model.opset_imports.get("ai.onnx", 1)))

    def of(self, *op_types: str) -> Iterator[ir.Node]:
        """Nodes of these types in the domains of ONNX and of its contrib ops."""
        return (n for n in self.nodes if n.op_type in op_types and n.domain in ("", "ai.onnx", MICROSOFT))

    # ---- constants ----------------------------------------------------------------------------------------------
    def is_static(self, value: ir.Value | None) -> bool:
        """Whether a value is the same in every run: stored, or computed from stored values alone."""
        if value is None:
            return False
        stack = [value]
        while stack:
            v = stack[-1]
            if v in self._static:
                stack.pop()
                continue
            node = v.producer()
            if node is None:
                self._static[v] = v.is_initializer() and not v.is_graph_input()
            elif node.op_type.startswith("Random") or any(
                a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
            ):
                self._static[v] = False
            else:
                operands = [x for x in node.inputs if x is not None]
                unknown = [x for x in operands if x not in self._static]
                if unknown:
                    stack += unknown
                    continue
                self._static[v] = all(self._static[x] for x in operands)
            stack.pop()
        return self._static[value]

    def const(self, value: ir.Value | None) -> np.ndarray | None:
        """The data of a static value; None where it is not static, or too large to be computed."""
        if value is None or not self.is_static(value):
            return None
        if value not in self._constants:
            self._constants[value] = self._evaluate(value)
        return self._constants[value]

    def _evaluate(self, value: ir.Value) -> np.ndarray | None:
        if value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        node = value.producer()
        if node is None:
            return None
        operands = [None if x is None else self.const(x) for x in node.inputs]
        if any(x is not None and a is None for x, a in zip(node.inputs, operands, strict=True)):
            return None
        if sum(a.size for a in operands if a is not None) > SMALL:
            return None
        from onnx.reference import ReferenceEvaluator

        names = [f"in{i}" if x is not None else "" for i, x in enumerate(node.inputs)]
        proto = ir.serde.serialize_node(node)
        del proto.input[:]
        proto.input.extend(names)
        feeds = {name: a for name, a in zip(names, operands, strict=True) if name}
        try:
            found = ReferenceEvaluator(proto).run(None, feeds)
        except Exception:  # the evaluator raises whatever its numpy code does; the value then counts as unknown
            return None
        results: list[Any] = list(found)  # type: ignore[arg-type]
        return np.asarray(results[value.index() or 0])

    def static_dtype(self, value: ir.Value | None) -> str:
        """Element type of a value in numpy's words, or "" where it is unknown."""
        found = self.dtype(value)
        return "" if found is None else dtype_name(found)

    # ---- types and shapes ---------------------------------------------------------------------------------------
    @cached_property
    def _inferred(self) -> dict[str, tuple[ir.DataType | None, tuple[int | None, ...] | None]]:
        """Types and shapes by value name, from ONNX's own inference on a copy without its weights."""
        import onnx

        proto = ir.serde.serialize_model(_skeleton(self.model))
        try:
            proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return {}
        found: dict[str, tuple[ir.DataType | None, tuple[int | None, ...] | None]] = {}
        for info in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
            if info.type.HasField("tensor_type"):
                tensor = info.type.tensor_type
                dims = None
                if tensor.HasField("shape"):
                    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
                found[info.name] = (ir.DataType(tensor.elem_type) if tensor.elem_type else None, dims)
        return found

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Element type, or None where it is unknown."""
        if value is None:
            return None
        if value.const_value is not None:
            return value.const_value.dtype
        if value.dtype is not None:
            return value.dtype
        return self._inferred.get(value.name or "", (None, None))[0]

    def shape(self, value: ir.Value | None) -> tuple[int | None, ...] | None:
        """Shape with None for what varies, or None where even the rank is unknown."""
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(int(d) for d in value.const_value.shape)  # type: ignore[arg-type]
        if value.shape is not None:
            return tuple(d if isinstance(d, int) else None for d in value.shape)
        found = self._inferred.get(value.name or "", (None, None))[1]
        if found is None and self.is_static(value):
            data = self.const(value)
            return None if data is None else data.shape
        return found

    def sizes(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The shape where all of it is fixed, else None."""
        found = self.shape(value)
        known = tuple(d for d in found or () if d is not None)
        return known if found is not None and len(known) == len(found) else None

    def rank(self, value: ir.Value | None) -> int | None:
        found = self.shape(value)
        return None if found is None else len(found)


def read(model: Any) -> ir.Model:
    """The model as onnx_ir. Raises ModelFileError where a file cannot be read."""
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, (str, Path)):
        try:
            return ir.load(model)
        except Exception as exc:  # protobuf's, onnx_ir's and the file system's errors alike: the file is unreadable
            raise ModelFileError(f"this ONNX file cannot be read: {exc}", node=str(model)) from exc
    return ir.serde.deserialize_model(model)


def _skeleton(model: ir.Model) -> ir.Model:
    """A copy whose large initializers are inputs of their type."""
    copy = model.clone()
    for value in list(copy.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > SKELETON:
            copy.graph.initializers.pop(value.name or "")
            if not value.is_graph_input():
                value.shape, value.dtype = ir.Shape(tuple(tensor.shape)), tensor.dtype  # type: ignore[arg-type]
                copy.graph.inputs.append(value)
    return copy


def name_of(node: ir.Node) -> str:
    """The node's name, or that of its first result where it has none."""
    return node.name or next((v.name for v in node.outputs if v.name), "") or node.op_type


def dtype_name(dtype: ir.DataType) -> str:
    """``float32``, ``int8``, ``float8_e4m3fn``..., as numpy and ml_dtypes call it."""
    try:
        return str(dtype.numpy())
    except TypeError:
        return dtype.name.lower()


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of an attribute, or the default."""
    found = node.attributes.get(name)
    return default if found is None else found.value
