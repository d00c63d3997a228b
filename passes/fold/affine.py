"""Affine maps ``x -> scale * x + shift`` that lie over the axes of a value: what they are and how they compose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...graph.ir import Node, Value
from ...graph.ops.carry import align, compress
from ..rewrite.rule import Refusal, Why


@dataclass(frozen=True, eq=False)
class Affine:
    """The map ``y = scale * x + shift`` on a value of rank ``rank``.

    Attributes:
        scale, shift: float64, each of the value's rank, every axis of length 1 (the same for all indices) or of the
            value's length. A scalar map is one whose axes all have length 1. All arithmetic is float64; the weight
            that absorbs the map is cast once.
    """

    scale: np.ndarray
    shift: np.ndarray

    @staticmethod
    def of(scale: np.ndarray | float, shift: np.ndarray | float, rank: int) -> Affine:
        """A map over the last axes of a value of rank ``rank``, from arrays that broadcast to it."""
        parts = (compress(align(np.asarray(part, np.float64), rank)) for part in (scale, shift))
        return Affine(*parts)

    @staticmethod
    def along(axis: int, scale: np.ndarray, shift: np.ndarray, rank: int) -> Affine:
        """A map with one number per index of one axis."""
        shape = [-1 if a == axis else 1 for a in range(rank)]
        return Affine.of(scale.reshape(shape), shift.reshape(shape), rank)

    @property
    def rank(self) -> int:
        return self.scale.ndim

    @property
    def has_scale(self) -> bool:
        found: bool | None = self.__dict__.get("_has_scale")  # not cached_property: its lock costs more than the answer
        if found is None:
            found = self.__dict__["_has_scale"] = bool((self.scale != 1.0).any())
        return found

    @property
    def has_shift(self) -> bool:
        """Whether any element is shifted; a map without shift fixes zero, and so commutes with zero padding."""
        found: bool | None = self.__dict__.get("_has_shift")
        if found is None:
            found = self.__dict__["_has_shift"] = bool(self.shift.any())
        return found

    @property
    def identity(self) -> bool:
        return not self.has_scale and not self.has_shift

    @property
    def positive(self) -> bool:
        return bool((self.scale > 0).all())

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes on which it differs between indices."""
        return tuple(a for a in range(self.rank) if self.scale.shape[a] != 1 or self.shift.shape[a] != 1)

    def vector(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(scale, shift), each [size], if it differs along that axis at most."""
        if set(self.axes) - {axis}:
            return None
        scale, shift = (np.broadcast_to(part.reshape(-1), (size,)).copy() for part in (self.scale, self.shift))
        return scale, shift

    def only_scale(self) -> Affine:
        return Affine(self.scale, np.zeros((1,) * self.rank))

    def only_shift(self) -> Affine:
        return Affine(np.ones((1,) * self.rank), self.shift)

    def on(self, data: np.ndarray) -> np.ndarray:
        """What it does to an array."""
        return np.asarray(data * self.scale + self.shift)


def lay(part: np.ndarray, value: Value, constant: bool) -> np.ndarray | Refusal:
    """An array over the output of a broadcasting op, over one of its operands instead.

    Where the operand is broadcast, the array must not tell the copies apart; a constant may grow, an activation not.
    """
    if constant:
        return part
    if part.size == 1 and value.rank is not None:
        return np.asarray(part.reshape((1,) * value.rank))
    if value.shape is None:
        return Refusal(f"the shape of {value.name} is unknown", why=Why.SHAPE)
    lead = part.ndim - len(value.shape)
    if any(n != 1 for n in part.shape[:lead]):
        return Refusal(f"{value.name} is broadcast, the map tells the copies apart", why=Why.SHAPE)
    part = np.asarray(part.reshape(part.shape[lead:]))
    if any(n not in (1, d) for n, d in zip(part.shape, value.shape, strict=True)):
        return Refusal(f"{value.name} is broadcast, the map tells the copies apart", why=Why.SHAPE)
    return part


def constant(node: Node, position: int) -> np.ndarray | None:
    """A constant operand as float64, or None where it is absent or computed at run time."""
    value = node.input(position)
    data = None if value is None else value.const()
    return None if data is None else np.asarray(data).astype(np.float64)


__all__ = ["Affine", "Refusal", "Why", "constant", "lay"]
