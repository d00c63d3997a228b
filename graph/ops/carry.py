"""How an array laid over the axes of a value passes the operators that only move indices, forwards and backwards.

An array lies over a value when it has the value's rank and each of its axes has length 1 (the same for every index) or
the value's length. The analysis (analysis.py) answers the same question for whole graphs at once, with expressions that
operators refine and tie; rewriting would outdate them at every step, they know sizes by one example only, and they hold
one axis at a time. Carrying reads one operator, works on symbolic shapes, and takes arrays over several axes; a test
holds the two to the same answer for every operator that moves indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..ir import Dim, Node, Value

LARGEST = 1 << 24
"""Elements up to which an array is spread over axes that a reshape merges or cuts."""


class Stuck(Exception):
    """The array does not lie over the other side; the message says why."""


Carry = Callable[[Node, int, int, np.ndarray, float], np.ndarray]
_FORWARD: dict[str, Carry] = {}
_BACKWARD: dict[str, Carry] = {}
PICKING = ("slice", "select", "unbind", "split", "flip", "roll", "concat", "gather")


def moves(op: str) -> bool:
    """Whether every output element of the op is one element of an operand, found by its indices alone."""
    return op in _FORWARD or op in PICKING


def register(forward: Carry, backward: Carry, *ops: str) -> None:
    """Add the two functions ``(node, operand, output, array, fill) -> array`` of some ops."""
    for op in ops:
        _FORWARD[op], _BACKWARD[op] = forward, backward


def forward(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    """The array over an output that says for each element what ``array`` says of the operand's element it is.

    ``fill`` stands at elements that come from elsewhere (another operand). Raises Stuck.
    """
    return (_take if node.op in PICKING else _FORWARD[node.op])(node, operand, output, array, fill)


def backward(node: Node, operand: int, output: int, array: np.ndarray, fill: float, spare: bool) -> np.ndarray:
    """The array over an operand which, carried forward, is ``array`` (as far as that output shows it).

    Elements that the output does not show: anything, or ``fill`` if ``spare`` (somebody else reads them). Raises Stuck.
    """
    if node.op in PICKING:
        return _untake(node, operand, output, array, fill, spare or len(node.outputs) > 1)
    return _BACKWARD[node.op](node, operand, output, array, fill)


def dims(value: Value | None) -> tuple[Dim, ...]:
    """The shape of a value. Raises Stuck where its rank is unknown."""
    if value is None or value.shape is None:
        raise Stuck("a shape is unknown")
    return value.shape


def compress(array: np.ndarray, axes: Sequence[int] | None = None) -> np.ndarray:
    """The same array with length 1 on every axis along which it does not change."""
    for axis in range(array.ndim) if axes is None else axes:
        if array.shape[axis] > 1:
            first = array[(slice(None),) * axis + (slice(0, 1),)]
            if (array == first).all():
                array = first
    return array


def align(array: np.ndarray, rank: int) -> np.ndarray:
    """With leading axes of length 1 up to ``rank``, as numpy broadcasting reads it."""
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


# ---- renaming axes ---------------------------------------------------------------------------------------------
def _same(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return array


def _transpose(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return array.transpose(node.attrs["perm"])


def _untranspose(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return array.transpose(np.argsort(node.attrs["perm"]))


def _drop_axes(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return np.squeeze(array, tuple(node.attrs["axes"]))


def _new_axes(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return np.expand_dims(array, tuple(node.attrs["axes"]))


register(_same, _same, "identity")
register(_transpose, _untranspose, "transpose")
register(_drop_axes, _new_axes, "squeeze")
register(_new_axes, _drop_axes, "unsqueeze")


# ---- reshape ---------------------------------------------------------------------------------------------------
def _reshape(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return _regroup(array, dims(node.inputs[0]), dims(node.output))


def _unreshape(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return _regroup(array, dims(node.output), dims(node.inputs[0]))


def _regroup(array: np.ndarray, before: tuple[Dim, ...], after: tuple[Dim, ...]) -> np.ndarray:
    """Piece by piece between the cuts that both shapes share; a piece that the array does not vary on stays 1."""
    wide: list[int] = []
    target: list[int] = []
    touched: list[int] = []
    cuts = _cuts(before, after)
    for (i, j), (i2, j2) in zip(cuts, cuts[1:], strict=False):
        if all(n == 1 for n in array.shape[i:i2]):
            wide += [1] * (i2 - i)
            target += [1] * (j2 - j)
            continue
        old, new = before[i:i2], after[j:j2]
        if not all(isinstance(n, int) for n in (*old, *new)):
            raise Stuck("the reshape cuts or merges the axis with one whose length is not fixed")
        touched += range(len(target), len(target) + len(new))
        wide += [n for n in old if isinstance(n, int)]
        target += [n for n in new if isinstance(n, int)]
    if math.prod(wide) > LARGEST:
        raise Stuck("the reshape spreads the map over too many elements")
    return compress(np.broadcast_to(array, wide).reshape(target), touched)


def _cuts(before: tuple[Dim, ...], after: tuple[Dim, ...]) -> list[tuple[int, int]]:
    """Pairs of positions at which the shapes have as many elements before them, or behind them, for every symbol."""
    cuts = [(0, 0)]
    end = (len(before), len(after))
    while cuts[-1] != end:
        i, j = cuts[-1]
        steps = [(a, b) for a in range(i, end[0] + 1) for b in range(j, end[1] + 1) if (a, b) != (i, j)]
        steps.sort(key=lambda step: step[0] + step[1])
        cuts.append(next((s for s in steps if _level(before, s[0], after, s[1])), end))
    return cuts


def _level(before: tuple[Dim, ...], i: int, after: tuple[Dim, ...], j: int) -> bool:
    return _extent(before[:i]) == _extent(after[:j]) or _extent(before[i:]) == _extent(after[j:])


def _extent(some: Sequence[Dim]) -> tuple[int, list[str]]:
    """The product of some dimensions, in a form that compares equal only where it is equal for every symbol."""
    return math.prod(d for d in some if isinstance(d, int)), sorted(d for d in some if isinstance(d, str))


register(_reshape, _unreshape, "reshape")


# ---- copies ----------------------------------------------------------------------------------------------------
def _expand(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return align(array, len(dims(node.output)))


def _unexpand(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    own = dims(node.inputs[0])
    lead = array.ndim - len(own)
    if any(n != 1 for n in array.shape[:lead]) or any(
        n != 1 and d != n for n, d in zip(array.shape[lead:], own, strict=True)
    ):
        raise Stuck("the map tells copies apart")
    return array.reshape(array.shape[lead:])


def _repeat(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    if node.op == "repeat_interleave":
        axis, times = node.attrs["axis"], node.attrs["repeats"]
        return array if array.shape[axis] == 1 else np.repeat(array, times, axis)
    array = align(array, len(dims(node.output)))
    counts = [times if n != 1 else 1 for n, times in zip(array.shape, node.attrs["repeats"], strict=True)]
    if None in counts:
        raise Stuck("the number of copies is not fixed")
    return np.tile(array, counts)


def _unrepeat(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    own = dims(node.inputs[0])
    lead = array.ndim - len(own)
    if any(n != 1 for n in array.shape[:lead]):
        raise Stuck("the map tells copies apart")
    array = np.asarray(array.reshape(array.shape[lead:]))
    for axis, n in enumerate(array.shape):
        size = own[axis]
        if n == 1 or size == n:
            continue
        if not isinstance(size, int):
            raise Stuck("the number of copies is not fixed")
        if node.op == "tile":
            copies = array.reshape(*array.shape[:axis], n // size, size, *array.shape[axis + 1 :])
            at = axis
        else:
            copies = array.reshape(*array.shape[:axis], size, n // size, *array.shape[axis + 1 :])
            at = axis + 1
        first = copies.take([0], at)
        if not (copies == first).all():
            raise Stuck("the map tells copies apart")
        array = first.squeeze(at)
    return array


register(_expand, _unexpand, "expand")
register(_repeat, _unrepeat, "tile", "repeat_interleave")


# ---- picking positions of an axis --------------------------------------------------------------------------------
def taken(node: Node, operand: int, output: int) -> dict[int, np.ndarray | None]:
    """Per axis of the operand that the op picks from: the position each output position shows, -1 where none.

    None where that is known at run time only.
    """
    attrs, found = node.attrs, node.inputs[operand]
    shape = dims(found)

    def length(axis: int) -> int | None:
        n = shape[axis]
        return n if isinstance(n, int) else None

    if node.op == "slice":
        result: dict[int, np.ndarray | None] = {}
        for axis, start, end, step in zip(attrs["axes"], attrs["starts"], attrs["ends"], attrs["steps"], strict=True):
            n, size = length(axis), dims(node.output)[axis]
            picks = None if n is None or start is None or step is None else np.arange(n)[slice(start, end, step)]
            result[axis] = picks if picks is not None and len(picks) == size else None
        return result
    if node.op in ("select", "unbind", "split", "flip", "roll", "concat"):
        axes = attrs["axes"] if node.op in ("flip", "roll") else [attrs["axis"]]
        result = {}
        for k, axis in enumerate(axes):
            n = length(axis)
            result[axis] = None if n is None else _picks(node, operand, output, k, n)
        return result
    if node.op == "gather":
        data, axis = node.inputs[1], attrs["axis"]
        index, n = None if data is None else data.const(), length(axis)
        if index is None or n is None:
            return {axis: None}
        flat = index.astype(np.int64).reshape(-1)
        return {axis: np.where(flat < 0, flat + n, flat)}
    raise Stuck(f"{node.op} is not followed")


def _picks(node: Node, operand: int, output: int, k: int, n: int) -> np.ndarray | None:
    attrs = node.attrs
    if node.op == "select":
        index = attrs["index"]
        return None if index is None else np.array([index % n])
    if node.op == "unbind":
        return np.array([output])
    if node.op == "split":
        start = sum(attrs["sizes"][:output])
        return np.arange(start, start + attrs["sizes"][output])
    if node.op == "flip":
        return np.arange(n)[::-1]
    if node.op == "roll":
        shift = attrs["shifts"][k]
        return None if shift is None else np.roll(np.arange(n), shift)
    sizes = [dims(v)[attrs["axis"]] for v in node.inputs]
    if not all(isinstance(m, int) for m in sizes):
        return None
    index = np.full(sum(m for m in sizes if isinstance(m, int)), -1)
    start = sum(m for m in sizes[:operand] if isinstance(m, int))
    index[start : start + n] = np.arange(n)
    return index


def _take(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    for axis, picks in taken(node, operand, output).items():
        constant = array.shape[axis] == 1
        if constant and (node.op != "concat" or (array == fill).all()):
            continue
        if picks is None:
            raise Stuck("which positions are picked is known at run time only")
        shown = array if constant else array.take(np.maximum(picks, 0), axis)
        seen = (picks >= 0).reshape(-1, *[1] * (array.ndim - axis - 1))
        array = np.where(seen, shown, fill)
    return _landed(node, array)


def _landed(node: Node, array: np.ndarray) -> np.ndarray:
    """Axes that select, unbind and gather drop or replace, once positions have been picked."""
    if node.op in ("select", "unbind"):
        return array.squeeze(node.attrs["axis"])
    if node.op == "gather":
        index, axis = dims(node.inputs[1]), node.attrs["axis"]
        inner = [1] * len(index)
        if array.shape[axis] != 1:
            inner = [n if isinstance(n, int) else 1 for n in index]
        return array.reshape(*array.shape[:axis], *inner, *array.shape[axis + 1 :])
    return array


def _lifted(node: Node, array: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_landed`."""
    if node.op in ("select", "unbind"):
        return np.expand_dims(array, node.attrs["axis"])
    if node.op == "gather":
        index, axis = dims(node.inputs[1]), node.attrs["axis"]
        rows = array.shape[axis : axis + len(index)]
        if any(n != 1 for n in rows):
            wanted = [n for n in index if isinstance(n, int)]
            if len(wanted) != len(index):
                raise Stuck("the number of rows is not fixed")
            array = np.broadcast_to(array, (*array.shape[:axis], *wanted, *array.shape[axis + len(index) :]))
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + len(index) :])
    return array


