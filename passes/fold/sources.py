"""Which nodes are affine maps of one operand, and which map they are."""

from __future__ import annotations

import numpy as np

from ...graph.ir import Dim, Node, Value
from ...graph.ops.carry import Stuck, forward, moves
from .affine import Affine, Refusal, Why, constant
from .operands import FLOATS

ARITHMETIC = ("mul", "div", "add", "sub", "neg")
DEEP = 4
"""Operators that may stand between a constant and the arithmetic that reads it."""


def steady(value: Value | None) -> tuple[np.ndarray, list[Node]] | None:
    """A value that is a constant, or a constant whose indices are moved, and the nodes that move them.

    In a module ``gamma.reshape(1, -1, 1, 1)`` stays a node, since storing its result would cost the layer its class.
    """
    made: list[Value] = []
    while value is not None and not value.is_const and len(made) < DEEP:
        producer = value.producer
        if producer is None or not moves(producer.op) or producer.op in ("concat", "stack", "gather"):
            return None
        made.append(value)
        value = producer.inputs[0]
    data = None if value is None else value.const()
    if data is None:
        return None
    found = np.asarray(data).astype(np.float64)
    try:
        for step in reversed(made):
            assert step.producer is not None
            found = forward(step.producer, 0, step.index, found, 0.0)
    except Stuck:
        return None
    return found, [step.producer for step in made if step.producer is not None]


def data_operand(node: Node) -> int | None:
    """The position of the one operand that is computed at run time; None where there are none or two."""
    if node.op not in ARITHMETIC:
        return 0
    moving = [i for i, v in enumerate(node.inputs) if v is not None and not v.is_const]
    if len(moving) == 2:
        moving = [i for i in moving if steady(node.inputs[i]) is None]
    return moving[0] if len(moving) == 1 else None


def movers(node: Node) -> list[Node]:
    """The nodes that bring the constant of arithmetic into its shape."""
    position = data_operand(node)
    if position is None or node.op not in ARITHMETIC or len(node.inputs) != 2:
        return []
    found = steady(node.inputs[1 - position])
    return [] if found is None else found[1]


def affine_of(node: Node) -> Affine | Refusal | None:
    """The map that a batch norm in eval mode, or arithmetic with a constant, is; None where it is none by nature."""
    if node.op == "batch_norm":
        return affine_of_norm(node)
    if node.op not in ARITHMETIC or len(node.inputs) > 2:
        return None
    position = data_operand(node)
    x = None if position is None else node.inputs[position]
    if x is None or position is None or node.output.dtype not in FLOATS or x.dtype != node.output.dtype:
        return None
    rank = x.rank
    if rank is None or x.shape is None:
        return Refusal(f"the rank of {x.name} is unknown", why=Why.SHAPE)
    if node.op == "neg":
        return Affine.of(-1.0, 0.0, rank)
    other = node.inputs[1 - position]
    held = steady(other)
    assert other is not None and held is not None
    data = held[0]
    if other.shape is None or not _kept(x, other.shape):
        return Refusal("the constant broadcasts what it meets to another shape", why=Why.SHAPE)
    data = data * float(node.attrs.get("alpha", 1.0)) if position == 0 else data
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = _arithmetic(node, position, data, rank)
    if found is not None and not found.finite:
        return Refusal("the constant gives a scale or shift that is not finite", why=Why.RANGE)
    return found


def _arithmetic(node: Node, position: int, data: np.ndarray, rank: int) -> Affine | None:
    factor = float(node.attrs.get("alpha", 1.0)) if position == 1 else 1.0
    if node.op == "mul":
        return Affine.of(data, 0.0, rank)
    if node.op == "div":
        return Affine.of(1.0 / data, 0.0, rank) if position == 0 else None
    if node.op == "add":
        return Affine.of(factor, data, rank)
    return Affine.of(1.0, -data, rank) if position == 0 else Affine.of(-factor, data, rank)


def _kept(x: Value, shape: tuple[Dim, ...]) -> bool:
    """Whether a constant of this shape leaves the shape of ``x`` as it is, for every symbolic size."""
    assert x.shape is not None
    if len(shape) > len(x.shape) or 0 in shape:
        return False
    return all(n in (1, d) for n, d in zip(shape, x.shape[len(x.shape) - len(shape) :], strict=True))


def affine_of_norm(node: Node) -> Affine | Refusal:
    """``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean * scale``."""
    if node.attrs.get("training"):
        return Refusal("it is in training mode: its statistics come from the batch", why=Why.TRAINING)
    if any(extra.uses or extra.is_output for extra in node.outputs[1:]):
        return Refusal("its batch statistics are read", why=Why.TRAINING)
    gamma, beta, mean, var = (constant(node, i) for i in range(1, 5))
    for name, operand, found in zip(
        ("scale", "bias", "mean", "variance"), range(1, 5), (gamma, beta, mean, var), strict=True
    ):
        if found is None and (operand > 2 or node.input(operand) is not None):
            return Refusal(f"its {name} is not a constant", why=Why.NOT_CONSTANT)
    assert mean is not None and var is not None
    rank = None if node.inputs[0] is None else node.inputs[0].rank
    if rank is None:
        return Refusal("the rank of what it reads is unknown", why=Why.SHAPE)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = 1.0 / np.sqrt(var.reshape(-1) + float(node.attrs["eps"]))
        if gamma is not None:
            scale = gamma.reshape(-1) * scale
        shift = (0.0 if beta is None else beta.reshape(-1)) - mean.reshape(-1) * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return Refusal("its statistics give a scale or shift that is not finite", why=Why.RANGE)
    return Affine.along(1, scale, shift, rank)
