"""Weight rounding: from a float weight and its parameters to integers. One function each."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...graph.errors import ConfigError
from .numerics import QuantParams


class Rounding(Protocol):
    """Chooses the integers of one weight; the scale and zero point are given."""

    def __call__(self, weight: np.ndarray, params: QuantParams) -> np.ndarray: ...


def nearest(weight: np.ndarray, params: QuantParams) -> np.ndarray:
    """Each element to its nearest integer, ties to even."""
    return params.quantize(weight)


ROUNDINGS: dict[str, Rounding] = {"nearest": nearest}
"""Name -> function. Add one here and it is an option of the pass."""


def rounding(name: str) -> Rounding:
    """The rounding of that name. Raises ConfigError naming those that exist."""
    if name not in ROUNDINGS:
        raise ConfigError("unknown rounding", node="rounding", expected=", ".join(ROUNDINGS), found=name)
    return ROUNDINGS[name]
