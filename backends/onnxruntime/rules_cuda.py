"""Rules for ONNX Runtime's CUDA provider: it has kernels for weights of few bits, and none for integer activations."""

from __future__ import annotations

from collections.abc import Iterator

from ..rules.onnx_file import MICROSOFT, attribute, name_of
from ..rules.qdq import PRODUCTS, dequantizer, is_op, pairs, readers, stored
from ..rules.rule import Hit, Rule, Where

INTEGER = (
    "QLinearConv QLinearMatMul QLinearAdd QLinearMul QLinearConcat QLinearSigmoid QLinearLeakyRelu QLinearAveragePool "
    "QLinearGlobalAveragePool QLinearSoftmax QGemm MatMulIntegerToFloat ConvInteger DynamicQuantizeMatMul "
    "DynamicQuantizeLinear"
).split()
BLOCKS = (16, 32, 64, 128, 256)


def _activations(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if pair.quantizes and not where.file.is_static(pair.data):
            yield pair.name, f"{pair.dtype} activation"


def _integer(where: Where) -> Iterator[Hit]:
    for node in where.file.of(*INTEGER):
        yield name_of(node), node.op_type


def _nbits(where: Where) -> Iterator[Hit]:
    for node in where.file.of("MatMulNBits"):
        size = int(attribute(node, "block_size", 0))
        if node.domain == MICROSOFT and size not in BLOCKS:
            yield name_of(node), f"its blocks have {size} weights"


def _weights(where: Where) -> Iterator[Hit]:
    for pair in pairs(where.file):
        if not stored(where.file, pair) or pair.dtype not in ("int4", "uint4", "int8", "uint8", "int2", "uint2"):
            continue
        for node in readers(pair.node.outputs[0]):
            if not is_op(node, *PRODUCTS) or dequantizer(where.file, node.inputs[0]) is not None:
                continue
            if node.op_type != "MatMul" or not pair.block or pair.positive_axis != 0:
                shape = f"blocks of {pair.block} along axis {pair.axis}" if pair.block else "no blocks"
                yield name_of(node), f"{node.op_type} of {pair.dtype} weights with {shape}"
            elif pair.block not in BLOCKS:
                yield name_of(node), f"blocks of {pair.block}"


RULES: tuple[Rule, ...] = (
    Rule(
        "nbits-block",
        "error",
        "MatMulNBits takes blocks of 16, 32, 64, 128 or 256",
        "quantize with such a block size",
        _nbits,
    ),
    Rule(
        "activation-qdq",
        "slow",
        "Q/DQ of activations is computed as written, beside float products",
        "quantize weights alone (target onnxruntime-cuda), or use TensorRT",
        _activations,
    ),
    Rule(
        "integer-op",
        "slow",
        "an integer operator runs on the CPU, with copies there and back",
        "quantize weights alone",
        _integer,
    ),
    Rule(
        "weight-blocks",
        "slow",
        "weights become MatMulNBits only in blocks along the rows of a MatMul; others are dequantized in every run",
        "quantize in blocks along axis 0",
        _weights,
    ),
)
"""From the provider's list of kernels; no machine here runs it, so no test holds these against it."""
