"""Nodes that return what they are given, at most laid out anew: their readers read the operand, or a reshape of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

from ...graph.ir import Graph, Node
from ...graph.ops.linear import counts_up
from ..rewrite import Env, Refusal, Rewrite, Rule, Why
from .common import exactly, fits_into, same_type, stands_for, static


class NoOp(Rule):
    """Remove nodes that copy, move or cast nothing.

    Identity: ``f(x) = x`` for Identity and dropout in inference, a Cast to the dtype that x has, a Transpose by the
    identity permutation, a Reshape to the shape that x has, a Slice of everything, a Pad by nothing, an Expand or
    Tile by one, a Squeeze or Unsqueeze of no axis, a Concat or Sum of one, a Split into one part, a Clip without
    bounds, a pool whose window is one element.
    Conditions: dtype and rank of x and of the result are known and equal, and equality of the shapes is provable for
    every run: sizes that depend on the input count as equal only where the op itself keeps that axis.
    Refuses: a result that is a graph output while x is an input, a constant or another output (the output keeps its
    name); a result that a subgraph reads. Never removed from an nn.Module: dropout and detach (it may be trained
    again), contiguous and clone (a later view may need the memory layout).
    """

    name: ClassVar[str] = "no_op"
    ops: ClassVar[tuple[str, ...]] = (
        "identity", "cast", "transpose", "reshape", "slice", "pad", "expand", "tile", "squeeze", "unsqueeze", "concat",
        "addn", "split", "clip", "max_pool", "avg_pool",
    )  # fmt: skip

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        x = node.input(0)
        if x is None or len(node.outputs) != 1 or not self._returns_operand(node, env):
            return None
        if node.op == "identity" and node.output.is_output and (x.is_input or x.is_const or x.is_output):
            return None  # what gives an output its own name
        return stands_for(node, x, env, f"{node.op} of {x.name} is {x.name}")

    def _returns_operand(self, node: Node, env: Env) -> bool:
        x, a = node.inputs[0], node.attrs
        assert x is not None
        if node.op == "identity":
            return env.graph.kind == "onnx" or a.get("fn") in ("to", "alias", "identity")
        if node.op == "cast":
            return bool(x.dtype) and x.dtype == node.output.dtype and a.get("dtype") == x.dtype
        if not same_type(x, node.output):
            return False
        if node.op == "transpose":
            return list(a["perm"]) == list(range(len(a["perm"])))
        if node.op == "reshape":
            return _keeps_shape(node)
        if node.op == "slice":
            return not node.dynamic and _takes_all(node)
        if node.op == "pad":
            return not node.dynamic and all(tuple(p) == (0, 0) for p in a["pads"])
        if node.op == "expand":
            return not node.dynamic and _expands_nothing(node)
        if node.op == "tile":
            return not node.dynamic and all(r == 1 for r in a["repeats"])
        if node.op in ("squeeze", "unsqueeze"):  # a squeeze without axes looks at the sizes of each run
            return not node.dynamic and a["axes"] == [] and (node.op == "unsqueeze" or static(x) is not None)
        if node.op in ("concat", "addn"):
            return len(node.inputs) == 1
        if node.op == "split":
            return len(a["sizes"]) == 1 and static(x) is not None and static(x) == static(node.output)
        if node.op == "clip":
            return a.get("min") is None and a.get("max") is None
        return _pools_one(node)


def _keeps_shape(node: Node) -> bool:
    """All sizes equal but at most one, which follows from the number of elements (none of the others being 0)."""
    x, made = node.inputs[0], node.output
    assert x is not None
    if x.shape is None or made.shape is None:
        return False
    pairs = list(zip(x.shape, made.shape, strict=True))
    sized = [p for p in pairs if isinstance(p[0], int) and isinstance(p[1], int)]
    if any(a != b for a, b in sized):
        return False
    if len(sized) == len(pairs):
        return True
    target = node.attrs.get("shape")
    if node.dynamic or target is None or len(sized) < len(pairs) - 1 or any(a == 0 for a, _ in sized):
        return False
    rest = next(i for i, p in enumerate(pairs) if p not in sized)
    return target[rest] is None


def _takes_all(node: Node) -> bool:
    x, a = node.inputs[0], node.attrs
    assert x is not None and x.shape is not None
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        whole = end is None or (isinstance(x.shape[axis], int) and end == x.shape[axis])
        if start != 0 or step != 1 or not whole:
            return False
    return True


def _expands_nothing(node: Node) -> bool:
    x, target = node.inputs[0], node.attrs["shape"]
    assert x is not None and x.shape is not None
    if len(target) != len(x.shape):
        return False
    return all(d is None or (isinstance(s, int) and d == s) for d, s in zip(target, x.shape, strict=True))


def _pools_one(node: Node) -> bool:
    a = node.attrs
    ones = all(k == 1 for k in a["kernel"]) and all(s == 1 for s in a["stride"] or a["kernel"])
    return ones and all(tuple(p) == (0, 0) for p in a["padding"])


class NeutralElement(Rule):
    """Remove arithmetic with the neutral element.

    Identity: ``x + 0 = 0 + x = x - 0 = x``, ``x * 1 = 1 * x = x / 1 = x ** 1 = x``; for booleans ``x and true = x``,
    ``x or false = x``.
    Conditions: the other operand is constant and holds this number only; broadcasting it provably leaves the shape of
    x as it is; the result has the dtype of x. NaN and infinities pass through both sides alike; the only bit that may
    differ is the sign of a zero under ``x + 0``.
    Refuses: as no_op does. ``x * 0`` is never folded (NaN, infinities), a trained operand never counts as constant.
    """

    name: ClassVar[str] = "neutral_element"
    ops: ClassVar[tuple[str, ...]] = ("add", "sub", "mul", "div", "pow", "logical_and", "logical_or")

    NEUTRAL: ClassVar[dict[str, int]] = {
        "add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1, "logical_and": 1, "logical_or": 0
    }  # fmt: skip
    EITHER: ClassVar[tuple[str, ...]] = ("add", "mul", "logical_and", "logical_or")

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        if len(node.inputs) != 2 or len(node.outputs) != 1 or node.attrs.get("alpha", 1) != 1:
            return None
        for x, other in ((0, 1), (1, 0)) if node.op in self.EITHER else ((0, 1),):
            value, constant = node.inputs[x], node.inputs[other]
            if value is None or value.is_const or not exactly(constant, self.NEUTRAL[node.op], env):
                continue
            if fits_into(constant, value) and same_type(value, node.output):
                return stands_for(node, value, env, f"{node.op} with {self.NEUTRAL[node.op]} returns {value.name}")
        return None


class GatherInOrder(Rule):
    """Write a gather of every position in order as the reshape that it is, or remove it (ONNX).

    Identity: ``x[.., i, ..] = reshape(x, (.., *i.shape, ..))`` where the index tensor i holds 0, 1, .., n - 1 and n is
    the length of the axis. Exporters write as_strided so.
    Conditions: the index is constant, n known; at most one other size depends on the run, none is 0.
    Refuses: as no_op does where an index list of one axis is removed; a result that a subgraph reads.
    """

    name: ClassVar[str] = "gather_in_order"
    ops: ClassVar[tuple[str, ...]] = ("gather",)

    def match(self, node: Node, env: Env) -> Rewrite | Refusal | None:
        x, index = node.inputs
        if env.graph.kind != "onnx" or x is None or index is None or not index.is_const or x.is_const:
            return None
        axis, shape = node.attrs["axis"], node.output.shape
        if x.shape is None or shape is None or not same_type(x, node.output) and index.rank == 1:
            return None
        positions = index.const() if index.rank and x.shape[axis] == prod(static(index) or (0,)) else None
        if positions is None or not counts_up(positions):
            return None
        if index.rank == 1:
            return stands_for(node, x, env, f"all of {x.name} is taken in order")
        sizes = [d if isinstance(d, int) else None for d in shape]
        if sizes.count(None) > 1 or 0 in sizes:
            return Refusal("several sizes are known at run time only, or one is 0", why=Why.SHAPE)
        if id(node.output) in env.captured:
            return Refusal(f"{node.output.name} is read by a subgraph", why=Why.CAPTURED)

        def apply(graph: Graph) -> Sequence[Node]:
            made = graph.insert(
                "reshape", [x], {"shape": sizes}, name=f"{node.name}_laid", after=node, scope=node.scope
            )
            graph.replace_uses(node.output, made.output)
            return [made]

        return Rewrite([node], apply, "rewritten", f"all of {x.name} is taken in order: a reshape")


IDENTITY_RULES: list[Rule] = [NoOp(), NeutralElement(), GatherInOrder()]

__all__ = ["IDENTITY_RULES", "GatherInOrder", "NeutralElement", "NoOp"]
