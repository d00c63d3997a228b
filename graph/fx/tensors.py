"""Torch tensors as numpy and back (bfloat16 and float8 through ml_dtypes), and the identity of their storage."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import ConstraintError

_BITS: dict[torch.dtype, tuple[torch.dtype, str]] = {
    torch.bfloat16: (torch.int16, "bfloat16"),
    torch.float8_e4m3fn: (torch.uint8, "float8_e4m3fn"),
    torch.float8_e5m2: (torch.uint8, "float8_e5m2"),
}


def storage_key(t: torch.Tensor) -> tuple[Any, ...]:
    """Identity of a tensor's data: same storage, offset and layout. Works on meta tensors too."""
    return (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())


class StorageKeys:
    """:func:`storage_key` of tensors that are not moved while this lives, asked once for each."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[torch.Tensor, tuple[Any, ...]]] = {}  # ids stay unique while the tensors live

    def __getitem__(self, t: torch.Tensor) -> tuple[Any, ...]:
        found = self._known.get(id(t))
        if found is None:
            found = self._known[id(t)] = t, storage_key(t)
        return found[1]


def same_data(a: torch.Tensor | None, b: torch.Tensor) -> bool:
    """Whether both have data, and it is the same bit for bit."""
    if a is None or a.is_meta or b.is_meta:
        return False
    return a.dtype == b.dtype and torch.equal(a, b)


def to_numpy(t: torch.Tensor, name: str = "") -> np.ndarray:
    """Tensor data as numpy (bfloat16, float8: ml_dtypes), without a copy on CPU. ConstraintError on meta tensors."""
    if t.is_meta:
        raise ConstraintError(
            "this weight has no data (meta device)", node=name, hint="materialize the model before passes that read it"
        )
    t = t.detach().cpu()
    if t.dtype in _BITS:
        import ml_dtypes

        bits, type_name = _BITS[t.dtype]
        return t.contiguous().view(bits).numpy().view(getattr(ml_dtypes, type_name))
    return t.resolve_conj().resolve_neg().numpy()


HELD = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8, "uint16": np.int32}
"""Types that torch computes little or nothing with, and the type that holds their values here."""


def from_numpy(data: Any) -> torch.Tensor:
    """Torch tensor of a numpy array (ml_dtypes included); tensors pass through. Always its own memory for arrays.

    Integers of 4 and 2 bits take a byte each, uint16 an int32.
    """
    if isinstance(data, torch.Tensor):
        return data
    data = np.asarray(data)
    if data.dtype.name in HELD:
        data = data.astype(HELD[data.dtype.name])
    for dtype, (bits, type_name) in _BITS.items():
        if data.dtype.name == type_name:
            view = {torch.int16: np.int16, torch.uint8: np.uint8}[bits]
            return torch.from_numpy(np.array(data, order="C").view(view)).view(dtype)
    return torch.from_numpy(np.array(data, order="C"))


def frozen(data: np.ndarray) -> np.ndarray:
    """A view that cannot be written: the memory may be the caller's own weight."""
    view = data.view()
    view.flags.writeable = False
    return view
