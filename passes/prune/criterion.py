"""What a criterion is, and the table of them: small functions of one group and the evidence, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ...graph.groups import AxisGroup
from ..base import Needs
from .evidence import Evidence

Parts: TypeAlias = list[np.ndarray]
"""One float64 score per index for each member that a criterion can judge; empty where it can judge none."""
PartsFunction: TypeAlias = Callable[[AxisGroup, Evidence], Parts]


@dataclass(frozen=True)
class Criterion:
    """A named criterion.

    Attributes:
        needs: nothing, calibration (model inputs) or gradients (pairs of inputs and targets; from model inputs alone
            the targets are drawn from the model's own output).
        relative: each member's scores are divided by their mean before they are reduced, since the members have
            different units; False where all are in one unit (loss).
    """

    name: str
    parts: PartsFunction
    needs: Needs
    relative: bool
    about: str


CRITERIA: dict[str, Criterion] = {}


def criterion(
    name: str, needs: Needs = Needs.NOTHING, relative: bool = True
) -> Callable[[PartsFunction], PartsFunction]:
    """Register a function (group, evidence) -> one array of scores per member under a name."""

    def register(function: PartsFunction) -> PartsFunction:
        CRITERIA[name] = Criterion(name, function, needs, relative, (function.__doc__ or "").strip())
        return function

    return register
