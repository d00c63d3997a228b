"""Partial evaluation of the small tensors that carry sizes: every element is known, or depends on a dynamic dim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LIMIT = 1024
"""Tensors with more elements than this are data, not sizes, and are not evaluated."""


@dataclass(frozen=True)
class Elements:
    """The elements of a small tensor in two concrete worlds, and which of them are the same in every run.

    Attributes:
        a, b: the tensor under two different choices for the dynamic dimensions.
        known: per element, True where it depends on no dynamic dimension.
        sized: True if the tensor descends from a Shape node.
    """

    a: np.ndarray
    b: np.ndarray
    known: np.ndarray
    sized: bool = False

    @classmethod
    def constant(cls, data: np.ndarray) -> Elements:
        return cls(data, data, np.ones(data.shape, bool))

    @property
    def all_known(self) -> bool:
        """Asked of every operand of every node, so it is remembered (without the lock of ``cached_property``)."""
        known: bool | None = self.__dict__.get("_all_known")
        if known is None:
            known = self.__dict__["_all_known"] = bool(self.known.all())
        return known

    def ints(self) -> list[int | None]:
        """Flattened elements, None where unknown."""
        flags = self.known.ravel()
        return [int(v) if k else None for v, k in zip(self.a.ravel().tolist(), flags.tolist(), strict=True)]


Attrs = dict[str, Any]
Move = Callable[[Attrs, np.ndarray, Sequence[np.ndarray | None]], list[np.ndarray]]


def _ints(x: Any) -> list[int]:
    return [int(i) for i in np.asarray(x).ravel()]


def _operand(attrs: Attrs, name: str, rest: Sequence[np.ndarray | None], position: int) -> list[int] | None:
    """A list that is an attribute in old opsets and an operand in new ones."""
    if name in attrs:
        return _ints(attrs[name])
    value = rest[position] if position < len(rest) else None
    return None if value is None else _ints(value)


def _slice(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    starts, ends = _operand(attrs, "starts", rest, 0) or [], _operand(attrs, "ends", rest, 1) or []
    axes = _operand(attrs, "axes", rest, 2) or list(range(len(starts)))
    steps = _operand(attrs, "steps", rest, 3) or [1] * len(starts)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        n = x.shape[axis]
        if step < 0 and end < -n:
            index[axis] = slice(start, None, step)
        else:
            index[axis] = slice(start, end, step)
    return [x[tuple(index)]]


def _reshape(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    target = _operand(attrs, "shape", rest, 0) or []
    if not attrs.get("allowzero", 0):
        target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return [x.reshape(target)]


def _unsqueeze(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    axes = _operand(attrs, "axes", rest, 0) or []
    return [np.expand_dims(x, tuple(axes))]


def _squeeze(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    axes = _operand(attrs, "axes", rest, 0)
    return [np.squeeze(x, None if axes is None else tuple(axes))]


def _split(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    axis = attrs.get("axis", 0)
    sizes = _operand(attrs, "split", rest, 0)
    if sizes is None:
        parts, n = attrs["#outputs"], x.shape[axis]
        step = -(-n // parts)
        sizes = [min(step, n - i * step) for i in range(parts)]
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def _gather(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    return [np.take(x, np.asarray(rest[0]), axis=attrs.get("axis", 0))]


def _expand(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    shape = np.broadcast_shapes(x.shape, tuple(_ints(rest[0])))
    if np.prod(shape) > LIMIT:
        raise ValueError("too large")
    return [np.broadcast_to(x, shape)]


def _tile(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    if x.size * np.prod(_ints(rest[0])) > LIMIT:
        raise ValueError("too large")
    return [np.tile(x, _ints(rest[0]))]


def _flatten(attrs: Attrs, x: np.ndarray, rest: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    axis = attrs.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(int(np.prod(x.shape[:axis])), -1)]


MOVES: dict[str, Move] = {
    "Slice": _slice,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Split": _split,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "Flatten": _flatten,
    "Identity": lambda attrs, x, rest: [x],
    "Transpose": lambda attrs, x, rest: [np.transpose(x, attrs.get("perm"))],
}
"""Ops that only move elements of operand 0; the other operands say where to and must be known."""


def _div(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if np.issubdtype(np.result_type(x, y), np.integer):
        quotient = np.floor_divide(np.abs(x), np.abs(y))
        return (quotient * np.sign(x) * np.sign(y)).astype(x.dtype)
    return np.divide(x, y)


def _mod(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.mod(x, y)


ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _div,
    "Pow": lambda x, y: np.power(x, y).astype(x.dtype),
    "Min": lambda *xs: np.minimum.reduce(np.broadcast_arrays(*xs)),
    "Max": lambda *xs: np.maximum.reduce(np.broadcast_arrays(*xs)),
    "Neg": np.negative,
    "Abs": np.abs,
    "Sign": np.sign,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.rint,
    "Not": np.logical_not,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Equal": np.equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
}

REDUCE: dict[str, Callable[..., np.ndarray]] = {
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
}

EVALUATED = (
    frozenset(MOVES)
    | frozenset(ELEMENTWISE)
    | frozenset(REDUCE)
    | {
        "Concat",
        "Cast",
        "Where",
        "Range",
        "ConstantOfShape",
        "Mod",
    }
)


def evaluate(op: str, attrs: Attrs, inputs: Sequence[Elements | None]) -> list[Elements] | None:
    """Evaluate one op of default domain; ``attrs["#outputs"]`` is its number of outputs.

    Returns one Elements per output, or None where the op is not a size computation, an operand is missing, or the
    *length* of the result depends on a dynamic dimension.
    """
    if op not in EVALUATED:
        return None
    try:
        with np.errstate(all="ignore"):
            results = _evaluate(op, attrs, inputs)
    except (ValueError, IndexError, TypeError, ZeroDivisionError):
        return None  # operands do not fit: the file is wrong or the sizes are data, either way nothing is known
    if results is None or any(r.a.shape != r.b.shape or r.a.size > LIMIT for r in results):
        return None
    return results


def _evaluate(op: str, attrs: Attrs, inputs: Sequence[Elements | None]) -> list[Elements] | None:
    present = [e for e in inputs if e is not None]
    if not present or inputs[0] is None:
        return None
    sized = any(e.sized for e in present)
    first = inputs[0]
    if op in MOVES:
        rest = list(inputs[1:])
        if any(r is not None and not r.all_known for r in rest):
            return None
        plain = [None if r is None else r.a for r in rest]
        move = MOVES[op]
        parts = zip(
            move(attrs, first.a, plain), move(attrs, first.b, plain), move(attrs, first.known, plain), strict=True
        )
        return [Elements(np.asarray(a), np.asarray(b), np.asarray(k), sized) for a, b, k in parts]
    if len(present) != len(inputs):
        return None
    if op == "Concat":
        axis = attrs["axis"]
        a, b, k = (np.concatenate([getattr(e, f) for e in present], axis) for f in ("a", "b", "known"))
        return [Elements(a, b, k, sized)]
    if op == "Cast":
        to = attrs["#dtype"]
        return [Elements(first.a.astype(to), first.b.astype(to), first.known, sized)]
    if op == "Where":
        cond, x, y = present
        a, b = np.where(cond.a, x.a, y.a), np.where(cond.b, x.b, y.b)
        # A size is never negative, so "size == -1" chooses the same branch in both worlds though it is not `known`.
        settled = cond.known | (cond.a == cond.b)
        known = settled & np.where(cond.a, x.known, y.known)
        return [Elements(a, b, np.broadcast_to(known, a.shape), sized)]
    if op == "Range":
        if not all(e.all_known for e in present):
            return None
        start, limit, delta = (e.a.ravel()[0] for e in present)
        if delta == 0 or abs((limit - start) / delta) > LIMIT:
            return None
        return [Elements.constant(np.arange(start, limit, delta, dtype=first.a.dtype))]
    if op == "ConstantOfShape":
        if not first.all_known or int(np.prod(first.a)) > LIMIT:
            return None
        fill = attrs.get("value")
        data = np.full(tuple(_ints(first.a)), 0.0, np.float32) if fill is None else np.full(tuple(_ints(first.a)), fill)
        e = Elements.constant(data)
        return [Elements(e.a, e.b, e.known, sized)]
    if op == "Mod":
        function: Callable[..., np.ndarray] = np.fmod if attrs.get("fmod", 0) else _mod
        return _apply(function, present, sized)
    if op in REDUCE:
        return _reduce(op, attrs, present, sized)
    return _apply(ELEMENTWISE[op], present, sized)


def _apply(function: Callable[..., np.ndarray], present: Sequence[Elements], sized: bool) -> list[Elements]:
    a = np.asarray(function(*(e.a for e in present)))
    b = np.asarray(function(*(e.b for e in present)))
    known = np.logical_and.reduce(np.broadcast_arrays(*(e.known for e in present)))
    return [Elements(a, b, np.broadcast_to(known, a.shape), sized)]


def _reduce(op: str, attrs: Attrs, present: Sequence[Elements], sized: bool) -> list[Elements] | None:
    x = present[0]
    if any(not e.all_known for e in present[1:]):
        return None
    axes = _operand(attrs, "axes", [e.a for e in present[1:]], 0)
    if not axes:
        if attrs.get("noop_with_empty_axes", 0):
            return [x]
        axes = list(range(x.a.ndim))
    keep = bool(attrs.get("keepdims", 1))
    function = REDUCE[op]
    a, b = (np.asarray(function(v, axis=tuple(axes), keepdims=keep)).astype(v.dtype) for v in (x.a, x.b))
    known = np.asarray(np.all(x.known, axis=tuple(axes), keepdims=keep))
    return [Elements(a, b, known, sized)]
