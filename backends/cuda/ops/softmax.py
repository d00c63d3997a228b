"""foldline::two_pass_softmax: softmax that reads its input twice, not three times."""

from __future__ import annotations

import math

import torch

from .registry import expect, operator, rows_of

LARGEST = 8388608.0
LOWEST = -1073741824.0


def _check(x: torch.Tensor, axis: int) -> None:
    expect(x.is_floating_point(), "softmax takes floats")
    expect(-x.ndim <= axis < x.ndim or x.ndim == 0 and axis in (0, -1), f"there is no axis {axis}")


def _fake(x: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("two_pass_softmax", _check, _fake)
def two_pass_softmax(x: torch.Tensor, axis: int) -> torch.Tensor:
    """softmax(x) along ``axis`` by the two-pass algorithm (Dukhan and Ablavatski, The Two-Pass Softmax Algorithm).

    e^x = m * 2^n is kept as a pair, so sums cannot overflow and the pass that looks for the maximum is not needed.
    The result has the dtype of x; the kernel computes in float32 with compensation (absolute error about 5e-8 at any
    scale of x), the CPU in float64. -inf gives 0; a row of nothing but -inf, or with a NaN or +inf, gives NaN, as in
    torch. Finite values are clamped to 2^23 in size.
    """
    if x.numel() == 0:
        return x.contiguous().clone()
    if x.ndim == 0:
        return two_pass_softmax(x.reshape(1), 0).reshape(())
    last = x.movedim(axis, -1)
    if x.is_cuda:
        from ..kernels.softmax import two_pass_softmax as kernel

        rows = rows_of(last)
        y = kernel(rows, x.new_empty(rows.shape)).reshape(last.shape)
    else:
        y = reference(last)
    return y.movedim(-1, axis).contiguous()


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same along the last axis with torch's functions, all pairs at once and in float64."""
    m, n = mantissa_exponent(x.to(torch.float64))
    top = n.amax(-1, keepdim=True)
    total = (m * torch.exp2(n - top)).sum(-1, keepdim=True)
    return (m / total * torch.exp2(n - top)).to(x.dtype)


def mantissa_exponent(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, n) with e^x = m * 2^n, n whole, m within [0.70, 1.42]; -inf gives m = 0 and the lowest n."""
    v = x.clamp(-LARGEST, LARGEST)
    n = torch.floor(v * 1.4426950408889634 + 0.5)
    m = torch.exp(v - n * math.log(2))
    m = torch.where(x == float("inf"), torch.full_like(m, float("nan")), m)
    empty = x == float("-inf")
    return torch.where(empty, torch.zeros_like(m), m), torch.where(empty, torch.full_like(n, LOWEST), n)
