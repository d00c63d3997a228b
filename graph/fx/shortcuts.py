"""Results of frequent calls on meta tensors, where torch's own shape functions are written in Python and slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from . import products
from .functional import by_identity
from .layouts import dense, elementwise, like, not_channels_last

aten = torch.ops.aten
Rule: TypeAlias = Callable[..., Any]


@by_identity
def _rule(func: Any) -> Rule | None:
    return _RULES.get(func)


@by_identity
def _makes(func: Any) -> bool:
    return func in _FACTORIES


def shortcut(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the call returns, as a meta tensor; None where torch must say it."""
    rule = _rule(func)
    if rule is not None:
        return rule(*args, **kwargs)
    if _makes(func):
        return func(*args, **{**kwargs, "device": "meta"})
    return None


def _like(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return like(x)


def _like_made(x: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """Of new contents: full_like and its kin, on the meta device like everything else."""
    if any(v not in (None, False) for k, v in kwargs.items() if k != "device") or not x.is_contiguous():
        return None
    return torch.empty(x.shape, dtype=dtype or x.dtype, device="meta")


def _to_dtype(x: torch.Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    if any(args) or any(kwargs.values()):
        return None
    if dtype == x.dtype:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta") if dense(x) else None


def _to_device(x: torch.Tensor, device: torch.device, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    return _to_dtype(x, dtype, *args, **kwargs) if device.type == "meta" else None


def _call(name: str) -> Rule:
    """The tensor's own method: the same call, without a search through its schema."""

    def rule(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(x, name)(*args, **kwargs)

    return rule


def _slice(x: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if not -x.ndim <= dim < x.ndim:
        return None
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)]


def _contiguous(x: torch.Tensor, **kwargs: Any) -> Any:
    if kwargs:
        return None
    return x if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device="meta")


def _in_place(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    others = [a.shape for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    return x if all(shape == x.shape for shape in others) else None


def _contiguous_like(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _dropout(x: torch.Tensor, p: float, train: bool) -> Any:
    return None if train else x


def _unary(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return elementwise(x.dtype, x) if isinstance(x, torch.Tensor) and x.is_floating_point() else None


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    return like(x) if dtype in (None, x.dtype) and x.is_floating_point() else None


def _binary(x: Any, y: Any = None, **kwargs: Any) -> Any:
    """Two floating-point operands, or one and a number."""
    return _together(x, y, float) if not kwargs or isinstance(y, torch.Tensor) else None


def _sum(x: Any, y: Any = None, **kwargs: Any) -> Any:
    """Sums, differences and products of integers are integers."""
    return _together(x, y, float if kwargs else None)


def _lesser(x: Any, y: Any) -> Any:
    return _together(x, y)


def _together(x: Any, y: Any, kind: type | None = None) -> Any:
    """Of the type that both promote to, unless that is not of the kind, or bool."""
    if not isinstance(x, torch.Tensor) or not isinstance(y, (torch.Tensor, int, float)) or isinstance(y, bool):
        return None
    dtype = torch.result_type(x, y)
    if dtype == torch.bool or (kind is float and not dtype.is_floating_point) or dtype.is_complex:
        return None
    tensors = (x, y) if isinstance(y, torch.Tensor) else (x,)
    return elementwise(dtype, *tensors, common=dtype)


def _comparison(x: torch.Tensor, y: Any) -> Any:
    if isinstance(y, torch.Tensor):
        return elementwise(torch.bool, x, y, common=torch.result_type(x, y))
    return elementwise(torch.bool, x) if type(y) in (int, float, bool) else None


def _where(condition: torch.Tensor, x: Any, y: Any) -> Any:
    tensors = [t for t in (x, y) if isinstance(t, torch.Tensor)]
    if condition.dtype != torch.bool or not tensors:
        return None
    dtype = torch.result_type(x, y)
    if any([t.dtype != dtype and not dense(t) for t in tensors]):
        return None
    return elementwise(dtype, condition, *tensors)


def _signed(x: torch.Tensor) -> Any:
    return elementwise(x.dtype, x) if x.dtype in (torch.int64, torch.int32) or x.is_floating_point() else None


def _power(x: torch.Tensor, exponent: Any) -> Any:
    return elementwise(x.dtype, x) if x.is_floating_point() and type(exponent) in (int, float) else None


def _cumulated(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    if not -x.ndim <= dim < x.ndim or not x.is_contiguous() or x.dtype not in _CUMULATED:
        return None
    return torch.empty(x.shape, dtype=dtype or _CUMULATED[x.dtype], device="meta")


_CUMULATED = {torch.bool: torch.int64, torch.int32: torch.int64, torch.int64: torch.int64, torch.float32: torch.float32}


def _gather(x: torch.Tensor, dim: int, index: torch.Tensor, **kwargs: Any) -> Any:
    if index.dtype != torch.int64 or index.ndim != x.ndim or not x.ndim or not -x.ndim <= dim < x.ndim:
        return None
    if any(n > m for i, (n, m) in enumerate(zip(index.shape, x.shape, strict=True)) if i != dim % x.ndim):
        return None
    return torch.empty(index.shape, dtype=x.dtype, device="meta")


def _cat(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    rank, shape = first.ndim, list(first.shape)
    if not rank or not -rank <= dim < rank:
        return None
    dim %= rank
    for t in tensors:
        if t.ndim != rank or t.dtype != first.dtype or (rank > 3 and not _plain(t)):
            return None
        if any(i != dim and n != m for i, (n, m) in enumerate(zip(t.shape, shape, strict=True))):
            return None
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return torch.empty(shape, dtype=first.dtype, device="meta")


def _plain(t: torch.Tensor) -> bool:
    """Whether what is made of it lies as usual: channels-last cannot be meant."""
    return not_channels_last(t) if t.ndim == 4 and not t.is_contiguous() else t.is_contiguous() and not _spread(t)


def _spread(t: torch.Tensor) -> bool:
    """Whether channels-last fits, too (an axis of one): torch chooses then."""
    return (t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)) or t.ndim == 5


def _norm(x: torch.Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    fits = dim is not None and all(-x.ndim <= d < x.ndim for d in ([dim] if isinstance(dim, int) else dim))
    return _mean(x, dim, keepdim) if fits and dtype is None and type(ord) in (int, float) and x.numel() else None


def _max_pool(
    x: torch.Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    if ceil_mode or x.ndim != 4 or not x.is_contiguous() or _spread(x):
        return None
    shape = list(x.shape[:2])
    for i in range(2):
        step, pad, gap, size = (
            (v if isinstance(v, int) else v[i] if len(v) > 1 else v[0])
            for v in (stride or kernel, padding, dilation, kernel)
        )
        shape.append((x.shape[2 + i] + 2 * pad - gap * (size - 1) - 1) // step + 1)
        if 2 * pad > size or shape[-1] < 1:
            return None
    return torch.empty(shape, dtype=x.dtype, device="meta")


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
            "softplus sqrt rsqrt sin cos log": _unary,
            "neg abs": _signed,
            "add sub mul": _sum,
            "div": _binary,
        },
        in_place=True,
    ),
    **_rules(
        {
            "batch_norm": _like,
            "layer_norm": _contiguous_like,
            "dropout": _dropout,
            "conv1d conv2d conv3d": products.conv,
            "mean": _mean,
            "adaptive_avg_pool2d": _adaptive_pool,
            "softmax log_softmax": _softmax,
            "linear": products.linear,
            "addmm": products.addmm,
            "matmul bmm mm": products.matmul,
            "scaled_dot_product_attention": products.attention,
            "embedding": products.embedding,
            "eq ne lt le gt ge": _comparison,
            "cat": _cat,
            "cumsum": _cumulated,
            "gather": _gather,
            "linalg_vector_norm": _norm,
            "max_pool2d": _max_pool,
            "contiguous": _contiguous,
            "slice": _slice,
            "minimum maximum": _lesser,
            "full_like zeros_like ones_like empty_like": _like_made,
        }
    ),
    **{
        rule: _call(name)
        for name, rule in {
            "view": aten.view.default,
            "reshape": aten.reshape.default,
            "transpose": aten.transpose.int,
            "permute": aten.permute.default,
            "expand": aten.expand.default,
            "unsqueeze": aten.unsqueeze.default,
            "select": aten.select.int,
            "flatten": aten.flatten.using_ints,
            "squeeze": aten.squeeze.dim,
        }.items()
    },
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.min.other: _lesser,
    aten.max.other: _lesser,
    aten.to.dtype: _to_dtype,
    aten.to.device: _to_device,
    aten.pow.Tensor_Scalar: _power,
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
