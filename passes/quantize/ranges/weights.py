"""Ranges of weights: per tensor, channel or block at once, all of it or the range of least squared error."""

from __future__ import annotations

import numpy as np

from ....graph.errors import ConfigError
from ..numerics import extremes, grid
from ..spec.formats import TensorFormat

WEIGHT_RANGES = ("minmax", "mse")
COARSE = np.linspace(1.0, 0.4, 13)
FINE = np.linspace(-0.04, 0.04, 9)
LOT = 1 << 18
"""Weight elements worked on at a time."""


def weight_bounds(
    weight: np.ndarray, form: TensorFormat, out_axis: int, in_axis: int | None = None, method: str = "minmax"
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Range per scale of a weight's format, and the axis that the scales lie along (see ``numerics.extremes``).

    Args:
        weight: float array.
        form: its format, of any granularity.
        out_axis, in_axis: its output- and input-channel axes.
        method: ``minmax``: nothing is clipped; ``mse``: least squared error over ranges shrunk down to 0.36 of that,
            each scale on its own. Memory: a few float32 copies of ``LOT`` elements (per tensor: of the weight).

    Raises:
        ConfigError: no such method.
    """
    if method not in WEIGHT_RANGES:
        raise ConfigError(
            "unknown range of weights", node="weight_ranges", expected=", ".join(WEIGHT_RANGES), found=method
        )
    low, high, along = extremes(weight, form, out_axis, in_axis)
    if method == "minmax" or weight.size == 0:
        return low, high, along
    rows, shape = _rows(weight, form, along)
    count = len(rows)
    lows, highs = (
        np.moveaxis(end, along or 0, -1).reshape(-1) if form.block else end.reshape(-1) for end in (low, high)
    )
    best = np.empty(count)
    lot = max(LOT // max(rows.shape[1], 1), 1)
    for i in range(0, count, lot):
        part = slice(i, i + lot)
        best[part] = _ratios(rows[part], lows[part], highs[part], form)
    ratio = np.moveaxis(best.reshape(shape), -1, along or 0) if form.block else best.reshape(low.shape)
    return low * ratio, high * ratio, along


def _rows(weight: np.ndarray, form: TensorFormat, along: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """The weight as [scales, elements per scale], a short last block filled up with zeros (which cost nothing)."""
    if along is None:
        return weight.reshape(1, -1), (1,)
    if not form.block:
        moved = np.moveaxis(weight, along, 0)
        return moved.reshape(len(moved), -1), (len(moved),)
    moved = np.moveaxis(weight, along, -1)
    missing = -moved.shape[-1] % form.block
    if missing:
        moved = np.concatenate([moved, np.zeros((*moved.shape[:-1], missing), moved.dtype)], axis=-1)
    return moved.reshape(-1, form.block), (*moved.shape[:-1], moved.shape[-1] // form.block)


def _ratios(rows: np.ndarray, low: np.ndarray, high: np.ndarray, form: TensorFormat) -> np.ndarray:
    """The best ratio of each row: first of a coarse grid, then of a fine one around it."""
    rows = rows.astype(np.float32, copy=False)
    best, least = np.ones(len(rows)), np.full(len(rows), np.inf)

    def weigh(ratio: np.ndarray) -> None:
        nonlocal best, least
        miss = grid(low * ratio, high * ratio, form, axis=0).apply(rows)
        miss -= rows
        error = np.einsum("ij,ij->i", miss, miss, dtype=np.float64)
        better = error < least
        best, least = np.where(better, ratio, best), np.where(better, error, least)

    for step in COARSE:
        weigh(np.full(len(rows), step))
    centre = best
    for step in FINE:
        weigh(np.minimum(centre + step, 1.0))
    return best
