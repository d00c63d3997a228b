"""foldline::int4_linear: float activations times weights of 4 bits with a scale and a zero point per group."""

from __future__ import annotations

import torch

from .registry import activated, expect, known_activation, operator, rows_of

CHUNK = 64
"""Weights of a row are packed in chunks of 64: byte j of a chunk holds element j (low bits) and 32 + j (high bits)."""


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] with values 0..15 -> packed uint8 [N, ceil(K / 64) * 32]; the padding is 0."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -k % CHUNK))
    halves = padded.reshape(n, -1, 2, CHUNK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(n, -1).contiguous()


def unpack_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """The inverse of :func:`pack_int4`: uint8 [N, k]."""
    chunks = packed.reshape(packed.shape[0], -1, CHUNK // 2)
    return torch.stack((chunks & 15, chunks >> 4), dim=2).reshape(packed.shape[0], -1)[:, :k]


def _check(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    activation: str,
) -> None:
    k = x.shape[-1]
    expect(x.is_floating_point() and packed.dtype == torch.uint8, "int4_linear takes float x and uint8 packed weights")
    expect(packed.ndim == 2 and packed.shape[1] == -(-k // CHUNK) * (CHUNK // 2), "the packed weight does not fit x")
    expect(group > 0 and scales.shape == (-(-k // group), packed.shape[0]), "scales must be [ceil(K / group), N]")
    expect(zeros.shape == scales.shape, "zeros must have the shape of scales")
    known_activation(activation)


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    activation: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@operator("int4_linear", _check, _fake)
def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    activation: str,
) -> torch.Tensor:
    """act(x @ W.T + bias) with W[n, k] = (code[n, k] - zeros[k // group, n]) * scales[k // group, n].

    W is rounded to the dtype of x; products are summed in float32; the result has the dtype of x.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        packed: uint8, see :func:`pack_int4`.
        scales, zeros: [ceil(K / group), N]; scales float, zeros uint8 (8 for symmetric codes).
        bias: [N] or None.
        group: inputs per scale.
        activation: none, relu, gelu, gelu_tanh or silu.
    """
    n = packed.shape[0]
    if x.is_cuda:
        from ..kernels.int4 import int4_linear as kernel

        rows = rows_of(x)
        out = x.new_empty((rows.shape[0], n))
        # One group per row: any multiple of the block sizes says the same, and lets every block lie in one group.
        group = 1 << 20 if scales.shape[0] == 1 else group
        if rows.numel() and n:
            kernel(rows, packed.contiguous(), scales.contiguous(), zeros.contiguous(), bias, group, activation, out)
        return out.reshape(*x.shape[:-1], n)
    return reference(x, packed, scales, zeros, bias, group, activation)


def reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    activation: str,
) -> torch.Tensor:
    """The same with torch's functions; the weight is dequantized whole."""
    k = x.shape[-1]
    scale = scales.to(torch.float32).repeat_interleave(group, dim=0)[:k].t()
    zero = zeros.to(torch.float32).repeat_interleave(group, dim=0)[:k].t()
    weight = ((unpack_int4(packed, k).to(torch.float32) - zero) * scale).to(x.dtype)
    y = torch.nn.functional.linear(x.to(torch.float32), weight.to(torch.float32))
    if bias is not None:
        y = y + bias.to(torch.float32)
    return activated(y, activation).to(x.dtype)
