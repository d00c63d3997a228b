"""Rules for TensorRT on stored integers: with one axis or more, they go into a DequantizeLinear and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ..rules.onnx_file import OnnxFile, name_of
from ..rules.qdq import DQ, Pair, Q, is_op, pairs, readers
from ..rules.rule import Hit, Rule, Where
from .operators import CONTRIB, DYNAMIC, QOPERATORS
from .rules_numbers import LEGAL

OTHERS = QOPERATORS | DYNAMIC | CONTRIB
"""Operators that take integers as such, of which other rules speak."""


def _moved(where: Where) -> Iterator[Hit]:
    for pair, source in _chains(where.file):
        if where.file.static_dtype(source) in LEGAL | {"uint8"}:
            node = None if pair.data is None else pair.data.producer()
            yield pair.name, f"{'' if node is None else node.op_type} stands between the stored integers and it"


def _chains(file: OnnxFile) -> Iterator[tuple[Pair, ir.Value]]:
    """DequantizeLinear nodes with operators between them and what is stored, and the stored tensor."""
    for pair in pairs(file):
        node = None if pair.data is None else pair.data.producer()
        if pair.quantizes or node is None or is_op(node, "Constant", Q) or pair.dtype not in LEGAL | {"uint8"}:
            continue
        source = _source(file, node)
        if source is not None:
            yield pair, source


def _source(file: OnnxFile, node: ir.Node) -> ir.Value | None:
    """The stored tensor that a chain of moving operators begins with, or None."""
    value: ir.Value | None = node.inputs[0] if node.inputs else None
    while value is not None and value.producer() is not None and not is_op(value.producer(), "Constant"):
        producer = value.producer()
        if is_op(producer, Q) or producer is None:
            return None
        value = producer.inputs[0] if producer.inputs else None
    return value if value is not None and file.is_static(value) else None


def _read(where: Where) -> Iterator[Hit]:
    file = where.file
    moved = {source for _, source in _chains(file)}
    for node in file.nodes:
        if is_op(node, Q, DQ) or node.op_type in OTHERS:
            continue
        for value in node.inputs:
            if value is not None and value not in moved and _stored(value) and _integers(file, node, value):
                yield name_of(node), f"{node.op_type} reads the {file.static_dtype(value)} of {value.name!r}"
                break


def _stored(value: ir.Value) -> bool:
    made = value.producer()
    return is_op(made, "Constant") or (made is None and value.is_initializer() and not value.is_graph_input())


def _integers(file: OnnxFile, node: ir.Node, value: ir.Value) -> bool:
    """Narrow numbers; uint8, which is read as int32, only beside an activation of that type."""
    kind = file.static_dtype(value)
    if kind != "uint8":
        return kind in LEGAL
    return any(v is not None and not file.is_static(v) and file.static_dtype(v) == "uint8" for v in node.inputs)


def _scalar(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.quantizes or pair.data is None or not _stored(pair.data) or where.file.rank(pair.data) != 0:
            continue
        result = pair.node.outputs[0]
        if pair.dtype in LEGAL and (readers(result) or result.is_graph_output()):
            yield pair.name, f"{pair.data.name!r} has no axis"


RULES: tuple[Rule, ...] = (
    Rule(
        "stored-moved",
        "error",
        "stored integers go into a DequantizeLinear and nowhere else",
        "dequantize first",
        _moved,
        "dequantize_first",
    ),
    Rule(
        "stored-read",
        "error",
        "stored integers that something else than a DequantizeLinear reads are refused",
        "store them in float, and compute in float",
        _read,
    ),
    Rule(
        "stored-scalar",
        "error",
        "a stored integer without axes cannot be dequantized",
        "store the constant in float",
        _scalar,
        "float_bias",
    ),
)
