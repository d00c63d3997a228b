"""View: a stored weight (transposed, grouped, fused) as the canonical [out, in / groups, *kernel], and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...graph.errors import ConstraintError
from .kinds import Array, Geometry, xp


@dataclass(frozen=True)
class View:
    """How a layer stores its weight.

    Attributes:
        transposed: stored as [in, out / groups, *kernel] (transposed convolutions, GPT-2's Conv1D, embeddings).
        groups: of a convolution.
        rows: the outputs [start, stop) that the adapter concerns, of a fused projection (q, k, v in one weight).
    """

    transposed: bool = False
    groups: int = 1
    rows: tuple[int, int] | None = None

    def canonical(self, w: Array) -> Array:
        """[out, in / groups, *kernel] of the stored weight, its rows only where only they are concerned."""
        c = self._turn(w)
        if self.rows is None:
            return c
        start, stop = self.rows
        if not 0 <= start < stop <= c.shape[0]:
            raise ConstraintError(
                "the rows are outside the weight", expected=f"within 0..{c.shape[0]}", found=self.rows
            )
        return c[start:stop]

    def stored(self, c: Array, w: Array) -> Array:
        """The stored weight whose canonical form is ``c``; ``w``, the old one, gives the other rows."""
        if self.rows is not None:
            whole = self._turn(w)
            c = xp(c).concatenate([whole[: self.rows[0]], c, whole[self.rows[1] :]])
        if not self.transposed:
            return c.reshape(w.shape)
        g, kernel = self.groups, tuple(c.shape[2:])
        turned = c.reshape((g, c.shape[0] // g, c.shape[1], *kernel)).swapaxes(1, 2)
        return turned.reshape(w.shape)

    def geometry(self, shape: tuple[int, ...]) -> Geometry:
        """Sizes of the canonical form of a stored weight of this shape.

        Raises:
            ConstraintError: a scalar has no rows and columns.
        """
        if len(shape) == 0:
            raise ConstraintError("a scalar has no rows and columns", expected="[out] or [out, in, ...]", found=shape)
        out, inp = shape[0], shape[1] if len(shape) > 1 else 1
        if self.transposed:
            out, inp = shape[1] * self.groups, shape[0] // self.groups
        if self.rows is not None:
            out = self.rows[1] - self.rows[0]
        return Geometry(out, inp, tuple(shape[2:]), self.groups)

    def rows_of(self, shape: tuple[int, ...]) -> int:
        """Outputs of the whole stored weight: the length of the layer's bias."""
        return shape[1] * self.groups if self.transposed else shape[0]

    def _turn(self, w: Array) -> Array:
        if w.ndim == 1:  # the gain of a norm: one column
            return w.reshape((-1, 1))
        if not self.transposed:
            return w
        g, kernel = self.groups, tuple(w.shape[2:])
        turned = w.reshape((g, w.shape[0] // g, w.shape[1], *kernel)).swapaxes(1, 2)
        return turned.reshape((g * w.shape[1], w.shape[0] // g, *kernel))

    def bias_rows(self, b: Array) -> Array:
        """The bias entries that belong to the rows."""
        return b if self.rows is None else b[self.rows[0] : self.rows[1]]

    def stored_bias(self, c: Array, b: Array) -> Array:
        """The whole bias with the rows' entries replaced."""
        if self.rows is None:
            return c
        return xp(c).concatenate([b[: self.rows[0]], c, b[self.rows[1] :]])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rows = None if self.rows is None else list(self.rows)
        return {"transposed": self.transposed, "groups": self.groups, "rows": rows}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> View:
        """The inverse of :meth:`to_dict`."""
        rows = data.get("rows")
        return cls(
            bool(data.get("transposed")), int(data.get("groups", 1)), None if rows is None else (rows[0], rows[1])
        )
