"""Triton: binary-coded weights times float activations, by tables of 256 signed sums or by tensor cores."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import launch, tile_order

TABLE_BLOCK = 16
"""Bytes of codes (of 8 inputs each) whose tables one program builds."""
TABLE_CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCK_B": b}, num_warps=w, num_stages=3)
    for n, b, w in ((16, 16, 2), (32, 16, 4), (64, 16, 4), (128, 8, 4), (32, 32, 4))
]
TABLE_FALLBACK = {"BLOCK_N": 32, "BLOCK_B": 16}
DOT_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_warps=w, num_stages=3)
    for m, n, k, w in ((128, 64, 64, 8), (64, 64, 64, 4), (32, 64, 64, 4), (16, 64, 128, 4))
]
DOT_FALLBACK = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 8}


@triton.jit
def binary_tables_kernel(x, tables, K, B, stride_x, BLOCK_B: tl.constexpr):
    """tables[m, b, e] = sum over j of x[m, 8 b + j], added where bit j of e is set, else subtracted. float32."""
    m = tl.program_id(1).to(tl.int64)
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    entry = tl.arange(0, 256)
    total = tl.zeros((BLOCK_B, 256), dtype=tl.float32)
    for j in tl.static_range(8):
        v = tl.load(x + m * stride_x + b * 8 + j, mask=b * 8 + j < K, other=0.0).to(tl.float32)
        total += tl.where(((entry >> j) & 1)[None, :] == 1, v[:, None], -v[:, None])
    to = tables + (m * B + b)[:, None] * 256 + entry[None, :]
    tl.store(to, total, mask=(b < B)[:, None])


@triton.jit
def binary_lookup_kernel(
    tables,
    codes,
    alphas,
    bias,
    out,
    N,
    B,
    groups,
    stride_out,
    Q: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One row of activations: every code byte looks up the signed sum of its 8 inputs; no products but by alpha."""
    m = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = cols < N
    step = tl.arange(0, BLOCK_B)
    row = tables + m * B * 256
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(0, tl.cdiv(B, BLOCK_B)):
        b = k * BLOCK_B + step
        inside = in_n[:, None] & (b < B)[None, :]
        for i in tl.static_range(Q):
            plane = (i * N + cols).to(tl.int64)
            code = tl.load(codes + plane[:, None] * B + b[None, :], mask=inside, other=0).to(tl.int32)
            t = tl.load(row + b[None, :] * 256 + code, mask=inside, other=0.0)
            if GROUP_BYTES % BLOCK_B == 0:  # the whole block lies in one group
                alpha = tl.load(alphas + plane * groups + (k * BLOCK_B) // GROUP_BYTES, mask=in_n, other=0.0)
                acc += alpha.to(tl.float32) * tl.sum(t, axis=1)
            else:
                at = plane[:, None] * groups + (b // GROUP_BYTES)[None, :]
                acc += tl.sum(tl.load(alphas + at, mask=inside, other=0.0).to(tl.float32) * t, axis=1)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=in_n, other=0.0).to(tl.float32)
    tl.store(out + m * stride_out + cols, acc.to(out.dtype.element_ty), mask=in_n)


@triton.jit
def binary_dot_kernel(
    x,
    codes,
    alphas,
    bias,
    out,
    M,
    N,
    K,
    B,
    groups,
    stride_x,
    stride_out,
    Q: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Many rows: sum_i alpha_i b_i of a block is put together and multiplied by tensor cores.

    A sum of Q powers of two is rounded to the type of x; where the block lies in one group the product with each
    sign plane (exact in any type) is scaled instead.
    """
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows < M, cols < N
    depth = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        at = k * BLOCK_K + depth
        in_k = at < K
        a = tl.load(
            x + rows.to(tl.int64)[:, None] * stride_x + at[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0
        )
        inside = in_k[:, None] & in_n[None, :]
        for i in tl.static_range(Q):
            plane = (i * N + cols).to(tl.int64)
            byte = tl.load(codes + plane[None, :] * B + (at // 8)[:, None], mask=inside, other=0).to(tl.int32)
            sign = (((byte >> (at % 8)[:, None]) & 1) * 2 - 1).to(tl.float32)
            if GROUP % BLOCK_K == 0:
                alpha = tl.load(alphas + plane * groups + (k * BLOCK_K) // GROUP, mask=in_n, other=0.0).to(tl.float32)
                if IEEE:
                    acc += tl.dot(a, sign.to(a.dtype), input_precision="ieee") * alpha[None, :]
                else:
                    acc += tl.dot(a, sign.to(a.dtype)) * alpha[None, :]
            else:
                w = tl.load(alphas + plane[None, :] * groups + (at // GROUP)[:, None], mask=inside, other=0.0)
                w = (w.to(tl.float32) * sign).to(a.dtype)
                if IEEE:
                    acc = tl.dot(a, w, acc, input_precision="ieee")
                else:
                    acc = tl.dot(a, w, acc)
    if HAS_BIAS:
        acc += tl.load(bias + cols, mask=in_n, other=0.0).to(tl.float32)[None, :]
    to = out + rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


tuned_lookup = triton.autotune(configs=TABLE_CONFIGS, key=["N", "B"])(binary_lookup_kernel)
tuned_dot = triton.autotune(configs=DOT_CONFIGS, key=["M", "N", "K"])(binary_dot_kernel)


def binary_lookup(
    x: torch.Tensor,
    codes: torch.Tensor,
    alphas: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    tables: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill ``out`` [M, N] by table lookups; ``tables`` is float32 scratch [M, K/8, 256]. M is at most 65535."""
    m, k = x.shape
    q, n, b = codes.shape
    blocks = (triton.cdiv(b, TABLE_BLOCK), m)
    launch(
        binary_tables_kernel,
        binary_tables_kernel,
        {},
        blocks,
        x,
        tables,
        k,
        b,
        x.stride(0),
        BLOCK_B=TABLE_BLOCK,
    )

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return (triton.cdiv(n, meta["BLOCK_N"]), m)

    launch(
        tuned_lookup,
        binary_lookup_kernel,
        TABLE_FALLBACK,
        grid,
        tables,
        codes,
        alphas,
        alphas if bias is None else bias,
        out,
        n,
        b,
        alphas.shape[2],
        out.stride(0),
        Q=q,
        GROUP_BYTES=group // 8,
        HAS_BIAS=bias is not None,
    )
    return out


def binary_dot(
    x: torch.Tensor,
    codes: torch.Tensor,
    alphas: torch.Tensor,
    bias: torch.Tensor | None,
    group: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill ``out`` [M, N] by products of the decoded planes."""
    m, k = x.shape
    q, n, b = codes.shape

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    launch(
        tuned_dot,
        binary_dot_kernel,
        DOT_FALLBACK,
        grid,
        x,
        codes,
        alphas,
        alphas if bias is None else bias,
        out,
        m,
        n,
        k,
        b,
        alphas.shape[2],
        x.stride(0),
        out.stride(0),
        Q=q,
        GROUP=group,
        HAS_BIAS=bias is not None,
        IEEE=x.dtype == torch.float32,
    )
    return out
