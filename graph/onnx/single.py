"""Which nodes of an ONNXGraph can be evaluated by themselves, and the plain ones among them evaluated in numpy.

Most constants of exported files are transposed weights and sizes: for them nothing else needs to be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..ir import Node, Value
from . import native as onnx_native
from .eval import MOVES, Elements, evaluate

if TYPE_CHECKING:
    from .graph import ONNXGraph

RANDOM = frozenset("RandomNormal RandomUniform RandomNormalLike RandomUniformLike Multinomial Bernoulli".split())


def takes(node: Node) -> bool:
    """Whether a node is a deterministic standard operator over tensors."""
    native: ir.Node = node.native
    if native.domain not in onnx_native.STANDARD_DOMAINS or native.op_type in RANDOM:
        return False
    if any(True for _ in onnx_native.subgraphs(native)):
        return False
    if native.op_type == "Dropout" and any(v is not None for v in list(native.inputs)[2:]):
        return False
    values = [*node.outputs, *(v for v in node.inputs if v is not None)]
    return all(isinstance(v.native.type, (ir.TensorType, type(None))) and v.dtype != "string" for v in values)


def in_numpy(
    graph: ONNXGraph, nodes: Sequence[Node], wanted: Sequence[Value], wide: bool
) -> dict[str, np.ndarray] | None:
    """The data of ``wanted``, which ``nodes`` (operands first) compute; None where that takes the full evaluation.

    Every node must move elements, or compute small integers, or (``wide``) be plain arithmetic on floats, which is
    done in float64 and not rounded yet. Otherwise results come in the dtypes of the file.
    """
    known: dict[ir.Value, np.ndarray] = {}
    for node in nodes:
        made = move(graph, node, known, wide=wide)
        if made is None and wide:
            made = _arithmetic(graph, node, known)
        if made is None:
            return None
        known.update(zip(node.native.outputs, made, strict=True))
    return {v.name: np.ascontiguousarray(known[v.native]).reshape(known[v.native].shape) for v in wanted}


def move(
    graph: ONNXGraph, node: Node, known: Mapping[ir.Value, np.ndarray], wide: bool = False
) -> list[np.ndarray] | None:
    """The outputs of one node that only moves elements of constants, views where possible; None if it is no such.

    Small integers and booleans are computed too: there every runtime gives the same. ``wide``: floats are widened
    to float64 and casts between floats leave them so.
    """
    native: ir.Node = node.native
    op = native.op_type
    if op not in KNOWN or native.domain not in onnx_native.STANDARD_DOMAINS:
        return None
    operands = _operands(graph, native, known, wide)
    if operands is None or not operands or operands[0] is None:
        return None
    first = operands[0]
    attrs: dict[str, Any] = {name: onnx_native.attribute(native, name) for name in native.attributes}
    attrs["#outputs"] = len(native.outputs)
    try:
        if op == "Concat":
            return [np.concatenate([x for x in operands if x is not None], attrs["axis"])]
        if op == "Expand":
            shape = tuple(int(d) for d in np.asarray(operands[1]).ravel())
            return [np.broadcast_to(first, np.broadcast_shapes(first.shape, shape))]
        if op == "GatherElements":
            index = np.asarray(operands[1])
            axis = attrs.get("axis", 0) % first.ndim
            # only as many rows are read as the indices have; numpy would broadcast a single one
            first = first[tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(index.shape))]
            return [np.take_along_axis(first, np.where(index < 0, index + first.shape[axis], index), axis)]
        if op in ("Cast", "CastLike"):
            return _cast(graph, native, first, wide)
        if op in MOVES:
            return MOVES[op](attrs, first, operands[1:])
        if op == "Where" and len(operands) == 3:
            _, yes, no = operands
            return None if yes is None or no is None else [np.where(first, yes, no)]
    except (ValueError, IndexError, TypeError):
        return None  # operands that do not fit: the full evaluation says which
    if not wide and op in IEEE and first.dtype in (np.float32, np.float64):
        if any(x is None or x.dtype != first.dtype for x in operands) or op == "Sqrt" and first.size > 1:
            return None
        with np.errstate(all="ignore"):
            return [np.asarray(IEEE[op](*operands), first.dtype)]
    if any(x is None or x.dtype.kind not in "iub" for x in operands):
        return None
    if op == "Mod" and attrs.get("fmod"):
        return None
    if op in LOGIC:
        return [np.asarray(LOGIC[op](*operands))]
    found = evaluate(op, attrs, [Elements.constant(x) for x in operands if x is not None])
    return None if found is None else [e.a for e in found]


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Neg": np.negative, "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal, "Abs": np.abs, "Cos": np.cos, "Sin": np.sin, "Exp": np.exp,
}  # fmt: skip
IEEE: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Neg": np.negative, "Abs": np.abs,
    "Sqrt": np.sqrt,
}  # fmt: skip
"""Rounded correctly by every runtime: the same bits everywhere (vectorized square roots apart)."""
LOGIC: dict[str, Callable[..., np.ndarray]] = {
    "And": np.logical_and, "Or": np.logical_or, "Not": np.logical_not, "Equal": np.equal, "Less": np.less,
    "LessOrEqual": np.less_equal, "Greater": np.greater, "GreaterOrEqual": np.greater_equal,
}  # fmt: skip
"""Of integers and booleans."""
INTEGER = frozenset("Add Sub Mul Mod Range And Or Not Equal Less LessOrEqual Greater GreaterOrEqual Where".split())
KNOWN = frozenset(MOVES) | INTEGER | frozenset(IEEE) | {"Concat", "Expand", "GatherElements", "Cast", "CastLike"}
WIDENED = ("float16", "bfloat16", "float32")
PLAIN = ("float16", "float32", "float64")
TARGETS = frozenset((*PLAIN, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))))


def _operands(
    graph: ONNXGraph, native: ir.Node, known: Mapping[ir.Value, np.ndarray], wide: bool
) -> list[np.ndarray | None] | None:
    operands: list[np.ndarray | None] = []
    for value in native.inputs:
        data = None if value is None else known[value] if value in known else _stored(graph, value)
        if value is not None and data is None and not (native.op_type == "CastLike" and operands):
            return None
        if wide and data is not None and data.dtype.name in WIDENED:
            data = data.astype(np.float64)
        operands.append(data)
    return operands


def _arithmetic(graph: ONNXGraph, node: Node, known: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray] | None:
    function = ARITHMETIC.get(node.native.op_type)
    operands = _operands(graph, node.native, known, True)
    if function is None or operands is None or any(x is None or x.dtype != np.float64 for x in operands):
        return None
    with np.errstate(all="ignore"):
        return [np.asarray(function(*operands))]


def _cast(graph: ONNXGraph, native: ir.Node, data: np.ndarray, wide: bool) -> list[np.ndarray] | None:
    """Casts on which all runtimes agree: integers, roundings between plain floats, floats in range to integers."""
    target = graph.value_of(native.outputs[0]).dtype
    source = data.dtype.name
    if wide and data.dtype == np.float64 and target in (*PLAIN, "bfloat16"):
        return [data]
    if source == target or source in PLAIN and target in PLAIN or data.dtype.kind in "iub" and target in TARGETS:
        with np.errstate(over="ignore"):
            return [data.astype(target)]
    whole = target in ("bool", "int32", "int64") and source in PLAIN and bool((np.abs(data) < 2**31 - 1).all())
    return [data.astype(target)] if whole else None


def _stored(graph: ONNXGraph, value: ir.Value) -> np.ndarray | None:
    tensor = onnx_native.constant_tensor(value)
    if tensor is not None:
        return np.asarray(tensor.numpy())
    view = graph.view.get(value)
    return None if view is None or view.literal is None else np.asarray(view.literal)
