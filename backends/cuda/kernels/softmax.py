"""Triton: softmax in two passes over memory; e^x is kept as m * 2^n, so no pass looks for the maximum first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import launch


@triton.jit
def power_of_two(d):
    """2^d of whole numbers d <= 0 held in float32, put together from its bits; below 2^-126 it is 0."""
    bits = (tl.maximum(d, -127.0).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mantissa_exponent(x):
    """e^x = m * 2^n with n = round(x / ln 2) and m in [0.70, 1.42]; -inf gives m = 0 with the lowest n.

    The remainder r = x - n ln 2 is taken in two steps, of which the first is exact (a product of few bits within a
    fused multiply-add), and e^r is a polynomial of degree 7: about one unit in the last place, where the hardware's
    exponential has two. Finite values are clamped to 2^23 in size; beyond that n would be no whole number any more.
    """
    v = tl.where(x == x, tl.minimum(tl.maximum(x, -8388608.0), 8388608.0), x)
    n = tl.floor(v * 1.4426950408889634 + 0.5)
    r = tl.fma(n, tl.full(x.shape, -0.693145751953125, tl.float32), v)
    r = tl.fma(n, tl.full(x.shape, -1.4286068203094173e-06, tl.float32), r)
    m = tl.full(x.shape, 0.0001984126984126984, tl.float32)
    m = tl.fma(m, r, tl.full(x.shape, 0.001388888888888889, tl.float32))
    m = tl.fma(m, r, tl.full(x.shape, 0.008333333333333333, tl.float32))
    m = tl.fma(m, r, tl.full(x.shape, 0.041666666666666664, tl.float32))
    m = tl.fma(m, r, tl.full(x.shape, 0.16666666666666666, tl.float32))
    m = tl.fma(m, r, tl.full(x.shape, 0.5, tl.float32))
    m = tl.fma(m, r, tl.full(x.shape, 1.0, tl.float32))
    m = tl.fma(m, r, tl.full(x.shape, 1.0, tl.float32))
    m = tl.where(x == float("inf"), float("nan"), m)
    empty = x == float("-inf")
    return tl.where(empty, 0.0, m), tl.where(empty, -1073741824.0, n)


@triton.jit
def two_pass_softmax_kernel(x, out, COLUMNS, stride_x, stride_out, BLOCK: tl.constexpr):
    """One row. Pass 1 sums (m, n) pairs per lane and then over lanes; pass 2 writes m / M * 2^(n - N)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    m_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    n_sum = tl.full((BLOCK,), -1073741824.0, tl.float32)
    for at in range(0, COLUMNS, BLOCK):
        inside = at + lane < COLUMNS
        v = tl.load(x + row * stride_x + at + lane, mask=inside, other=float("-inf")).to(tl.float32)
        m, n = mantissa_exponent(v)
        top = tl.maximum(n, n_sum)
        m_sum = m_sum * power_of_two(n_sum - top) + m * power_of_two(n - top)
        n_sum = top
    n_all = tl.max(n_sum, axis=0)
    m_all = tl.sum(m_sum * power_of_two(n_sum - n_all), axis=0)
    for at in range(0, COLUMNS, BLOCK):
        inside = at + lane < COLUMNS
        v = tl.load(x + row * stride_x + at + lane, mask=inside, other=float("-inf")).to(tl.float32)
        m, n = mantissa_exponent(v)
        y = tl.div_rn(m, m_all + tl.zeros_like(m)) * power_of_two(n - n_all)
        tl.store(out + row * stride_out + at + lane, y.to(out.dtype.element_ty), mask=inside)


def two_pass_softmax(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` [rows, columns] with the softmax of x along columns; see ``foldline::two_pass_softmax``."""
    rows, columns = x.shape
    block = min(max(triton.next_power_of_2(columns), 32), 4096)
    launch(
        two_pass_softmax_kernel,
        two_pass_softmax_kernel,
        {},
        (rows,),
        x,
        out,
        columns,
        x.stride(0),
        out.stride(0),
        BLOCK=block,
    )
    return out
