"""How an affine map passes an operator: ``op(A(x)) == A'(op(x))``, or the reason why no such A' exists.

Where the indices go is the operator table's business (``graph/ops/carry.py``), what it declares of the arithmetic too
(linear, positively homogeneous, elementwise). Here stands what is left: which maps an operator with several operands,
a pool or a reduction lets pass.
"""

from __future__ import annotations

import math

import numpy as np

from ...graph.ir import Node
from ...graph.ops.carry import Stuck, align, backward, forward, moves
from ...graph.ops.table import get_rule
from .affine import Affine, Refusal, Why, constant, lay
from .bilinear import BILINEAR, bilinear_down, bilinear_up

WINDOWS = ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool")
REDUCTIONS = ("mean", "sum", "amax", "amin")
EXTREMA = ("maximum", "minimum", "maxn", "minn")

Maps = list[tuple[int, Affine]]
"""(operand or output, the map on it)."""


def down(node: Node, position: int, affine: Affine) -> Maps | Refusal:
    """The maps on the outputs of ``node`` that do what ``affine`` does on its operand ``position``."""
    try:
        return _down(node, position, affine)
    except Stuck as stuck:
        return Refusal(f"the map does not pass {node.op}: {stuck}", node.name, Why.COMMUTE)


def up(node: Node, output: int, affine: Affine, shared: bool) -> list[Maps] | Refusal:
    """Ways to have, instead of ``affine`` on an output of ``node``, maps on its operands; the likeliest first.

    ``shared``: the operand has other readers, so that what this node does not read of it must stay.
    """
    try:
        return _up(node, output, affine, shared)
    except Stuck as stuck:
        return Refusal(f"the map does not pass {node.op}: {stuck}", node.name, Why.COMMUTE)


# ---- forward -----------------------------------------------------------------------------------------------------
def _down(node: Node, position: int, affine: Affine) -> Maps | Refusal:
    op = node.op
    if op == "gather" and position == 0 and not _picks_fixed(node) and node.attrs["axis"] in affine.axes:
        return Refusal("the map acts on the axis that is indexed at run time", node.name, Why.COMMUTE)
    if moves(op) and (position == 0 or op in ("concat", "stack")):
        return [(k, _moved(node, position, k, affine)) for k in range(len(node.outputs))]
    if op == "where":
        return Refusal("where chooses between this and another value", node.name, Why.COMMUTE)
    if op in ("add", "sub"):
        return _down_sum(node, position, affine)
    if op in ("mul", "div"):
        return _down_product(node, position, affine)
    if op in BILINEAR:
        return bilinear_down(node, position, affine)
    if position != 0:
        return Refusal(f"{node.name} reads it as operand {position}", node.name, Why.COMMUTE)
    if op in REDUCTIONS:
        return _reduced(node, affine)
    allowed = _elementwise(node, affine)
    return allowed if isinstance(allowed, Refusal) else [(0, allowed)]


def _moved(node: Node, position: int, output: int, affine: Affine) -> Affine:
    return Affine(
        forward(node, position, output, affine.scale, 1.0), forward(node, position, output, affine.shift, 0.0)
    )


def _picks_fixed(node: Node) -> bool:
    index = node.input(1)
    return index is not None and index.is_const


def _down_sum(node: Node, position: int, affine: Affine) -> Maps | Refusal:
    if affine.has_scale:
        return Refusal(f"the other operand of {node.op} would not be scaled", node.name, Why.COMMUTE)
    rank = _rank(node)
    factor = float(node.attrs.get("alpha", 1.0)) if position == 1 else 1.0
    sign = -factor if node.op == "sub" and position == 1 else factor
    return [(0, Affine.of(1.0, sign * align(affine.shift, rank), rank))]


def _down_product(node: Node, position: int, affine: Affine) -> Maps | Refusal:
    rank = _rank(node)
    other = constant(node, 1 - position)
    if node.op == "div" and position == 1:
        if affine.has_shift or not affine.scale.all():
            return Refusal("a divisor lets only factors pass", node.name, Why.COMMUTE)
        return [(0, Affine.of(1.0 / align(affine.scale, rank), 0.0, rank))]
    shift: np.ndarray | float = 0.0
    if affine.has_shift:
        if other is None:
            return Refusal(f"{node.op} with a value computed at run time lets no shift pass", node.name, Why.COMMUTE)
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = align(affine.shift, rank) * (other if node.op == "mul" else 1.0 / other)
        if not np.isfinite(shift).all():
            return Refusal("the shift becomes infinite", node.name, Why.RANGE)
    return [(0, Affine.of(align(affine.scale, rank), shift, rank))]


