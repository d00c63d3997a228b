"""foldline::kronecker_quantize: an online Kronecker transform of each token followed by quantization (FlatQuant)."""

from __future__ import annotations

import torch

from .registry import expect, operator, rows_of

LARGEST = 128
"""Largest side of a factor; FlatQuant's balanced factors of widths up to 16384 fit."""


def _check(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, low: int, high: int, scale: torch.Tensor | None
) -> None:
    n1, n2 = left.shape[0], right.shape[0]
    expect(left.shape == (n1, n1) and right.shape == (n2, n2), "the factors must be square")
    expect(x.shape[-1] == n1 * n2, f"{x.shape[-1]} inputs are not {n1} x {n2}")
    expect(max(n1, n2) <= LARGEST, f"factors of {n1} and {n2}: at most {LARGEST}; choose more even ones")
    expect(-128 <= low < 0 < high <= 127, f"{low} .. {high} does not lie within -128 .. 127 around 0")
    expect(scale is None or scale.numel() == 1, "a fixed scale is one number")


def _fake(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, low: int, high: int, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@operator("kronecker_quantize", _check, _fake)
def kronecker_quantize(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, low: int, high: int, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x (left kron right) of every token, quantized symmetrically: q = clamp(round(y / scale), low, high).

    With X the token as [n1, n2], y = left.T @ X @ right. Without a fixed scale each token has its own, max|y| / high.
    In 16-bit types X @ right is rounded to that type before the second product; sums are float32; ties go to even.

    Args:
        x: [..., n1 * n2] float.
        left, right: [n1, n1] and [n2, n2], both sides at most 128.
        low, high: integers used, e.g. -127 and 127, or -7 and 7 for 4 bits.
        scale: float32 scalar, or None.

    Returns:
        q int8 [..., n1 * n2] and the scale of each token, float32 [..., 1] (1 where a token is zero throughout).
    """
    if not x.is_cuda:
        return reference(x, left, right, low, high, scale)
    from ..kernels.kronecker import kronecker_quantize as kernel

    rows = rows_of(x)
    q = x.new_empty(rows.shape, dtype=torch.int8)
    made = x.new_empty((rows.shape[0],), dtype=torch.float32)
    if rows.numel():
        target = made if scale is None else scale.reshape(1)
        kernel(rows, left.contiguous(), right.contiguous(), low, high, scale is not None, q, target)
    if scale is not None:
        made = scale.reshape(1).repeat(rows.shape[0])
    return q.reshape(x.shape), made.reshape(*x.shape[:-1], 1)


def reference(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, low: int, high: int, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with torch's functions, with the same rounding between the products."""
    n1, n2 = left.shape[0], right.shape[0]
    wide = torch.float32
    tokens = x.reshape(-1, n1, n2).to(wide)
    inner = (tokens @ right.to(x.dtype).to(wide)).to(x.dtype).to(wide)
    y = (left.to(x.dtype).to(wide).t() @ inner).reshape(-1, n1 * n2)
    if scale is None:
        peak = y.abs().amax(dim=-1, keepdim=True)
        used = torch.where(peak > 0, peak / high, torch.ones_like(peak))
    else:
        used = scale.reshape(1, 1).repeat(y.shape[0], 1)
    q = torch.round(torch.clamp(y / used, low, high)).to(torch.int8)
    return q.reshape(x.shape), used.reshape(*x.shape[:-1], 1)
