"""Operators of ONNX Runtime's own domain that have a canonical form: MatMulNBits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from . import native
from .insert import SPELLINGS, Speller
from .ops import RULES, Canon, Native

if TYPE_CHECKING:
    from .shapes import ShapeTable

DOMAIN = "com.microsoft"
MATMUL_NBITS = f"{DOMAIN}::MatMulNBits"


def _read(c: Native) -> Canon | None:
    if c.has(4):
        return None  # columns in another order
    attrs = {"k": c.attr("K"), "n": c.attr("N"), "bits": c.attr("bits", 4), "block": c.attr("block_size")}
    operands: list[int | None] = [0, 1, 2, 3 if c.has(3) else None, 5 if c.has(5) else None]
    while operands[-1] is None:
        operands.pop()
    return Canon("matmul_nbits", tuple(operands), attrs)


def _spell(s: Speller, a: dict[str, Any]) -> None:
    x, packed, scales, zeros, bias = [*s.operands, None, None][:5]
    inputs = [x, packed, scales, zeros, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    sizes = {"K": a["k"], "N": a["n"], "bits": a["bits"], "block_size": a["block"]}
    s.g.model.graph.opset_imports.setdefault(DOMAIN, 1)
    attrs = [ir.AttrInt64(key, int(value)) for key, value in sizes.items()]
    s.made.append(ir.Node(DOMAIN, "MatMulNBits", inputs, attrs))


def infer(table: ShapeTable, node: ir.Node, world: int) -> dict[int, tuple[tuple[int, ...] | None, str]]:
    """Shape and type of the output of such a node; {} where it is another one or its input is unknown."""
    if f"{node.domain}::{node.op_type}" != MATMUL_NBITS or node.inputs[0] is None:
        return {}
    info = table.info.get(node.inputs[0])
    shape = None if info is None else (info.b if world else info.a)
    return {} if info is None or shape is None else {0: ((*shape[:-1], native.attribute(node, "N")), info.dtype)}


RULES[MATMUL_NBITS] = _read
SPELLINGS["matmul_nbits"] = _spell
