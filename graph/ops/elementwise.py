"""Rules of elementwise operators: what they tie under broadcasting, and how they treat zero and positive scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Node, Value
from ..space import UNIT, Space
from .table import OpRule, register, rule

if TYPE_CHECKING:
    from ..analysis import Analysis

LINEAR = ("neg", "identity")
HOMOGENEOUS = ("relu", "leaky_relu", "abs")
ZERO_KEEPING = (
    *("elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "tanh", "softsign", "erf", "expm1", "log1p"),
    *("sqrt", "sign", "floor", "ceil", "round", "sin", "tan", "asin", "atan", "sinh", "asinh", "square"),
    *("hardshrink", "softshrink", "tanhshrink", "nan_to_num"),
)
MONOTONE = frozenset(
    (
        *("relu", "leaky_relu", "elu", "selu", "celu", "sigmoid", "hardsigmoid", "tanh", "softplus", "softsign", "erf"),
        *("exp", "expm1", "log", "log1p", "sqrt", "floor", "ceil", "round", "logsigmoid", "identity"),
    )
)
OTHER = (
    *("sigmoid", "hardsigmoid", "softplus", "exp", "log", "rsqrt", "reciprocal", "cos", "acos", "cosh", "acosh"),
    *("atanh", "logical_not", "bitwise_not", "isnan", "isinf", "threshold", "logsigmoid", "logit"),
)


def _unary(linear: bool, homogeneous: bool, zero: bool) -> object:
    def infer(an: Analysis, node: Node) -> None:
        x = node.inputs[0]
        assert x is not None
        spaces = an.of(x)
        if not (linear or homogeneous):
            an.no_scale(spaces, node, f"{node.op} does not commute with scaling")
        keep = [z and zero for z in an.zeros(x)]
        for out in node.outputs:
            an.set(out, spaces, keep)
        if linear:
            an.keep_root(x, node.output, list(range(len(spaces))))

    return infer


for _name in (*LINEAR, *HOMOGENEOUS, *ZERO_KEEPING, *OTHER):
    _lin, _hom = _name in LINEAR, _name in HOMOGENEOUS
    _zero = _lin or _hom or _name in ZERO_KEEPING
    register(
        OpRule(
            _name,
            _unary(_lin, _hom, _zero),  # type: ignore[arg-type]
            linear=_lin,
            homogeneous=_lin or _hom,
            zero=_zero,
            monotone=_name in MONOTONE,
            elementwise=True,
        )
    )


@rule("clip", elementwise=True, monotone=True)
def _clip(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    lo, hi = node.attrs.get("min"), node.attrs.get("max")
    spaces = an.of(x)
    if not (lo == 0 and hi is None):
        an.no_scale(spaces, node, "clip does not commute with scaling")
    keeps = (lo is None or lo <= 0) and (hi is None or hi >= 0)
    an.set(node.output, spaces, [z and keeps for z in an.zeros(x)])


@rule("cast", elementwise=True, monotone=True)
def _cast(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces = an.of(x)
    to_float = node.output.dtype.startswith(("float", "bfloat"))
    if not to_float:
        an.no_scale(spaces, node, "cast to an integer type")
    an.set(node.output, spaces, an.zeros(x))
    if to_float:
        an.keep_root(x, node.output, list(range(len(spaces))))


# ---- several operands -------------------------------------------------------------------------------------------
def broadcast(an: Analysis, node: Node, operands: list[Value], out: Value) -> tuple[list[Space], list[list[int]]]:
    """Tie the operands' axes as numpy broadcasting does.

    Returns the output's spaces and, per output axis, the positions of the operands that carry it (size > 1).
    """
    assert out.hint is not None
    rank = len(out.hint)
    spaces: list[Space] = []
    carriers: list[list[int]] = []
    for axis in range(rank):
        have: list[int] = []
        result: Space = UNIT
        for k, v in enumerate(operands):
            own = an.of(v)
            i = axis - (rank - len(own))
            if i < 0 or own[i].size == 1:
                continue
            result = an.tie(result, own[i], node) if have else own[i]
            have.append(k)
        spaces.append(result)
        carriers.append(have)
    return spaces, carriers


def axis_zero(an: Analysis, v: Value, rank: int, axis: int) -> bool:
    """Whether operand ``v`` of a broadcast op is zero on slabs removed along the output's axis."""
    own = an.zeros(v)
    i = axis - (rank - len(own))
    return i >= 0 and own[i] and an.of(v)[i].size > 1


def is_zero_literal(v: Value) -> bool:
    return v.literal is not None and v.literal.size > 0 and bool((v.literal == 0).all())


@rule("add", "sub", "addn", "maximum", "minimum", "maxn", "minn", "meann")
def _additive(an: Analysis, node: Node) -> None:
    operands = [v for v in node.inputs if v is not None]
    out = node.output
    spaces, carriers = broadcast(an, node, operands, out)
    rank, zero = len(spaces), []
    for axis, have in enumerate(carriers):
        silent = [k for k in range(len(operands)) if k not in have and not is_zero_literal(operands[k])]
        if silent and have:
            an.no_scale(spaces[axis], node, f"{node.op} with an operand that does not carry the axis")
        zero.append(not silent and all(axis_zero(an, operands[k], rank, axis) for k in have))
    an.set(out, spaces, zero)
    if not all(an.is_const(v) for v in operands):
        for v in operands:
            an.as_activation(v, node)


