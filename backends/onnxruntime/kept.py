"""Float weights that are to stay float: ONNX Runtime quantizes those of transposed convolutions on its own."""

from __future__ import annotations

import onnx_ir as ir

OPTIMIZER = "WeightBiasQuantization"
"""The rewrite that quantizes float weights and biases between Q and DQ: to 8 bits, one scale per tensor."""


def quantized_behind_our_back(model: ir.Model) -> bool:
    """Whether that rewrite changes numbers for nothing.

    It does where a transposed convolution with a float weight stands between DequantizeLinear and QuantizeLinear: there
    is no integer kernel for it, so that its weight is rounded and then dequantized in every run. False where another
    product owes its integer kernel to the rewrite (a float weight or bias under a quantized activation).
    """
    found = False
    for node in model.graph:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or not _dequantized(node.inputs[0]):
            continue
        floats = [v for v in node.inputs[1:3] if v is not None and v.producer() is None and v.const_value is not None]
        if node.op_type == "ConvTranspose":
            found = found or node.inputs[1] in floats
        elif floats:
            return False
    return found


def _dequantized(value: ir.Value | None) -> bool:
    made = None if value is None else value.producer()
    return made is not None and made.op_type == "DequantizeLinear"
