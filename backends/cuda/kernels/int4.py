"""Triton: float activations times packed 4-bit weights, dequantized group by group between load and dot."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import ACTIVATIONS, activate, launch, tile_order


def _config(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


CONFIGS = [
    _config(128, 128, 64, 8, 3),
    _config(64, 128, 128, 4, 3),
    _config(64, 64, 64, 4, 4),
    _config(32, 64, 128, 4, 4),
    _config(16, 64, 128, 4, 4),
    _config(16, 32, 256, 4, 4),
    _config(16, 32, 128, 2, 5),
    _config(16, 16, 256, 2, 5),
]
FALLBACK = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "GROUP_M": 8}


@triton.jit
def _half(x_rows, in_x, packed, scales, zeros, start, k_at, cols, in_n, N, K, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """One nibble plane: activations at the k of that plane, and its weights as numbers of the activations' type."""
    a = tl.load(x_rows + k_at[None, :], mask=in_x & (k_at[None, :] < K), other=0.0)
    if GROUP % BLOCK == 0:  # the whole block lies in one group
        at = (start // GROUP).to(tl.int64) * N + cols
        s = tl.load(scales + at, mask=in_n, other=0.0).to(tl.float32)[None, :]
        z = tl.load(zeros + at, mask=in_n, other=0).to(tl.float32)[None, :]
    else:
        at = (k_at // GROUP).to(tl.int64)[:, None] * N + cols[None, :]
        inside = in_n[None, :] & (k_at[:, None] < K)
        s = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
    return a, ((packed.to(tl.float32) - z) * s).to(a.dtype)


@triton.jit
def int4_linear_kernel(
    x,
    w,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_out,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Bytes 32 c to 32 c + 31 of a weight row hold elements 64 c + j (low nibble) and 64 c + 32 + j (high nibble).

    So both nibble planes of a byte tile meet runs of 32 consecutive activations, which load as whole vectors.
    """
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows < M, cols < N
    in_x = in_m[:, None]
    byte = tl.arange(0, BLOCK_K // 2)
    spread = (byte // 32) * 64 + byte % 32
    x_rows = x + rows.to(tl.int64)[:, None] * stride_x
    w_cols = w + cols.to(tl.int64)[None, :] * stride_w
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        at = k * (BLOCK_K // 2) + byte
        packed = tl.load(w_cols + at[:, None], mask=in_n[None, :] & (at[:, None] < stride_w), other=0)
        start = k * BLOCK_K
        low = start + spread
        a, b = _half(x_rows, in_x, packed & 15, scales, zeros, start, low, cols, in_n, N, K, GROUP, BLOCK_K)
        if IEEE:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
        a, b = _half(x_rows, in_x, packed >> 4, scales, zeros, start, low + 32, cols, in_n, N, K, GROUP, BLOCK_K)
        if IEEE:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y = activate(acc, ACTIVATION)
    to = out + rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


tuned = triton.autotune(configs=CONFIGS, key=["M", "N", "K"])(int4_linear_kernel)


def int4_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    activation: str,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill ``out`` [M, N] from x [M, K] and w uint8 [N, K/2]; see ``foldline::int4_linear``."""
    m, k = x.shape
    n = w.shape[0]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    launch(
        tuned,
        int4_linear_kernel,
        FALLBACK,
        grid,
        x,
        w,
        scales,
        zeros,
        scales if bias is None else bias,
        out,
        m,
        n,
        k,
        x.stride(0),
        w.stride(0),
        out.stride(0),
        GROUP=group,
        HAS_BIAS=bias is not None,
        ACTIVATION=ACTIVATIONS[activation],
        IEEE=x.dtype == torch.float32,
    )
    return out
