"""Rules of operators that contract with a stored matrix: convolution, linear, matmul, einsum, embedding lookups."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir import Node, Value
from ..refine import Conflict, factor, permute
from ..space import UNIT, Space, fresh, make_prod, norm
from .elementwise import broadcast
from .shaping import reshape_spaces
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis, Resize


def contract(an: Analysis, node: Node, a: Value, i: int, b: Value, j: int) -> None:
    """Tie axis i of a with axis j of b, which are summed over together."""
    e = an.tie(an.of(a)[i], an.of(b)[j], node)
    fixed = [an.is_const(v) for v in (a, b)]
    if not any(fixed):
        an.no_scale(e, node, "contracted between two activations")
        if not (an.zeros(a)[i] or an.zeros(b)[j]):
            an.inexact(e, node, "contracted between activations that are not zero where masked")
    for v, axis, is_fixed in ((a, i, fixed[0]), (b, j, fixed[1])):
        if is_fixed:
            an.role(v, axis, -1, node)


def _groups(re: Resize, node: Node) -> dict[str, Any]:
    g = re.memo(node).get("G")
    if g is None:
        return {}
    size = re.size_of(g)
    return {} if size == node.attrs["groups"] else {"groups": size}


@rule("conv", update=_groups, linear=True)
def _conv(an: Analysis, node: Node) -> None:
    x, w = node.inputs[0], node.inputs[1]
    bias = node.input(2)
    assert x is not None and w is not None
    xs, ws = an.of(x), list(an.of(w))
    spatial = len(ws) - 2
    if len(xs) != spatial + 2:
        raise Conflict("convolution of an input without batch axis")
    groups, transposed = node.attrs["groups"], node.attrs.get("transposed", False)
    an.freeze(ws[2:], "kernel axis", node)
    an.freeze(xs[2:], "spatial axis of a convolution", node)
    if groups == 1:
        contract(an, node, x, 1, w, 0 if transposed else 1)
        out = ws[1 if transposed else 0]
        an.role(w, 1 if transposed else 0, 1, node)
    else:
        out = _grouped(an, node, x, w, groups, transposed)
    out = norm(out)
    if bias is not None:
        an.tie(out, an.of(bias)[0], node)
        an.role(bias, 0, 1, node)
    rest = [an.frozen(n, "spatial axis of a convolution", node) for n in (node.output.hint or ())[2:]]
    fixed = an.is_const(w) and (bias is None or an.is_const(bias))
    an.set(node.output, [xs[0], norm(out), *rest], [False, fixed, *[False] * len(rest)])
    an.no_scale(xs[0], node, "batch axis")


def _grouped(an: Analysis, node: Node, x: Value, w: Value, groups: int, transposed: bool) -> Space:
    """Channels are group x index: input C = G*Ci, output = G*Co; the weight holds G on its first axis only."""
    first, second = an.of(w)[0], an.of(w)[1]
    if transposed:
        an.tie(an.of(x)[1], first, node)
        g, ci = factor(first, first.size // groups)
        co = second
        out = make_prod([g, co])
        an.role(w, 0, -1, node, make_prod([fresh(groups), ci]))
        an.role(w, 1, 1, node)
    else:
        g, ci = factor(an.of(x)[1], an.of(x)[1].size // groups)
        g2, co = factor(first, first.size // groups)
        g = an.tie(g, g2, node)
        ci = an.tie(ci, second, node)
        out = make_prod([norm(g), norm(co)])
        an.role(w, 0, 1, node, make_prod([fresh(groups), norm(co)]))
        if ci.size > 1:
            an.role(w, 1, -1, node)
    if not (an.is_const(w)):
        an.no_scale(out, node, "convolution with a computed kernel")
    # A whole group scales input and output alike: exponent 0, but it is both produced and consumed here.
    an.role(w, 0, 0, node, make_prod([norm(g), fresh(first.size // groups)]))
    an.memo[node] = {"G": g}
    return out


@rule("linear", linear=True)
def _linear(an: Analysis, node: Node) -> None:
    x, w = node.inputs[0], node.inputs[1]
    bias = node.input(2)
    assert x is not None and w is not None
    o, k = (1, 0) if node.attrs.get("transposed_weight") else (0, 1)
    contract(an, node, x, len(an.of(x)) - 1, w, k)
    out = an.of(w)[o]
    an.role(w, o, 1, node)
    if bias is not None:
        own = an.of(bias)
        if own and own[-1].size > 1:
            out = an.tie(out, own[-1], node)
            an.role(bias, len(own) - 1, 1, node)
        elif out.size > 1:
            an.no_scale(out, node, "one bias for all outputs")
    rest = an.of(x)[:-1]
    if bias is not None:
        an.no_scale(rest, node, "a bias is added")
    fixed = an.is_const(w) and (bias is None or (an.is_const(bias) and bias.hint != (1,)))
    zero = [z and bias is None for z in an.zeros(x)[:-1]]
    an.set(node.output, [*rest, norm(out)], [*zero, fixed])


@rule("matmul", linear=True)
def _matmul(an: Analysis, node: Node) -> None:
    a, b = node.inputs
    assert a is not None and b is not None
    ra, rb = len(an.of(a)), len(an.of(b))
    contract(an, node, a, ra - 1, b, max(rb - 2, 0))
    out_rank = len(node.output.hint or ())
    tail: list[Space] = []
    zero_tail: list[bool] = []
    fixed = [an.is_const(a), an.is_const(b)]
    if ra > 1:
        tail.append(an.of(a)[ra - 2])
        zero_tail.append(an.zeros(a)[ra - 2])
        an.role(a, ra - 2, 1, node)
    if rb > 1:
        tail.append(an.of(b)[rb - 1])
        zero_tail.append(an.zeros(b)[rb - 1])
        an.role(b, rb - 1, 1, node)
    batch: list[Space] = []
    zero: list[bool] = []
    n_batch = out_rank - len(tail)
    for axis in range(n_batch):
        have = [
            (v, i)
            for v, r in ((a, ra), (b, rb))
            if 0 <= (i := axis - (n_batch - (r - 2))) < r - 2 and an.of(v)[i].size > 1
        ]
        e = an.of(have[0][0])[have[0][1]] if have else UNIT
        if len(have) == 2:
            e = an.tie(e, an.of(have[1][0])[have[1][1]], node)
            if not any(fixed):
                an.no_scale(e, node, "product of two activations")
        zero.append(any(an.zeros(v)[i] for v, i in have))
        batch.append(e)
    an.set(node.output, [*batch, *tail], [*zero, *zero_tail])


@rule("einsum", linear=True)
def _einsum(an: Analysis, node: Node) -> None:
    left, right = node.attrs["equation"].split("->")
    operands = [v for v in node.inputs if v is not None]
    if "." in left:
        raise Conflict("einsum with an ellipsis")
    where: dict[str, list[tuple[Value, int]]] = {}
    for term, v in zip(left.split(","), operands, strict=True):
        for i, label in enumerate(term):
            where.setdefault(label, []).append((v, i))
    spaces: dict[str, Space] = {}
    zero: dict[str, bool] = {}
    for label, places in where.items():
        wide = [(v, i) for v, i in places if an.of(v)[i].size > 1]
        e: Space = UNIT
        for v, i in wide:
            e = an.tie(e, an.of(v)[i], node) if e.size > 1 else an.of(v)[i]
        spaces[label] = e
        moving = [p for p in wide if not an.is_const(p[0])]
        zero[label] = any(an.zeros(v)[i] for v, i in wide)
        summed = label not in right
        if len(moving) > 1:
            an.no_scale(e, node, "shared by two activations")
        if summed and moving and len(moving) == len(wide):
            if not zero[label]:
                an.inexact(e, node, "summed over activations that are not zero where masked")
            if len(wide) == 1:
                an.no_scale(e, node, "summed over")
        for v, i in wide:
            if an.is_const(v):
                an.role(v, i, -1 if summed else 0 if moving else 1, node)
    an.set(node.output, [norm(spaces[label]) for label in right], [zero[label] for label in right])


def counts_up(index: np.ndarray) -> bool:
    """Whether an index tensor holds 0, 1, 2, ... in order: taking by it lays an axis out in the tensor's shape."""
    flat = index.reshape(-1)
    # most index tables differ from it at their end already
    return bool(flat.size) and bool(flat[-1] == flat.size - 1) and bool((flat == np.arange(flat.size)).all())