def _untake(node: Node, operand: int, output: int, array: np.ndarray, fill: float, spare: bool) -> np.ndarray:
    array = _lifted(node, array)
    shape = dims(node.inputs[operand])
    for axis, picks in taken(node, operand, output).items():
        if array.shape[axis] == 1 and (node.op == "concat" or not spare or (array == fill).all()):
            continue  # the same for every position, picked or not
        n = shape[axis]
        if picks is None or not isinstance(n, int):
            raise Stuck("which positions are picked is known at run time only")
        if node.op == "concat":
            array = array.take(np.flatnonzero(picks >= 0), axis)
            continue
        wide = np.broadcast_to(array, (*array.shape[:axis], len(picks), *array.shape[axis + 1 :]))
        made = np.full((*array.shape[:axis], n, *array.shape[axis + 1 :]), float(fill))
        at: tuple[Any, ...] = (*[slice(None)] * axis, picks)
        made[at] = wide
        if not (made[at] == wide).all():
            raise Stuck("the map tells copies apart")
        array = made
    return array


def _stack(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    axis, array = node.attrs["axis"], np.expand_dims(array, node.attrs["axis"])
    if (array == fill).all():
        return array
    others = [array if k == operand else np.full_like(array, fill) for k in range(len(node.inputs))]
    return np.concatenate(others, axis)


def _unstack(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    axis = node.attrs["axis"]
    return array.squeeze(axis) if array.shape[axis] == 1 else array.take(operand, axis)


register(_stack, _unstack, "stack")


# ---- channels and pixels -----------------------------------------------------------------------------------------
def _shuffle(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    """A map per channel passes where the channels that become one channel's pixels agree."""
    return _per_channel(array, node, joined=True)


def _unshuffle(node: Node, operand: int, output: int, array: np.ndarray, fill: float) -> np.ndarray:
    return _per_channel(array, node, joined=False)


def _per_channel(array: np.ndarray, node: Node, joined: bool) -> np.ndarray:
    axis, pixels = array.ndim - 3, node.attrs["factor"] ** 2
    if array.shape[-2:] != (1, 1):
        raise Stuck(f"{node.op} moves pixels")
    if array.shape[axis] == 1:
        return array
    inner = node.attrs.get("mode", "crd") == "crd"  # the pixels count inside the channels, else outside
    if not joined:
        return np.repeat(array, pixels, axis) if inner else np.concatenate([array] * pixels, axis)
    shape = (-1, pixels) if inner else (pixels, -1)
    parts = array.reshape(*array.shape[:axis], *shape, 1, 1)
    first = parts.take([0], axis + 1 if inner else axis)
    if not (parts == first).all():
        raise Stuck("the map tells pixels of one channel apart")
    return first.reshape(*array.shape[:axis], -1, 1, 1)


register(_shuffle, _unshuffle, "pixel_shuffle")
register(_unshuffle, _shuffle, "pixel_unshuffle")
