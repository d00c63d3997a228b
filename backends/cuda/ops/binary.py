"""foldline::binary_linear: weights that are sums of scaled signs (binary coding), multiplied by table lookup."""

from __future__ import annotations

import torch

from .registry import expect, operator, rows_of

LOOKUP_ROWS = 8
"""Up to this many rows of activations tables are looked up; beyond, tensor cores multiply decoded planes."""


def pack_signs(signs: torch.Tensor) -> torch.Tensor:
    """bool or {-1, +1} [q, N, K] -> uint8 [q, N, ceil(K / 8)]; bit j of byte b is input 8 b + j, set for +1."""
    positive = torch.nn.functional.pad((signs > 0).to(torch.uint8), (0, -signs.shape[-1] % 8))
    bits = positive.reshape(*signs.shape[:2], -1, 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def decode_binary(codes: torch.Tensor, alphas: torch.Tensor, k: int, group: int) -> torch.Tensor:
    """The dense weight float32 [N, k]: sum over q of alphas[q, n, k // group] * (+1 or -1)."""
    bit = torch.arange(8, device=codes.device, dtype=torch.uint8)
    signs = ((codes.unsqueeze(-1) >> bit) & 1).reshape(codes.shape[0], codes.shape[1], -1)[..., :k]
    spread = alphas.to(torch.float32).repeat_interleave(group, dim=2)[..., :k]
    return ((signs.to(torch.float32) * 2 - 1) * spread).sum(0)


def _check(x: torch.Tensor, codes: torch.Tensor, alphas: torch.Tensor, bias: torch.Tensor | None, group: int) -> None:
    k = x.shape[-1]
    expect(codes.ndim == 3 and codes.dtype == torch.uint8, "codes must be uint8 [q, N, K / 8]")
    expect(codes.shape[2] == -(-k // 8), f"codes of {codes.shape[2]} bytes do not fit {k} inputs")
    expect(group > 0 and group % 8 == 0, "a group is a multiple of 8 inputs")
    expect(alphas.shape == (*codes.shape[:2], -(-k // group)), "alphas must be [q, N, ceil(K / group)]")


def _fake(
    x: torch.Tensor, codes: torch.Tensor, alphas: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[1]))


@operator("binary_linear", _check, _fake)
def binary_linear(
    x: torch.Tensor, codes: torch.Tensor, alphas: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """x @ W.T + bias with W = sum_i alpha_i b_i, b_i signs (ShiftAddLLM's form; alphas need not be powers of two).

    For few rows every 8 inputs make a table of their 256 signed sums, which the code bytes index: no product but by
    alpha. Sums are float32; the result has the dtype of x.

    Args:
        x: [..., K] float.
        codes: uint8 [q, N, ceil(K / 8)], see :func:`pack_signs`.
        alphas: [q, N, ceil(K / group)] float.
        bias: [N] or None.
        group: inputs per alpha, a multiple of 8.
    """
    if not x.is_cuda:
        return reference(x, codes, alphas, bias, group)
    from ..kernels import binary as kernels

    rows, n = rows_of(x), codes.shape[1]
    out = x.new_empty((rows.shape[0], n))
    if rows.numel() and n:
        codes, alphas = codes.contiguous(), alphas.contiguous()
        if rows.shape[0] <= LOOKUP_ROWS:
            tables = x.new_empty((rows.shape[0], codes.shape[2], 256), dtype=torch.float32)
            kernels.binary_lookup(rows, codes, alphas, bias, group, tables, out)
        else:
            kernels.binary_dot(rows, codes, alphas, bias, group, out)
    return out.reshape(*x.shape[:-1], n)


def reference(
    x: torch.Tensor, codes: torch.Tensor, alphas: torch.Tensor, bias: torch.Tensor | None, group: int
) -> torch.Tensor:
    """The same with the weight written out."""
    weight = decode_binary(codes, alphas, x.shape[-1], group)
    y = torch.nn.functional.linear(x.to(torch.float32), weight)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)
