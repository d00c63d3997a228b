"""Normalisations of ONNX in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .as_torch_run import Call, torch_op


@torch_op("BatchNormalization")
def batch_norm(c: Call) -> Tensor | tuple[Tensor, ...]:
    """Running statistics in eval mode; batch statistics, which update the running ones in place, in train mode."""
    x, scale, bias, mean, var = c.all()
    eps, momentum = c.attr("epsilon", 1e-5), c.attr("momentum", 0.9)
    if c.attr("training_mode", 0) and len(c.step.outputs) > 1:
        axes = [i for i in range(x.dim()) if i != 1]
        batch_mean, batch_var = x.mean(axes), x.var(axes, unbiased=False)
        y = F.batch_norm(x, None, None, scale.to(x.dtype), bias.to(x.dtype), True, 0.0, eps)
        return y, mean * momentum + batch_mean * (1 - momentum), var * momentum + batch_var * (1 - momentum)
    training = c.training or bool(c.attr("training_mode", 0))
    return F.batch_norm(x, mean.to(x.dtype) if not training else mean, var.to(x.dtype) if not training else var,
                        scale.to(x.dtype), bias.to(x.dtype), training, 1 - momentum, eps)  # fmt: skip


@torch_op("InstanceNormalization")
def instance_norm(c: Call) -> Tensor:
    x, scale, bias = c.all()
    axes = list(range(2, x.dim()))
    mean, var = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
    shape = [-1] + [1] * len(axes)
    return (x - mean) * torch.rsqrt(var + c.attr("epsilon", 1e-5)) * scale.reshape(shape) + bias.reshape(shape)


@torch_op("GroupNormalization")
def group_norm(c: Call) -> Tensor:
    x, scale, bias = c.all()
    groups, eps = c.attr("num_groups"), c.attr("epsilon", 1e-5)
    if c.opset < 21:  # one scale per group
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, eps)


@torch_op("LayerNormalization")
def layer_norm(c: Call) -> tuple[Tensor, ...] | Tensor:
    x, scale, *rest = c.all()
    axis, eps = c.axis(-1, x.dim()), c.attr("epsilon", 1e-5)
    shape = list(x.shape[axis:])
    bias = rest[0] if rest else None
    if not (c.used(1) or c.used(2)) and list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        return F.layer_norm(x, shape, scale, bias, eps)
    axes = list(range(axis, x.dim()))
    wide = x if x.dtype == torch.float64 else x.float()
    mean, var = wide.mean(axes, keepdim=True), wide.var(axes, unbiased=False, keepdim=True)
    inverse = torch.rsqrt(var + eps)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    return (y if bias is None else y + bias), mean, inverse


@torch_op("RMSNormalization")
def rms_norm(c: Call) -> Tensor:
    x, scale = c.all()
    axes = list(range(c.axis(-1, x.dim()), x.dim()))
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + c.attr("epsilon", 1e-5))
    return y.to(x.dtype) * scale


@torch_op("LpNormalization")
def lp_norm(c: Call) -> Tensor:
    x = c.x()
    norm = torch.linalg.vector_norm(x, c.attr("p", 2), c.axis(-1, x.dim()), True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@torch_op("MeanVarianceNormalization")
def mean_variance_norm(c: Call) -> Tensor:
    x, axes = c.x(), c.attr("axes", [0, 2, 3])
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / (x.var(axes, unbiased=False, keepdim=True).sqrt() + 1e-9)


@torch_op("LRN")
def local_response_norm(c: Call) -> Tensor:
    x, size = c.x(), c.attr("size")
    squares = F.pad(x.square().movedim(1, -1), ((size - 1) // 2, size - 1 - (size - 1) // 2))
    window = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (c.attr("bias", 1.0) + c.attr("alpha", 1e-4) / size * window) ** c.attr("beta", 0.75)
