"""Triton: softmax in two passes over memory; e^x is kept as m * 2^n, so no pass looks for the maximum first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import launch

CONFIGS = [triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((512, 4), (1024, 4), (2048, 8), (4096, 8), (8192, 16))]
FALLBACK = {"BLOCK": 1024}


@triton.jit
def power_of_two(d):
    """2^d of whole numbers d <= 0 held in float32, put together from its bits; below 2^-126 it is 0."""
    bits = (tl.maximum(d, -127.0).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mantissa_exponent(x):
    """(present, e, n) with exp(x) = (present + e) * 2^n, n whole, present 1 and e in [-0.30, 0.42]; -inf gives zeros.

    The remainder r = x - n ln 2 is taken in two steps, of which the first is exact (a product of few bits within a
    fused multiply-add); e = exp(r) - 1 is a polynomial of degree 7, kept apart from the 1, next to which half of its
    digits would be lost. Finite values are clamped to 2^23 in size; beyond that n would be no whole number any more.
    """
    v = tl.where(x == x, tl.minimum(tl.maximum(x, -8388608.0), 8388608.0), x)
    n = tl.floor(v * 1.4426950408889634 + 0.5)
    r = tl.fma(n, tl.full(x.shape, -0.693145751953125, tl.float32), v)
    r = tl.fma(n, tl.full(x.shape, -1.4286068203094173e-06, tl.float32), r)
    p = tl.full(x.shape, 0.0001984126984126984, tl.float32)
    p = tl.fma(p, r, tl.full(x.shape, 0.001388888888888889, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 0.008333333333333333, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 0.041666666666666664, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 0.16666666666666666, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 0.5, tl.float32))
    e = tl.fma(r * r, p, r)
    e = tl.where(x == float("inf"), float("nan"), e)
    empty = x == float("-inf")
    return tl.where(empty, 0.0, 1.0), tl.where(empty, 0.0, e), tl.where(empty, -1073741824.0, n)


@triton.jit
def two_pass_softmax_kernel(x, out, COLUMNS, stride_x, stride_out, BLOCK: tl.constexpr):
    """One row. Pass 1 sums ones and remainders apart, per lane and then over lanes; pass 2 writes the quotients."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    ones = tl.zeros((BLOCK,), dtype=tl.float32)
    rest = tl.zeros((BLOCK,), dtype=tl.float32)
    highest = tl.full((BLOCK,), -1073741824.0, tl.float32)
    for at in range(0, COLUMNS, BLOCK):
        inside = at + lane < COLUMNS
        v = tl.load(x + row * stride_x + at + lane, mask=inside, other=float("-inf")).to(tl.float32)
        one, e, n = mantissa_exponent(v)
        top = tl.maximum(n, highest)
        old, new = power_of_two(highest - top), power_of_two(n - top)
        ones = ones * old + one * new
        rest = rest * old + e * new
        highest = top
    n_all = tl.max(highest, axis=0)
    factor = power_of_two(highest - n_all)
    # Once per row in float64, as a float32 and what it leaves out: rounding the ones' sum is the largest error else.
    exact = tl.sum((ones * factor).to(tl.float64) + (rest * factor).to(tl.float64), axis=0)
    total = exact.to(tl.float32)
    lost = (exact - total.to(tl.float64)).to(tl.float32)
    for at in range(0, COLUMNS, BLOCK):
        inside = at + lane < COLUMNS
        v = tl.load(x + row * stride_x + at + lane, mask=inside, other=float("-inf")).to(tl.float32)
        one, e, n = mantissa_exponent(v)
        m = one + e
        q = tl.div_rn(m, total + tl.zeros_like(m))
        # One step of correction: what rounding took from numerator, denominator and quotient.
        missing = tl.fma(-q, total + tl.zeros_like(q), m) + (e - (m - one)) - q * lost
        y = (q + tl.div_rn(missing, total + tl.zeros_like(q))) * power_of_two(n - n_all)
        tl.store(out + row * stride_out + at + lane, y.to(out.dtype.element_ty), mask=inside)


tuned = triton.autotune(configs=CONFIGS, key=["COLUMNS"])(two_pass_softmax_kernel)


def two_pass_softmax(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` [rows, columns] with the softmax of x along columns; see ``foldline::two_pass_softmax``."""
    rows, columns = x.shape
    launch(tuned, two_pass_softmax_kernel, FALLBACK, (rows,), x, out, columns, x.stride(0), out.stride(0))
    return out
