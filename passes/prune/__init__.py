"""Structured pruning: importance, selection, and the pass that applies them to axis groups."""

from .prune_pass import Prune

__all__ = ["Prune"]
