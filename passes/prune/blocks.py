"""Residual blocks of a graph, found from its edges alone: a sum one of whose operands is made from the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...graph.ir import Graph, Node, Value, Weight
from ...graph.ops.macs import macs

IDEMPOTENT = ("relu",)
"""Ops that change nothing the second time: relu(x + f(x)) is x without f, where x is a relu's result."""
PERIODS = range(1, 9)
"""Residual sums per layer that are looked for."""


@dataclass(frozen=True, eq=False)
class Block:
    """``y = x + f(x)``, or several of them in a row.

    Attributes:
        name: of the (last) sum.
        start: ``x``.
        stop: what ``x`` takes the place of when the block is dropped: ``y``, or an op on it that ``x`` has passed.
        join: the (last) sum.
        body: the nodes between ``start`` and ``stop``, in graph order; they die with the block unless something
            outside reads them.
    """

    name: str
    start: Value
    stop: Value
    join: Node
    body: tuple[Node, ...]

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
            start = root(pair[0])
            stop = _past_idempotent(start, node)
            found.append(Block(node.name, start, stop, node, tuple(_between(graph, reach, start, stop))))
    return found


def root(v: Value) -> Value:
    """The value itself behind identities and casts to its own dtype."""
    while v.producer is not None and v.producer.op in ("identity", "cast"):
        before = v.producer.inputs[0]
        if before is None or before.is_const or before.dtype != v.dtype:
            break
        v = before
    return v


def _past_idempotent(start: Value, join: Node) -> Value:
    """The sum's result, or that of an idempotent op on it which the start has already been through."""
    users = {id(n): n for n, _ in join.output.uses}
    after = next(iter(users.values())) if len(users) == 1 and not join.output.is_output else None
    before = start.producer
    same = after is not None and before is not None and after.op == before.op and after.op in IDEMPOTENT
    return after.output if same and after is not None else join.output


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


# ---- layers --------------------------------------------------------------------------------------------------------
def layers(graph: Graph, blocks: list[Block], reach: Reach) -> list[Block]:
    """Blocks joined into layers: the shortest run of residual sums that repeats along a stream (attention and MLP).

    Where each layer ends in a norm (post-norm transformers) the norm goes with its layer. Streams without a
    repetition keep their blocks. Blocks inside another block's branch are left out.
    """
    inner = {id(n) for b in blocks for n in b.body if n is not b.join}
    found: list[Block] = []
    for chain in _chains([b for b in blocks if id(b.join) not in inner], reach):
        period = _period(chain)
        for i in range(0, len(chain), period):
            run = chain[i : i + period]
            following = chain[i + period] if i + period < len(chain) else None
            found.append(_joined(graph, reach, chain, run, following) if period > 1 and len(run) == period else run[0])
            found += run[1:] if len(run) < period else []
    return found


def _chains(blocks: list[Block], reach: Reach) -> list[list[Block]]:
    """Blocks that follow each other on one stream, with nothing weighty between them."""
    chains: list[list[Block]] = []
    for b in blocks:
        for chain in chains:
            last = chain[-1]
            linked = b.start is last.stop or b.start is last.join.output or reach.depends(b.start, last.join.output)
            if linked and not reach.of(b.start) & ~reach.of(last.stop) & reach.weighty:
                chain.append(b)
                break
        else:
            chains.append([b])
    return chains


Sign: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


def _signature(b: Block, shapes: bool) -> Sign:
    """The products of a block, with the shapes of their weights or without."""
    found = []
    for n in b.body:
        if macs(n):
            weight = next((v.weight for v in n.inputs if v is not None and v.weight is not None), None)
            found.append((n.op, weight.shape if shapes and weight is not None else ()))
    return tuple(sorted(found))


def _period(chain: list[Block]) -> int:
    """The smallest period under which four of five blocks repeat, by shapes or else by kinds of ops; 1 without any."""
    for shapes in (True, False):
        signs = [_signature(b, shapes) for b in chain]
        for p in PERIODS:
            pairs = [a == b for a, b in zip(signs, signs[p:], strict=False)]
            if len(signs) >= 2 * p and sum(pairs) >= 0.8 * len(pairs):
                return p
    return 1


def _joined(graph: Graph, reach: Reach, chain: list[Block], run: list[Block], following: Block | None) -> Block:
    start, stop = run[0].start, run[-1].stop
    if following is not None:
        stop = root(following.start)
    else:  # the last layer ends as the others do
        tail = _tail(chain[len(run) - 1].stop, chain[len(run)].start) if len(chain) > len(run) else []
        stop = _follow(stop, tail)
    if stop.hint != start.hint:
        stop = run[-1].stop
    return replace(run[-1], start=start, stop=stop, body=tuple(_between(graph, reach, start, stop)))


def _tail(stop: Value, start: Value) -> list[str]:
    """Ops from one value to a later one, through first operands."""
    ops: list[str] = []
    at = start
    while at is not stop and at.producer is not None and at.producer.inputs and len(ops) < 8:
        ops.append(at.producer.op)
        first = at.producer.inputs[0]
        if first is None:
            return []
        at = first
    return ops[::-1] if at is stop else []


def _follow(stop: Value, ops: Iterable[str]) -> Value:
    at = stop
    for op in ops:
        nodes = [n for n, i in at.uses if i == 0 and n.op == op]
        if len(nodes) != 1:
            return stop
        at = nodes[0].output
    return at


# ---- removal -------------------------------------------------------------------------------------------------------
def drop(graph: Graph, names: Iterable[tuple[str, str]]) -> int:
    """Let each (start, stop) pair of value names be one value, and erase what nobody needs any more.

    Exact where the branches between give zero. Returns the number of nodes erased.
    """
    idle = {id(n) for n in graph.nodes if not _needed(n, _dynamic(graph))}
    origin: dict[str, str] = {}
    for start, stop in names:
        first = start
        while first in origin:
            first = origin[first]
        origin[stop] = first
        graph.replace_uses(graph.values[stop], graph.values[first])
    erased = 0
    while True:
        dynamic = _dynamic(graph)
        dead = [n for n in reversed(graph.nodes) if id(n) not in idle and not _needed(n, dynamic)]
        if not dead:
            graph.refresh()
            return erased
        for node in dead:
            if not _needed(node, dynamic):
                graph.erase(node)
                erased += 1


def _dynamic(graph: Graph) -> set[int]:
    """ids of values that sizes or subgraphs read."""
    return {id(v) for n in graph.nodes for v in (*n.dynamic, *n.captured)}


def _needed(node: Node, dynamic: set[int]) -> bool:
    return any(v.uses or v.is_output or id(v) in dynamic for v in node.outputs)
