"""Latency targets."""

from __future__ import annotations

from typing import Any

from ..targets import Target
from .select import Kept


def settle_latency(chooser: Any, target: Target) -> Kept:
    """Being written."""
    raise NotImplementedError
