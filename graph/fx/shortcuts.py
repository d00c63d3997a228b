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


def _in_place(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    others = [a.shape for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    return x if all(shape == x.shape for shape in others) else None


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


def _unary(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _like(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else None


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return _unary(x) if dtype in (None, x.dtype) else None


def _binary(x: Any, y: Any = None, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return None
    if not isinstance(y, torch.Tensor):
        return _like(x) if isinstance(y, (int, float)) else None
    if x.dtype != y.dtype:
        return None
    if x.shape == y.shape:
        return _like(x) if x.stride() == y.stride() else None
    wide = x if x.numel() > y.numel() else y
    narrow = y if wide is x else x
    if not (wide.is_contiguous() and narrow.is_contiguous()) or narrow.ndim > wide.ndim:
        return None  # torch orders the strides of the result
    tail = wide.shape[wide.ndim - narrow.ndim :]
    fits = all(n in (1, w) for n, w in zip(narrow.shape, tail, strict=True))
    return torch.empty(wide.shape, dtype=wide.dtype, device="meta") if fits else None


def _adaptive_pool(x: torch.Tensor, output_size: Any) -> Any:
    sizes = list(output_size) if isinstance(output_size, (list, tuple)) else None
    if sizes is None or len(sizes) != 2 or x.ndim != 4 or not x.is_contiguous() or not x.is_floating_point():
        return None
    if any(not isinstance(n, int) or n < 1 for n in sizes):
        return None
    return torch.empty((*x.shape[:2], *sizes), dtype=x.dtype, device="meta")


def _mean(x: torch.Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if dim is None or kwargs or not x.is_floating_point():
        return None
    gone = {d % x.ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim])} or set(range(x.ndim))
    shape = [1 if i in gone else s for i, s in enumerate(x.shape) if keepdim or i not in gone]
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    if not x.is_contiguous() or not (bias is None or _vector(bias, weight.shape[0], x.dtype)):
        return None
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device="meta")


def _vector(t: torch.Tensor, size: int, dtype: torch.dtype) -> bool:
    return t.ndim == 1 and t.shape[0] == size and t.dtype == dtype


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if a.ndim != 2 or b.ndim != 2 or a.dtype != b.dtype or not a.is_floating_point():
        return None
    if a.shape[1] != b.shape[0] or not _vector(bias, b.shape[1], a.dtype):
        return None
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def _matmul(a: torch.Tensor, b: torch.Tensor) -> Any:
    if a.ndim != b.ndim or a.ndim < 2 or a.dtype != b.dtype or a.shape[-1] != b.shape[-2]:
        return None
    if a.shape[:-2] != b.shape[:-2]:
        return None
    return torch.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype, device="meta")


def _attention(
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
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return None
    if mask is not None:
        scores = (*q.shape[:-1], k.shape[-2])
        fits = mask.ndim <= len(scores) and all(
            n in (1, s) for n, s in zip(mask.shape, scores[len(scores) - mask.ndim :], strict=True)
        )
        if is_causal or not fits or mask.dtype not in (torch.bool, q.dtype):
            return None
    return torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device="meta")


def _embedding(weight: torch.Tensor, indices: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if weight.ndim != 2 or indices.dtype not in (torch.int64, torch.int32):
        return None
    return torch.empty((*indices.shape, weight.shape[1]), dtype=weight.dtype, device="meta")


def _rules(table: dict[str, Rule], in_place: bool = False) -> dict[Any, Rule]:
    """Rules by overload, for every default or tensor overload of the named packets (and their in-place twins)."""
    found: dict[Any, Rule] = {}
    for names, rule in table.items():
        for name in names.split():
            for overload in getattr(aten, name).overloads():
                if overload in ("default", "Tensor", "Scalar", "int", "dim"):
                    found[getattr(getattr(aten, name), overload)] = rule
            twin = getattr(aten, f"{name}_", None) if in_place else None
            if twin is not None:
                found |= {getattr(twin, o): _in_place for o in twin.overloads() if o in ("default", "Tensor", "Scalar")}
    return found


_RULES: dict[Any, Rule] = {
    **_rules(
        {
            "relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid sigmoid tanh exp erf "
            "softplus sqrt rsqrt neg abs sin cos log": _unary,
            "add sub mul div": _binary,
        },
        in_place=True,
    ),
    **_rules(
        {
            "batch_norm": _like,
            "layer_norm": _contiguous_like,
            "dropout": _dropout,
            "conv1d conv2d conv3d": _conv,
            "mean": _mean,
            "adaptive_avg_pool2d": _adaptive_pool,
            "softmax log_softmax": _softmax,
            "linear": _linear,
            "addmm": _addmm,
            "matmul bmm mm": _matmul,
            "scaled_dot_product_attention": _attention,
            "embedding": _embedding,
        }
    ),
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