def _gather_update(re: Resize, node: Node) -> dict[str, Any]:
    index = re.memo(node).get("index")
    if index is None:
        return {}
    data, axis = node.inputs[0], node.attrs["axis"]
    assert data is not None
    if index.ndim != 1:  # positions 0, 1, 2, ... laid out anew: as many as are left
        sizes = re.shape(node.output)[axis : axis + index.ndim]
        return (
            {} if sizes == list(index.shape) else {"input:1": np.arange(prod(sizes), dtype=index.dtype).reshape(sizes)}
        )
    if not re.touched(data, axis) and not re.touched(node.output, axis):
        return {}
    rank_of = np.full(re.analysis.of(data)[axis].size, -1)
    kept = re.kept(data, axis)
    rank_of[kept] = np.arange(len(kept))
    return {"input:1": rank_of[index[re.kept(node.output, axis)]].astype(index.dtype)}


@rule("gather", update=_gather_update, linear=True)
def _gather(an: Analysis, node: Node) -> None:
    data, indices = node.inputs
    assert data is not None and indices is not None
    axis = node.attrs["axis"]
    spaces, own = list(an.of(data)), an.of(indices)
    zero = an.zeros(data)
    index = indices.const() if indices.is_const and own else None
    middle: list[Space]
    if index is not None and len(own) > 1:
        index = index if index.size == spaces[axis].size and not an.is_const(data) and counts_up(index) else None
    if index is not None and len(own) > 1:
        an.freeze(list(own), "length of an index list", node)
        middle, middle_zero, _ = reshape_spaces(an, node, [spaces[axis]], [zero[axis]], list(index.shape))
        an.memo[node] = {"index": index}
    elif index is not None and index.size:
        an.freeze(list(own), "length of an index list", node)
        index = np.where(index < 0, index + spaces[axis].size, index)
        try:
            middle = [permute(spaces[axis], index)]
            an.freeze(middle, "reordered by an index list", node, ("permute",))
            an.memo[node] = {"index": index}
        except Conflict as c:
            an.freeze(spaces[axis], f"indexed by a constant list: {c}", node)
            middle = [an.frozen(len(index), "indexed by a constant list", node)]
        middle_zero = [zero[axis]]
    else:
        an.freeze(spaces[axis], "indexed by data", node)
        middle, middle_zero = list(own), [False] * len(own)
        an.freeze(middle, "positions of an index tensor", node, ("scale",))
    for i in range(len(spaces)):
        if i != axis:
            an.role(data, i, 1, node)
    an.set(
        node.output,
        [*spaces[:axis], *middle, *spaces[axis + 1 :]],
        [*zero[:axis], *middle_zero, *zero[axis + 1 :]],
    )


