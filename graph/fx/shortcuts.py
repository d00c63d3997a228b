"""Results of frequent calls on meta tensors, where torch's own shape functions are written in Python and slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

aten = torch.ops.aten
Rule: TypeAlias = Callable[..., Any]


def shortcut(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the call returns, as a meta tensor; None where torch must say it."""
    rule = _RULES.get(func)
    if rule is not None:
        return rule(*args, **kwargs)
    if func in _FACTORIES:
        return func(*args, **{**kwargs, "device": "meta"})
    return None


def _like(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _in_place(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return x


def _contiguous_like(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _dropout(x: torch.Tensor, p: float, train: bool) -> Any:
    return None if train else x


def _conv(
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


_RULES: dict[Any, Rule] = {
    aten.batch_norm.default: _like,
    aten.hardswish.default: _like,
    aten.hardsigmoid.default: _like,
    aten.hardswish_.default: _in_place,
    aten.hardsigmoid_.default: _in_place,
    aten.relu_.default: _in_place,
    aten.silu_.default: _in_place,
    aten.hardtanh.default: _like,
    aten.hardtanh_.default: _in_place,
    aten.relu6.default: _like,
    aten.relu6_.default: _in_place,
    aten.mish.default: _like,
    aten.layer_norm.default: _contiguous_like,
    aten.dropout.default: _dropout,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
}
"""Errors of shape are torch's to report: a rule returns None unless the operands fit."""

_FACTORIES = {
    getattr(getattr(aten, name), overload)
    for name in "arange zeros ones full empty rand randn linspace eye tril_indices triu_indices".split()
    for overload in getattr(aten, name).overloads()
    if not overload.endswith("out")
    and not any("Tensor" in str(a.type) for a in getattr(getattr(aten, name), overload)._schema.arguments)
    and any(a.name == "device" for a in getattr(getattr(aten, name), overload)._schema.arguments)
}
"""Calls that make tensors from sizes: on the meta device like everything else."""
