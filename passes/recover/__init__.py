"""Recovery without training: closed-form correction of what pruning left."""

from .recover_pass import Recover

__all__ = ["Recover"]
