"""Stored integers behind a dequantize node: which weights they are, the numbers they stand for, and what is zero."""

from __future__ import annotations

import numpy as np

from .ir import Node, Weight


def dequantizer(weight: Weight) -> Node | None:
    """The node that turns a stored integer tensor into numbers, if all that reads it are such nodes."""
    if weight.dtype.startswith(("float", "bfloat")) or weight.value is None or not weight.value.uses:
        return None
    nodes = [n for n, i in weight.value.uses if n.op == "dequantize" and i == 0]
    return nodes[0] if len(nodes) == len(weight.value.uses) else None


def is_numeric(weight: Weight) -> bool:
    """Whether a weight holds numbers that the network computes with: floating ones, or integers that stand for them."""
    return weight.dtype.startswith(("float", "bfloat")) or dequantizer(weight) is not None


def zero_points(weight: Weight) -> np.ndarray:
    """What stands for zero in a stored integer tensor, shaped to broadcast against it."""
    node = dequantizer(weight)
    assert node is not None
    v = node.input(2)
    point = None if v is None else v.const()
    return np.zeros((), dtype=np.int64) if point is None else _spread(weight, node, np.asarray(point).astype(np.int64))


def real(weight: Weight) -> np.ndarray:
    """The numbers a weight stands for: its data, or (integers) (data - zero point) * scale in float32.

    Integers whose scale is computed at run time are taken without it.
    """
    node = dequantizer(weight)
    if node is None:
        return weight.numpy()
    v = node.input(1)
    scale = None if v is None else v.const()
    data = (weight.numpy().astype(np.int64) - zero_points(weight)).astype(np.float32)
    return data if scale is None else data * _spread(weight, node, np.asarray(scale, dtype=np.float32))


def _spread(weight: Weight, node: Node, parameter: np.ndarray) -> np.ndarray:
    axis = node.attrs.get("axis")
    if parameter.size == 1:
        return parameter.reshape(())
    if parameter.ndim == 1:
        axis = 0 if axis is None else axis
        return parameter.reshape([-1 if i == axis % len(weight.shape) else 1 for i in range(len(weight.shape))])
    for i, (have, want) in enumerate(zip(parameter.shape, weight.shape, strict=True)):  # blocks
        if have != want:
            parameter = np.repeat(parameter, -(-want // have), axis=i)[(slice(None),) * i + (slice(want),)]
    return parameter
