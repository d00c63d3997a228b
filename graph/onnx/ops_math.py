"""Arithmetic in canonical terms: elementwise ops, reductions, searches, einsum."""

from __future__ import annotations

from .ops import PLAIN, Canon, Native, Rule, axes_of, axis_of, rule

PLAIN.update({
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Softplus": "softplus", "Softsign": "softsign",
    "HardSwish": "hardswish", "Mish": "mish", "Erf": "erf", "Exp": "exp", "Log": "log", "Sqrt": "sqrt",
    "Reciprocal": "reciprocal", "Abs": "abs", "Neg": "neg", "Sign": "sign", "Floor": "floor", "Ceil": "ceil",
    "Round": "round", "Sin": "sin", "Cos": "cos", "Tan": "tan", "Asin": "asin", "Acos": "acos", "Atan": "atan",
    "Sinh": "sinh", "Cosh": "cosh", "Asinh": "asinh", "Acosh": "acosh", "Atanh": "atanh", "Not": "logical_not",
    "BitwiseNot": "bitwise_not", "IsNaN": "isnan",
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Equal": "eq", "Less": "lt",
    "LessOrEqual": "le", "Greater": "gt", "GreaterOrEqual": "ge", "And": "logical_and", "Or": "logical_or",
    "Xor": "logical_xor", "BitwiseAnd": "bitwise_and", "BitwiseOr": "bitwise_or", "BitwiseXor": "bitwise_xor",
    "PRelu": "prelu", "Where": "where",
})  # fmt: skip

VARIADIC = {"Sum": ("add", "addn"), "Max": ("maximum", "maxn"), "Min": ("minimum", "minn"), "Mean": ("meann", "meann")}

REDUCTIONS = {
    "ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "amax", "ReduceMin": "amin", "ReduceProd": "prod",
    "ReduceLogSumExp": "logsumexp", "ReduceL1": "norm", "ReduceL2": "norm",
}  # fmt: skip

PARAMETERS: dict[str, tuple[str, dict[str, tuple[str, float]]]] = {
    "LeakyRelu": ("leaky_relu", {"slope": ("alpha", 0.01)}),
    "Elu": ("elu", {"alpha": ("alpha", 1.0)}),
    "Celu": ("celu", {"alpha": ("alpha", 1.0)}),
    "Selu": ("selu", {"alpha": ("alpha", 1.67326319217681884765625), "gamma": ("gamma", 1.05070102214813232421875)}),
    "HardSigmoid": ("hardsigmoid", {"alpha": ("alpha", 0.2), "beta": ("beta", 0.5)}),
    "ThresholdedRelu": ("threshold", {"threshold": ("alpha", 1.0), "value": ("#", 0.0)}),
}
"""native op -> (canonical op, canonical attribute -> (native attribute, default))"""


def _parametrized(op: str, names: dict[str, tuple[str, float]]) -> Rule:
    return lambda c: Canon(op, (0,), {canonical: c.attr(name, default) for canonical, (name, default) in names.items()})


for _native, (_op, _names) in PARAMETERS.items():
    rule(_native)(_parametrized(_op, _names))


@rule(*VARIADIC)
def variadic(c: Native) -> Canon:
    binary, nary = VARIADIC[c.node.op_type]
    n = len(c.every())
    if n == 1:
        return Canon("identity", (0,), {"fn": "identity"})
    return Canon(binary if n == 2 else nary, c.every())


@rule("Gelu")
def gelu(c: Native) -> Canon:
    return Canon("gelu", (0,), {"approximate": c.attr("approximate", "none")})


@rule("Swish")
def swish(c: Native) -> Canon | None:
    return Canon("silu", (0,)) if c.attr("alpha", 1.0) == 1.0 else None


@rule("Shrink")
def shrink(c: Native) -> Canon | None:
    bias, lambd = c.attr("bias", 0.0), c.attr("lambd", 0.5)
    if bias == 0.0:
        return Canon("hardshrink", (0,), {"lambd": lambd})
    return Canon("softshrink", (0,), {"lambd": lambd}) if bias == lambd else None


