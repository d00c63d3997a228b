"""Weights as few bytes: an entropy coder, a container of coded tensors, the passes that fill one."""

from __future__ import annotations

from .container import Archive, read_archive

__all__ = ["Archive", "read_archive"]
