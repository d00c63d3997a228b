"""Equivalent transforms before quantization: scales, rotations and affine maps folded into the weights around a value."""

from __future__ import annotations
