"""Where every index of every axis flows: the one forward walk over a graph that all axis-group actions rest on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ir import Graph, Node, Value, Weight
from .ops.table import get_rule
from .positions import Selection, kept_positions, size_after
from .refine import Conflict, unify
from .space import FROZEN, Space, Sum, atoms, fresh, mark, norm

INEXACT = "inexact"  # remark, not a prohibition: selecting here changes a statistic (mean, variance, maximum)


@dataclass
class Role:
    """How a stored tensor takes part: ``weight`` scales with ``vector(space) ** exponent`` along ``axis``.

    exponent +1: the weight produces the indices; -1: it consumes them; 0: it neither changes (norm gains).
    ``stat`` marks running statistics, which masking leaves alone.
    """

    weight: Weight
    axis: int
    space: Space
    exponent: int
    node: Node
    stat: bool = False


@dataclass
class Analysis:
    """Spaces per value and axis, roles per weight, and what rules remember for their updates.

    ``zero[v][i]``: a slab removed along axis i of v is exactly zero in the masked model; contractions without a
    weight use it to tell whether selection there is exact.
    """

    graph: Graph
    spaces: dict[Value, list[Space]] = field(default_factory=dict)
    zero: dict[Value, list[bool]] = field(default_factory=dict)
    roles: list[Role] = field(default_factory=list)
    memo: dict[Node, dict[str, Any]] = field(default_factory=dict)
    constant: set[Value] = field(default_factory=set)
    root: dict[Value, tuple[Weight, list[int | None]]] = field(default_factory=dict)
    sizes_read: dict[Value, list[Space]] = field(default_factory=dict)
    opaque: list[tuple[Node, str]] = field(default_factory=list)

    # ---- reading ---------------------------------------------------------------------------------------------
    def of(self, v: Value) -> list[Space]:
        """The spaces of a value's axes, created on first sight."""
        got = self.spaces.get(v)
        if got is not None:
            return got
        shape = v.weight.shape if v.weight is not None else v.hint
        if shape is None:
            raise Conflict(f"the shape of {v.name} is unknown")
        new = [fresh(n) if n else Sum(()) for n in shape]
        self.spaces[v] = new
        if v.weight is not None:
            self.constant.add(v)
            self.root[v] = (v.weight, list(range(len(shape))))
            self.zero[v] = [_is_float(v.dtype)] * len(shape)
        elif v.literal is not None:
            self.constant.add(v)
            self.zero[v] = [bool((v.literal == 0).all()) if v.literal.dtype != object else False] * len(shape)
            for e in new:
                mark(e, FROZEN, "length of a literal constant", "")
        else:
            self.zero[v] = [False] * len(shape)
        return new

    def zeros(self, v: Value) -> list[bool]:
        self.of(v)
        return self.zero[v]

    # ---- writing, for rules ------------------------------------------------------------------------------------
    def set(self, v: Value, spaces: Sequence[Space], zero: Sequence[bool] | bool = False) -> None:
        """Give an output its spaces; a mismatch with its shape is a broken rule or front end and stops the op."""
        if v.hint is not None and [e.size for e in spaces] != list(v.hint):
            raise Conflict(f"rule gives {v.name} the shape {[e.size for e in spaces]}, the graph says {list(v.hint)}")
        self.spaces[v] = list(spaces)
        self.zero[v] = [zero] * len(spaces) if isinstance(zero, bool) else list(zero)

    def tie(self, a: Space, b: Space, node: Node) -> Space:
        """Unify two spaces; where they do not fit both are frozen, with the reason."""
        try:
            unify(a, b)
        except Conflict as c:
            self.freeze((a, b), f"seen in two ways that do not fit: {c}", node)
        return norm(a)

    def freeze(
        self, spaces: Space | Iterable[Space], reason: str, node: Node | None, kinds: Sequence[str] = FROZEN
    ) -> None:
        where = node.name if node is not None else ""
        for e in (spaces,) if not isinstance(spaces, Iterable) else spaces:
            mark(e, kinds, reason, where)

    def no_scale(self, spaces: Space | Iterable[Space], node: Node, reason: str) -> None:
        self.freeze(spaces, reason, node, ("scale",))

    def inexact(self, spaces: Space | Iterable[Space], node: Node, reason: str) -> None:
        self.freeze(spaces, reason, node, (INEXACT,))

    def frozen(self, size: int, reason: str, node: Node) -> Space:
        """A new space that nothing may act on."""
        e = fresh(size) if size else Sum(())
        mark(e, FROZEN, reason, node.name)
        return e

    def is_const(self, v: Value | None) -> bool:
        if v is None:
            return False
        self.of(v)
        return v in self.constant

    def role(
        self, v: Value | None, axis: int, exponent: int, node: Node, space: Space | None = None, *, stat: bool = False
    ) -> None:
        """Record how a constant operand takes part along one of its axes (nothing for run-time operands)."""
        if v is None or not self.is_const(v):
            return
        e = self.of(v)[axis] if space is None else space
        root = self.root.get(v)
        origin = root[1][axis] if root is not None and axis < len(root[1]) else None
        if root is None or origin is None:
            if e.size > 1 and exponent:
                self.no_scale(e, node, "weight computed from others")
            return
        self.roles.append(Role(root[0], origin, e, exponent, node, stat))

    def as_activation(self, v: Value, node: Node) -> None:
        """A constant that joins the data stream scales like data on every axis."""
        if self.is_const(v):
            for i in range(len(self.of(v))):
                self.role(v, i, 1, node)

    def keep_root(self, src: Value, dst: Value, axes: Sequence[int | None]) -> None:
        """``dst`` is a pure rearrangement of constant ``src``; ``axes[i]`` is the source axis of its axis i."""
        if self.is_const(src):
            root = self.root.get(src)
            if root is not None:
                self.root[dst] = (root[0], [None if a is None else root[1][a] for a in axes])

    def block(self, node: Node, reason: str) -> None:
        """Freeze everything a node touches: the fallback for ops that no rule follows."""
        self.opaque.append((node, reason))
        for v in [*node.inputs, *node.captured, *node.outputs]:
            if v is None or (v.hint is None and v.weight is None):
                continue
            self.freeze(list(self.of(v)), reason, node)

    # ---- the walk ------------------------------------------------------------------------------------------------
    def run(self) -> Analysis:
        for v in self.graph.inputs:
            if v.hint is not None:
                self.freeze(list(self.of(v)), "graph input", None)
        for node in self.graph.nodes:
            self._visit(node)
        for v in self.graph.outputs:
            if v.hint is not None:
                self.freeze(list(self.of(v)), "graph output", v.producer)
        return self

    def _visit(self, node: Node) -> None:
        rule = get_rule(node.op)
        if rule is None:
            self.block(node, f"no rule for {node.origin or node.op}")
        elif any(v is not None and v.hint is None and v.weight is None for v in [*node.inputs, *node.outputs]):
            self.block(node, "shape unknown")
        elif node.op not in ("shape_of", "scalar") and (read := self._reads_sizes(node)):
            self.freeze(read, "its length is used as a number at run time", node)
            self._infer(rule, node)
        else:
            self._infer(rule, node)
        inputs = [v for v in node.inputs if v is not None]
        if (
            inputs
            and (not node.dynamic or node.op == "expand")  # repeated as often as the batch asks: the same data
            and all(v in self.constant for v in inputs)
            and node.op not in ("random", "dropout")
        ):
            self.constant.update(node.outputs)

    def _infer(self, rule: Any, node: Node) -> None:
        try:
            rule.infer(self, node)
        except Conflict as c:
            self.block(node, str(c))
        for v in node.outputs:
            if v not in self.spaces and v.hint is not None:
                self.freeze(list(self.of(v)), f"not followed through {node.origin or node.op}", node)

    def _reads_sizes(self, node: Node) -> list[Space]:
        return [e for v in node.inputs if v is not None for e in self.sizes_read.get(v, ())]


