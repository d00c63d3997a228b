"""Quantize and dequantize nodes as rules read them: scale, zero point, axis, stored type, and what stands behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .onnx_file import MICROSOFT, OnnxFile, attribute, dtype_name, name_of

Q, DQ = "QuantizeLinear", "DequantizeLinear"
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Pair:
    """One QuantizeLinear or DequantizeLinear of a file.

    Attributes:
        node: it.
        quantizes: whether it is the QuantizeLinear.
        dtype: the narrow type: of the zero point, of ``output_dtype``, or of what is stored; ONNX's default for a
            QuantizeLinear that says nothing is uint8. "" where it is unknown.
    """

    file: OnnxFile
    node: ir.Node

    @property
    def quantizes(self) -> bool:
        return self.node.op_type == Q

    @property
    def name(self) -> str:
        return name_of(self.node)

    @property
    def data(self) -> ir.Value | None:
        return self.node.inputs[0]

    @property
    def scale(self) -> ir.Value | None:
        return self.node.inputs[1] if len(self.node.inputs) > 1 else None

    @property
    def zero(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def block(self) -> int:
        return int(attribute(self.node, "block_size", 0))

    @property
    def axis(self) -> int:
        """As written; 1 where it is not."""
        return int(attribute(self.node, "axis", 1))

    @property
    def scales(self) -> np.ndarray | None:
        """The scale's data, where it is constant."""
        return self.file.const(self.scale)

    @property
    def zeros(self) -> np.ndarray | None:
        """The zero point's data, where there is one and it is constant."""
        return self.file.const(self.zero)

    @property
    def dtype(self) -> str:
        if self.zero is not None:
            return self.file.static_dtype(self.zero)
        if not self.quantizes:
            return self.file.static_dtype(self.data)
        declared = int(attribute(self.node, "output_dtype", 0))
        return dtype_name(ir.DataType(declared)) if declared else "uint8"

    @property
    def per_tensor(self) -> bool:
        """One scale, written as a scalar or as one element."""
        shape = self.file.shape(self.scale)
        return not self.block and (shape == () or shape == (1,))

    @property
    def positive_axis(self) -> int | None:
        """The axis counted from the front, or None where the rank is unknown."""
        rank = self.file.rank(self.data)
        return self.axis if self.axis >= 0 else None if rank is None else self.axis + rank


def pairs(file: OnnxFile) -> Iterator[Pair]:
    """Every QuantizeLinear and DequantizeLinear."""
    return (Pair(file, node) for node in file.of(Q, DQ))


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and node.op_type in op_types and node.domain in ("", "ai.onnx", MICROSOFT)


def dequantizer(file: OnnxFile, value: ir.Value | None) -> Pair | None:
    """The DequantizeLinear that makes this value, if one does."""
    node = None if value is None else value.producer()
    return Pair(file, node) if node is not None and is_op(node, DQ) else None


def quantizer(file: OnnxFile, value: ir.Value | None) -> Pair | None:
    """The QuantizeLinear that makes this value, if one does."""
    node = None if value is None else value.producer()
    return Pair(file, node) if node is not None and is_op(node, Q) else None


def readers(value: ir.Value) -> list[ir.Node]:
    """Nodes that read a value, each once, in order."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def weight_axis(node: ir.Node) -> int:
    """The axis of operand 1 (a matrix of rank 2 in MatMul) that indexes output channels, from the front."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1


def stored(file: OnnxFile, pair: Pair) -> bool:
    """Whether what it dequantizes is constant: a stored weight or bias."""
    return not pair.quantizes and file.is_static(pair.data)


def products(file: OnnxFile) -> Iterator[ir.Node]:
    """Convolutions and matrix products."""
    return file.of(*PRODUCTS)


def same_scale(a: Pair, b: Pair) -> bool:
    """Whether two pairs surely map the same integers to the same numbers."""
    if a.scale is b.scale and a.zero is b.zero:
        return True
    one, two = a.scales, b.scales
    if one is None or two is None or not np.array_equal(one.reshape(-1), two.reshape(-1)):
        return False
    first, second = a.zeros, b.zeros
    zero = [0 if z is None else z.astype(np.int64).reshape(-1) for z in (first, second)]
    return bool(np.all(np.equal(*np.broadcast_arrays(*zero))))
