"""What a criterion may look at besides the weights: calibration batches, labelled batches and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...graph.groups import AxisGroups
from ..base import Progress, no_progress


@dataclass
class Evidence:
    """The data of one run, read by the criteria that need it.

    Attributes:
        groups: axis groups of the graph that is judged.
        batches: model inputs, each as ``Graph.bind`` takes them, or None.
        data: pairs (model inputs, target), or None.
        loss: name of a loss or a function (output, target) -> scalar.
    """

    groups: AxisGroups
    batches: Iterable[Any] | None = None
    data: Iterable[Any] | None = None
    loss: str | Callable[..., Any] = "cross_entropy"
    seed: int = 0
    progress: Progress = no_progress
