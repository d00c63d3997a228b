"""Quantization to integers: where a backend wants it (spec, placement), with which ranges, rounding and numerics."""

from .quantize import Quantize
from .spec import BackendSpec, OpPlacement, TensorFormat

__all__ = ["BackendSpec", "OpPlacement", "Quantize", "TensorFormat"]