def _reduced(node: Node, affine: Affine) -> Maps | Refusal:
    axes = _axes(node)
    if set(axes) & set(affine.axes):
        return Refusal(f"{node.op} reduces the channels", node.name, Why.COMMUTE)
    if (blocked := _extremum(node, affine)) is not None:
        return blocked
    scale, shift = affine.scale, affine.shift * (_count(node, axes) if node.op == "sum" and affine.has_shift else 1.0)
    if not node.attrs.get("keepdims", False):
        scale, shift = scale.squeeze(tuple(axes)), shift.squeeze(tuple(axes))
    return [(0, Affine(scale, shift))]


def _axes(node: Node) -> list[int]:
    x = node.inputs[0]
    if x is None or x.rank is None:
        raise Stuck("a rank is unknown")
    return sorted(a % x.rank for a in node.attrs.get("axes") or range(x.rank))


def _count(node: Node, axes: list[int]) -> float:
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    sizes = [x.shape[a] for a in axes]
    if not all(isinstance(n, int) for n in sizes):
        raise Stuck("the number of summed elements is not fixed")
    return float(math.prod(n for n in sizes if isinstance(n, int)))


def _extremum(node: Node, affine: Affine) -> Refusal | None:
    if "max" in node.op or "min" in node.op:
        if not affine.positive:
            return Refusal(f"{node.op} commutes with positive scales only, and some are not", node.name, Why.SIGN)
    return None


def _rank(node: Node) -> int:
    if node.output.rank is None:
        raise Stuck("a rank is unknown")
    return node.output.rank


def _elementwise(node: Node, affine: Affine) -> Affine | Refusal:
    """Operators of one operand that keep the map as it is, forwards and backwards."""
    op, attrs = node.op, node.attrs
    rule = get_rule(op)
    if op == "neg":
        return Affine(affine.scale, -affine.shift)
    if op == "clip":
        if attrs.get("min") != 0 or attrs.get("max") is not None:
            return Refusal("the map does not commute with clip", node.name, Why.COMMUTE)
        return _homogeneous(node, affine)
    if rule is not None and rule.elementwise and rule.homogeneous and not rule.linear:
        return _homogeneous(node, affine)
    if op == "pad":
        return _padded(node, affine)
    if op in WINDOWS:
        return _window(node, affine)
    if op == "resize":
        if set(attrs["axes"]) & set(affine.axes):
            return Refusal("resize mixes the axis", node.name, Why.COMMUTE)
        return affine
    return Refusal(f"the map does not commute with {op}", node.name, Why.COMMUTE)


def _homogeneous(node: Node, affine: Affine) -> Affine | Refusal:
    if affine.has_shift:
        return Refusal(f"a shift does not commute with {node.op}", node.name, Why.COMMUTE)
    if not affine.positive:
        return Refusal(f"{node.op} commutes with positive scales only, and some are not", node.name, Why.SIGN)
    return affine


def _padded(node: Node, affine: Affine) -> Affine | Refusal:
    pads = node.attrs["pads"]
    if any((lo != 0 or hi != 0) and a in affine.axes for a, (lo, hi) in enumerate(pads)):
        return Refusal("the padding adds channels", node.name, Why.BORDER)
    if node.attrs["mode"] == "constant" and (affine.has_shift or node.attrs.get("value") or node.dynamic):
        if all(lo == 0 and hi == 0 for lo, hi in pads):
            return affine
        return Refusal("the padded border would be shifted too", node.name, Why.BORDER)
    return affine


def _window(node: Node, affine: Affine) -> Affine | Refusal:
    op, attrs = node.op, node.attrs
    x = node.inputs[0]
    if (blocked := _extremum(node, affine)) is not None:
        return blocked
    if any(extra.uses or extra.is_output for extra in node.outputs[1:]) and not affine.positive:
        return Refusal("the positions of the maxima are read", node.name, Why.SIGN)
    padded = any(lo or hi for lo, hi in attrs.get("padding") or ())
    if op == "avg_pool" and affine.has_shift and (padded or attrs.get("ceil_mode") or attrs.get("ceil")):
        return Refusal("the padded border would be shifted too", node.name, Why.BORDER)
    spatial = len(attrs.get("kernel") or attrs.get("output_size") or ())
    if x is None or x.rank is None or not spatial or any(a >= x.rank - spatial for a in affine.axes):
        return Refusal(f"{op} slides over that axis", node.name, Why.COMMUTE)
    return affine


