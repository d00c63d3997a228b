"""FuseQueryKey: the query and key projections of every head become one matrix, so that keys need no projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import Field

from ...graph.ir import Graph, Node, Value
from ...graph.ops.carry import taken
from ..base import Context, Contract, Decision, Outcome, Pass
from ..fold.affine import constant
from ..fold.operands import bias_slot
from ..rewrite import Refusal
from .boundary import source, weight_matrix
from .common import layer_name, matches

BETWEEN = ("mul", "div", "add", "sub", "where", "masked_fill", "cast", "identity")
"""Operators between the product of queries and keys and its softmax under which a constant per query stays one."""


@dataclass(eq=False)
class _Projection:
    """Queries or keys as a linear layer of a value.

    Attributes:
        x: what is projected, [batch, positions, in].
        weight, bias: float64 [out, in] and [out].
        channels: which output is (head, dim), int64 [heads, dims].
        factor: scalar that they are multiplied by on the way.
    """

    node: Node
    x: Value
    weight: np.ndarray
    bias: np.ndarray
    channels: np.ndarray
    factor: float


class FuseQueryKey(Pass):
    """Replace queries and keys by ``q' = x (Wq Wk^T)`` and ``k' = x`` in every attention head.

    Identity: ``(x Wq + bq)(y Wk + bk)^T = (x Wq Wk^T + bq Wk^T) y^T + terms that are the same for all keys``, which
    softmax does not see. (The query-key reparametrization of ``Oscillation-free Quantization for Low-bit Vision
    Transformers``: the oscillations of two weights no longer meet in a product.) Scores then contract over the width of
    y instead of a head's: more work, fewer quantized operands. Biases, grouped queries and masks are covered; exact.

    Refused, with the reason: anything but rearrangements and a scalar between the projection and the product (rotary
    embeddings, norms of queries and keys), scores that something besides a softmax over the keys reads.
    """

    name: ClassVar[str] = "fuse_query_key"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"float"})

    ignore: list[str] = Field(default_factory=list)
    """Glob patterns of query projections to leave alone."""

    def apply(self, graph: Graph, ctx: Context) -> Outcome:
        decisions = []
        for node in list(graph.nodes):
            if node.op != "sdpa" and not _is_scores(node):
                continue
            q = self._projection(node, 0)
            k = self._projection(node, 1)
            wrong = next((p for p in (q, k) if isinstance(p, Refusal)), None) or _mismatch(q, k)
            if wrong is not None or isinstance(q, Refusal) or isinstance(k, Refusal):
                assert wrong is not None
                decisions.append(Decision(node.name, "refused", wrong.reason, {"node": wrong.node}))
            elif not matches(q.node, self.ignore):
                decisions.append(_fuse(graph, node, q, k))
        graph.refresh()
        return Outcome(decisions=decisions, details={"fused": sum(d.action == "fused" for d in decisions)})

    def _projection(self, node: Node, operand: int) -> _Projection | Refusal:
        """The linear layer that an operand of the product comes from through rearrangements and scalars."""
        value = node.inputs[operand]
        assert value is not None
        chain: list[tuple[Node, int]] = []
        factor, at = 1.0, value
        while at.producer is not None and at.producer.op not in ("linear", "matmul"):
            made = at.producer
            step = _step(made)
            if step is None:
                return Refusal(f"{made.op} stands between a projection and its product", made.name)
            position, times = step
            factor *= times
            if made.op == "add":  # the bias of a product written apart: the layer is right before it
                first = made.inputs[position]
                if first is None or first.producer is None or first.producer.op not in ("linear", "matmul"):
                    return Refusal(f"{made.op} stands between a projection and its product", made.name)
            else:
                chain.append((made, at.index))
            first = made.inputs[position]
            assert first is not None
            at = first
        layer = at.producer
        weight = None if layer is None else weight_matrix(layer)
        if layer is None or weight is None:
            return Refusal(f"{value.name} does not come from a linear layer with a stored weight")
        return _described(node, operand, layer, weight.astype(np.float64), chain, factor)


def _is_scores(node: Node) -> bool:
    """A product of two activations that only a softmax over its last axis reads."""
    if node.op != "matmul" or any(v is None or v.is_const for v in node.inputs) or (node.output.rank or 0) < 4:
        return False
    value = node.output
    for _ in range(8):
        readers = [u for u, _ in value.uses if u.op != "shape_of"]
        if value.is_output or len(readers) != 1:
            return False
        user = readers[0]
        if user.op == "softmax":
            return int(user.attrs["axis"]) % (user.output.rank or 1) == (user.output.rank or 1) - 1
        if user.op not in BETWEEN or (user.op in ("mul", "div") and _scalar(user, value) is None):
            return False
        value = user.output
    return False


def _scalar(node: Node, value: Value) -> float | None:
    """The scalar that ``value`` is multiplied by (divided by), or None."""
    position = 1 if node.inputs[0] is value else 0
    data = constant(node, position)
    if data is None or data.size != 1 or (node.op == "div" and position == 0):
        return None
    number = float(data.reshape(-1)[0])
    return number if node.op == "mul" else 1.0 / number if number else None


MOVES = ("reshape", "transpose", "identity", "squeeze", "unsqueeze", "slice", "split", "unbind", "expand")


def _step(node: Node) -> tuple[int, float] | None:
    """(the operand that goes on, the scalar it meets) of a node on the way from a projection; None if it may not be."""
    if node.op in (*MOVES, "repeat_interleave", "select"):
        return 0, 1.0
    if node.op in ("mul", "div"):
        for k in (0, 1):
            value = node.inputs[k]
            times = None if value is None or value.is_const else _scalar(node, value)
            if times is not None:
                return k, times
    if node.op == "add":
        moving = [k for k, v in enumerate(node.inputs) if v is not None and not v.is_const]
        if len(moving) == 1:
            return moving[0], 1.0
    return None


def _described(
    node: Node, operand: int, layer: Node, weight: np.ndarray, chain: list[tuple[Node, int]], factor: float
) -> _Projection | Refusal:
    slot = bias_slot(layer, len(weight)) if layer.op == "linear" else None
    if isinstance(slot, Refusal):
        return slot
    bias = np.zeros(len(weight)) if slot is None else slot.data(len(weight)) * float(layer.attrs.get("beta", 1.0))
    weight = weight * float(layer.attrs.get("alpha", 1.0))
    x = layer.inputs[0]
    assert x is not None and x.rank is not None
    base, axis = source(x, x.rank - 1)
    if base.rank != 3 or axis != 2 or base.hint is None or layer.output.hint is None:
        return Refusal(f"{layer.name} does not project rows of [batch, positions, channels]", layer.name)
    batch, length, _ = base.hint
    index = np.arange(batch * length * len(weight)).reshape(layer.output.hint)
    for step, output in reversed(chain):
        routed = _routed(step, output, index)
        if isinstance(routed, Refusal):
            return routed
        index = routed
    if node.op == "matmul" and operand == 1:
        index = np.moveaxis(index, -1, -2)
    if index.ndim != 4 or index.shape[0] != batch or index.shape[2] != length:
        return Refusal(f"{layer.name}'s heads are not laid out as [batch, heads, positions, dims]", layer.name)
    channels = index[0, :, 0, :] % len(weight)
    rows = (np.arange(batch)[:, None] * length + np.arange(length))[:, None, :, None] * len(weight)
    if not np.array_equal(index, rows + channels[None, :, None, :]):
        return Refusal(f"{layer.name}'s rows do not stay in their order", layer.name)
    return _Projection(layer, base, weight, bias, channels, factor)


def _routed(node: Node, output: int, index: np.ndarray) -> np.ndarray | Refusal:
    """An array of element numbers after a rearrangement, at the hint sizes."""
    shape = node.outputs[output].hint
    if shape is None:
        return Refusal(f"the shape of {node.outputs[output].name} is unknown", node.name)
    if node.op in ("mul", "div"):
        return index
    if node.op == "transpose":
        return index.transpose(node.attrs["perm"])
    if node.op == "expand":
        return np.broadcast_to(index, shape)
    if node.op == "repeat_interleave":
        return np.repeat(index, node.attrs["repeats"], node.attrs["axis"])
    if node.op in ("slice", "split", "unbind", "select"):
        for axis, picks in taken(node, 0, output).items():
            if picks is None:
                return Refusal(f"what {node.name} picks is known at run time only", node.name)
            index = index.take(picks, axis)
    return index.reshape(shape)


def _mismatch(q: _Projection | Refusal, k: _Projection | Refusal) -> Refusal | None:
    if isinstance(q, Refusal) or isinstance(k, Refusal):
        return None
    if q.channels.shape != k.channels.shape:
        return Refusal(f"queries {q.channels.shape} and keys {k.channels.shape} have other heads", q.node.name)
    return None


def _fuse(graph: Graph, node: Node, q: _Projection, k: _Projection) -> Decision:
    heads, width = len(q.channels), k.weight.shape[1]
    factor = q.factor * k.factor
    per_head = [(q.weight[a], q.bias[a], k.weight[b]) for a, b in zip(q.channels, k.channels, strict=True)]
    weight = np.concatenate([wk.T @ wq for wq, _, wk in per_head]) * factor  # [heads * width, in]
    bias = np.concatenate([wk.T @ bq for _, bq, wk in per_head]) * factor
    name, scope = f"{q.node.name}_key", q.node.scope
    stored = [
        graph.add_weight(f"{layer_name(q.node)}_key.{part}", data.astype(np.float32), trainable=True)
        for part, data in (("weight", weight), ("bias", bias))
    ]
    at = node.inputs[0].producer if _later(graph, node.inputs[0], node.inputs[1]) == 0 else node.inputs[1].producer  # type: ignore[union-attr]

    def put(op: str, inputs: list[Value | None], attrs: dict[str, object], part: str) -> Value:
        nonlocal at
        at = graph.insert(op, inputs, attrs, name=f"{name}_{part}", after=at, scope=scope)
        return at.output

    y = put("linear", [q.x, *stored], {}, "linear")
    assert q.x.shape is not None
    lead = [n if isinstance(n, int) else None for n in q.x.shape[:2]]
    y = put("reshape", [y], {"shape": [*lead, heads, width]}, "heads")
    y = put("transpose", [y], {"perm": [0, 2, 1, 3]}, "turned")
    keys = put("unsqueeze", [k.x], {"axes": [1]}, "keys")
    if node.op == "matmul":
        keys = put("transpose", [keys], {"perm": [0, 1, 3, 2]}, "columns")
    else:
        keys = put("expand", [keys], {"shape": [None, heads, None, None]}, "copies")
        graph.set_attr(node, scale=float(node.attrs.get("scale") or q.channels.shape[1] ** -0.5))
    graph.set_input(node, 0, y)
    graph.set_input(node, 1, keys)
    if node.op == "sdpa" and node.attrs.get("gqa"):
        graph.set_attr(node, gqa=False)
    dim = q.channels.shape[1]
    reason = f"{heads} heads: queries and keys of {dim} became one matrix to {width} channels per head"
    return Decision(layer_name(q.node), "fused", reason, {"heads": heads, "width": width})


def _later(graph: Graph, a: Value | None, b: Value | None) -> int:
    """0 if ``a`` is made after ``b``, else 1."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    places = [order.get(v.producer, -1) if v is not None and v.producer is not None else -1 for v in (a, b)]
    return 0 if places[0] >= places[1] else 1
