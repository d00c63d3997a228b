"""Shapes of products on meta tensors: convolutions, linear layers, attention, embedding."""

from __future__ import annotations

from typing import Any

import torch


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> Any:
    rank = weight.ndim - 2
    channels = x.shape[1] if x.ndim == rank + 2 else -1
    if channels != weight.shape[1] * groups or (bias is not None and bias.shape[0] != weight.shape[0]):
        return None  # torch words the error, or knows the unbatched form
    sizes = []
    for i in range(rank):
        step, pad, gap = (v[i] if len(v) > 1 else v[0] for v in (stride, padding, dilation))
        size = (x.shape[2 + i] + 2 * pad - gap * (weight.shape[2 + i] - 1) - 1) // step + 1
        if size < 1:
            return None
        sizes.append(size)
    shape = (x.shape[0], weight.shape[0], *sizes)
    layout = torch.channels_last if rank == 2 and _channels_last(x, weight) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device="meta", memory_format=layout)


def _channels_last(*tensors: torch.Tensor) -> bool:
    return any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in tensors)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    if not (bias is None or _vector(bias, weight.shape[0], x.dtype)):
        return None
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="meta")


def _vector(t: torch.Tensor, size: int, dtype: torch.dtype) -> bool:
    return t.ndim == 1 and t.shape[0] == size and t.dtype == dtype


def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if a.ndim != 2 or b.ndim != 2 or a.dtype != b.dtype or not a.is_floating_point():
        return None
    if a.shape[1] != b.shape[0] or not _vector(bias, b.shape[1], a.dtype):
        return None
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def matmul(a: torch.Tensor, b: torch.Tensor) -> Any:
    if a.ndim != b.ndim or a.ndim < 2 or a.dtype != b.dtype or a.shape[-1] != b.shape[-2]:
        return None
    if a.shape[:-2] != b.shape[:-2]:
        return None
    return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device="meta")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    attn_mask: torch.Tensor | None = None,
) -> Any:
    mask = attn_mask if mask is None else mask
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype or not q.ndim == k.ndim == v.ndim >= 3:
        return None
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        return None
    if q.shape[:-2] != k.shape[:-2]:
        shared = enable_gqa and q.ndim == 4 and q.shape[0] == k.shape[0] and k.shape[1] and not q.shape[1] % k.shape[1]
        if not shared:
            return None
    if mask is not None:
        scores = (*q.shape[:-1], k.shape[-2])
        fits = mask.ndim <= len(scores) and all(
            n in (1, s) for n, s in zip(mask.shape, scores[len(scores) - mask.ndim :], strict=True)
        )
        if is_causal or not fits or mask.dtype not in (torch.bool, q.dtype):
            return None
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device="meta")


def embedding(weight: torch.Tensor, indices: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if weight.ndim != 2 or indices.dtype not in (torch.int64, torch.int32):
        return None
    return torch.empty((*indices.shape, weight.shape[1]), dtype=weight.dtype, device="meta")
