"""Rounding: from float weights and their grids to stored integers, by weight alone or by what the model computes."""

from __future__ import annotations

from ....graph.errors import ConfigError
from .job import Rounded, RoundingJob
from .methods import METHODS, round_weights
from .nearest import Rounding, nearest

ROUNDINGS: dict[str, Rounding] = {"nearest": nearest}
"""Roundings of one array, without data: name -> function."""


def rounding(name: str) -> Rounding:
    """The rounding of one array of that name. Raises ConfigError naming those that exist."""
    if name not in ROUNDINGS:
        raise ConfigError("unknown rounding", node="rounding", expected=", ".join(ROUNDINGS), found=name)
    return ROUNDINGS[name]


__all__ = ["METHODS", "ROUNDINGS", "Rounded", "Rounding", "RoundingJob", "round_weights", "rounding"]