# ---- backward ----------------------------------------------------------------------------------------------------
def _up(node: Node, output: int, affine: Affine, shared: bool) -> list[Maps] | Refusal:
    op = node.op
    if op in ("concat", "stack"):
        return [[(k, _unmoved(node, k, output, affine, shared)) for k in range(len(node.inputs))]]
    if moves(op):
        return [[(0, _unmoved(node, 0, output, affine, shared))]]
    if op in ("add", "sub"):
        return _up_sum(node, affine)
    if op in ("mul", "div"):
        return _up_product(node, affine)
    if op in BILINEAR:
        return bilinear_up(node, affine)
    if op in EXTREMA or op == "where":
        return _up_choice(node, affine)
    if output != 0:
        return Refusal(f"the map is on output {output} of {op}", node.name, Why.COMMUTE)
    if op in REDUCTIONS:
        return _unreduced(node, affine)
    allowed = _elementwise(node, affine)
    return allowed if isinstance(allowed, Refusal) else [[(0, allowed)]]


def _unmoved(node: Node, position: int, output: int, affine: Affine, shared: bool) -> Affine:
    return Affine(
        backward(node, position, output, affine.scale, 1.0, shared),
        backward(node, position, output, affine.shift, 0.0, shared),
    )


def _up_sum(node: Node, affine: Affine) -> list[Maps] | Refusal:
    """The scale goes to both operands, the shift to one of them."""
    if float(node.attrs.get("alpha", 1.0)) != 1.0:
        return Refusal(f"{node.op} scales its operand by alpha", node.name, Why.COMMUTE)
    ways: list[Maps] = []
    refusal: Refusal | None = None
    order = sorted(range(2), key=lambda k: not _is_const(node, k))
    for taker in order if affine.has_shift else order[:1]:
        maps: Maps = []
        for k in order if affine.has_scale else (taker,):
            sign = -1.0 if node.op == "sub" and k == 1 else 1.0
            shift = sign * affine.shift if k == taker else np.zeros((1,) * affine.rank)
            laid = _lay(node, k, affine.scale, shift)
            if isinstance(laid, Refusal):
                refusal = laid
                break
            maps.append((k, laid))
        else:
            ways.append(maps)
    return ways if ways or refusal is None else refusal


def _up_product(node: Node, affine: Affine) -> list[Maps] | Refusal:
    if affine.has_shift:
        return Refusal(f"a shift does not commute with {node.op}", node.name, Why.COMMUTE)
    ways: list[Maps] = []
    refusal: Refusal | None = None
    for k in sorted(range(2), key=lambda k: not _is_const(node, k)):
        scale = affine.scale
        if node.op == "div" and k == 1:
            if not _is_const(node, 1) or not scale.all():
                continue
            scale = 1.0 / scale
        laid = _lay(node, k, scale, affine.shift)
        if isinstance(laid, Refusal):
            refusal = laid
        else:
            ways.append([(k, laid)])
    return ways if ways or refusal is None else refusal


def _up_choice(node: Node, affine: Affine) -> list[Maps] | Refusal:
    if node.op != "where" and (blocked := _extremum(node, affine)) is not None:
        return blocked
    maps: Maps = []
    for k in range(1 if node.op == "where" else 0, len(node.inputs)):
        laid = _lay(node, k, affine.scale, affine.shift)
        if isinstance(laid, Refusal):
            return laid
        maps.append((k, laid))
    return [maps]


def _unreduced(node: Node, affine: Affine) -> list[Maps] | Refusal:
    axes = _axes(node)
    if (blocked := _extremum(node, affine)) is not None:
        return blocked
    scale, shift = affine.scale, affine.shift / (_count(node, axes) if node.op == "sum" and affine.has_shift else 1.0)
    if not node.attrs.get("keepdims", False):
        scale, shift = np.expand_dims(scale, tuple(axes)), np.expand_dims(shift, tuple(axes))
    return [[(0, Affine(scale, shift))]]


def _is_const(node: Node, k: int) -> bool:
    value = node.input(k)
    return value is not None and value.is_const


def _lay(node: Node, k: int, scale: np.ndarray, shift: np.ndarray) -> Affine | Refusal:
    value = node.input(k)
    assert value is not None
    parts = [lay(part, value, value.is_const) for part in (scale, shift)]
    for part in parts:
        if isinstance(part, Refusal):
            return Refusal(part.reason, node.name, part.why)
    return Affine(*(np.asarray(part) for part in parts))  # of scalars numpy makes no arrays
