"""Bits per layer: what each width costs and loses, and the exact choice within a budget."""

from .mixed import MixedPrecision

__all__ = ["MixedPrecision"]
