"""What a graph costs: parameters, bytes and multiply-accumulates, per node and in total."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np

from .ir import Graph, Node, Value, Weight
from .ops.macs import macs

BITS = {"int4": 4, "uint4": 4, "float4e2m1fn": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2, "bool": 8, "bfloat16": 16}
FLOATING = ("float", "bfloat")

STATISTICS = {("batch_norm", 3), ("batch_norm", 4), ("instance_norm", 3), ("instance_norm", 4)}
"""(op, operand position) of running means and variances: data, but nobody's parameter."""
SCALES = {("quantize", 1), ("quantize", 2), ("dequantize", 1), ("dequantize", 2), ("fake_quantize", 1)}
_STORED = {("dequantize", 0)}
_NO_PARAMETERS = STATISTICS | SCALES
SIZE_OPS = frozenset(("scalar", "shape_of", "arange", "full", "random"))


@dataclass
class NodeCost:
    """One node: its own weights (a weight that several nodes use belongs to the first) and its work.

    ``bytes`` is that of its weights; ``macs`` is per sample (see :class:`Cost`).
    """

    name: str
    op: str
    scope: str
    parameters: int = 0
    bytes: int = 0
    macs: int = 0


@dataclass
class Cost:
    """Totals of a graph.

    Attributes:
        parameters: elements of parameters, each storage once (tied weights once). Buffers, batch norm statistics,
            quantization scales, index and shape tensors do not count; quantized weight data does, as the
            parameter it stands for.
        bytes: of all stored tensors that nodes read as data, at their stored width, each storage once.
        macs: multiply-accumulates for one sample: the work at the hint shapes divided by ``batch``, for nodes that
            depend on the input; nodes that see only weights are counted whole.
        batch: the hint size of the batch axis, taken to be axis 0 of the first graph input if axis 0 of the first
            output has the same size; else 1, and ``macs`` is the work of a whole call.
        unknown: names of nodes whose MACs are unknown because a shape is; they are not in ``macs``.
        nodes: per node, in topological order.
    """

    parameters: int = 0
    bytes: int = 0
    macs: int = 0
    batch: int = 1
    unknown: list[str] = field(default_factory=list)
    nodes: list[NodeCost] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@cache
def itemsize_bits(dtype: str) -> int:
    """Bits of one stored element of a dtype named numpy-style; sub-byte types count packed."""
    if dtype in BITS:
        return BITS[dtype]
    if dtype.startswith("float8"):
        return 8
    if dtype == "string":
        return 0  # as long as its text, which nothing here reads
    return 8 * np.dtype(dtype).itemsize


def weight_bytes(weight: Weight) -> int:
    """Bytes of a weight as stored, sub-byte elements packed."""
    return (weight.size * itemsize_bits(weight.dtype) + 7) // 8


def roles(weight: Weight) -> set[tuple[str, int]]:
    """(op, operand position) of every use of a weight as a tensor operand."""
    return set() if weight.value is None else {(node.op, i) for node, i in weight.value.uses}


def is_parameter(weight: Weight) -> bool:
    """Whether a weight counts as a parameter: floating, not a buffer, and not a statistic, scale or size by role."""
    floating = weight.dtype.startswith(FLOATING)
    found = {role for role in roles(weight) if role[0] not in SIZE_OPS}
    if found and found <= _STORED:
        return weight.kind != "buffer" or not floating
    if weight.kind != "parameter" or not floating:
        return False
    return not found or not found <= _NO_PARAMETERS


def is_size(weight: Weight) -> bool:
    """Whether a weight only sets sizes, axes or the like: integer data that no node reads as a tensor operand."""
    if weight.dtype.startswith(FLOATING):
        return False
    return all(op in SIZE_OPS for op, _ in roles(weight))


def batch_of(graph: Graph) -> int:
    """The hint size of the batch axis; 1 where axis 0 of input and output are not the same."""
    if not graph.inputs or not graph.outputs:
        return 1
    x, y = graph.inputs[0], graph.outputs[0]
    if not x.hint or not y.hint or not x.shape or not y.shape:
        return 1
    return x.hint[0] if x.hint[0] == y.hint[0] and x.shape[0] == y.shape[0] else 1


def _fed(graph: Graph) -> set[int]:
    """ids of the values that depend on the data of a graph input (not merely on its sizes)."""
    fed = {id(v) for v in graph.inputs}
    for node in graph.nodes:
        if node.op == "shape_of":
            continue
        operands: list[Value | None] = [*node.inputs, *node.captured]
        if any([id(v) in fed for v in operands if v is not None]):
            fed.update([id(v) for v in node.outputs])
    return fed


def cost(graph: Graph, batch: int | None = None) -> Cost:
    """Count parameters, bytes and MACs of a graph from its hint shapes; weights are not loaded.

    Args:
        graph: any graph.
        batch: samples in one call at the hint shapes; found as described in :class:`Cost` when None.
    """
    size = batch_of(graph) if batch is None else batch
    total = Cost(batch=size)
    fed = _fed(graph)
    counted: set[int] = set()
    for node in graph.nodes:
        item = NodeCost(node.name, node.op, node.scope)
        for v in [*node.inputs, *node.captured]:
            if v is not None and v.weight is not None and id(v.weight) not in counted:
                counted.add(id(v.weight))
                _charge(item, v.weight)
        work = macs(node)
        if work is None:
            total.unknown.append(node.name)
        elif _depends(node, fed):
            item.macs = work // max(size, 1)
        else:
            item.macs = work
        total.nodes.append(item)
    total.parameters = sum([n.parameters for n in total.nodes])
    total.bytes = sum([n.bytes for n in total.nodes])
    total.macs = sum([n.macs for n in total.nodes])
    # Weights that no node reads (an unused layer, a weight that is itself an output) are stored all the same.
    for weight in graph.weights.values():
        if id(weight) not in counted and not is_size(weight):
            total.parameters += weight.size if is_parameter(weight) else 0
            total.bytes += weight_bytes(weight)
    return total


def _charge(item: NodeCost, weight: Weight) -> None:
    if not is_size(weight):
        item.bytes += weight_bytes(weight)
        item.parameters += weight.size if is_parameter(weight) else 0


def _depends(node: Node, fed: set[int]) -> bool:
    return any([id(v) in fed for v in node.inputs if v is not None])
