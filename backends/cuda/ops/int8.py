"""foldline::int8_linear: int8 activations times int8 weights, with the scales and what follows in one kernel."""

from __future__ import annotations

import torch

from .registry import activated, expect, known_activation, operator, rows_of


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    expect(x.dtype == torch.int8 and weight.dtype == torch.int8, "int8_linear takes int8 operands")
    expect(weight.ndim == 2 and x.shape[-1] == weight.shape[1], f"x {tuple(x.shape)} does not fit the weight")
    known_activation(activation)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    dtype = torch.int8 if out_scale is not None else out_dtype
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


@operator("int8_linear", _check, _fake)
def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """act((x @ weight.T + offset) * (x_scale * weight_scale) + bias), optionally quantized again.

    The sum over K and the offset are exact in int32; the rest is float32, one rounding per operation.

    Args:
        x: int8 [..., K].
        weight: int8 [N, K].
        x_scale: float32, one value, or one per row of x ([...] or [..., 1]).
        weight_scale: float32, one value or [N].
        offset: int32 [N], added to the sums (``-zero_point * weight.sum(1)``, an int32 bias), or None.
        bias: float [N], or None.
        out_scale: float32 scalar: the result is round(y / out_scale), ties to even, in int8. None: ``out_dtype``.
        activation: none, relu, gelu, gelu_tanh or silu.
        out_dtype: float32, bfloat16 or float16.
    """
    rows = rows_of(x)
    n = weight.shape[0]
    if x.is_cuda:
        from ..kernels.int8 import int8_linear as kernel

        out = x.new_empty((rows.shape[0], n), dtype=torch.int8 if out_scale is not None else out_dtype)
        scale = x_scale.reshape(-1)
        if rows.numel() and n:
            kernel(rows, rows_of(weight), scale, weight_scale.reshape(-1), offset, bias, out_scale, activation, out)
        return out.reshape(*x.shape[:-1], n)
    return reference(x, weight, x_scale, weight_scale, offset, bias, out_scale, activation, out_dtype)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same with torch's functions, in the same order of roundings."""
    n = weight.shape[0]
    acc = torch._int_mm(x.reshape(-1, x.shape[-1]), weight.t())
    if offset is not None:
        acc = acc + offset
    scale = x_scale.reshape(-1, 1) * weight_scale.reshape(1, -1)
    y = acc.to(torch.float32) * scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    y = activated(y, activation)
    if out_scale is not None:
        y = torch.round(torch.clamp(y / out_scale, -128, 127)).to(torch.int8)
    else:
        y = y.to(out_dtype)
    return y.reshape(*x.shape[:-1], n)
