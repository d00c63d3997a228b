"""Torch operators foldline::quantize_linear and foldline::dequantize_linear: ONNX Q/DQ semantics in an fx graph.

``rounding="reciprocal"`` multiplies by the scale's reciprocal, as torch's own kernels do; ONNX divides.
"""

from __future__ import annotations

import torch

_RANGES: dict[str, tuple[int, int, torch.dtype]] = {
    "int8": (-128, 127, torch.int8),
    "uint8": (0, 255, torch.uint8),
    "int16": (-32768, 32767, torch.int16),
    "uint16": (0, 65535, torch.int32),
    "int32": (-(2**31), 2**31 - 1, torch.int32),
    "int4": (-8, 7, torch.int8),
    "uint4": (0, 15, torch.uint8),
    "int2": (-2, 1, torch.int8),
    "uint2": (0, 3, torch.uint8),
}
_FLOATS: dict[str, torch.dtype] = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def storage_dtype(dtype: str) -> torch.dtype:
    """The torch dtype that holds a canonical quantized dtype (4-bit and 2-bit values sit in a byte each)."""
    return _FLOATS[dtype] if dtype in _FLOATS else _RANGES[dtype][2]


def _spread(p: torch.Tensor, x: torch.Tensor, axis: int | None, block: int) -> torch.Tensor:
    """Scale or zero point broadcast against x: one value, one per index of ``axis``, or one per block along it."""
    if p.numel() == 1 and (p.ndim <= 1 or not block):
        return p.reshape(())
    if axis is None:
        return p
    axis = axis % x.ndim
    if block:
        return p.repeat_interleave(block, dim=axis).narrow(axis, 0, x.shape[axis])
    shape = [1] * x.ndim
    shape[axis] = -1
    return p.reshape(shape)


def _quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    dtype: str = "int8",
    block: int = 0,
    rounding: str = "divide",
) -> torch.Tensor:
    whole = _spread(scale, x, axis, block).to(x.dtype)
    steps = x * whole.reciprocal() if rounding == "reciprocal" else x / whole
    if dtype in _FLOATS:
        limit = torch.finfo(_FLOATS[dtype]).max
        return steps.clamp(-limit, limit).to(_FLOATS[dtype])
    low, high, storage = _RANGES[dtype]
    steps = torch.round(steps)
    if zero_point is not None:
        steps = steps + _spread(zero_point, x, axis, block).to(steps.dtype)
    return steps.clamp(low, high).to(storage)


def _dequantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    dtype: str = "int8",
    block: int = 0,
) -> torch.Tensor:
    steps = x.to(scale.dtype)
    if zero_point is not None:
        steps = steps - _spread(zero_point, x, axis, block).to(scale.dtype)
    return steps * _spread(scale, x, axis, block)


def _fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    dtype: str = "int8",
    block: int = 0,
    rounding: str = "divide",
) -> torch.Tensor:
    return torch.empty_like(x, dtype=storage_dtype(dtype))


def _fake_dequantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    dtype: str = "int8",
    block: int = 0,
) -> torch.Tensor:
    return torch.empty_like(x, dtype=scale.dtype)


# The dispatcher drops trailing arguments that equal the schema's defaults, so the functions above repeat them.
_LIBRARY = torch.library.Library("foldline", "FRAGMENT")


def _register() -> None:
    signature = "Tensor x, Tensor scale, Tensor? zero_point=None, int? axis=None, str dtype='int8', int block=0"
    rounding = ", str rounding='divide'"
    if hasattr(torch.ops.foldline, "quantize_linear"):
        return
    for name, more, function, fake in (
        ("quantize_linear", rounding, _quantize, _fake_quantize),
        ("dequantize_linear", "", _dequantize, _fake_dequantize),
    ):
        _LIBRARY.define(f"{name}({signature}{more}) -> Tensor")
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"foldline::{name}", fake, lib=_LIBRARY)


_register()
quantize_linear = torch.ops.foldline.quantize_linear.default
dequantize_linear = torch.ops.foldline.dequantize_linear.default
