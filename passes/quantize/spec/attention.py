"""Whether a product makes query, key and value at once: what a spec's condition ``packed_attention`` asks."""

from __future__ import annotations

from ....graph.ir import Node, Value

CUTS = frozenset("slice split chunk unbind gather".split())
KEEPS = frozenset("reshape transpose squeeze unsqueeze identity flatten cast".split())
"""Ops that rearrange elements and nothing else."""
SCALES = frozenset(("add", "mul", "div"))
"""Followed where the other operand is a constant (a bias, the scale of the scores)."""
SCORES = frozenset("mul div add sub where masked_fill cast clip identity reshape".split())
FAR = 8
"""Ops between a product and the softmax of its scores."""


def packed_attention(node: Node) -> bool:
    """Whether the result is cut into parts of which one goes into attention scores, unchanged but for a constant."""
    stack: list[tuple[Value, bool]] = [(node.output, False)]
    seen: set[str] = set()
    while stack:
        value, cut = stack.pop()
        if value.name in seen:
            continue
        seen.add(value.name)
        for user, position in value.uses:
            if user.op == "sdpa" and cut and position < 2:
                return True
            if user.op == "matmul" and cut and _before_softmax(user):
                return True
            if user.op in CUTS and position == 0:
                stack += [(v, True) for v in user.outputs]
            elif user.op in KEEPS or (user.op in SCALES and _one_activation(user)):
                stack.append((user.output, cut))
    return False


def _one_activation(node: Node) -> bool:
    return sum(v is not None and not v.is_const for v in node.inputs) == 1


def _before_softmax(product: Node) -> bool:
    if _one_activation(product):
        return False
    stack = [(product.output, 0)]
    while stack:
        value, steps = stack.pop()
        for user, _ in value.uses:
            if user.op == "softmax":
                return True
            if user.op in SCORES and steps < FAR:
                stack.append((user.output, steps + 1))
    return False
