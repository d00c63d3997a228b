"""What a range estimator is: a statistic to stream a tensor into, and the interval that the integers are to cover."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from ...calibrate import Statistic
from ..spec.formats import TensorFormat


class RangeEstimator(ABC):
    """Chooses the interval of one tensor. ``statistic`` makes the summary to stream into; ``bounds`` reads it.

    Statistics are bounded in memory, take tensors of any shape, and depend neither on the order of the batches nor on
    how samples are cut into batches; so do the bounds.
    """

    @abstractmethod
    def statistic(self) -> Statistic:
        """A fresh, empty statistic; statistics of one estimator merge."""

    @abstractmethod
    def bounds(self, statistic: Any, form: TensorFormat) -> tuple[float, float]:
        """(low, high) of a filled statistic: what lies outside is clipped. ``form`` tells the grid between them.

        Zero lies inside: every format represents it exactly.
        """
