"""Attention cores of a graph: softmaxes over keys, fused or written out; a fused one can be taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...graph.ir import Graph, Node, Value
from ..rewrite import Refusal
from .query_key import BETWEEN

FURTHER = (*BETWEEN, "expand", "reshape", "transpose", "squeeze", "unsqueeze", "clip", "maximum")
"""Operators that may stand between a product and its softmax, or between that and the product with the values."""
HALF = ("float16", "bfloat16")


class Writer:
    """Inserts nodes one behind the other, starting right behind a given one."""

    def __init__(self, graph: Graph, name: str, after: Node | None, scope: str) -> None:
        self.graph, self.name, self.at, self.scope = graph, name, after, scope

    def put(self, op: str, inputs: list[Value | None], part: str, **attrs: Any) -> Value:
        """The output of a new node of a canonical op."""
        self.at = self.graph.insert(op, inputs, attrs, name=f"{self.name}_{part}", after=self.at, scope=self.scope)
        return self.at.output

    def number(self, value: float, part: str, dtype: str = "float32") -> Value:
        """A stored scalar."""
        return self.graph.add_weight(f"{self.name}_{part}", np.array(value, dtype=numpy_type(dtype)))

    def wide(self, x: Value) -> Value:
        """A value in half precision as float32: masks, sums and small numbers do not fit into the half types."""
        return self.put("cast", [x], "float32", dtype="float32") if x.dtype in HALF else x

    def narrow(self, y: Value, dtype: str) -> Value:
        """Back from :meth:`wide`."""
        return y if y.dtype == dtype else self.put("cast", [y], dtype, dtype=dtype)


def numpy_type(name: str) -> np.dtype:
    """The numpy type of a dtype's name, bfloat16 too."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def cores(graph: Graph) -> list[Node]:
    """Every fused attention, and every softmax over the last axis between two products, in graph order."""
    return [n for n in graph.nodes if n.op == "sdpa" or (n.op == "softmax" and _over_keys(n))]


def _over_keys(node: Node) -> bool:
    x, y = node.inputs[0], node.output
    if x is None or x.rank is None or x.rank < 3 or int(node.attrs["axis"]) % x.rank != x.rank - 1:
        return False
    return _from_product(x) and _into_product(y)


def _from_product(value: Value) -> bool:
    """Whether two activations were multiplied on the way here (the operand that is scores, not a mask)."""
    stack, seen = [value], 0
    while stack and seen < 24:
        made, seen = stack.pop().producer, seen + 1
        if made is None:
            continue
        if made.op in ("matmul", "einsum"):
            if sum(v is not None and not v.is_const for v in made.inputs) >= 2:
                return True
        elif made.op in FURTHER:
            stack += [v for v in made.inputs if v is not None and not v.is_const]
    return False


def _into_product(value: Value) -> bool:
    """Whether the weights multiply something on the way on (a guard against NaN may stand in between)."""
    stack, seen = [value], 0
    while stack and seen < 24:
        value, seen = stack.pop(), seen + 1
        for user, position in value.uses:
            if user.op in ("matmul", "einsum") and position == 0:
                return True
            if user.op in FURTHER:
                stack += user.outputs
    return False


def take_apart(graph: Graph, node: Node) -> Node | Refusal:
    """Write a fused attention as products round a softmax, which is returned. Exact.

    ``sdpa(q, k, v, mask) = softmax(q k^T scale + mask) v``; a mask of truth values keeps where it is true; grouped
    keys and values are repeated; a causal mask is stored for the lengths at hand.

    Refused: a causal mask, or grouped heads, over sizes known at run time only.
    """
    q, k, v, mask = (node.input(i) for i in range(4))
    assert q is not None and k is not None and v is not None
    if q.rank is None or q.rank < 3 or q.hint is None or k.hint is None or k.shape is None or q.shape is None:
        return Refusal("the shape of its operands is unknown", node.name)
    shape = k.shape
    causal, gqa = bool(node.attrs.get("causal")), bool(node.attrs.get("gqa")) and q.hint[-3] != k.hint[-3]
    if causal and not (isinstance(q.shape[-2], int) and isinstance(shape[-2], int)):
        return Refusal("its causal mask depends on lengths known at run time only", node.name)
    if gqa and sum(not isinstance(n, int) for n in shape) > 1:
        return Refusal("its grouped heads have several sizes known at run time only", node.name)
    before = max((x.producer for x in (q, k, v, mask) if x is not None and x.producer is not None),
                 key=graph.nodes.index, default=None)  # fmt: skip
    write = Writer(graph, node.name, before, node.scope)
    length, times = k.hint[-2], q.hint[-3] // k.hint[-3]
    if gqa:
        k, v = (_repeated(write, x, times, part) for x, part in ((k, "keys"), (v, "values")))
    rank, lengths = q.rank, (q.hint[-2], length)
    turned = write.put("transpose", [k], "columns", perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = write.put("matmul", [q, turned], "scores")
    scale = node.attrs.get("scale")
    factor = q.hint[-1] ** -0.5 if scale is None else float(scale)
    scores = write.put("mul", [scores, write.number(factor, "scale", q.dtype)], "scaled")
    if mask is not None and mask.dtype == "bool":
        scores = write.put("where", [mask, scores, write.number(-np.inf, "never", q.dtype)], "masked")
    elif mask is not None:
        scores = write.put("add", [scores, mask], "masked")
    if causal:
        hidden = np.where(np.tri(*lengths, dtype=bool), 0, -np.inf).astype(numpy_type(q.dtype))
        scores = write.put("add", [scores, graph.add_weight(f"{node.name}_causal", hidden)], "causal")
    weights = write.put("softmax", [scores], "softmax", axis=rank - 1)
    softmax = weights.producer
    assert softmax is not None
    result = write.put("matmul", [weights, v], "values_mixed")
    graph.replace_uses(node.output, result)
    graph.erase(node)
    return softmax


def _repeated(write: Writer, x: Value, times: int, part: str) -> Value:
    """[.., heads, length, dim] with every head ``times`` times in a row."""
    assert x.rank is not None and x.hint is not None and x.shape is not None
    rank = x.rank
    y = write.put("unsqueeze", [x], f"{part}_apart", axes=[rank - 2])
    copies: list[int | None] = [None] * (rank + 1)
    copies[rank - 2] = times
    y = write.put("expand", [y], f"{part}_copies", shape=copies)
    shape = [n if isinstance(n, int) else None for n in x.shape]
    shape[-3] = x.hint[-3] * times
    return write.put("reshape", [y], f"{part}_repeated", shape=shape)