@rule("gather_elements")
def _gather_elements(an: Analysis, node: Node) -> None:
    data, indices = node.inputs
    assert data is not None and indices is not None
    axis, out = node.attrs["axis"], []
    for i, (e, own) in enumerate(zip(an.of(data), an.of(indices), strict=True)):
        if i == axis:
            an.freeze([e, own], "indexed by data", node)
            out.append(own)
        elif e.size == own.size:
            # Entry i of the index reads entry i of the data: the two run in step.
            out.append(an.tie(e, own, node))
        else:
            an.freeze([e, own], "read up to the length of an index tensor", node)
            out.append(own)
    an.no_scale(out, node, "positions of an index tensor")
    an.set(node.output, [norm(e) for e in out])


@rule("gather_nd")
def _gather_nd(an: Analysis, node: Node) -> None:
    data, *indices = node.inputs
    assert data is not None
    axes = list(node.attrs["axes"])
    spaces, zero = an.of(data), an.zeros(data)
    an.freeze([spaces[a] for a in axes], "indexed by data", node)
    given = [v for v in indices if v is not None]
    for v in given:
        an.freeze(list(an.of(v)), "positions of an index tensor", node)
    batch = node.attrs.get("batch")
    if batch:
        an.freeze(spaces[:batch], "runs in step with an index tensor", node)
    # One tensor of packed coordinates spends its last axis on them, and its first on the batch.
    count = max(len(an.of(v)) for v in given) - (0 if batch is None else 1 + batch)
    passing = [i for i in range(len(spaces)) if i not in axes]
    # numpy puts the index axes where the indexed axes were if those stand together, in front otherwise.
    at = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0
    assert node.output.hint is not None
    middle = [an.frozen(n, "positions of an index tensor", node) for n in node.output.hint[at : at + count]]
    for i in passing:
        an.role(data, i, 1, node)
    before, after = passing[:at], passing[at:]
    an.set(
        node.output,
        [*[spaces[i] for i in before], *middle, *[spaces[i] for i in after]],
        [*[zero[i] for i in before], *[False] * count, *[zero[i] for i in after]],
    )


__all__ = ["broadcast", "contract"]


@rule("matmul_nbits", linear=True)
def _matmul_nbits(an: Analysis, node: Node) -> None:
    x, *stored = node.inputs
    assert x is not None
    reason = "its weight is packed in blocks of a few bits"
    spaces = list(an.of(x))
    an.freeze([spaces[-1], *(e for v in stored if v is not None for e in an.of(v))], reason, node)
    an.set(node.output, [*spaces[:-1], an.frozen(node.attrs["n"], reason, node)], [False] * len(spaces))
