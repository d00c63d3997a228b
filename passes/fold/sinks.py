"""What absorbs an affine map: constants, linear operators, norms, products with a constant.

``UP`` holds the operators that absorb a map on their output, ``DOWN`` those that absorb one on an operand. A function
of ``DOWN`` returns None where the map is gone, or what is left of it for the operator to let pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...graph.ir import Node
from ...graph.ops.carry import Stuck
from .affine import Affine, Refusal, Why, constant
from .bilinear import lay_letters, letters
from .edits import Edits, changeable
from .linear_sinks import linear_down, linear_up, shift_behind

if TYPE_CHECKING:
    from .walk import Walk

GROWN = 1 << 16
"""Elements to which a constant may grow that absorbs a map over more axes than its own."""
ARITHMETIC = ("add", "sub", "mul", "div")
BROADCASTING = ("add", "sub", "mul", "div", "maximum", "minimum", "maxn", "minn", "where")


def into_constant(edits: Edits, reader: Node, position: int, affine: Affine) -> Refusal | None:
    """A constant operand takes the map itself."""
    data = edits.current(reader, position)
    assert data is not None
    if (blocked := changeable(reader, position)) is not None:
        return blocked
    shape = np.broadcast_shapes(data.shape, affine.scale.shape, affine.shift.shape)
    while len(shape) > data.ndim and shape[0] == 1:
        shape = shape[1:]
    if shape != data.shape:
        if reader.op not in BROADCASTING:
            return Refusal(f"{reader.name} holds one number for many that the map tells apart", reader.name, Why.SHAPE)
        if np.prod(shape) > max(GROWN, data.size):
            return Refusal(f"the constant of {reader.name} would grow to {shape}", reader.name, Why.SIZE)
    edits.add(reader, position, lambda a: affine.on(a).reshape(shape))
    return None


# ---- norms -------------------------------------------------------------------------------------------------------
def _norm_up(walk: Walk, node: Node, affine: Affine) -> Refusal | None:
    """Gain and bias of a normalization: ``scale * (g * n + b) + shift``."""
    shape = gain_shape(node)
    if isinstance(shape, Refusal):
        return shape
    rank = affine.rank
    axes = (1,) if node.op in ("group_norm", "instance_norm") else tuple(node.attrs["axes"])
    if set(affine.axes) - set(axes):
        return Refusal(f"it acts on axes {affine.axes}, {node.name} has gains on {axes}", node.name, Why.COMMUTE)
    if affine.has_shift and node.op == "rms_norm":
        return Refusal(f"{node.name} has no bias", node.name, Why.COMMUTE)
    parts = [part.reshape([part.shape[a] for a in axes] if rank else []) for part in (affine.scale, affine.shift)]
    return _into_gain(walk.edits, node, parts[0], parts[1] if affine.has_shift else None, shape)


def _into_gain(
    edits: Edits, node: Node, scale: np.ndarray, shift: np.ndarray | None, shape: tuple[int, ...]
) -> Refusal | None:
    for position, default in ((1, np.ones(shape)), (2, np.zeros(shape))):
        value = node.input(position)
        if value is not None and not value.is_const:
            return Refusal(f"operand {position} of {node.name} is no constant", node.name, Why.NOT_CONSTANT)
        if value is not None and (constant(node, position) is None or not _spreads(node, position, shape)):
            return Refusal(f"{node.name} holds its gains in another shape", node.name, Why.SHAPE)
        offset = shift if position == 2 else None
        if position == 1 and (scale == 1.0).all():
            continue
        if position == 2 and value is None and offset is None and not _pending(edits, node, 2):
            continue
        edits.add(node, position, _gain_change(scale, offset, shape), default)
    return None


def _gain_change(scale: np.ndarray, offset: np.ndarray | None, shape: tuple[int, ...]) -> Callable[..., np.ndarray]:
    return lambda a: np.broadcast_to(a * scale + (0.0 if offset is None else offset), shape).copy()


def _spreads(node: Node, position: int, shape: tuple[int, ...]) -> bool:
    data = constant(node, position)
    assert data is not None
    try:
        return np.broadcast_shapes(data.shape, shape) == shape
    except ValueError:
        return False


def _pending(edits: Edits, node: Node, position: int) -> bool:
    return (node, position) in edits.slots()


def gain_shape(node: Node) -> tuple[int, ...] | Refusal:
    """The shape of a full gain of a normalization."""
    x = node.inputs[0]
    if x is None or x.shape is None:
        return Refusal(f"the shape of what {node.name} reads is unknown", node.name, Why.SHAPE)
    axes = (1,) if node.op in ("group_norm", "instance_norm", "batch_norm") else node.attrs["axes"]
    sizes = [x.shape[a] for a in axes]
    if not all(isinstance(n, int) for n in sizes):
        return Refusal(f"the normalized axes of {node.name} have no fixed length", node.name, Why.SHAPE)
    return tuple(n for n in sizes if isinstance(n, int))


def _batch_norm_up(walk: Walk, node: Node, affine: Affine) -> Refusal | None:
    shape = gain_shape(node)
    if isinstance(shape, Refusal):
        return shape
    if node.attrs.get("training"):
        return Refusal(f"{node.name} is in training mode", node.name, Why.TRAINING)
    vector = affine.vector(1, shape[0])
    if vector is None:
        return Refusal(f"it acts on axes {affine.axes}, {node.name} on axis 1", node.name, Why.COMMUTE)
    return _into_gain(walk.edits, node, vector[0], vector[1] if affine.has_shift else None, shape)


def _batch_norm_down(walk: Walk, node: Node, position: int, affine: Affine) -> Affine | Refusal | None:
    """``g (s x + t - m) / d + b  =  (g s) (x - m) / d + (b + (g / d) (t - m + s m))``, d the deviation."""
    shape = gain_shape(node)
    if isinstance(shape, Refusal) or position != 0:
        return shape if isinstance(shape, Refusal) else Refusal(f"{node.name} reads it as a statistic", node.name)
    if node.attrs.get("training"):
        return Refusal(f"{node.name} is in training mode", node.name, Why.TRAINING)
    vector, mean, var = affine.vector(1, shape[0]), constant(node, 3), constant(node, 4)
    if vector is None or mean is None or var is None:
        return Refusal(f"it does not act on the channels of {node.name} alone", node.name, Why.COMMUTE)
    gain = walk.edits.current(node, 1, np.ones(shape))
    if gain is None or (node.input(2) is not None and constant(node, 2) is None):
        return Refusal(f"a gain of {node.name} is no constant", node.name, Why.NOT_CONSTANT)
    scale, shift = vector
    offset = gain / np.sqrt(var + float(node.attrs["eps"])) * (shift - mean + scale * mean)
    walk.edits.add(node, 1, lambda a: a * scale, np.ones(shape))
    walk.edits.add(node, 2, lambda a: a + offset, np.zeros(shape))
    return None


def _dequantize_up(walk: Walk, node: Node, affine: Affine) -> Refusal | None:
    """``s * (scale * (q - zero)) = (s * scale) * (q - zero)``: the scales of a dequantized weight take a scale."""
    if affine.has_shift or not affine.positive:
        return Refusal(f"{node.name} takes positive scales only", node.name, Why.SIGN)
    data = walk.edits.current(node, 1)
    if data is None or node.attrs.get("block"):
        return Refusal(f"the scales of {node.name} are no constant vector", node.name, Why.NOT_CONSTANT)
    if (blocked := changeable(node, 1)) is not None:
        return blocked
    axis = node.attrs.get("axis")
    vector = affine.vector(0 if data.size == 1 or axis is None else axis % affine.rank, data.size)
    if (data.size == 1 and affine.axes) or vector is None:
        return Refusal(f"{node.name} has one scale for many that the map tells apart", node.name, Why.SHAPE)
    walk.edits.add(node, 1, lambda a: a * vector[0].reshape(a.shape))
    return None


# ---- arithmetic with a constant ------------------------------------------------------------------------------------
def _sum_down(walk: Walk, node: Node, position: int, affine: Affine) -> Affine | Refusal | None:
    """``(s x + t) + c = s (x + (t + c) / s)``: the constant takes the shift; a scale stands behind the sum."""
    other = 1 - position
    if len(node.inputs) != 2 or not _is_const(node, other) or float(node.attrs.get("alpha", 1.0)) != 1.0:
        return affine
    if affine.has_scale and not (np.abs(affine.scale) > 0).all():
        return Refusal(f"a scale of zero cannot stand behind {node.name}", node.name, Why.SIGN)
    sign = -1.0 if node.op == "sub" else 1.0
    inverse = 1.0 / affine.scale
    if not np.isfinite(inverse).all():
        return Refusal(f"the scale has no inverse for {node.name}", node.name, Why.RANGE)
    blocked = into_constant(walk.edits, node, other, Affine(inverse, sign * affine.shift * inverse))
    return blocked if blocked is not None else (walk.down(node.output, _scale_behind(node, affine)))


def _scale_behind(node: Node, affine: Affine) -> Affine:
    rank = node.output.rank
    assert rank is not None
    return Affine.of(affine.scale, 0.0, rank)


def _product_down(walk: Walk, node: Node, position: int, affine: Affine) -> Affine | Refusal | None:
    """``(s x + t) c = x (s c) + t c``: the constant takes the scale, what is left is a shift."""
    other = 1 - position
    rank = node.output.rank
    data = walk.edits.current(node, other) if _is_const(node, other) else None
    if data is None or rank is None:
        return affine
    scale = affine.scale
    if node.op == "div":
        if not scale.all() or (position == 1 and affine.has_shift):
            return affine
        scale = 1.0 / scale
    shift: np.ndarray | float = 0.0
    if affine.has_shift:
        with np.errstate(divide="ignore", invalid="ignore"):
            shift = affine.shift * data if node.op == "mul" else affine.shift / data
    mark = walk.edits.mark()
    if affine.has_scale and into_constant(walk.edits, node, other, Affine(scale, np.zeros_like(scale))) is not None:
        walk.edits.undo(mark)
        return affine
    left = Affine.of(1.0, shift, rank)
    if not left.finite:
        return Refusal("the shift becomes infinite", node.name, Why.RANGE)
    return walk.down(node.output, left)


def _is_const(node: Node, position: int) -> bool:
    value = node.input(position)
    return value is not None and value.is_const


# ---- products with a constant that are not `linear` ------------------------------------------------------------------
def _bilinear_down(walk: Walk, node: Node, position: int, affine: Affine) -> Affine | Refusal | None:
    """``(s x + t) W = x (s W) + t W`` where W has every axis on which the scale differs."""
    if len(node.inputs) != 2 or not _is_const(node, 1 - position):
        return affine
    try:
        operands, out = letters(node)
    except Stuck as stuck:
        return Refusal(f"the map does not pass {node.op}: {stuck}", node.name, Why.COMMUTE)
    part = lay_letters(affine.scale, operands[position], operands[1 - position])
    if affine.has_shift:
        return _shift_down(walk, node, position, affine, operands, out)
    if part is None:
        return affine
    return into_constant(walk.edits, node, 1 - position, Affine(part, np.zeros((1,) * part.ndim)))


def _shift_down(
    walk: Walk, node: Node, position: int, affine: Affine, operands: list[list[str]], out: list[str]
) -> Affine | Refusal | None:
    data = walk.edits.current(node, 1 - position)
    x = node.inputs[position]
    assert data is not None and x is not None and x.shape is not None
    mine, other = operands[position], operands[1 - position]
    summed = [name for name in mine if name in other and name not in out]
    if any(affine.shift.shape[i] != 1 and name not in (*summed, *out) for i, name in enumerate(mine)):
        return Refusal(f"{node.op} sums over the axis", node.name, Why.COMMUTE)
    if set(mine) - set(out) - set(summed) - {""}:
        return Refusal(f"{node.op} sums its operand on its own", node.name, Why.COMMUTE)
    names = {name: chr(97 + i) for i, name in enumerate(dict.fromkeys(n for n in (*mine, *other, *out) if n))}
    wide = list(affine.shift.shape)
    for i, name in enumerate(mine):
        if name in summed:
            wide[i] = data.shape[other.index(name)]
    shift = np.broadcast_to(affine.shift, wide)
    kept = [i for i, name in enumerate(mine) if name and (shift.shape[i] != 1 or name in summed)]
    kept_other = [i for i, name in enumerate(other) if name]
    left = "".join(names[mine[i]] for i in kept)
    right = "".join(names[other[i]] for i in kept_other)
    shown = [name for name in out if names.get(name, "?") in left + right]
    extra = np.einsum(
        f"{left},{right}->{''.join(names[name] for name in shown)}",
        shift.reshape([shift.shape[i] for i in kept]),
        data.reshape([data.shape[i] for i in kept_other]),
    )
    sizes = iter(extra.shape)
    extra = extra.reshape([next(sizes) if name in shown else 1 for name in out])
    part = lay_letters(affine.scale, mine, other)
    if part is None:
        return Refusal(f"{node.op} sums over the axis", node.name, Why.COMMUTE)
    if affine.has_scale:
        blocked = into_constant(walk.edits, node, 1 - position, Affine(part, np.zeros((1,) * part.ndim)))
        if blocked is not None:
            return blocked
    return shift_behind(walk, node, extra)


UP: dict[str, Callable[[Walk, Node, Affine], Refusal | None]] = {
    "conv": linear_up,
    "linear": linear_up,
    "batch_norm": _batch_norm_up,
    "dequantize": _dequantize_up,
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm"), _norm_up),
}
DOWN: dict[str, Callable[[Walk, Node, int, Affine], Affine | Refusal | None]] = {
    "conv": linear_down,
    "linear": linear_down,
    "batch_norm": _batch_norm_down,
    "add": _sum_down,
    "sub": _sum_down,
    "mul": _product_down,
    "div": _product_down,
    "matmul": _bilinear_down,
    "einsum": _bilinear_down,
}