@rule("IsInf")
def is_inf(c: Native) -> Canon | None:
    both = c.attr("detect_negative", 1) and c.attr("detect_positive", 1)
    return Canon("isinf", (0,)) if both else None


@rule("Mod")
def mod(c: Native) -> Canon:
    return Canon("fmod" if c.attr("fmod", 0) else "mod", (0, 1))


@rule("BitShift")
def shift(c: Native) -> Canon:
    return Canon("shift", (0, 1), {"direction": c.attr("direction").lower()})


@rule("Clip")
def clip(c: Native) -> Canon | None:
    if c.opset < 11:
        return Canon("clip", (0,), {"min": c.attr("min"), "max": c.attr("max")})
    bounds: dict[str, float | None] = {}
    for i, name in ((1, "min"), (2, "max")):
        data = c.const(i) if c.has(i) else None
        if data is None and c.has(i):
            return None
        bounds[name] = None if data is None else data.ravel()[0].item()
    return Canon("clip", (0,), bounds, c.sizes(1, 2))


@rule(*REDUCTIONS)
def reduction(c: Native) -> Canon | None:
    rank = c.rank(0)
    axes = c.axes_operand("axes", 1)
    if rank is None or (axes is None and c.has(1)):
        return None
    if not axes:
        if c.attr("noop_with_empty_axes", 0):
            return Canon("identity", (0,), {"fn": "identity"}, c.sizes(1)) if _neutral(c) else None
        axes = list(range(rank))
    attrs = {"axes": axes_of(axes, rank), "keepdims": bool(c.attr("keepdims", 1))}
    if c.node.op_type in ("ReduceL1", "ReduceL2"):
        attrs["p"] = 1 if c.node.op_type == "ReduceL1" else 2
    return Canon(REDUCTIONS[c.node.op_type], (0,), attrs, c.sizes(1))


def _neutral(c: Native) -> bool:
    """Reducing over no axis changes nothing (it does for the norms: |x|)."""
    return c.node.op_type not in ("ReduceL1", "ReduceL2")


@rule("ArgMax", "ArgMin")
def argmax(c: Native) -> Canon | None:
    rank = c.rank(0)
    if rank is None:
        return None
    attrs = {"axis": axis_of(c.attr("axis", 0), rank), "keepdims": bool(c.attr("keepdims", 1))}
    return Canon(c.node.op_type.lower(), (0,), attrs)


@rule("CumSum")
def cumsum(c: Native) -> Canon | None:
    rank, axis = c.rank(0), c.const(1)
    if rank is None or axis is None:
        return None
    return Canon("cumsum", (0,), {"axis": axis_of(int(axis.ravel()[0]), rank)}, (1,))


@rule("TopK")
def topk(c: Native) -> Canon | None:
    rank = c.rank(0)
    return None if rank is None else Canon("topk", (0,), {"axis": axis_of(c.attr("axis", -1), rank)}, c.sizes(1))


@rule("Einsum")
def einsum(c: Native) -> Canon | None:
    equation = "".join(c.attr("equation").split())
    if "->" not in equation:
        counts = {x: equation.count(x) for x in equation if x.isalpha()}
        equation += (
            "->" + ("..." if "..." in equation else "") + "".join(sorted(x for x, n in counts.items() if n == 1))
        )
    lower = _lower(equation)
    return None if lower is None else Canon("einsum", c.every(), {"equation": lower})


def _lower(equation: str) -> str | None:
    """Letters renamed to lower case ones; None where more than 26 are used."""
    letters = [x for x in dict.fromkeys(equation) if x.isalpha()]
    if all(x.islower() for x in letters):
        return equation
    free = iter(x for x in "abcdefghijklmnopqrstuvwxyz" if x not in letters)
    renamed = {x: x if x.islower() else next(free, "") for x in letters}
    return None if "" in renamed.values() else "".join(renamed.get(x, x) for x in equation)
