"""Disjoint parts of weights, each trained on its own and merged bit for bit ("Split & Merge")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...graph.errors import ConstraintError


def split_adapter(
    tensors: Mapping[str, np.ndarray], count: int, *, seed: int = 0
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Every element goes to one of ``count`` parts at random (stochastic sparse training, one mask per part).

    "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training".

    Returns:
        (parts, masks): per part {name: tensor with zeros elsewhere} and {name: bool mask}; the masks of a tensor sum
        to one everywhere.
    """
    if count < 1:
        raise ConstraintError("there must be a part", node="count", expected="at least 1", found=count)
    rng = np.random.Generator(np.random.Philox(key=seed))
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
    masks: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
    for name in sorted(tensors):
        data = np.asarray(tensors[name])
        owner = rng.integers(count, size=data.shape)
        for j in range(count):
            masks[j][name] = owner == j
            parts[j][name] = np.where(masks[j][name], data, np.zeros((), data.dtype))
    return parts, masks


def merge_disjoint(
    parts: Sequence[Mapping[str, np.ndarray]], masks: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The tensors whose elements each come from the part whose mask has them; no arithmetic, so bit for bit.

    Raises:
        ConstraintError: the masks overlap or leave elements out.
    """
    merged: dict[str, np.ndarray] = {}
    for name in parts[0]:
        owners = np.sum([np.asarray(m[name], dtype=np.int64) for m in masks], axis=0)
        if not (owners == 1).all():
            raise ConstraintError(
                "the masks are not disjoint, or not complete",
                node=name,
                expected="every element in exactly one mask",
                found=f"{int((owners > 1).sum())} in several, {int((owners == 0).sum())} in none",
            )
        whole = np.array(parts[0][name], copy=True)
        for part, mask in zip(parts[1:], masks[1:], strict=True):
            np.copyto(whole, part[name], where=np.asarray(mask[name], dtype=bool))
        merged[name] = whole
    return merged
