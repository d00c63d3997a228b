"""Triton: int8 matrix product with exact int32 sums; scales, bias, activation and requantization in its epilogue."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import ACTIVATIONS, activate, launch, round_even, tile_order


def _config(m: int, n: int, k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


CONFIGS = [
    _config(128, 256, 128, 8, 3),
    _config(256, 128, 128, 8, 3),
    _config(128, 128, 128, 8, 4),
    _config(128, 128, 128, 4, 4),
    _config(128, 64, 128, 4, 4),
    _config(64, 128, 128, 4, 4),
    _config(64, 64, 128, 4, 5),
    _config(32, 64, 128, 4, 5),
    _config(16, 64, 128, 4, 6),
    _config(16, 32, 128, 2, 6),
]
"""Every BLOCK_K divides DEPTH, so that one flag says for all of them whether the last block is whole."""
DEPTH = 128
FALLBACK = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 8}


@triton.jit
def int8_linear_kernel(
    x,
    w,
    x_scale,
    w_scale,
    offset,
    bias,
    out_scale,
    out,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_out,
    X_ROWS: tl.constexpr,
    W_CHANNELS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[m, n] = act((sum_k x[m, k] w[n, k] + offset[n]) * (x_scale[m] * w_scale[n]) + bias[n])."""
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the last one instead of being masked; the store leaves them out.
    x_rows = tl.minimum(rows, M - 1).to(tl.int64)
    w_rows = tl.minimum(cols, N - 1).to(tl.int64)
    x_at = x + x_rows[:, None] * stride_x + depth[None, :]
    w_at = w + w_rows[None, :] * stride_w + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if WHOLE_K:
            a = tl.load(x_at)
            b = tl.load(w_at)
        else:
            left = K - k * BLOCK_K
            a = tl.load(x_at, mask=depth[None, :] < left, other=0)
            b = tl.load(w_at, mask=depth[:, None] < left, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        x_at += BLOCK_K
        w_at += BLOCK_K
    in_m, in_n = rows < M, cols < N
    if HAS_OFFSET:
        acc += tl.load(offset + cols, mask=in_n, other=0)[None, :]
    xs = tl.load(x_scale + rows, mask=in_m, other=1.0) if X_ROWS else tl.load(x_scale + tl.zeros_like(rows))
    ws = tl.load(w_scale + cols, mask=in_n, other=1.0) if W_CHANNELS else tl.load(w_scale + tl.zeros_like(cols))
    y = acc.to(tl.float32) * (xs[:, None] * ws[None, :])
    if HAS_BIAS:
        y += tl.load(bias + cols, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if REQUANTIZE:
        y = round_even(tl.div_rn(y, tl.load(out_scale) + tl.zeros_like(y)), -128.0, 127.0)
    to = out + rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


tuned = triton.autotune(configs=CONFIGS, key=["M", "N", "K"])(int8_linear_kernel)


def int8_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill ``out`` [M, N] from x [M, K] and w [N, K] int8 (rows contiguous); see ``foldline::int8_linear``."""
    m, k = x.shape
    n = w.shape[0]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    launch(
        tuned,
        int8_linear_kernel,
        FALLBACK,
        grid,
        x,
        w,
        x_scale,
        w_scale,
        x_scale if offset is None else offset,
        x_scale if bias is None else bias,
        x_scale if out_scale is None else out_scale,
        out,
        m,
        n,
        k,
        x.stride(0),
        w.stride(0),
        out.stride(0),
        X_ROWS=x_scale.numel() > 1,
        W_CHANNELS=w_scale.numel() > 1,
        HAS_OFFSET=offset is not None,
        HAS_BIAS=bias is not None,
        REQUANTIZE=out_scale is not None,
        ACTIVATION=ACTIVATIONS[activation],
        WHOLE_K=k % DEPTH == 0,
    )
    return out
