"""Canonical node -> ATen call, for nodes that passes insert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..errors import ConstraintError
from .ops import TORCH_DTYPES

aten = torch.ops.aten
Built: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]
Builder: TypeAlias = Callable[[list[Any], dict[str, Any]], Built]

_BUILDERS: dict[str, Builder] = {}


def builds(*ops: str) -> Callable[[Builder], Builder]:
    """Register a builder for canonical ops."""

    def register(builder: Builder) -> Builder:
        for op in ops:
            _BUILDERS[op] = builder
        return builder

    return register


def build_call(op: str, operands: list[Any], attrs: dict[str, Any], name: str) -> Built:
    """(target, args, kwargs) of the ATen call for a canonical op. ConstraintError where there is none."""
    if op in _SIMPLE:
        target = getattr(getattr(aten, _SIMPLE[op][0]), _SIMPLE[op][1])
        given = {k: attrs[a] for a, k in _SIMPLE_ATTRS.get(op, {}).items() if attrs.get(a) is not None}
        return target, tuple(operands), given
    if op not in _BUILDERS:
        raise ConstraintError(
            "this op cannot be inserted into an FX graph", node=name, value=op, expected=", ".join(sorted(_all_ops()))
        )
    try:
        return _BUILDERS[op](operands, attrs)
    except (KeyError, IndexError) as error:
        raise ConstraintError("an attribute or operand is missing", node=name, value=f"{op}: {error}") from error


def _all_ops() -> set[str]:
    return set(_SIMPLE) | set(_BUILDERS)


_SIMPLE: dict[str, tuple[str, str]] = (
    {
        op: (op, "default")
        for op in (
            "relu elu selu celu gelu silu mish sigmoid hardsigmoid hardswish tanh softplus erf exp expm1 log "
            "log1p sqrt rsqrt reciprocal abs neg sign floor ceil sin cos tan asin acos atan sinh cosh asinh "
            "acosh atanh square logical_not bitwise_not isnan isinf threshold hardshrink softshrink logit "
            "nan_to_num leaky_relu round matmul maximum minimum atan2 logical_and logical_or logical_xor "
            "prelu"
        ).split()
    }
    | {op: (op, "Tensor") for op in "sub mul fmod eq ne lt le gt ge bitwise_and bitwise_or bitwise_xor add div".split()}
    | {
        "logsigmoid": ("log_sigmoid", "default"),
        "mod": ("remainder", "Tensor"),
        "floor_div": ("floor_divide", "default"),
        "where": ("where", "self"),
    }
)
_SIMPLE_ATTRS: dict[str, dict[str, str]] = {
    "leaky_relu": {"slope": "negative_slope"},
    "gelu": {"approximate": "approximate"},
    "elu": {"alpha": "alpha"},
    "celu": {"alpha": "alpha"},
    "softplus": {"beta": "beta", "threshold": "threshold"},
    "threshold": {"threshold": "threshold", "value": "value"},
    "add": {"alpha": "alpha"},
    "sub": {"alpha": "alpha"},
}


@builds("pow")
def _pow(x: list[Any], a: dict[str, Any]) -> Built:
    numbers = [isinstance(v, (int, float)) for v in x]
    overload = "Scalar" if numbers[0] else "Tensor_Scalar" if numbers[1] else "Tensor_Tensor"
    return getattr(aten.pow, overload), (x[0], x[1]), {}


@builds("linear")
def _linear(x: list[Any], a: dict[str, Any]) -> Built:
    bias = x[2] if len(x) > 2 else None
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0:
        return aten.addmm.default, (bias, x[0], x[1]), {"alpha": a["alpha"], "beta": a["beta"]}
    if not a.get("transposed_weight"):
        return aten.linear.default, (x[0], x[1], bias), {}
    return (aten.matmul.default, (x[0], x[1]), {}) if bias is None else (aten.addmm.default, (bias, x[0], x[1]), {})


@builds("conv")
def _conv(x: list[Any], a: dict[str, Any]) -> Built:
    n = len(a["stride"]) if a.get("stride") else 2
    pads = a.get("padding") or [(0, 0)] * n
    if any(lo != hi for lo, hi in pads):
        raise ConstraintError("ATen convolutions pad both sides alike", value=pads, hint="insert a pad node before it")
    args = (
        x[0],
        x[1],
        x[2] if len(x) > 2 else None,
        list(a.get("stride") or [1] * n),
        [int(lo) for lo, _ in pads],
        list(a.get("dilation") or [1] * n),
        bool(a.get("transposed", False)),
        list(a.get("output_padding") or [0] * n),
        int(a.get("groups", 1)),
    )
    return aten.convolution.default, args, {}


@builds("reshape")
def _reshape(x: list[Any], a: dict[str, Any]) -> Built:
    unknown = [i for i, s in enumerate(a["shape"]) if s is None]
    if len(unknown) > 1:
        raise ConstraintError("a reshape can leave one size open", value=a["shape"], hint="give the other sizes")
    return aten.reshape.default, (x[0], [-1 if s is None else int(s) for s in a["shape"]]), {}


@builds("transpose")
def _transpose(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.permute.default, (x[0], list(a["perm"])), {}


@builds("expand")
def _expand(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.expand.default, (x[0], [-1 if s is None else int(s) for s in a["shape"]]), {}


@builds("unsqueeze")
def _unsqueeze(x: list[Any], a: dict[str, Any]) -> Built:
    axes = list(a["axes"])
    if len(axes) == 1:
        return aten.unsqueeze.default, (x[0], axes[0]), {}
    raise ConstraintError("insert one unsqueeze per axis", value=axes)


@builds("squeeze")
def _squeeze(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.squeeze.dims, (x[0], list(a["axes"])), {}


@builds("concat")
def _concat(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.cat.default, (list(x), int(a["axis"])), {}


_BUILDERS["stack"] = lambda x, a: (aten.stack.default, (list(x), int(a["axis"])), {})


@builds("slice")
def _slice(x: list[Any], a: dict[str, Any]) -> Built:
    if len(a["axes"]) != 1:
        raise ConstraintError("insert one slice per axis", value=a["axes"])
    end = a["ends"][0]
    step = (a.get("steps") or [1])[0]
    return aten.slice.Tensor, (x[0], a["axes"][0], a["starts"][0], 2**63 - 1 if end is None else end, step), {}


@builds("split")
def _split(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.split_with_sizes.default, (x[0], [int(size) for size in a["sizes"]], int(a["axis"])), {}


@builds("select")
def _select(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.select.int, (x[0], int(a["axis"]), int(a["index"])), {}


@builds("gather")
def _gather(x: list[Any], a: dict[str, Any]) -> Built:
    axis = int(a["axis"])
    indices: list[Any] = [None] * axis + [x[1]]
    return aten.index.Tensor, (x[0], indices), {}


@builds("pad")
def _pad(x: list[Any], a: dict[str, Any]) -> Built:
    flat = [int(s) for lo, hi in reversed(list(a["pads"])) for s in (lo, hi)]
    mode = a.get("mode", "constant")
    if mode == "constant":
        return aten.constant_pad_nd.default, (x[0], flat, a.get("value", 0.0)), {}
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return aten.pad.default, (x[0], flat, mode), {}


@builds("mean")
def _mean(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.mean.dim, (x[0], list(a["axes"]), bool(a.get("keepdims", False))), {}


@builds("flip")
def _flip(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.flip.default, (x[0], list(a["axes"])), {}


def _qdq(name: str) -> Builder:
    def build(x: list[Any], a: dict[str, Any]) -> Built:
        from . import custom as fx_custom

        zero_point = x[2] if len(x) > 2 else None
        args: tuple[Any, ...] = (
            x[0],
            x[1],
            zero_point,
            a.get("axis"),
            a.get("dtype", "int8"),
            int(a.get("block") or 0),
        )
        if a.get("rounding", "divide") != "divide" and name == "quantize_linear":
            args = (*args, a["rounding"])
        return getattr(fx_custom, name), args, {}

    return build


_BUILDERS["quantize"], _BUILDERS["dequantize"] = _qdq("quantize_linear"), _qdq("dequantize_linear")


@builds("fake_quantize")
def _fake_quantize(x: list[Any], a: dict[str, Any]) -> Built:
    from .fake_quantize import fake_quantize

    zero_point = x[2] if len(x) > 2 else None
    limits = int(a["quant_min"]), int(a["quant_max"])
    return fake_quantize, (x[0], x[1], zero_point, a.get("axis"), *limits, a.get("learn", "")), {}


@builds("matmul_nbits")
def _matmul_nbits(x: list[Any], a: dict[str, Any]) -> Built:
    from .custom_nbits import matmul_nbits

    operands = [*x, None, None][:5]
    return matmul_nbits, (*operands, *(int(a[key]) for key in ("k", "n", "bits", "block"))), {}


@builds("cast")
def _cast(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.to.dtype, (x[0], TORCH_DTYPES[a["dtype"]]), {}


@builds("full")
def _full(x: list[Any], a: dict[str, Any]) -> Built:
    dtype = TORCH_DTYPES[a.get("dtype", "float32")]
    return aten.full.default, ([int(s) for s in a["shape"]], a["value"]), {"dtype": dtype}


@builds("full_like")
def _full_like(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.full_like.default, (x[0], a["value"]), {}


@builds("clip")
def _clip(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.clamp.default, (x[0], a.get("min"), a.get("max")), {}


@builds("identity")
def _identity(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.alias.default, (x[0],), {}


@builds("softmax")
def _softmax(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.softmax.int, (x[0], int(a["axis"])), {}


_BUILDERS["log_softmax"] = lambda x, a: (aten.log_softmax.int, (x[0], int(a["axis"])), {})


_REDUCTIONS = {"mean": aten.mean.dim, "sum": aten.sum.dim_IntList, "amax": aten.amax.default, "amin": aten.amin.default}


def _reduction(op: str) -> Builder:
    return lambda x, a: (_REDUCTIONS[op], (x[0], list(a["axes"]), bool(a.get("keepdims", False))), {})


for _op in _REDUCTIONS:
    _BUILDERS[_op] = _reduction(_op)


@builds("batch_norm")
def _batch_norm(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.batch_norm.default, (*x[:5], bool(a.get("training", False)), 0.1, float(a["eps"]), False), {}


@builds("layer_norm")
def _layer_norm(x: list[Any], a: dict[str, Any]) -> Built:
    axes = a["axes"]
    shape = [int(s) for s in x[0].meta["val"].shape[-len(axes) :]]
    scale, bias = [*x, None, None][1:3]
    return aten.layer_norm.default, (x[0], shape, scale, bias, float(a["eps"])), {}


@builds("rms_norm")
def _rms_norm(x: list[Any], a: dict[str, Any]) -> Built:
    shape = [int(s) for s in x[0].meta["val"].shape[-len(a["axes"]) :]]
    return aten.rms_norm.default, (x[0], shape, x[1] if len(x) > 1 else None, float(a["eps"])), {}


@builds("einsum")
def _einsum(x: list[Any], a: dict[str, Any]) -> Built:
    return aten.einsum.default, (a["equation"], list(x)), {}


@builds("sdpa")
def _sdpa(x: list[Any], a: dict[str, Any]) -> Built:
    mask = x[3] if len(x) > 3 else None
    args = (x[0], x[1], x[2], mask, 0.0, bool(a.get("causal", False)))
    return aten.scaled_dot_product_attention.default, args, {"scale": a.get("scale"), "enable_gqa": bool(a.get("gqa"))}


@builds("max_pool")
def _max_pool(x: list[Any], a: dict[str, Any]) -> Built:
    n = len(a["kernel"])
    target = (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)[n - 1].default
    pads = [int(lo) for lo, _ in a.get("padding") or [(0, 0)] * n]
    args = (x[0], a["kernel"], a.get("stride") or a["kernel"], pads, a.get("dilation") or [1] * n, bool(a.get("ceil")))
    return target, args, {}


@builds("masked_fill")
def _masked_fill(x: list[Any], a: dict[str, Any]) -> Built:
    return (aten.masked_fill.Scalar if isinstance(x[2], (int, float)) else aten.masked_fill.Tensor), tuple(x), {}
