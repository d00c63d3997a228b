"""foldline::kronecker_quantize: an online Kronecker transform of each token followed by quantization (FlatQuant)."""

from __future__ import annotations

import torch

from .registry import expect, operator, rows_of

LARGEST = 128
"""Largest side of a factor; FlatQuant's balanced factors of widths up to 16384 fit."""


def _check(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, levels: int) -> None:
    n1, n2 = left.shape[0], right.shape[0]
    expect(left.shape == (n1, n1) and right.shape == (n2, n2), "the factors must be square")
    expect(x.shape[-1] == n1 * n2, f"{x.shape[-1]} inputs are not {n1} x {n2}")
    expect(max(n1, n2) <= LARGEST, f"factors of {n1} and {n2}: at most {LARGEST}; choose more even ones")
    expect(1 <= levels <= 127, "levels lie in 1..127")


def _fake(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale


@operator("kronecker_quantize", _check, _fake)
def kronecker_quantize(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x (left kron right) of every token, quantized symmetrically on the token's own scale.

    With X the token as [n1, n2], y = left.T @ X @ right; scale = max|y| / levels; q = round(y / scale), ties to even.
    In 16-bit types X @ right is rounded to that type before the second product; sums are float32.

    Args:
        x: [..., n1 * n2] float.
        left, right: [n1, n1] and [n2, n2], both sides at most 128.
        levels: largest integer, 127 for 8 bits and 7 for 4.

    Returns:
        q int8 [..., n1 * n2] and scale float32 [..., 1] (1 where a token is zero throughout).
    """
    if not x.is_cuda:
        return reference(x, left, right, levels)
    from ..kernels.kronecker import kronecker_quantize as kernel

    rows = rows_of(x)
    q = x.new_empty(rows.shape, dtype=torch.int8)
    scale = x.new_empty((rows.shape[0],), dtype=torch.float32)
    if rows.numel():
        kernel(rows, left.contiguous(), right.contiguous(), levels, q, scale)
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def reference(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with torch's functions, with the same rounding between the products."""
    n1, n2 = left.shape[0], right.shape[0]
    wide = torch.float32
    tokens = x.reshape(-1, n1, n2).to(wide)
    inner = (tokens @ right.to(x.dtype).to(wide)).to(x.dtype).to(wide)
    y = (left.to(x.dtype).to(wide).t() @ inner).reshape(-1, n1 * n2)
    peak = y.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(peak > 0, peak / levels, torch.ones_like(peak))
    q = torch.round(torch.clamp(y / scale, -levels, levels)).to(torch.int8)
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)
