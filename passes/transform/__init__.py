"""Equivalent transforms before quantization: scales, rotations and affine maps folded into the weights."""

from __future__ import annotations
