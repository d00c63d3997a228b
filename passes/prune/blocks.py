"""Residual blocks of a graph, found from its edges alone: a sum one of whose operands is made from the other."""

from __future__ import annotations

from dataclasses import dataclass

from ...graph.ir import Graph, Node, Value, Weight


@dataclass(frozen=True, eq=False)
class Block:
    """``y = x + f(x)``.

    Attributes:
        name: of the sum.
        start: ``x``.
        join: the sum.
        body: the nodes on the paths from ``x`` to the branch's end, in graph order; they die with the branch unless
            something outside reads them.
    """

    name: str
    start: Value
    join: Node
    body: tuple[Node, ...]

    @property
    def stop(self) -> Value:
        """``y``."""
        return self.join.output

    @property
    def weights(self) -> list[Weight]:
        """Weights that the body reads, each once, in graph order."""
        found = {v.weight: None for n in self.body for v in n.inputs if v is not None and v.weight is not None}
        return list(found)


class Reach:
    """Which nodes depend on which: one bit set per node, and one of the nodes that read a stored matrix.

    Memory: nodes squared / 8 bytes.
    """

    def __init__(self, graph: Graph) -> None:
        self.at = {id(n): i for i, n in enumerate(graph.nodes)}
        self.above: list[int] = []
        self.weighty = 0
        for i, node in enumerate(graph.nodes):
            bits = 1 << i
            for v in [*node.inputs, *node.captured, *node.dynamic]:
                if v is not None and v.producer is not None:
                    bits |= self.above[self.at[id(v.producer)]]
            self.above.append(bits)
            if any(v is not None and v.weight is not None and len(v.weight.shape) > 1 for v in node.inputs):
                self.weighty |= 1 << i

    def of(self, v: Value) -> int:
        """The nodes that a value depends on, as bits (its producer included)."""
        return 0 if v.producer is None else self.above[self.at[id(v.producer)]]

    def depends(self, y: Value, x: Value) -> bool:
        """Whether ``y`` is computed from ``x``."""
        if x.producer is None:
            bits = self.of(y)
            return any(bits >> self.at[id(n)] & 1 for n, _ in x.uses if id(n) in self.at)
        return y is not x and bool(self.of(y) >> self.at[id(x.producer)] & 1)


def residual_blocks(graph: Graph, reach: Reach | None = None) -> list[Block]:
    """Every ``x + f(x)`` of equal shapes, in graph order; blocks inside another block's branch are listed too."""
    reach = Reach(graph) if reach is None else reach
    found = []
    for node in graph.nodes:
        pair = skip_of(node, reach)
        if pair is not None:
            found.append(Block(node.name, pair[0], node, tuple(_between(graph, reach, *pair))))
    return found


def skip_of(node: Node, reach: Reach) -> tuple[Value, Value] | None:
    """(x, f(x)) if the node is a sum ``x + f(x)`` of two equal shapes, else None."""
    if node.op not in ("add", "addn") or len(node.inputs) != 2 or node.attrs.get("alpha", 1) != 1:
        return None
    a, b = node.inputs
    if a is None or b is None or a is b or a.is_const or b.is_const or a.hint is None or a.hint != b.hint:
        return None
    if len(a.hint) < 2 or list(a.shape or ()) != list(b.shape or ()):
        return None
    start, end = (a, b) if reach.depends(b, a) else (b, a)
    if not reach.depends(end, start):
        return None
    # A branch without a matrix is an activation written out (x + 0.04 x^3), not a layer.
    return (start, end) if reach.of(end) & ~reach.of(start) & reach.weighty else None


def _between(graph: Graph, reach: Reach, start: Value, end: Value) -> list[Node]:
    """Nodes that depend on ``start`` and that ``end`` depends on."""
    after = {id(start)}
    bits = reach.of(end)
    found = []
    for i, node in enumerate(graph.nodes):
        if not bits >> i & 1 or node is start.producer:
            continue
        if any(v is not None and id(v) in after for v in [*node.inputs, *node.captured, *node.dynamic]):
            after.update(id(v) for v in node.outputs)
            found.append(node)
    return found
