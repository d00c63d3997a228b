"""How scales pass products of two values (matmul, einsum, attention): by the letters of their axes."""

from __future__ import annotations

import numpy as np

from ...graph.ir import Node
from ...graph.ops.carry import Stuck, dims
from .affine import Affine, Refusal, Why

BILINEAR = ("matmul", "einsum", "sdpa")
Maps = list[tuple[int, Affine]]


def letters(node: Node) -> tuple[list[list[str]], list[str]]:
    """One name per axis for each operand and for the output; an axis that is broadcast gets no name of its own ("")."""
    if node.op == "sdpa":
        return _attention(node)
    if node.op == "einsum":
        left, right = node.attrs["equation"].replace(" ", "").split("->")
        if "." in left:
            raise Stuck("the equation has an ellipsis")
        operands = [list(part) for part in left.split(",")]
        if any(len(set(names)) != len(names) for names in operands):
            raise Stuck("the equation takes a diagonal")
        return operands, list(right)
    ranks = [len(dims(v)) for v in node.inputs[:2]]
    a = [*(f"b{i}" for i in range(ranks[0] - 2, 0, -1)), "m", "k"][-ranks[0] :] if ranks[0] > 1 else ["k"]
    b = [*(f"b{i}" for i in range(ranks[1] - 2, 0, -1)), "k", "n"] if ranks[1] > 1 else ["k"]
    out = [f"b{i}" for i in range(max(ranks) - 2, 0, -1)]
    out += ["m"] * (ranks[0] > 1) + ["n"] * (ranks[1] > 1)
    operands = [
        ["" if name[0] == "b" and n == 1 else name for name, n in zip(names, dims(v), strict=True)]
        for names, v in zip((a, b), node.inputs[:2], strict=True)
    ]
    return operands, out


def _attention(node: Node) -> tuple[list[list[str]], list[str]]:
    """Of softmax(q k) v: only v's own last axis, and the axes of batch and heads, are the output's."""
    rank = len(dims(node.output))
    lead = [f"b{i}" for i in range(rank - 2)]
    if node.attrs.get("gqa"):
        lead = lead[:-1]
    heads = ["h"] * (rank - 2 - len(lead))
    v = [*lead, *(f"kv{h}" for h in heads), "s", "e"]
    return [[*lead, *heads, "l", "d"], [*lead, *(f"kv{h}" for h in heads), "s", "d"], v], [*lead, *heads, "l", "e"]


def lay_letters(part: np.ndarray, source: list[str], target: list[str]) -> np.ndarray | None:
    """An array over axes of these names, over others; None where it differs along an axis that is missing there."""
    place = {name: axis for axis, name in enumerate(source) if name and name in target}
    if any(n != 1 and name not in place for n, name in zip(part.shape, source, strict=True)):
        return None
    order = [place[name] for name in target if name in place]
    rest = [axis for axis in range(part.ndim) if axis not in order]
    shape = [part.shape[place[name]] if name in place else 1 for name in target]
    return part.transpose(*order, *rest).reshape(shape)


def bilinear_down(node: Node, position: int, affine: Affine) -> Maps | Refusal:
    """A scale that does not touch what is summed over stands behind the product as well."""
    operands, out = letters(node)
    if affine.has_shift:
        return Refusal(f"a shift in front of {node.op} is none behind it", node.name, Why.COMMUTE)
    if node.op == "sdpa" and position != 2:
        return Refusal("a scale does not commute with softmax", node.name, Why.COMMUTE)
    if position >= len(operands):
        return Refusal(f"{node.name} reads it as operand {position}", node.name, Why.COMMUTE)
    part = lay_letters(affine.scale, operands[position], out)
    if part is None:
        return Refusal(f"{node.op} sums over the axis", node.name, Why.COMMUTE)
    return [(0, Affine(part, np.zeros((1,) * part.ndim)))]


def bilinear_up(node: Node, affine: Affine) -> list[list[tuple[int, Affine]]] | Refusal:
    """A scale behind the product stands on any operand that has all the axes it differs on."""
    operands, out = letters(node)
    if affine.has_shift:
        return Refusal(f"a shift behind {node.op} is none in front of it", node.name, Why.COMMUTE)
    ways = []
    candidates = [2] if node.op == "sdpa" else range(len(operands))
    for k in sorted(candidates, key=lambda k: not _const(node, k)):
        part = lay_letters(affine.scale, out, operands[k])
        if part is not None:
            ways.append([(k, Affine(part, np.zeros((1,) * part.ndim)))])
    if not ways:
        return Refusal(f"no operand of {node.op} has all its axes", node.name, Why.COMMUTE)
    return ways


def _const(node: Node, k: int) -> bool:
    value = node.input(k)
    return value is not None and value.is_const