@rule("mul", "div")
def _multiplicative(an: Analysis, node: Node) -> None:
    a, b = node.inputs
    assert a is not None and b is not None
    spaces, carriers = broadcast(an, node, [a, b], node.output)
    fixed = [an.is_const(a), an.is_const(b)]
    rank, zero = len(spaces), []
    for axis, have in enumerate(carriers):
        moving = [k for k in have if not fixed[k]]
        if node.op == "div" and (1 in moving or (have and not moving)):
            an.no_scale(spaces[axis], node, "the divisor carries the axis")
        elif len(moving) == 2:
            an.no_scale(spaces[axis], node, "product of two activations")
        numerators = have if node.op == "mul" else [k for k in have if k == 0]
        zero.append(any(axis_zero(an, (a, b)[k], rank, axis) for k in numerators))
    an.set(node.output, spaces, zero)
    if fixed[0] != fixed[1]:
        # A stored gain carries the axis but need not change when data are scaled: exponent 0.
        k = 0 if fixed[0] else 1
        v = (a, b)[k]
        carried_by_other = (b, a)[k]
        for i in range(len(an.of(v))):
            axis = i + rank - len(an.of(v))
            j = axis - (rank - len(an.of(carried_by_other)))
            only_here = j < 0 or an.of(carried_by_other)[j].size == 1
            an.role(v, i, 1 if only_here and (k == 1 or node.op == "mul") else 0, node)
    elif fixed[0]:
        for src, other in ((a, b), (b, a)):
            if other.literal is not None and other.literal.size == 1 and (src is a or node.op == "mul"):
                an.keep_root(src, node.output, list(range(len(an.of(src)))))


@rule("pow", "mod", "fmod", "floor_div", "atan2", "eq", "ne", "lt", "le", "gt", "ge")
@rule("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor", "shift")
def _nonlinear(an: Analysis, node: Node) -> None:
    operands = [v for v in node.inputs if v is not None]
    spaces, _ = broadcast(an, node, operands, node.output)
    an.no_scale(spaces, node, f"{node.op} does not commute with scaling")
    power = operands[1].literal if node.op == "pow" and len(operands) > 1 else None
    if power is not None and power.size == 1 and float(power.reshape(-1)[0]) > 0:
        an.set(node.output, spaces, an.zeros(operands[0]))
    else:
        an.set(node.output, spaces, False)


@rule("where")
def _where(an: Analysis, node: Node) -> None:
    cond, x, y = node.inputs
    assert cond is not None and x is not None and y is not None
    spaces, _ = broadcast(an, node, [cond, x, y], node.output)
    rank = len(spaces)
    zero = []
    for axis in range(rank):
        sides = [is_zero_literal(v) or axis_zero(an, v, rank, axis) for v in (x, y)]
        zero.append(all(sides))
        carried = all(is_zero_literal(v) or _carries(an, v, rank, axis) for v in (x, y))
        if not carried or _carries(an, cond, rank, axis):
            an.no_scale(spaces[axis], node, "where chooses between values that do not scale alike")
    an.set(node.output, spaces, zero)
    for v in (x, y):
        an.as_activation(v, node)


def _carries(an: Analysis, v: Value, rank: int, axis: int) -> bool:
    own = an.of(v)
    i = axis - (rank - len(own))
    return i >= 0 and own[i].size > 1


@rule("masked_fill")
def _masked_fill(an: Analysis, node: Node) -> None:
    operands = [v for v in node.inputs[:2] if v is not None]
    spaces, _ = broadcast(an, node, operands, node.output)
    an.no_scale(spaces, node, "masked_fill does not commute with scaling")
    an.set(node.output, spaces, False)


@rule("prelu", homogeneous=True, zero=True, elementwise=True)
def _prelu(an: Analysis, node: Node) -> None:
    x, slope = node.inputs
    assert x is not None and slope is not None
    spaces, own = an.of(x), an.of(slope)
    torch_form = node.origin.startswith("aten") and len(own) == 1 and len(spaces) > 1
    pairs = [(1, 0)] if torch_form else [(len(spaces) - len(own) + i, i) for i in range(len(own))]
    for axis, i in pairs:
        if own[i].size > 1:
            an.tie(spaces[axis], own[i], node)
            an.role(slope, i, 0, node)
    an.set(node.output, spaces, an.zeros(x))


@rule("glu")
def _glu(an: Analysis, node: Node) -> None:
    from ..refine import cut

    x = node.inputs[0]
    assert x is not None
    spaces, axis = list(an.of(x)), node.attrs["axis"]
    first, second = cut(spaces[axis], spaces[axis].size // 2)
    an.tie(first, second, node)
    an.no_scale(spaces, node, "gate is not linear")
    spaces[axis] = first
    an.set(node.output, spaces, an.zeros(x))
