"""Affine maps ``x -> scale * x + shift`` along one axis: what they are, which nodes are one, how they compose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graph.ir import Node
from ..rewrite.rule import Refusal, Why


@dataclass(frozen=True, eq=False)
class Affine:
    """The map ``y[..., c, ...] = scale[c] * x[..., c, ...] + shift[c]``, c being the index on ``axis``.

    Attributes:
        axis: non-negative axis of the value it acts on.
        scale, shift: float64 [C]. All arithmetic is float64; the weight that absorbs the map is cast once.
    """

    axis: int
    scale: np.ndarray
    shift: np.ndarray

    @property
    def size(self) -> int:
        """C, the length of the axis."""
        return len(self.scale)

    @property
    def has_shift(self) -> bool:
        """Whether any channel is shifted; a map without shift fixes zero, and so commutes with zero padding."""
        return bool(np.any(self.shift))

    def on(self, axis: int) -> Affine:
        """The same map on another axis."""
        return Affine(axis, self.scale, self.shift)

    def repeat(self, inner: int, axis: int) -> Affine:
        """The map after each channel became ``inner`` consecutive entries of ``axis``."""
        return Affine(axis, np.repeat(self.scale, inner), np.repeat(self.shift, inner))


def affine_of(node: Node) -> Affine | Refusal:
    """The affine map that a batch norm in eval mode is, with ``scale = gamma / sqrt(var + eps)``."""
    if node.attrs.get("training"):
        return Refusal("it is in training mode: its statistics come from the batch", why=Why.TRAINING)
    if any(extra.uses or extra.is_output for extra in node.outputs[1:]):
        return Refusal("its batch statistics are read")
    gamma, beta, mean, var = (_vector(node, i) for i in range(1, 5))
    for name, operand, found in zip(
        ("scale", "bias", "mean", "variance"), range(1, 5), (gamma, beta, mean, var), strict=True
    ):
        if found is None and (operand > 2 or node.input(operand) is not None):
            return Refusal(f"its {name} is not a constant", why=Why.NOT_CONSTANT)
    assert mean is not None and var is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 1.0 / np.sqrt(var + float(node.attrs["eps"]))
        if gamma is not None:
            scale = gamma * scale
        shift = (0.0 if beta is None else beta) - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return Refusal("its statistics give a scale or shift that is not finite", why=Why.RANGE)
    return Affine(1, scale, shift)


def _vector(node: Node, position: int) -> np.ndarray | None:
    """A constant operand as float64 [C], or None where it is absent or computed at run time."""
    value = node.input(position)
    data = None if value is None else value.const()
    return None if data is None else np.asarray(data).astype(np.float64).reshape(-1)


__all__ = ["Affine", "Refusal", "affine_of"]
