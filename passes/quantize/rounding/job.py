"""What a rounding method is given and what it returns: RoundingJob, Rounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....graph.ir import Graph
from ...base import Progress, no_progress
from ..numerics import QuantParams
from ..placement import Placement
from ..spec import BackendSpec


@dataclass
class RoundingJob:
    """Everything that the choice of a model's stored integers depends on.

    Attributes:
        graph: the float graph, without Q/DQ; it is only read.
        placement: which values and weights are quantized.
        params: name of a point -> its grid.
        weight_params: name of a weight site's node -> the grid of its weight.
        spec: the target's wishes.
        batches: calibration inputs as ``Graph.bind`` takes them; methods that look at weights alone need none.
        method: a name of ``METHODS``.
        options: options of the method, by name.
        seed: of every random choice; the same job gives the same bytes.
        progress: wraps long loops.
    """

    graph: Graph
    placement: Placement
    params: dict[str, QuantParams]
    weight_params: dict[str, QuantParams]
    spec: BackendSpec | None = None
    batches: list[Any] = field(default_factory=list)
    method: str = "nearest"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = no_progress


@dataclass
class Rounded:
    """The integers of one weight site.

    Attributes:
        integers: of the weight's shape, in the stored dtype of ``params``.
        params: the grid they belong to: the job's own, or one with learned scales.
        bias: the site's bias after it was corrected or learned, float32 [out channels]; None: as it was.
        points: learned grids of activations, by name of the point; all points that share a scale are named.
        details: numbers worth reporting (``mse_before``, ``mse_after``, ...).
    """

    integers: np.ndarray
    params: QuantParams
    bias: np.ndarray | None = None
    points: dict[str, QuantParams] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
