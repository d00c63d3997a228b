"""Multiply-accumulates of each canonical op that has any, from the hint shapes: a table op -> function(node)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..ir import Node, Value


def _hint(value: Value | None) -> tuple[int, ...] | None:
    return None if value is None else value.hint


def conv(node: Node) -> int | None:
    """Each weight element meets every output position (input position, if transposed) once per sample.

    weight is [O, I/groups, k...] ([I, O/groups, k...] if transposed), so no division by groups is left to do.
    """
    x, w, y = _hint(node.inputs[0]), _hint(node.inputs[1]), _hint(node.output)
    if x is None or w is None or y is None:
        return None
    spatial = x[2:] if node.attrs.get("transposed") else y[2:]
    return x[0] * math.prod(w) * math.prod(spatial)


def linear(node: Node) -> int | None:
    """Rows of x times weight elements; x may have any number of leading axes."""
    x, w = _hint(node.inputs[0]), _hint(node.inputs[1])
    return None if x is None or w is None else math.prod(x[:-1]) * math.prod(w)


def matmul_nbits(node: Node) -> int | None:
    """Rows of x times elements of the unpacked weight."""
    x = _hint(node.inputs[0])
    return None if x is None else math.prod(x[:-1]) * int(node.attrs["k"]) * int(node.attrs["n"])


def matmul(node: Node) -> int | None:
    """Output elements times the contracted length (the last axis of a)."""
    a, y = _hint(node.inputs[0]), _hint(node.output)
    return None if not a or y is None else math.prod(y) * a[-1]


def einsum(node: Node) -> int | None:
    """Operands are contracted pairwise from the left; each step costs the product of all indices it sees.

    A single operand costs nothing (a transpose or a sum), and ``...`` counts as one index of its total size.
    """
    left, _, result = node.attrs["equation"].partition("->")
    terms = left.split(",")
    sizes: dict[str, int] = {}
    letters: list[str] = []
    for term, operand in zip(terms, node.inputs, strict=True):
        shape = _hint(operand)
        if shape is None:
            return None
        letters.append(_spell(term, shape, sizes))
    result = result.replace("...", "@")
    total, have = 0, letters[0]
    for i, term in enumerate(letters[1:], start=1):
        union = dict.fromkeys(have + term)
        total += math.prod(sizes[c] for c in union)
        later = set(result).union(*letters[i + 1 :])
        have = "".join(c for c in union if c in later)
    return total


def _spell(term: str, shape: Sequence[int], sizes: dict[str, int]) -> str:
    before, dots, after = term.partition("...")
    middle = len(shape) - len(before) - len(after)
    axes = [*zip(before, shape[: len(before)], strict=True)]
    if dots:
        axes.append(("@", math.prod(shape[len(before) : len(before) + middle])))
    axes += [*zip(after, shape[len(shape) - len(after) :], strict=True)]
    for letter, size in axes:
        sizes[letter] = max(sizes.get(letter, 1), size)
    return "".join(letter for letter, _ in axes)


def sdpa(node: Node) -> int | None:
    """q k^T and the product with v: (query rows) x (keys) x (head dim of q + head dim of v); a causal half counts."""
    q, k, v = (_hint(x) for x in node.inputs[:3])
    return None if q is None or k is None or v is None else math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def recurrent(node: Node) -> int | None:
    """Time steps x batch x elements of the input, hidden and projection matrices of all layers and directions."""
    x = _hint(node.inputs[0])
    weights = node.inputs[3:5] if node.attrs.get("layout") == "onnx" else node.inputs[3:]
    shapes = [_hint(w) for w in weights if w is not None]
    if x is None or any(s is None for s in shapes):
        return None
    return math.prod(x[:-1]) * sum(math.prod(s) for s in shapes if s is not None and len(s) >= 2)


MACS: dict[str, Callable[[Node], int | None]] = {
    "conv": conv,
    "linear": linear,
    "matmul": matmul,
    "matmul_nbits": matmul_nbits,
    "einsum": einsum,
    "sdpa": sdpa,
    "lstm": recurrent,
    "gru": recurrent,
    "rnn": recurrent,
}
"""MACs for the whole hint batch; None where a shape is unknown. Ops that are absent have none by convention:
normalizations, activations, pooling and elementwise arithmetic, and the addition of a bias."""


def macs(node: Node) -> int | None:
    """Multiply-accumulates of one node at the hint shapes (the batch included); None if a shape is unknown."""
    rule = MACS.get(node.op)
    return 0 if rule is None else rule(node)
