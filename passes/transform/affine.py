"""A Kronecker-factored linear map before a layer: two small products at run time, the inverse in the layer's weight."""

from __future__ import annotations

import math

import numpy as np

from ...graph.ir import Graph, Node, Value
from ..fold.edits import changeable
from ..fold.operands import inputs_first
from ..rewrite import Env, Refusal
from .boundary import Boundary, input_axis


def near_square(size: int) -> tuple[int, int]:
    """The factorisation (a, b) of ``size`` with a <= b whose sum is least."""
    a = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return a, size // a


def insert_kronecker(
    graph: Graph,
    env: Env,
    boundary: Boundary,
    left: np.ndarray,
    right: np.ndarray,
    left_inverse_t: np.ndarray,
    right_inverse_t: np.ndarray,
    label: str,
) -> list[str] | Refusal:
    """Let the readers of a boundary read ``x (left kron right)`` and undo it in their weights.

    Exact up to float rounding: ``x P (W P^-T)^T = x W^T``. Per distinct operand two matrix products and the reshapes
    around them are inserted; the readers of one value share them.

    Args:
        left, right: [a, a] and [b, b] with a * b channels; channel ``i * b + j`` is row i, column j.
        left_inverse_t, right_inverse_t: the transposed inverses of both.

    Returns:
        The names of the two products, which later passes of the run leave in float (``Context.float_nodes``), or why
        the weights cannot take the inverse.
    """
    for node, _ in boundary.readers:
        weight = node.inputs[1]
        if node.op not in ("linear", "matmul") or weight is None or weight.weight is None:
            return Refusal(f"{node.name} is no linear layer with a stored weight", node.name)
        if (blocked := changeable(node, 1)) is not None:
            return blocked
    made: list[str] = []
    stored: list[Value] = []
    for x in dict.fromkeys(x for _, x in boundary.readers):
        users = [node for node, other in boundary.readers if other is x]
        if input_axis(users[0]) != (x.rank or 0) - 1:
            return Refusal(f"the channels of {users[0].name} do not come last", users[0].name)
        if not stored:
            base = users[0].name
            stored = [
                graph.add_weight(f"{base}_{label}_{side}", m.astype(np.float32))
                for side, m in (("left", left.T), ("right", right))
            ]
        made += _products(graph, x, users, stored, len(left), len(right), label)
    for node, _ in boundary.readers:
        take_inverse(graph, node, left_inverse_t, right_inverse_t)
    env.ctx.float_nodes.update(made)
    return made


def take_inverse(graph: Graph, node: Node, left: np.ndarray, right: np.ndarray) -> None:
    """Multiply the input channels of a layer's weight by ``left kron right``."""
    weight = node.inputs[1].weight  # type: ignore[union-attr]
    assert weight is not None
    data = weight.numpy()
    first = node.op == "matmul" or inputs_first(node)
    rows = (data.T if first else data).astype(np.float64)
    cube = rows.reshape(len(rows), len(left), len(right))
    mixed = np.einsum("oij,ik,jl->okl", cube, left, right, optimize=True).reshape(rows.shape)
    graph.set_weight(weight, np.ascontiguousarray((mixed.T if first else mixed).astype(data.dtype)))


def _products(graph: Graph, x: Value, users: list[Node], stored: list[Value], a: int, b: int, label: str) -> list[str]:
    """``reshape([.., a, b])``, ``left^T @ .``, ``. @ right`` and back, read by ``users``; the products' names."""
    base, scope = users[0].name, users[0].scope
    assert x.shape is not None
    lead = [None if isinstance(n, str) else n for n in x.shape[:-1]]
    dynamic = sum(n is None for n in lead)
    at: Node | None = x.producer

    def put(op: str, inputs: list[Value], attrs: dict[str, object], name: str) -> Value:
        nonlocal at
        at = graph.insert(op, inputs, attrs, name=f"{base}_{label}_{name}", after=at, scope=scope)
        return at.output

    if dynamic > 1:  # leading sizes that stay where they are: written as copies of the operand's
        shape: list[int | None] = [*lead, a, b]
        back: list[int | None] = [*lead, a * b]
    else:
        shape, back = [*lead, a, b], [*lead, a * b]
    y = put("reshape", [x], {"shape": shape}, "split")
    y = put("matmul", [stored[0], y], {}, "left")
    first = y
    y = put("matmul", [y, stored[1]], {}, "right")
    second = y
    y = put("reshape", [y], {"shape": back}, "join")
    for user in users:
        graph.set_input(user, 0, y)
    return [v.producer.name for v in (first, second) if v.producer is not None]
