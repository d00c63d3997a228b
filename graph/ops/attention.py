"""Rule of fused attention: heads, query-key dimension and value dimension as separate axes, grouped heads factored."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

from ..ir import Node
from ..refine import Conflict, factor
from ..space import norm
from .linear import contract
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis, Resize


def _update(re: Resize, node: Node) -> dict[str, Any]:
    q = node.inputs[0]
    assert q is not None
    last = len(re.analysis.of(q)) - 1
    before = re.analysis.of(q)[last].size
    if node.attrs.get("scale") is None and re.size(q, last) != before:
        # The default 1/sqrt(dim) would silently change with the dimension.
        return {"scale": 1.0 / sqrt(before)}
    return {}


@rule("sdpa", update=_update)
def _sdpa(an: Analysis, node: Node) -> None:
    q, k, v = node.inputs[:3]
    mask = node.input(3)
    assert q is not None and k is not None and v is not None
    rank = len(an.of(q))
    if rank < 3 or len(an.of(k)) != rank or len(an.of(v)) != rank:
        raise Conflict("attention operands of different rank")
    for axis in range(rank - 2):
        if axis == rank - 3 and node.attrs.get("gqa"):
            continue
        for other in (k, v):
            if an.of(other)[axis].size == an.of(q)[axis].size:
                an.tie(an.of(q)[axis], an.of(other)[axis], node)
    heads = rank - 3
    if node.attrs.get("gqa") and heads >= 0:
        kv = an.tie(an.of(k)[heads], an.of(v)[heads], node)
        outer, _ = factor(an.of(q)[heads], an.of(q)[heads].size // kv.size)
        an.tie(outer, kv, node)
    contract(an, node, q, rank - 1, k, rank - 1)
    length = an.tie(an.of(k)[rank - 2], an.of(v)[rank - 2], node)
    an.freeze(length, "normalized by softmax", node, ("select",))
    if node.attrs.get("causal"):
        an.freeze([length, an.of(q)[rank - 2]], "causal mask depends on positions", node)
    for t in (q, k):
        an.no_scale(an.of(t), node, "softmax does not commute with scaling")
    an.no_scale(an.of(v)[:-1], node, "softmax does not commute with scaling")
    out = [norm(e) for e in [*an.of(q)[:-1], an.of(v)[rank - 1]]]
    if mask is not None:
        own = an.of(mask)
        logits = [*an.of(q)[:-1], length]
        for i in range(len(own)):
            axis = rank - len(own) + i
            if own[i].size > 1:
                an.tie(logits[axis], own[i], node)
    zero = [False] * rank
    zero[rank - 1] = an.zeros(v)[rank - 1]
    if heads >= 0:
        zero[heads] = an.zeros(v)[heads]
    an.set(node.output, out, zero)
    for extra in node.outputs[1:]:
        if extra.hint is not None:
            an.freeze(an.of(extra), "auxiliary output of attention", node)
