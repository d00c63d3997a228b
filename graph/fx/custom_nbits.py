"""Torch operator foldline::matmul_nbits: a product with a weight of a few bits in blocks, as ONNX's MatMulNBits."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of 2, 4 or 8 bits in uint8 [..., bytes], lowest bits first, as uint8 [..., bytes * 8 / bits]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = torch.bitwise_and(torch.bitwise_right_shift(packed.unsqueeze(-1), shifts), 2**bits - 1)
    return codes.flatten(-2)


def dequantize_nbits(
    packed: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, k: int, bits: int
) -> torch.Tensor:
    """The weight [n, k] in the dtype of the scales: (code - zero point) * scale.

    Args:
        packed: uint8 [n, blocks, bytes].
        scales: [n, blocks].
        zero_points: packed codes, uint8 [n, ceil(blocks * bits / 8)]; None: 2**(bits - 1).
    """
    n, blocks = scales.shape
    codes = unpack(packed, bits).to(scales.dtype)
    if zero_points is None:
        codes = codes - 2 ** (bits - 1)
    else:
        codes = codes - unpack(zero_points, bits)[:, :blocks].to(scales.dtype).unsqueeze(-1)
    return (codes * scales.unsqueeze(-1)).reshape(n, -1)[:, :k]


def _matmul_nbits(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    k: int,
    n: int,
    bits: int,
    block: int,
) -> torch.Tensor:
    return F.linear(x, dequantize_nbits(packed, scales, zero_points, k, bits).to(x.dtype), bias)


_LIBRARY = torch.library.Library("foldline", "FRAGMENT")


def _register() -> None:
    if hasattr(torch.ops.foldline, "matmul_nbits"):
        return
    operands = "Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, Tensor? bias"
    _LIBRARY.define(f"matmul_nbits({operands}, int k, int n, int bits, int block) -> Tensor")
    # Implicit: gradients of x flow, and a kernel registered for a device takes its place there.
    _LIBRARY.impl("matmul_nbits", _matmul_nbits, "CompositeImplicitAutograd")


_register()
matmul_nbits = torch.ops.foldline.matmul_nbits.default
