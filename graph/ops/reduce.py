"""Rules of reductions and of operators that look along an axis: sums, means, extrema, sorting, cumulative sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Node
from ..space import UNIT, Space
from .table import rule

if TYPE_CHECKING:
    from ..analysis import Analysis

_DEGREE_ONE = ("mean", "sum", "amax", "amin", "norm", "std")


@rule("mean", "sum", "amax", "amin", "prod", "logsumexp", "norm", "var", "std", "all", "any")
def _reduce(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces, zero = an.of(x), an.zeros(x)
    axes = {a % max(len(spaces), 1) for a in node.attrs.get("axes") or range(len(spaces))}
    for a in axes:
        # Zero slabs add nothing to a sum or a norm; a mean divides by the new count, an extremum may have been zero.
        if not (node.op in ("sum", "norm", "any") and zero[a]):
            an.inexact(spaces[a], node, f"{node.op} over this axis")
        an.no_scale(spaces[a], node, f"{node.op} over this axis")
    if node.op not in _DEGREE_ONE:
        an.no_scale(spaces, node, f"{node.op} does not commute with scaling")
    keepdims = node.attrs.get("keepdims", False)
    out = [UNIT if i in axes else e for i, e in enumerate(spaces) if keepdims or i not in axes]
    flags = [z and i not in axes for i, z in enumerate(zero) if keepdims or i not in axes]
    for v in node.outputs:
        an.set(v, out, flags)


@rule("argmax", "argmin")
def _arg(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None and node.output.hint is not None
    spaces = an.of(x)
    axis = node.attrs.get("axis")
    touched = spaces if axis is None else [spaces[axis]]
    an.freeze(list(touched), "positions along this axis are results", node)
    an.no_scale(spaces, node, "positions do not scale")
    out: list[Space]
    if axis is None:
        out = [UNIT for _ in node.output.hint]
    elif len(node.output.hint) == len(spaces):
        out = [UNIT if i == axis else e for i, e in enumerate(spaces)]
    else:
        out = [e for i, e in enumerate(spaces) if i != axis]
    an.set(node.output, out)


@rule("cumsum", "topk", "sort")
def _along(an: Analysis, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    spaces, axis = an.of(x), node.attrs.get("axis", -1) % max(len(an.of(x)), 1)
    an.freeze(spaces[axis], f"{node.op} depends on positions along this axis", node)
    an.no_scale(spaces, node, f"{node.op} does not commute with scaling")
    for v in node.outputs:
        n = (v.hint or ())[axis]
        e = spaces[axis] if n == spaces[axis].size else an.frozen(n, f"result of {node.op}", node)
        an.set(v, [e if i == axis else s for i, s in enumerate(spaces)])
