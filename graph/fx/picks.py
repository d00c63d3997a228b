"""Index lists as torch tensors: those of one action are few, and each is used on many weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import ConstraintError


def fixed(indices: Any) -> np.ndarray:
    """Indices as an int64 array that nobody else can change: read-only ones as they are, others copied."""
    array = np.asarray(indices, dtype=np.int64)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


class Picks:
    """Index tensors by the (read-only) array they were made from; :meth:`forget` lets go of the arrays."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, torch.device], tuple[np.ndarray, torch.Tensor, int, int]] = {}

    def gather(self, tensor: torch.Tensor, axis: int, wanted: np.ndarray, name: str) -> torch.Tensor:
        """The slices of ``tensor`` at the indices ``wanted`` (int64) along one axis, in their order.

        Raises ConstraintError, naming the weight ``name``, for an axis or an index that the tensor does not have.
        """
        if not -tensor.ndim <= axis < tensor.ndim:
            raise ConstraintError("no such axis", node=name, expected=f"< {tensor.ndim}", found=axis)
        _, index, low, high = self._of(wanted, tensor.device)
        if low < 0 or high >= tensor.shape[axis]:
            raise ConstraintError(
                "index out of range", node=name, value=f"axis {axis}", expected=f"< {tensor.shape[axis]}"
            )
        return tensor.index_select(axis, index)

    def _of(self, wanted: np.ndarray, device: torch.device) -> Any:
        key = id(wanted), device
        if key not in self._known:
            low, high = (int(wanted.min()), int(wanted.max())) if len(wanted) else (0, -1)
            self._known[key] = wanted, torch.tensor(wanted, device=device), low, high
        return self._known[key]

    def forget(self) -> None:
        """Let go of the arrays: the action is over."""
        self._known.clear()