@dataclass
class Resize:
    """New sizes and kept positions of every value under a selection: what rules recompute shape constants from."""

    analysis: Analysis
    selection: Selection

    def __post_init__(self) -> None:
        self._sizes: dict[int, tuple[Space, int]] = {}  # many values share their spaces: each is kept, so its id is its

    def size(self, v: Value, axis: int) -> int:
        return self.size_of(self.analysis.of(v)[axis])

    def size_of(self, e: Space) -> int:
        known = self._sizes.get(id(e))
        if known is None:
            known = self._sizes[id(e)] = e, size_after(e, self.selection)
        return known[1]

    def kept(self, v: Value, axis: int) -> np.ndarray:
        return kept_positions(self.analysis.of(v)[axis], self.selection)

    def touched(self, v: Value, axis: int) -> bool:
        """Whether the axis mentions an atom of the selection at all."""
        return any(a in self.selection for a in atoms(self.analysis.of(v)[axis]))

    def shape(self, v: Value) -> list[int]:
        return [self.size_of(e) for e in self.analysis.of(v)]

    def memo(self, node: Node) -> dict[str, Any]:
        return self.analysis.memo.get(node, {})


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def analyse(graph: Graph) -> Analysis:
    """Run the index analysis on a graph. Touches no weight data; near-linear in the number of nodes."""
    return Analysis(graph).run()
