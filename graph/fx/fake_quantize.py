"""Torch operator foldline::fake_quantize: quantize and dequantize in one step, with gradients to train through."""

from __future__ import annotations

import math
from typing import Any

import torch

from .custom import _LIBRARY, _spread

SMALLEST = 1e-12
"""Scales train freely; what is used is their magnitude, not below this."""


def used_scale(scale: torch.Tensor) -> torch.Tensor:
    """The scale that a trained parameter stands for: its magnitude, bounded away from 0."""
    return scale.abs().clamp_min(SMALLEST)


def _steps(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, axis: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """(scale broadcast, x / scale, zero point broadcast), exactly as quantize_linear divides."""
    s = _spread(used_scale(scale), x, axis, 0).to(x.dtype)
    z: torch.Tensor | float = 0.0 if zero_point is None else _spread(zero_point, x, axis, 0).to(x.dtype)
    return s, x / s, z


def _fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    low: int = -128,
    high: int = 127,
    learn: str = "",
) -> torch.Tensor:
    s, steps, z = _steps(x, scale, zero_point, axis)
    q = steps.round_().add_(z).clamp_(low, high)
    return q.sub_(z).mul_(s)


def _meta(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    low: int = -128,
    high: int = 127,
    learn: str = "",
) -> torch.Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    # the dispatcher drops trailing arguments that equal the schema's defaults
    given = [*inputs, *(None, None, -128, 127, "")[len(inputs) - 2 :]]
    x, scale, zero_point = given[:3]
    ctx.axis, ctx.low, ctx.high, ctx.learn = given[3:]
    ctx.save_for_backward(x, scale, zero_point)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Straight through inside the range; the scale's gradient of "Learned Step Size Quantization".

    d y / d s is round(x / s) - x / s inside the range and the bound outside, summed over the elements that share the
    scale and divided by sqrt(their number * levels on the positive side).
    """
    x, scale, zero_point = ctx.saved_tensors
    s, steps, z = _steps(x, scale, zero_point, ctx.axis)
    rounded = steps.round()
    inside = (rounded + z >= ctx.low) & (rounded + z <= ctx.high)
    dx = torch.where(inside, grad, 0)
    ds = None
    if ctx.learn and ctx.needs_input_grad[1]:
        clipped = (rounded + z).clamp(ctx.low, ctx.high) - z
        per_element = grad * torch.where(inside, rounded - steps, clipped)
        shared = max(1, x.numel() // scale.numel())
        if ctx.learn == "sample" and x.ndim:
            shared = max(1, shared // x.shape[0])
        ds = _collect(per_element, scale, ctx.axis) / math.sqrt(shared * max(1, ctx.high))
        ds = (ds * torch.where(scale < 0, -1, 1)).to(scale.dtype)
    return dx, ds, None, None, None, None, None


def _collect(per_element: torch.Tensor, scale: torch.Tensor, axis: int | None) -> torch.Tensor:
    if axis is None or scale.numel() == 1:
        return per_element.sum().reshape(scale.shape)
    axis = axis % per_element.ndim
    return per_element.sum([i for i in range(per_element.ndim) if i != axis]).reshape(scale.shape)


def _register() -> None:
    if hasattr(torch.ops.foldline, "fake_quantize"):
        return
    _LIBRARY.define(
        "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point=None, int? axis=None, int low=-128, int high=127, "
        "str learn='') -> Tensor"
    )
    _LIBRARY.impl("fake_quantize", _fake_quantize, "CompositeExplicitAutograd")
    torch.library.register_fake("foldline::fake_quantize", _meta, lib=_LIBRARY)
    torch.library.register_autograd("foldline::fake_quantize", _gradients, setup_context=_remember, lib=_LIBRARY)


_register()
fake_quantize = torch.ops.foldline.fake_quantize.default
