"""ATen call -> canonical node: elementwise functions of one, two and three operands."""

from __future__ import annotations

from typing import Any

import torch

from .ops import Call, Spec, putter, reads, slots

aten = torch.ops.aten

UNARY: dict[str, str] = {
    n: n
    for n in (
        "relu elu selu celu gelu silu mish sigmoid hardsigmoid hardswish tanh softplus erf exp expm1 log log1p sqrt "
        "rsqrt reciprocal abs neg sign floor ceil round sin cos tan asin acos atan sinh cosh asinh acosh atanh square "
        "logical_not bitwise_not isnan isinf threshold hardshrink softshrink logit nan_to_num leaky_relu trunc"
    ).split()
} | {"log_sigmoid": "logsigmoid", "sgn": "sign", "negative": "neg", "absolute": "abs", "special_expit": "sigmoid"}

BINARY: dict[str, str] = {
    n: n
    for n in (
        "add sub mul div pow maximum minimum fmod atan2 eq ne lt le gt ge logical_and logical_or logical_xor "
        "bitwise_and bitwise_or bitwise_xor"
    ).split()
} | {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "remainder": "mod",
    "floor_divide": "floor_div",
    "fmax": "maximum",
    "fmin": "minimum",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "not_equal": "ne",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "bitwise_left_shift": "shift",
    "bitwise_right_shift": "shift",
    "__lshift__": "shift",
    "__rshift__": "shift",
}

_UNARY_ATTRS = {
    "leaky_relu": {"slope": "negative_slope"},
    "gelu": {"approximate": "approximate"},
    "elu": {"alpha": "alpha"},
    "celu": {"alpha": "alpha"},
    "softplus": {"beta": "beta", "threshold": "threshold"},
    "threshold": {"threshold": "threshold", "value": "value"},
    "hardshrink": {"lambd": "lambd"},
    "softshrink": {"lambd": "lambd"},
}


def _name(c: Call) -> str:
    return str(c.node.target).split(".")[1]


@reads(*UNARY)
def _unary(c: Call) -> Spec | None:
    if not isinstance(c.node.meta.get("val"), torch.Tensor):
        return None
    op = UNARY[_name(c)]
    names = _UNARY_ATTRS.get(op, {})
    write = {k: putter(c, n) for k, n in names.items()}
    return Spec(op, slots("self"), {k: c.get(n) for k, n in names.items() if c.has(n)}, write=write)


@reads(*BINARY)
def _binary(c: Call) -> Spec | None:
    op = BINARY[_name(c)]
    second = next((n for n in ("other", "exponent") if c.has(n)), None)
    if second is None:
        return None
    attrs: dict[str, Any] = {}
    if op == "div" and c.get("rounding_mode") is not None:
        if c.get("rounding_mode") != "floor":
            return None
        op = "floor_div"
    if op == "shift":
        attrs["direction"] = "right" if "right" in _name(c) or "rshift" in _name(c) else "left"
    alpha = c.get("alpha", 1)
    if alpha != 1:
        attrs["alpha"] = alpha
    write = {"alpha": lambda v: c.put("alpha", v)} if c.has("alpha") else {}
    return Spec(op, slots("self", second), attrs, write=write)


@reads("rsub")
def _rsub(c: Call) -> Spec | None:
    return Spec("sub", slots("other", "self")) if c.get("alpha") == 1 else None


@reads("clamp", "clamp_min", "clamp_max", "hardtanh", "relu6", "clip")
def _clip(c: Call) -> Spec | None:
    name = _name(c)
    low, high = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    if name == "relu6":
        return Spec("clip", slots("self"), {"min": 0.0, "max": 6.0})
    bounds = {"min": c.get(low), "max": c.get(high)}
    if any(not isinstance(b, (int, float, type(None))) for b in bounds.values()):
        if name in ("clamp_min", "clamp_max") and c.overload == "Tensor":
            return Spec("maximum" if name == "clamp_min" else "minimum", slots("self", low if c.has(low) else high))
        return None
    write = {k: putter(c, n) for k, n in (("min", low), ("max", high)) if c.has(n)}
    return Spec("clip", slots("self"), {k: None if b is None else float(b) for k, b in bounds.items()}, write=write)


@reads("where")
def _where(c: Call) -> Spec | None:
    if not c.has("other"):
        return None
    return Spec("where", slots("condition", "self", "other"))


@reads("masked_fill")
def _masked_fill(c: Call) -> Spec | None:
    return Spec("masked_fill", slots("self", "mask", "value"))
