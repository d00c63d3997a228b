"""The clean-up rules: what a user expects of a graph optimizer, and nothing that changes a number."""

from __future__ import annotations

from ..rewrite import Rule

CLEAN_RULES: list[Rule] = []

__all__ = ["CLEAN_RULES"]
