"""Training that drives axis groups towards zero, so that cutting them afterwards costs little."""

from .absorb import Cut, absorb_removed
from .hooks import Regularizer, regularize

__all__ = ["Cut", "Regularizer", "absorb_removed", "regularize"]
