"""Rules of operators that move slabs without mixing them: transpose, concat, split, slice, pad, flip, roll."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir import Node, Value
from ..refine import Conflict, cut, factor, permute, slice_space
from ..space import UNIT, Space, Sum, fresh, make_sum, norm
from .elementwise import is_zero_literal
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis, Resize


@rule("transpose", linear=True)
def _transpose(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    perm, spaces, zero = node.attrs["perm"], an.of(x), an.zeros(x)
    an.set(node.output, [spaces[p] for p in perm], [zero[p] for p in perm])
    an.keep_root(x, node.output, list(perm))


def _join_others(an: Analysis, node: Node, values: list[Value], skip: int | None) -> tuple[list[Space], list[bool]]:
    """Tie every axis but ``skip`` over all values; a slab is zero where it is zero in each of them."""
    spaces = list(an.of(values[0]))
    zero = list(an.zeros(values[0]))
    for v in values[1:]:
        for i, e in enumerate(an.of(v)):
            zero[i] = zero[i] and an.zeros(v)[i]
            if i != skip:
                spaces[i] = an.tie(spaces[i], e, node)
    return [norm(e) for e in spaces], zero


@rule("concat", linear=True)
def _concat(an: Analysis, node: Node) -> None:
    values = [v for v in node.inputs if v is not None and (v.hint != (0,) or node.output.hint == (0,))]
    axis = node.attrs["axis"]
    spaces, zero = _join_others(an, node, values, axis)
    spaces[axis] = norm(make_sum([norm(an.of(v)[axis]) for v in values]))
    an.set(node.output, spaces, zero)
    if not all(an.is_const(v) for v in values):
        for v in values:
            if not is_zero_literal(v):
                an.as_activation(v, node)


@rule("stack", linear=True)
def _stack(an: Analysis, node: Node) -> None:
    values = [v for v in node.inputs if v is not None]
    axis = node.attrs["axis"]
    spaces, zero = _join_others(an, node, values, None)
    spaces.insert(axis, UNIT if len(values) == 1 else Sum((UNIT,) * len(values)))
    zero.insert(axis, False)
    an.set(node.output, spaces, zero)
    for v in values:
        an.as_activation(v, node)


def _split_sizes(re: Resize, node: Node) -> dict[str, Any]:
    axis = node.attrs["axis"]
    sizes = [re.size(v, axis) for v in node.outputs]
    return {} if sizes == list(node.attrs["sizes"]) else {"sizes": sizes}


@rule("split", update=_split_sizes, linear=True)
def _split(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    axis, rest = node.attrs["axis"], norm(an.of(x)[node.attrs["axis"]])
    zero = an.zeros(x)
    for k, (v, size) in enumerate(zip(node.outputs, node.attrs["sizes"], strict=True)):
        piece = rest
        if k + 1 < len(node.outputs) and 0 < size < rest.size:
            piece, rest = cut(rest, size)
        elif size == 0:
            piece = Sum(())
        spaces = [norm(e) for e in an.of(x)]
        spaces[axis] = piece
        an.set(v, spaces, zero)


@rule("unbind", linear=True)
def _unbind(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    axis = node.attrs["axis"]
    _isolate_all(an.of(x)[axis])
    zero = [z for i, z in enumerate(an.zeros(x)) if i != axis]
    for v in node.outputs:
        an.set(v, [norm(e) for i, e in enumerate(an.of(x)) if i != axis], zero)


def _isolate_all(e: Space) -> None:
    for i in range(e.size - 1):
        slice_space(e, i, i + 1)


def _select_update(re: Resize, node: Node) -> dict[str, Any]:
    x, axis, index = node.inputs[0], node.attrs["axis"], node.attrs["index"]
    assert x is not None
    if not re.touched(x, axis):
        return {}
    index = index + re.analysis.of(x)[axis].size if index < 0 else index
    new = int(np.searchsorted(np.sort(re.kept(x, axis)), index))
    return {} if new == node.attrs["index"] else {"index": new}


@rule("select", update=_select_update, linear=True)
def _select(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    axis, index = node.attrs["axis"], node.attrs["index"]
    n = an.of(x)[axis].size
    if index is None:
        an.freeze(an.of(x)[axis], "indexed at run time", node)
    else:
        index = index + n if index < 0 else index
        slice_space(an.of(x)[axis], index, index + 1)
        # The isolated index must survive, and its place among the others must not move.
        an.freeze(an.of(x)[axis], "one index is picked by position", node, ("permute",))
    keep: list[int | None] = [i for i in range(len(an.of(x))) if i != axis]
    zero = an.zeros(x)
    an.set(node.output, [norm(an.of(x)[i]) for i in keep if i is not None], [zero[i] for i in keep if i is not None])
    an.keep_root(x, node.output, keep)


def _slice_update(re: Resize, node: Node) -> dict[str, Any]:
    x = node.inputs[0]
    assert x is not None
    starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
    for k, axis in enumerate(node.attrs["axes"]):
        if not re.touched(x, axis) or node.attrs["steps"][k] != 1:
            continue
        kept, n = re.kept(x, axis), re.analysis.of(x)[axis].size
        if starts[k] is not None:
            at = starts[k] + n if starts[k] < 0 else starts[k]
            starts[k] = int((kept < at).sum())
        if ends[k] is not None:
            at = ends[k] + n if ends[k] < 0 else min(ends[k], n)
            ends[k] = int((kept < at).sum())
    if starts == list(node.attrs["starts"]) and ends == list(node.attrs["ends"]):
        return {}
    return {"starts": starts, "ends": ends}


@rule("slice", update=_slice_update, linear=True)
def _slice(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces, zero = list(an.of(x)), an.zeros(x)
    origin: list[int | None] = list(range(len(spaces)))
    for axis, start, _end, step in zip(
        node.attrs["axes"], node.attrs["starts"], node.attrs["ends"], node.attrs["steps"], strict=True
    ):
        e, size = spaces[axis], node.output.hint[axis]
        if size == e.size and step == 1:
            continue
        origin[axis] = None
        if start is None or step is None:
            an.freeze(e, "sliced at run time", node)
            spaces[axis] = an.frozen(size, "sliced at run time", node)
            continue
        start = max(start + e.size, 0) if start < 0 else min(start, e.size)
        if step == 1:
            spaces[axis] = slice_space(e, start, start + size)
        elif step == -1 and size == e.size:
            spaces[axis] = permute(e, np.arange(e.size)[::-1])
            an.freeze(spaces[axis], "reversed", node, ("permute",))
        elif step > 1 and e.size % step == 0 and start < step and size == e.size // step:
            outer, inner = factor(e, step)
            slice_space(inner, start, start + 1)
            spaces[axis] = norm(outer)
        else:
            an.freeze(e, "sliced with a step", node)
            spaces[axis] = an.frozen(size, "sliced with a step", node)
    an.set(node.output, [norm(e) for e in spaces], zero)
    an.keep_root(x, node.output, origin)


def _pad_update(re: Resize, node: Node) -> dict[str, Any]:
    memo = re.memo(node).get("pads")
    if memo is None:
        return {}
    pads = [tuple(p) for p in node.attrs["pads"]]
    new = [
        pads[i]
        if memo[i] is None
        else tuple(re.size_of(e) if n > 0 else n for e, n in zip(memo[i], pads[i], strict=True))
        for i in range(len(pads))
    ]
    return {} if new == pads else {"pads": new}


@rule("pad", update=_pad_update)
def _pad(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces, zero = list(an.of(x)), list(an.zeros(x))
    value = node.attrs.get("value")
    memo: list[Any] = [None] * len(spaces)
    for axis, (lo, hi) in enumerate(node.attrs["pads"]):
        if not lo and not hi:
            continue
        e, size = spaces[axis], node.output.hint[axis]
        if node.attrs.get("mode", "constant") != "constant" or lo is None or hi is None:
            an.freeze(e, "padded from its own positions", node)
            spaces[axis] = an.frozen(size, "padded from its own positions", node)
            continue
        if value != 0:
            an.no_scale(e, node, "padded with a value that does not scale")
            zero[axis] = False
        if lo < 0 or hi < 0:
            e = slice_space(e, max(-lo, 0), e.size - max(-hi, 0))
            an.freeze(e, "cropped by a negative pad", node)
        before, after = fresh(lo) if lo > 0 else Sum(()), fresh(hi) if hi > 0 else Sum(())
        memo[axis] = (before, after)
        spaces[axis] = make_sum([p for p in (before, norm(e), after) if p.size])
    an.memo[node] = {"pads": memo}
    an.set(node.output, [norm(e) for e in spaces], zero)


@rule("flip", linear=True)
def _flip(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces = list(an.of(x))
    for axis in node.attrs["axes"]:
        spaces[axis] = permute(spaces[axis], np.arange(spaces[axis].size)[::-1])
        an.freeze(spaces[axis], "reversed", node, ("permute",))
    an.set(node.output, spaces, an.zeros(x))


def _roll_update(re: Resize, node: Node) -> dict[str, Any]:
    memo = re.memo(node).get("tails")
    if memo is None:
        return {}
    new = [re.size_of(t) if t is not None else s for t, s in zip(memo, node.attrs["shifts"], strict=True)]
    x = node.inputs[0]
    assert x is not None
    old = [s % max(re.analysis.of(x)[a].size, 1) for s, a in zip(node.attrs["shifts"], node.attrs["axes"], strict=True)]
    return {} if new == old else {"shifts": new}


@rule("roll", update=_roll_update, linear=True)
def _roll(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces = list(an.of(x))
    tails: list[Space | None] = []
    for axis, shift in zip(node.attrs["axes"], node.attrs["shifts"], strict=True):
        n = spaces[axis].size
        if shift is None:
            raise Conflict("rolled by a run-time amount")
        k = shift % n
        if k == 0:
            tails.append(None)
            continue
        head, tail = cut(spaces[axis], n - k)
        tails.append(tail)
        spaces[axis] = make_sum([norm(tail), norm(head)])
    an.memo[node] = {"tails": tails} if all(t is not None for t in tails) else {}
    an.set(node.output, [norm(e) for e in spaces], an.zeros(x))
