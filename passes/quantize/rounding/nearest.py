"""Round to nearest: each weight to the closest point of its grid, ties to even; needs no data."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..numerics import QuantParams
from .job import Rounded, RoundingJob


class Rounding(Protocol):
    """Chooses the integers of one weight without data; the scale and zero point are given."""

    def __call__(self, weight: np.ndarray, params: QuantParams) -> np.ndarray: ...


def nearest(weight: np.ndarray, params: QuantParams) -> np.ndarray:
    """Each element to its nearest integer, ties to even."""
    return params.quantize(weight)


def round_nearest(job: RoundingJob) -> dict[str, Rounded]:
    """Every site of the job to nearest."""
    found: dict[str, Rounded] = {}
    for site in job.progress(job.placement.weights, "rounding"):
        p = job.weight_params[site.node.name]
        found[site.node.name] = Rounded(nearest(site.weight.numpy().astype(np.float32, copy=False), p), p)
    return found
