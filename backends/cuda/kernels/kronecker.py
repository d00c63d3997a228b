"""Triton: one token times a Kronecker product of two small matrices, then quantized on a scale of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import launch, round_even

CONFIGS = [triton.Config({}, num_warps=warps, num_stages=1) for warps in (2, 4, 8, 16)]


@triton.jit
def kronecker_quantize_kernel(
    x,
    left,
    right,
    q,
    scale,
    stride_x,
    N1,
    N2,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    FIXED: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """y = left^T x right of a token x [N1, N2]; q = round(y / scale); scale = max |y| / HIGH unless it is FIXED."""
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_1)
    j = tl.arange(0, BLOCK_2)
    in_1, in_2 = i < N1, j < N2
    inside = in_1[:, None] & in_2[None, :]
    at = i[:, None] * N2 + j[None, :]
    t = tl.load(x + token * stride_x + at, mask=inside, other=0.0)
    # left is read transposed: element [i, k] of the tile is left[k, i].
    a = tl.load(left + j_times(i, N1), mask=in_1[:, None] & in_1[None, :], other=0.0).to(t.dtype)
    b = tl.load(right + j[:, None] * N2 + j[None, :], mask=in_2[:, None] & in_2[None, :], other=0.0).to(t.dtype)
    if IEEE:
        y = tl.dot(t, b, input_precision="ieee")
        y = tl.dot(a, y, input_precision="ieee")
    else:
        y = tl.dot(a, tl.dot(t, b).to(t.dtype))
    if FIXED:
        s = tl.load(scale)
    else:
        peak = tl.max(tl.max(tl.abs(y), axis=1), axis=0)
        s = tl.where(peak > 0.0, tl.div_rn(peak, HIGH * 1.0), 1.0)
        tl.store(scale + token, s)
    levels = round_even(tl.div_rn(y, s + tl.zeros_like(y)), LOW, HIGH)
    tl.store(q + token * N1 * N2 + at, levels.to(tl.int8), mask=inside)


@triton.jit
def j_times(i, N1):
    """Offsets of a square matrix read transposed."""
    return i[None, :] * N1 + i[:, None]


tuned = triton.autotune(configs=CONFIGS, key=["N1", "N2"])(kronecker_quantize_kernel)


def kronecker_quantize(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    low: int,
    high: int,
    fixed: bool,
    q: torch.Tensor,
    scale: torch.Tensor,
) -> None:
    """Fill ``q`` int8 [T, n1*n2] and ``scale`` float32 [T] from x [T, n1*n2]; see ``foldline::kronecker_quantize``.

    With ``fixed``, ``scale`` holds one number that is read.
    """
    n1, n2 = left.shape[0], right.shape[0]
    wide = max(16, triton.next_power_of_2(n1)), max(16, triton.next_power_of_2(n2))
    launch(
        tuned,
        kronecker_quantize_kernel,
        {},
        (x.shape[0],),
        x,
        left,
        right,
        q,
        scale,
        x.stride(0),
        n1,
        n2,
        LOW=low,
        HIGH=high,
        FIXED=fixed,
        IEEE=x.dtype == torch.float32,
        BLOCK_1=wide[0],
        BLOCK_2=wide[1],
    )
