"""foldline::fp8_linear: float8 e4m3 operands through torch._scaled_mm."""

from __future__ import annotations

import torch

from .registry import activated, expect, known_activation, operator

LIMIT = 448.0
"""Largest finite float8_e4m3fn."""


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    fp8 = torch.float8_e4m3fn
    expect(x.dtype == fp8 and weight.dtype == fp8, "fp8_linear takes float8_e4m3fn operands")
    expect(weight.ndim == 2 and x.shape[-1] == weight.shape[1], f"x {tuple(x.shape)} does not fit the weight")
    known_activation(activation)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


@operator("fp8_linear", _check, _fake)
def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """act((x @ weight.T) * x_scale * weight_scale + bias), summed in float32 (no fast accumulation).

    On a GPU sizes that are no multiple of 16 are padded with zeros, and scales per row or per channel make
    ``_scaled_mm`` write bfloat16 first (it knows no other type there).

    Args:
        x: float8_e4m3fn [..., K].
        weight: float8_e4m3fn [N, K].
        x_scale: float32, one value or one per row of x.
        weight_scale: float32, one value or [N].
        bias: [N] or None.
        activation: none, relu, gelu, gelu_tanh or silu.
        out_dtype: float32, bfloat16 or float16.
    """
    if not x.is_cuda:
        return reference(x, weight, x_scale, weight_scale, bias, activation, out_dtype)
    n, k = weight.shape
    rows = x.reshape(-1, k)
    m = rows.shape[0]
    if not (m and n and k):
        y = x.new_zeros((m, n), dtype=torch.float32)
        y = y if bias is None else y + bias.to(torch.float32)
        return activated(y, activation).to(out_dtype).reshape(*x.shape[:-1], n)
    a, b = _padded(rows, 1, 16), _padded(weight, 16, 16)
    single = x_scale.numel() == 1 and weight_scale.numel() == 1
    if single:
        sa, sb = x_scale.reshape(()), weight_scale.reshape(())
    else:
        sa = x_scale.reshape(-1, 1).repeat(m // x_scale.numel(), 1)
        sb = weight_scale.reshape(1, -1).expand(1, n)
        sb = torch.nn.functional.pad(sb, (0, b.shape[0] - n), value=1.0).contiguous()
    dtype = out_dtype if single else torch.bfloat16
    y = torch._scaled_mm(a, b.t(), scale_a=sa, scale_b=sb, out_dtype=dtype, use_fast_accum=False)[:, :n]
    if bias is not None or activation != "none":
        y = y.to(torch.float32) if bias is None else y.to(torch.float32) + bias.to(torch.float32)
        y = activated(y, activation)
    return y.to(out_dtype).reshape(*x.shape[:-1], n)


def _padded(t: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """t with both sizes rounded up; padded through bytes, since float8 knows no constant padding."""
    down, right = -t.shape[0] % rows, -t.shape[1] % columns
    if not (down or right):
        return t.contiguous()
    return torch.nn.functional.pad(t.view(torch.uint8), (0, right, 0, down)).view(t.dtype)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The same with torch's functions in float32."""
    y = x.reshape(-1, x.shape[-1]).to(torch.float32) @ weight.to(torch.float32).t()
    y = y * x_scale.reshape(-1, 1) * weight_scale.reshape(1, -1)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return activated(y, activation).to(out_dtype).reshape(*x.shape[:-1], weight.shape[0])
