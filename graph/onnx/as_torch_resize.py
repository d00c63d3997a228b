"""Resize and GridSample of ONNX in torch: separable interpolation as one small matrix per axis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .as_torch_run import Call, torch_op


@torch_op("Resize", "Upsample")
def resize(c: Call) -> Tensor:
    """All modes but cropping; each resized axis is a gather (nearest) or a matrix product (linear, cubic)."""
    x = c.x()
    rank = x.dim()
    old = c.step.op == "Upsample" or c.opset < 11
    first = 1 if old else 2
    transform = c.attr("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    if transform in ("tf_crop_and_resize", "tf_half_pixel_for_nn"):
        raise c.refuse(f"coordinate transformation {transform}")
    axes = [a + rank if a < 0 else a for a in c.attr("axes", list(range(rank)))]
    scales_in = c.attr("scales") or (None if c.maybe(first) is None else c.x(first).reshape(-1).tolist())
    sizes = c.ints(3) if not old else None
    if sizes is not None:
        scales = [n / x.shape[a] for n, a in zip(sizes, axes, strict=True)]
        policy = c.attr("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            ratio = min(scales) if policy == "not_larger" else max(scales)
            scales = [ratio] * len(axes)
            sizes = [int(math.floor(ratio * x.shape[a] + 0.5)) for a in axes]
    elif scales_in:
        scales = scales_in
        sizes = [int(math.floor(x.shape[a] * s)) for a, s in zip(axes, scales, strict=True)]
    else:
        raise c.refuse("neither sizes nor scales")
    for axis, out, scale in zip(axes, sizes, scales, strict=True):
        if out != x.shape[axis] or scale != 1.0:
            x = _along(c, x, axis, out, scale, transform)
    return x


def _along(c: Call, x: Tensor, axis: int, out: int, scale: float, transform: str) -> Tensor:
    n = x.shape[axis]
    at = _coordinates(n, out, scale, transform)
    mode = c.attr("mode", "nearest")
    if mode == "nearest":
        rounding = c.attr("nearest_mode", "floor" if c.step.op == "Upsample" or c.opset < 11 else "round_prefer_floor")
        index = {
            "round_prefer_floor": lambda: torch.ceil(at - 0.5),
            "round_prefer_ceil": lambda: torch.floor(at + 0.5),
            "floor": lambda: torch.floor(at),
            "ceil": lambda: torch.ceil(at),
        }[rounding]()
        return x.index_select(axis, index.long().clamp(0, n - 1).to(x.device))
    matrix = _weights(c, at, n, scale, mode).to(x.device, x.dtype if x.is_floating_point() else torch.float32)
    moved = x.movedim(axis, -1)
    y = (moved.to(matrix.dtype) @ matrix.T).movedim(-1, axis)
    return y if x.is_floating_point() else y.to(x.dtype)


def _coordinates(n: int, out: int, scale: float, transform: str) -> Tensor:
    """Position in the input of each output sample, float64."""
    i = torch.arange(out, dtype=torch.float64)
    if transform == "asymmetric":
        return i / scale
    if transform == "align_corners":
        length = scale * n
        return i * (n - 1) / (length - 1) if length > 1 else torch.zeros_like(i)
    if transform == "pytorch_half_pixel" and scale * n <= 1:
        return torch.zeros_like(i)
    if transform == "half_pixel_symmetric":
        adjustment = out / (n * scale)
        centre = n / 2
        return centre * (1 - adjustment) + (i + 0.5) / scale - 0.5
    return (i + 0.5) / scale - 0.5


def _weights(c: Call, at: Tensor, n: int, scale: float, mode: str) -> Tensor:
    """Interpolation matrix [out, n]: a kernel around each position, samples beyond the border folded onto it."""
    stretch = min(scale, 1.0) if c.attr("antialias", 0) else 1.0
    a = c.attr("cubic_coeff_a", -0.75)
    support = (1 if mode == "linear" else 2) / stretch
    low = torch.floor(at) - math.ceil(support) + 1
    taps = low[:, None] + torch.arange(2 * math.ceil(support) + 1, dtype=torch.float64)
    d = ((taps - at[:, None]) * stretch).abs()
    if mode == "linear":
        w = torch.clamp(1 - d, min=0)
    else:
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        w = torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    if c.attr("exclude_outside", 0):
        w = torch.where((taps >= 0) & (taps < n), w, torch.zeros_like(w))
    total = w.sum(1, keepdim=True)
    w = w / torch.where(total == 0, torch.ones_like(total), total)
    matrix = torch.zeros(len(at), n, dtype=torch.float64)
    return matrix.scatter_add(1, taps.long().clamp(0, n - 1), w)
