"""The fold family: constant affine maps move into the linear operators beside them, and the function stays the same."""

from __future__ import annotations

from .affine import Affine, Refusal
from .fold_pass import Fold
from .sources import affine_of

__all__ = ["Affine", "Fold", "Refusal", "affine_of"]
